#!/usr/bin/env python3
"""Checks that includes point in one direction only (docs and CONTRIBUTING name the layers), and what the public headers may show.

layers.py SOURCE_DIR; prints each finding as file:line: reason, and exits with 1 if there is one.
"""
import re
import sys
from pathlib import Path

# What the files of a layer may include of ours. A layer is the folder below include/dualpipe or src, but for the files in PARTS.
ALLOWED = {
    "base": {"base"},
    "schedule": {"base", "schedule"},
    "launch": {"base", "launch"},
    "pending": {"base", "pending"},
    "comm": {"base", "launch", "pending", "comm"},
    "stage": {"base", "pending", "stage"},
    "runtime": {"base", "schedule", "pending", "comm", "stage", "runtime"},
    "train": {"base", "schedule", "comm", "stage", "runtime", "train"},
    "testing": {"base", "pending", "comm", "testing"},
    "config": {"base", "schedule", "config"},
    "tools/plan": {"base", "schedule", "tools/plan"},
    "tools/run": {"base", "launch", "tools/run"},
}
PARTS = {
    "error": "base",
    "version": "base",
    "config": "config",
    "comm/pending": "pending",
    "runtime/collective": "stage",
    "runtime/stage": "stage",
    "runtime/stage_pass": "stage",
    "runtime/as_stage": "stage",
    "runtime/split_backward": "stage",
    "train/partition": "stage",
    "tools/plan": "tools/plan",
    "tools/run": "tools/run",
}
TOP = {"dualpipe", "dual_pipe", "pch"}  # may include everything
WITHOUT_TORCH = {"base", "schedule", "launch", "config", "tools/plan", "tools/run"}
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
CUDA = re.compile(r"^(c10/cuda/|ATen/cuda/|cuda|nccl|nvtx|torch/csrc/cuda/)")
STANDARD = re.compile(r"^[a-z_0-9]+$")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')


def layer_of(path: str) -> str:
    """path: below include/dualpipe or src."""
    stem = re.sub(r"\.[ch]pp$", "", path)
    for part, layer in PARTS.items():
        if stem == part or stem.startswith(part + "/"):
            return layer
    return stem.split("/")[0]


def findings(root: Path):
    public = root / "include" / "dualpipe"
    files = [(f, f.relative_to(public)) for f in sorted(public.rglob("*.hpp"))]
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
    for file in sorted(public.rglob("*.hpp")):
        name = file.relative_to(public).as_posix()
        if file.name not in ("dualpipe.hpp", "nccl.hpp") and name not in umbrella:
            yield f"{public / 'dualpipe.hpp'}:1: does not include dualpipe/{name}"
        if "#pragma once" not in file.read_text():
            yield f"{file}:1: has no #pragma once"


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    found = list(findings(Path(sys.argv[1])))
    print("\n".join(found) if found else "layers: no finding")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
