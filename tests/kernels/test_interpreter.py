"""What tests/interpreter.py spares Triton's interpreter, and why nothing is lost by it."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import builtins_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@triton.jit
def twice(x):
    return x + x


@triton.jit
def doubled(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, twice(tl.load(X + at)))


def test_an_overflow_would_be_looked_for_and_not_reported() -> None:
    assert interpreter.InterpreterOptions().sanitize_overflow
    assert not interpreter.InterpreterOptions().debug
    assert not interpreter.interpreter_builder.options.sanitize_overflow


def test_dtypes_are_those_of_numpy() -> None:
    dtypes = [tl.float32, tl.block_type(tl.bfloat16, [4]), tl.pointer_type(tl.int8), tl.float8e4nv]
    assert [interpreter._get_np_dtype(dtype) for dtype in dtypes] == ["float32", "uint16", "uint64", "uint8"]


def test_builtins_are_replaced_while_a_kernel_and_its_functions_run() -> None:
    before = dict(builtins_of(tl))
    x, out = torch.arange(4.0), torch.zeros(4)
    doubled[(1,)](x, out, 4)
    assert out.tolist() == [0.0, 2.0, 4.0, 6.0]
    assert {name: getattr(tl, name) for name in before} == before
