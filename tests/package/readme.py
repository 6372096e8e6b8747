"""What README.md shows is what one gets: its picture is the tool's, its program is the example's.

Usage: readme.py PROJECT_FOLDER DUALPIPE_PLAN
"""

import pathlib
import subprocess
import sys

root, plan = pathlib.Path(sys.argv[1]), sys.argv[2]
readme = (root / "README.md").read_text()

picture = subprocess.run(
    [plan, "show", "--schedule", "dualpipe", "--ranks", "8", "--microbatches", "20"],
    check=True, capture_output=True, text=True).stdout
program = (root / "examples/quickstart/main.cpp").read_text()
missing = [name for name, text in (("the picture of dualpipe-plan show", picture),
                                   ("examples/quickstart/main.cpp", program)) if f"\n{text.rstrip()}\n```" not in readme]
if missing:
    sys.exit("README.md does not hold, word for word, " + " and ".join(missing))
print("README.md holds the picture and the program")
