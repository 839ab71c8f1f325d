"""Checks an installed nflows-kconv from outside the checkout.

The argument is the backend that CPU tensors must run on.
"""

import sys
from importlib.metadata import files
from importlib.util import find_spec

import torch

import nflows_kconv
from nflows_kconv import InvertibleConv2d

expected = sys.argv[1]
selected = [name for name, backend in nflows_kconv.available_backends().items() if backend.selected]
assert selected == [expected], selected

layer = InvertibleConv2d(8)
x = torch.randn(2, 8, 6, 5)
y, log_abs_det = layer(x)
restored, inverse_log_abs_det = layer.inverse(y)
torch.testing.assert_close(restored, x)
torch.testing.assert_close(inverse_log_abs_det, -log_abs_det)

assert find_spec("nflows") is None
try:
    import nflows_kconv.nflows
except ImportError as error:
    assert "nflows-kconv[nflows]" in str(error), error
else:
    raise AssertionError("the nflows adapter imports without nflows")

installed = [str(path) for path in files("nflows-kconv") or []]
for source in ("cpu_caller.cpp", "cuda/arguments.cuh", "cuda/solve_rows.cu"):
    assert f"nflows_kconv/csrc/{source}" in installed, installed
assert not [path for path in installed if path.startswith(("tests", "build_backend", "examples"))], installed
assert ("nflows_kconv/_native.abi3.so" in installed) == (expected == "cpu"), installed
print(f"the installed package works on the {expected} backend")
