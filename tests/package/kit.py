"""The kit for GPUs: a bundle of this build works where only LibTorch is, and gpu-check reports what goes wrong.

Usage: kit.py PROJECT_FOLDER BUILD_FOLDER LIBTORCH_FOLDER
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import unittest

project, build, libtorch = (pathlib.Path(argument).resolve() for argument in sys.argv[1:4])


def check(script, arguments=(), environment=None):
    """Runs gpu-check in its folder with a bare environment. Returns its exit code and its parts by name."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "results.json"
        # -I and -S: no torch of this Python.
        done = subprocess.run([sys.executable, "-I", "-S", script, "--output", output, *arguments], env={"PATH": "/nowhere", **(environment or {})},
                              cwd="/", capture_output=True, text=True, timeout=300)
        if not output.exists():
            raise AssertionError(done.stderr)
        parts = json.loads(output.read_text())["parts"]
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == parts, "stdout and the file differ"
    return done.returncode, {part["name"]: part for part in parts}


class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        archive = pathlib.Path(cls.folder.name) / "kit.tar.gz"
        # bash and the tools that it calls, but nothing of this build's environment.
        subprocess.run([project / "scripts/bundle", "--build", build, "--output", archive], check=True, stdout=subprocess.DEVNULL)
        cls.bytes = archive.stat().st_size
        with tarfile.open(archive) as tar:
            tar.extractall(cls.folder.name)
        cls.kit = next(pathlib.Path(cls.folder.name).glob("*/gpu-check")).parent

    def test_is_small_and_names_no_folder_of_this_machine(self):
        self.assertLess(self.bytes, 40 << 20)
        for program in (self.kit / "bin").iterdir():
            paths = [line for line in subprocess.run(["readelf", "-d", program], capture_output=True, text=True, check=True).stdout.splitlines()
                     if "path:" in line]
            for path in paths:
                self.assertTrue(all(folder.startswith("$ORIGIN/") for folder in path[path.index("[") + 1:path.index("]")].split(":")), path)
            self.assertEqual(bool(paths), program.name not in ("dualpipe-run", "dualpipe-plan"), program)

    def test_runs_elsewhere_with_a_bare_environment(self):
        code, parts = check(self.kit / "gpu-check", environment={"LIBTORCH": str(libtorch), "CUDA_VISIBLE_DEVICES": ""})
        self.assertEqual({part["status"] for part in parts.values()} - {"ok", "skipped"}, set(), parts)
        self.assertEqual(code, 0)
        self.assertEqual(parts["environment"]["status"], "ok")
        self.assertEqual(parts["without_device"]["status"], "ok")
        self.assertGreater(parts["without_device"]["values"]["passed"], 0)
        others = [part for name, part in parts.items() if name not in ("environment", "without_device")]
        self.assertEqual(len(others), 9)
        for part in others:
            self.assertEqual(part["status"], "skipped")
            self.assertIn("no CUDA device", part["reason"])
        # The programs work by themselves from here on.
        self.assertIn("makespan", subprocess.run([self.kit / "bin/dualpipe-plan", "show", "--ranks", "4", "--microbatches", "8"], env={},
                                                 capture_output=True, text=True, check=True).stdout)
        self.assertIn("--dtype", subprocess.run([self.kit / "bin/dualpipe-lm-cuda", "--help"], env={}, capture_output=True, text=True, check=True).stdout)

    def test_a_missing_libtorch_is_named_with_the_places(self):
        for environment, expected in (({}, "torch of this Python"), ({"LIBTORCH": "/nowhere"}, "/nowhere has no lib/libtorch_cpu.so")):
            code, parts = check(self.kit / "gpu-check", environment=environment)
            self.assertEqual(code, 1)
            self.assertEqual(parts["environment"]["status"], "failed")
            self.assertIn("no LibTorch ", parts["environment"]["reason"])
            self.assertIn(expected, parts["environment"]["reason"])
            for part in list(parts.values())[1:]:
                self.assertEqual(part["status"], "skipped")
                self.assertIn("no LibTorch ", part["reason"])


