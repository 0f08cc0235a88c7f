"""Triton's interpreter without work that it repeats or throws away.

Triton 3.9 takes about 0.3 ms of Python for each operation of a kernel, on tensors as small as those of tests. More than
half of that time makes no difference to any result, and tests of kernels take most of the time of the suite.
"""

import functools
import inspect
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def spare_work() -> None:
    """Make the interpreter of this process faster; what it computes stays the same, bit for bit."""
    builder = interpreter.interpreter_builder
    # Sums and products of integers are computed again in 64 bits, to look for an overflow that only debug reports.
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    # A table of all dtypes is built to look up one; pointers are not in it.
    of_pointer, of_scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (of_pointer if dtype.scalar.is_ptr() else of_scalar)(dtype.scalar)
    # Each launch, and each call of a function in a kernel, looks through triton.language for builtins to replace.
    interpreter._patch_builtin = _patch_builtins


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    builtins = builtins_of(package)
    if not builtins or getattr(package, builtins[0][0]) is not builtins[0][1]:
        return  # the kernel that is running has replaced them
    for name, member in builtins:
        interpreter._patch_attr(package, name, member, builder, scope)


@functools.cache
def builtins_of(package: Any) -> list[tuple[str, Any]]:
    """Names and functions of a module or class that the interpreter replaces while a kernel runs."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
