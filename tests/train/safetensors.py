#!/usr/bin/env python3
"""The other side of safetensors_test.cpp.

safetensors.py write FILE   writes what the test reads
safetensors.py check FILE   checks what the test wrote; with 77 it says that Python's package is missing
"""
import sys

del sys.path[0]  # this folder has a file of the package's name
try:
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)


def tensors():
    """Value k of a tensor of n values is k - n // 2, of bool k % 2."""
    made = {}
    for name, dtype, shape in [
        ("f64", np.float64, (2, 3)),
        ("f32", np.float32, (5,)),
        ("f16", np.float16, (1, 3, 1)),
        ("i64", np.int64, ()),
        ("i32", np.int32, (4,)),
        ("i16", np.int16, (3,)),
        ("i8", np.int8, (7,)),
        ("u8", np.uint8, (3,)),
        ("empty", np.float32, (0, 4)),
        ("a name with spaces, ü and \"quotes\"", np.float32, (2,)),
    ]:
        count = int(np.prod(shape))
        first = 0 if dtype is np.uint8 else -(count // 2)
        made[name] = np.arange(first, first + count).astype(dtype).reshape(shape)
    made["bool"] = np.array([False, True, False])
    return made


def check(path):
    expected = tensors()
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"made": "by the test"}, file.metadata()
        assert set(file.keys()) == set(expected) | {"bf16"}, file.keys()
        for name, value in expected.items():
            found = file.get_tensor(name)
            assert found.dtype == value.dtype and found.shape == value.shape, (name, found.dtype, found.shape)
            assert np.array_equal(found, value), (name, found)
        part = file.get_slice("bf16")
        assert part.get_dtype() == "BF16" and part.get_shape() == [2], (part.get_dtype(), part.get_shape())


if sys.argv[1] == "write":
    save_file(tensors(), sys.argv[2], metadata={"made": "by Python"})
else:
    check(sys.argv[2])
