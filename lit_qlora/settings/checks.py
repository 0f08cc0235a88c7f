"""Checks each setting against its annotation and names it by its flag.

With `r: Annotated[int, at_least(1)] = 8`, LoRAConfig(r=0) and --lora.r 0 end with "lora.r must be at least 1, got 0."
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lit_qlora.errors import UsageError, did_you_mean
from lit_qlora.settings.limits import Limit


def check(condition: bool, message: str) -> None:
    """Raise UsageError(message) unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def check_cache_folder(name: str, path: str) -> None:
    """Raise UsageError if the path of a cache is that of a file, where nothing could be kept."""
    check(not Path(path).is_file(), f"{name}: {path} is a file. Give a folder, auto or none.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings whose types, choices and limits are checked on creation, from argv or in Python.

    A text stands for a path, a list for a tuple, and one value for a tuple of it where the annotation says so.
    """

    prefix: ClassVar[str] = ""
    """Common beginning of their flags, such as "lora."."""
    first: ClassVar[tuple[str, ...] | None] = None
    """Settings that --help explains by itself, and --help all with the others; None for all."""

    def notes(self) -> list[str]:
        """Return what a user may want to know of these settings; a command prints it before it begins."""
        return []

    def __post_init__(self) -> None:
        """Check each field by itself; a subclass then checks combinations."""
        for name, hint in _annotations(type(self)).items():  # type: ignore[arg-type] # a class is hashable
            object.__setattr__(self, name, fit(getattr(self, name), hint, self.prefix + name))


@cache
def _annotations(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {setting.name: hints[setting.name] for setting in fields(kind)}


def fit(value: Any, hint: Any, name: str) -> Any:
    """Return the value in the type of the annotation `hint`.

    Raises:
        UsageError: if the value has another type, is no choice, or is beyond a limit. The message begins with `name`.
    """
    kind, parts = _taken_apart(hint)
    if not _accepts(hint, value):
        _refuse(value, hint, name)
    if kind is int:
        check(abs(value) < 2**63, f"{name} has more digits than an integer of 64 bits: {value}.")
    if kind is Annotated:
        return _within(fit(value, parts[0], name), parts[1:], name)
    if kind is Union:
        return fit(*_member(value, parts), name)
    if kind is tuple:
        return tuple(fit(item, parts[0], name) for item in value)
    if kind is dict:
        return {fit(key, parts[0], name): fit(item, parts[1], f"{name}.{key}") for key, item in value.items()}
    return kind(value) if kind in _STANDS_FOR else value


_STANDS_FOR: dict[Any, Any] = {
    int: Integral,
    float: Real,
    str: (str, PathLike),
    Path: (str, PathLike),
    tuple: (list, tuple),
    dict: Mapping,
}
"""The Python types that are converted to a type of the annotation."""


def _taken_apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    kind = get_origin(hint) or hint
    return Union if kind is UnionType else kind, get_args(hint)


def _accepts(hint: Any, value: Any) -> bool:
    """Tell if the value has this type; its items and limits are not looked at."""
    kind, parts = _taken_apart(hint)
    if kind is Annotated:
        return _accepts(parts[0], value)
    if kind is Union:
        return any(_accepts(part, value) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is Any:
        return True
    return isinstance(value, _STANDS_FOR.get(kind, kind)) and not (isinstance(value, bool) and kind in (int, float))


def _member(value: Any, members: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the value and its member of a union. In tuple[X, ...] | X, a single X becomes a tuple."""
    member = next(member for member in members if _accepts(member, value))
    several = next((other for other in members if get_args(other) == (member, ...)), None)
    return ((value,), several) if several else (value, member)


def _within(value: Any, limits: tuple[Limit, ...], name: str) -> Any:
    wanted = " and ".join(limit.text for limit in limits)
    check(all(limit.holds(value) for limit in limits), f"{name} must be {wanted}, got {value!r}.")
    return value


def _refuse(value: Any, hint: Any, name: str) -> NoReturn:
    types, choices = _types(hint), _choices(hint)
    expected = " or ".join([*types, *([f"one of {', '.join(choices)}"] if choices else [])])
    raise UsageError(f"{name}: expected {expected}, got {value!r}.{did_you_mean(str(value), choices)}")


def _types(hint: Any) -> list[str]:
    kind, parts = _taken_apart(hint)
    if kind in (Annotated, Union):
        return [name for part in parts[: 1 if kind is Annotated else None] for name in _types(part)]
    return [] if kind in (Literal, NoneType) else ["list" if kind is tuple else kind.__name__]


def _choices(hint: Any) -> list[str]:
    kind, parts = _taken_apart(hint)
    return list(parts) if kind is Literal else [name for part in parts for name in _choices(part)] * (kind is Union)