class Failures(unittest.TestCase):
    """Stand-ins for the programs, on a machine that says that it has a device."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.kit = pathlib.Path(self.folder.name) / "kit"
        torch = pathlib.Path(self.folder.name) / "torch"
        for folder in (torch / "lib", self.kit / "bin"):
            folder.mkdir(parents=True)
        for file in ("libtorch_cpu.so", "libtorch_cuda.so"):
            (torch / "lib" / file).touch()
        (torch / "version.py").write_text("__version__ = '2.0.1+cu130'\n")
        self.write("built-with.json", '{"libtorch": "2.0.1"}')
        self.write("gpu-check", (project / "scripts/gpu-check").read_text())
        self.write("bin/dualpipe-bench-gpu", '#!/bin/sh\n'
                   '[ "$1" = versions ] && { echo \'{"devices": 1}\'; exit; }\n'
                   '[ "$1" = hidden ] && { echo \'{"skipped": "NCCL is too old"}\'; exit 77; }\n'
                   '[ "$1" = host ] && { echo no json; exit; }\n'
                   'echo before the wait; /bin/sleep 60 & echo $! > "$0.child"; wait\n')
        for program in ("dualpipe-run", "dualpipe-lm"):
            self.write(f"bin/{program}", "#!/bin/sh\n")
        self.write("bin/gpu_test", '#!/bin/sh\n'
                   'case $1 in *NcclThreads*) echo \'<testsuites><testsuite><testcase status="run" result="skipped"><skipped message="a.cpp:1&#x0A;NCCL is too '
                   'old"/></testcase></testsuite></testsuites>\' > "${2#--gtest_output=xml:}"; exit;; esac\n'
                   'echo about to crash >&2; kill -SEGV $$\n')
        self.environment = {"LIBTORCH": str(torch)}

    def write(self, name, text):
        (self.kit / name).write_text(text)
        (self.kit / name).chmod(0o755)

    def test_each_part_reports_its_own(self):
        code, parts = check(self.kit / "gpu-check", [f"--part={name}" for name in ("one_device", "language_model", "nccl_threads", "hidden_share",
                                                                                   "host_time", "waiting_receive=3")], self.environment)
        self.assertEqual(code, 1)
        self.assertEqual([part["status"] for part in parts.values()], ["ok", "failed", "failed", "skipped", "skipped", "failed", "failed"], parts)
        self.assertEqual(parts["one_device"]["reason"], "gpu_test was ended by SIGSEGV")
        self.assertIn("about to crash", parts["one_device"]["output"])
        self.assertIn("losses of 0 steps do not fall", parts["language_model"]["reason"])
        self.assertEqual(parts["nccl_threads"]["reason"], "NCCL is too old")
        self.assertEqual(parts["hidden_share"]["reason"], "NCCL is too old")
        self.assertIn("JSONDecodeError", parts["host_time"]["reason"])
        self.assertEqual(parts["waiting_receive"]["reason"], "stopped after 3 s")
        self.assertIn("before the wait", parts["waiting_receive"]["output"])
        child = int((self.kit / "bin/dualpipe-bench-gpu.child").read_text())
        state = pathlib.Path(f"/proc/{child}/stat")
        self.assertTrue(not state.exists() or state.read_text().split()[2] == "Z", "what the part had started runs on")

    def test_what_has_no_time_left_is_skipped(self):
        code, parts = check(self.kit / "gpu-check", ["--seconds=0"], self.environment)
        self.assertEqual(code, 0)
        for part in parts.values():
            self.assertEqual((part["status"], part["reason"]), ("skipped", "no time is left of 0 s"))

    def test_another_version_of_libtorch_is_no_match(self):
        self.write("built-with.json", '{"libtorch": "2.0.2"}')
        code, parts = check(self.kit / "gpu-check", environment=self.environment)
        self.assertEqual(code, 1)
        self.assertIn("is LibTorch 2.0.1", parts["environment"]["reason"])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
