"""Triton's interpreter without work that it repeats or throws away.

Triton 3.9 takes about 0.3 ms of Python for each operation of a kernel, on tensors as small as those of tests. Most of
that time makes no difference to any result, and tests of kernels take most of the time of the suite.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def spare_work() -> None:
    """Make the interpreter of this process faster; what it computes stays the same, bit for bit."""
    builder = interpreter.interpreter_builder
    # Sums and products of integers are computed again in 64 bits, to look for an overflow that only debug reports.
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    # A table of all dtypes is built to look up one; pointers are not in it.
    of_pointer, of_scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (of_pointer if dtype.scalar.is_ptr() else of_scalar)(dtype.scalar)
    # Each launch, and each call of a function in a kernel, replaces the builtins of triton.language.
    interpreter._patch_lang, interpreter._patch_attr = _patch_once(interpreter._patch_lang), _patch_attr
    if triton.__version__.startswith("3.9."):  # these know the classes of one version
        _share_types()
        _pass_values_that_stay()


def _patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    nothing, modules = interpreter._LangPatchScope(), set()

    def patched(function: Any) -> Any:
        if function.__module__ not in modules:
            modules.add(function.__module__)
            patch(function)
        return nothing  # that a launch would restore

    return patched


def _patch_attr(owner: Any, name: str, builtin: Any, builder: Any, scope: Any) -> None:
    function = getattr(builtin, "__wrapped__", builtin)  # the wrapper asks for _semantic

    def call(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return function(*arguments, **named)

    scope.set_attr(owner, name, call)


def _share_types() -> None:
    """Make each type of blocks, with its shape and its size, once instead of for each value."""
    make_type, types = core.block_type.__init__, {}

    @functools.cache
    def shape_and_numel(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def make_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        if not hasattr(self, "of_tensors"):
            make_type(self, element_ty, shape)
            self.of_tensors = shape_and_numel(tuple(self.shape.values))

    def known_type(kind: Any, element_ty: Any, shape: Any) -> Any:
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        key = (element_ty.name, sizes, type(sum(sizes)))  # 4.0 is refused where 4 is not
        if key not in types:
            types[key] = object.__new__(kind)
        return types[key]

    scalar = shape_and_numel(())

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if isinstance(type, core.block_type) else scalar

    core.block_type.to_ir = lambda self, builder: self  # the builder makes an equal one
    core.block_type.__new__ = known_type  # type: ignore[assignment,method-assign]
    core.block_type.__init__ = make_type_once  # type: ignore[method-assign]
    core.tensor.__init__ = make_tensor  # type: ignore[method-assign]


def _pass_values_that_stay() -> None:
    """Look first for values that no cast, broadcast or unwrapping changes."""
    unwrap, semantic = core._unwrap_if_constexpr, TritonSemantic
    cast, broadcast, common_type = semantic.cast, semantic.broadcast_impl_value, semantic.computation_type_impl
    plain = (core.tensor, core.dtype, core.pointer_type, core.block_type, int, bool, str, type(None))

    def unwrap_others(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    def cast_others(self: Any, value: Any, dst_ty: Any, rounding: Any = None) -> Any:
        return value if value.dtype is dst_ty.scalar else cast(self, value, dst_ty, rounding)

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def type_of_others(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, divides: bool) -> Any:
        return a if a is b and not divides else common_type(self, a, a_is_scalar, b, b_is_scalar, divides)

    core._unwrap_if_constexpr = unwrap_others
    semantic.cast = cast_others  # type: ignore[method-assign]
    semantic.broadcast_impl_value = broadcast_others  # type: ignore[method-assign]
    semantic.computation_type_impl = type_of_others  # type: ignore[method-assign]
