#!/usr/bin/env python3
"""Compiles every source file of the library, the tools and the examples with clang and without a precompiled header, and throws the
result away: what g++ or the precompiled header lets pass is found.

clang.py SOURCE_DIR BUILD_DIR [CMAKE_OPTION]...; configures BUILD_DIR for its compilation database, with each file by itself. Exits with 1 if a file does
not compile, with 77 where there is no clang 14 or later.
"""
import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDERS = ("src", "examples")


def find_clang():
    for name in ["clang++", *(f"clang++-{version}" for version in range(20, 13, -1))]:
        path = shutil.which(name)
        if not path:
            continue
        version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=True).stdout
        if int(version.split(".")[0]) >= 14:
            return path
    return None


def clang_command(entry, clang):
    """The command of the build for clang, without its launcher, precompiled header and output."""
    words = shlex.split(entry["command"])
    compiler = next(i for i, word in enumerate(words) if re.search(r"(^|/)(c\+\+|g\+\+|clang\+\+)[^/]*$", word))
    result = [clang, "-fsyntax-only", "-Wno-unused-command-line-argument"]
    skip = False
    for word in words[compiler + 1 :]:
        if skip:
            skip = False
        elif word in ("-include", "-o", "-MF", "-MT"):
            skip = True
        elif word not in ("-c", "-MD", "-fpch-preprocess", "-Winvalid-pch"):
            result.append(word)
    return result


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    source, build = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    clang = find_clang()
    if clang is None:
        print("clang: Skipped\nthere is no clang++ of version 14 or later; on Debian and Ubuntu: apt-get install clang")
        return 77
    configure = ["cmake", "-S", source, "-B", build, "-DDUALPIPE_UNITY=OFF", "-DDUALPIPE_BUILD_TESTS=OFF", *sys.argv[3:]]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    commands = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        file = Path(entry["directory"], entry["file"]).resolve()
        if file.is_relative_to(source) and file.relative_to(source).parts[0] in FOLDERS:
            commands.setdefault(file, clang_command(entry, clang))
    if len(commands) < 20:
        print(f"only {len(commands)} source files in {build}/compile_commands.json; is this the build folder of {source}?")
        return 1

    def compile_one(file):
        done = subprocess.run(commands[file], cwd=build, capture_output=True, text=True)
        return file, done.returncode, done.stderr

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, status, errors in pool.map(compile_one, sorted(commands)):
            if status != 0:
                failed += 1
                print(f"{file.relative_to(source)} does not compile:\n{errors}")
    print(f"clang: {len(commands)} files, {failed} do not compile")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
