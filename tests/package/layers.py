#!/usr/bin/env python3
"""Checks that includes point in one direction only (docs and CONTRIBUTING name the layers), what the public headers may show, and that no two
files define types of one name.

layers.py SOURCE_DIR; prints each finding as file:line: reason, and exits with 1 if there is one.
"""
import re
import sys
from pathlib import Path

# What the files of a layer may include of ours. A layer is the folder below include/dualpipe, include/dualpipe/detail or src, or the file of its
# name there, but for the files in PARTS.
ALLOWED = {
    "base": {"base"},
    "schedule": {"base", "schedule"},
    "planner": {"base", "schedule", "planner"},
    "launch": {"base", "launch"},
    "pending": {"base", "pending"},
    "contact": {"base", "launch", "contact"},
    "comm": {"base", "launch", "pending", "comm"},
    "socket": {"base", "launch", "pending", "contact", "comm", "socket"},
    "nccl": {"base", "launch", "pending", "contact", "comm", "socket", "nccl"},
    "stage": {"base", "pending", "stage"},
    "train": {"base", "pending", "comm", "train"},
    "pipeline": {"base", "schedule", "pending", "comm", "stage", "train", "config", "pipeline"},
    "checkpoint": {"base", "schedule", "planner", "pending", "comm", "stage", "train", "config", "pipeline", "checkpoint"},
    "testing": {"base", "pending", "comm", "testing"},
    "config": {"base", "schedule", "planner", "config"},
    "tools/plan": {"base", "schedule", "planner", "tools/plan"},
    "tools/run": {"base", "launch", "contact", "tools/run"},
}
PARTS = {
    "error": "base",
    "version": "base",
    "detail/config": "base",
    "detail/files": "base",
    "detail/host": "base",
    "detail/comm/stopwatch": "base",
    "detail/error_text": "pending",
    "detail/widened": "pending",
    "config": "config",
    "train/checkpoint": "checkpoint",
    "train/metrics": "checkpoint",
    "train/safetensors": "checkpoint",
    "train/sharded_optimizer": "pipeline",
    "detail/train/sharded_optimizer": "pipeline",
    "comm/pending": "pending",
    "tools/plan": "tools/plan",
    "tools/run": "tools/run",
    "tools/standard_streams": "base",
}
TOP = {"dualpipe"}  # may include everything
WITHOUT_TORCH = {"base", "schedule", "planner", "launch", "contact", "config", "tools/plan", "tools/run"}
# What dualpipe/dualpipe.hpp includes: what a trainer needs. Pairs by hand and single runs of stages have to be asked for.
UMBRELLA = {"comm", "config", "error", "launch", "pipeline", "stage", "train", "version"}
APART = {"dualpipe.hpp", "comm/nccl.hpp", "comm/device_trace.hpp", "pipeline/pair.hpp", "stage/stage_run.hpp"}
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
CUDA = re.compile(r"^(c10/cuda/|ATen/cuda/|cuda|nccl|nvtx|torch/csrc/cuda/)")
STANDARD = re.compile(r"^([a-z_0-9]+|(pthread|fcntl|unistd)\.h)$")  # and POSIX
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')


def layer_of(path: str) -> str:
    """path: below include/dualpipe or src."""
    stem = re.sub(r"\.[chi]pp$", "", path)
    for part, layer in PARTS.items():
        if stem == part or stem.startswith(part + "/"):
            return layer
    return stem.removeprefix("detail/").split("/")[0]


def findings(root: Path):
    public = root / "include" / "dualpipe"
    files = [(f, f.relative_to(public)) for f in sorted(public.rglob("*.[hi]pp"))]
    files += [(f, f.relative_to(root / "src")) for f in sorted((root / "src").rglob("*.[ch]pp"))]
    if len(files) < 20:
        yield f"{root}: only {len(files)} files found, is this the source folder?"
    umbrella = set()
    for file, path in files:
        layer = layer_of(path.as_posix())
        is_public = file.is_relative_to(public)
        if layer not in ALLOWED and layer not in TOP:
            yield f"{file}:1: belongs to no layer; add it to {Path(__file__).name}"
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            included = match[1]
            where = f"{file}:{number}"
            ours = included.removeprefix("dualpipe/")
            if included.startswith("dualpipe/") or (root / "src" / included).is_file():
                if is_public and not included.startswith("dualpipe/"):
                    yield f"{where}: a public header includes {included}, which is not installed"
                if path.as_posix() == "dualpipe.hpp":
                    umbrella.add(ours)
                target = layer_of(ours)
                if layer not in TOP and target not in ALLOWED[layer]:
                    yield f"{where}: {layer} may include {', '.join(sorted(ALLOWED[layer]))}, not {included} ({target})"
            elif TORCH.match(included) and layer in WITHOUT_TORCH:
                yield f"{where}: {layer} does without LibTorch, but includes {included}"
            elif is_public and CUDA.match(included):
                yield f"{where}: CUDA and NCCL headers belong into src/, not {included}"
            elif is_public and not TORCH.match(included) and not STANDARD.match(included):
                yield f"{where}: public headers show the standard library and LibTorch only, not {included}"
    umbrella_file = public / "dualpipe.hpp"
    for file, path in files:
        if not file.is_relative_to(public):
            continue
        name = path.as_posix()
        wanted = name.endswith(".hpp") and name.removesuffix(".hpp").split("/")[0] in UMBRELLA and name not in APART
        if wanted and name not in umbrella:
            yield f"{umbrella_file}:1: does not include dualpipe/{name}"
        if not wanted and name in umbrella:
            yield f"{umbrella_file}:1: includes dualpipe/{name}, which a trainer does not need"
        if "#pragma once" not in file.read_text():
            yield f"{file}:1: has no #pragma once"
        if name.endswith(".ipp") and re.search(r"^namespace \{", file.read_text(), re.MULTILINE):
            yield f"{file}:1: has an anonymous namespace, which would be another one in each file that includes it"


TOKEN = re.compile(r"namespace\s+([\w:]*)\s*\{|(?:class|struct|enum class)\s+([\w:]+)[^;{}()]*\{|[{}]")
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'', re.DOTALL)


def named_types(text: str):
    """Names of the types that are defined outside of functions and anonymous namespaces, with their namespaces and classes."""
    scopes = []  # a name, "" for an anonymous namespace, None for any other brace
    for match in TOKEN.finditer(COMMENT_OR_STRING.sub("", text)):
        if match[0] == "}":
            if scopes:
                scopes.pop()
        elif match[0] == "{":
            scopes.append(None)
        elif match[2]:
            if None not in scopes and "" not in scopes:
                yield "::".join([*scopes, match[2]])
            scopes.append(match[2])
        else:
            scopes.append(match[1])


def doubles(root: Path):
    """One name for two types is undefined behaviour as soon as both are in one program, and no linker says so."""
    first = {}
    for folder in ("include", "src", "examples", "benchmarks"):
        for file in sorted((root / folder).rglob("*.[chi]pp")):
            for name in named_types(file.read_text()):
                # Programs of their own may both have a type of one name.
                key = name if folder in ("include", "src") and "tools" not in file.parts else (file.parent, name)
                other = first.setdefault(key, file)
                if other != file:
                    yield f"{file}:1: defines {name}, as {other} does"


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    found = [*findings(Path(sys.argv[1])), *doubles(Path(sys.argv[1]))]
    print("\n".join(found) if found else "layers: no finding")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
