"""What tests/interpreter.py spares Triton's interpreter, and why nothing is lost by it."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
    pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason="work is spared for Triton 3.9 alone"),
]


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


def test_a_kernel_and_its_functions_call_what_the_interpreter_has_for_builtins() -> None:
    for _ in range(2):
        x, out = torch.arange(4.0), torch.zeros(4)
        doubled[(1,)](x, out, 4)
        assert out.tolist() == [0.0, 2.0, 4.0, 6.0]
    assert not any(map(tl.core.is_builtin, (tl.load, tl.store, tl.tensor.__add__, tl.math.exp)))


def test_a_type_of_blocks_is_made_once() -> None:
    one = tl.block_type(tl.float32, [4, 8])
    assert tl.block_type(tl.float32, tl.tuple([tl.constexpr(4), 8])) is one
    assert (one.scalar, list(one.shape), one.numel, one.nbytes) == (tl.float32, [4, 8], 32, 128)
    assert one.with_element_ty(tl.int8) == tl.block_type(tl.int8, [4, 8]) != one != tl.block_type(tl.float32, [8, 4])
    assert str(tl.block_type(tl.pointer_type(tl.int8), [4]).scalar) == "pointer<int8>"


@pytest.mark.parametrize("sizes", [[3], [4.0], []], ids=str)
def test_sizes_that_triton_refuses_are_refused_each_time(sizes: list[int]) -> None:
    tl.block_type(tl.float32, [4])
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            tl.block_type(tl.float32, sizes)


def test_a_tensor_has_the_shape_of_its_type() -> None:
    handle = interpreter.TensorHandle(torch.zeros(4, 8).numpy(), tl.float32)
    block, scalar = tl.tensor(handle, tl.block_type(tl.float32, [4, 8])), tl.tensor(handle, tl.float32)
    assert ([size.value for size in block.shape], block.numel.value) == ([4, 8], 32)
    assert (len(scalar.shape), scalar.numel.value) == (0, 1)
