"""Attention by the kernels of FlashAttention 4, where the extra `flash` is installed. Zadouri et al. 2026.

They are written in Python for each architecture, and compiled on first use, which takes some two seconds for each kind
of rows. The library is young. So a kind is tried on a few tokens before it is used: where it raises, or differs from
torch's flash attention, that goes on. Short documents, and very many, have kernels of their own, which are tried too.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from torch import Tensor

from lit_qlora.report import tell

ARCHITECTURES = (9, 10)
"""Major compute capabilities: Hopper, and Blackwell in data centres."""
MOST_SIZE = 128
"""Features of the largest heads."""
INSTALL = 'pip install "lit_qlora[flash]"'
LENGTHS = (8, 256)
"""Tokens of the documents that kernels are tried on: as many as the longest has, rounded up to a power of two, or if it
has more than these. Longer documents have no other kernels than those of 256 tokens."""
MANY = 256
"""From more documents on the kernels search for that of a tile in a table. Source: interface.py of the library."""
ALIGNED = 16
"""Bytes of which the address of each row is a multiple, where the kernels write into rows that do not touch."""
TOLERATED = 2e-2
"""Of the norm of a result: what two ways to compute it in bfloat16 may differ by."""

_aten = torch.ops.aten
Bounds = tuple[Tensor | None, Tensor | None, int, int]
"""First tokens of documents among queries and among keys, with their ends, or None for rows of one length; the longest
of each."""


@dataclass(frozen=True)
class Kind:
    """A kind of attention that kernels are compiled for.

    Attributes:
        query, key: heads; size: features of each.
        packed: rows have several documents, of any length; many: these are more than MANY.
        windowed: a token attends to some before it.
        queries, keys: tokens of the longest document, rounded up; see LENGTHS.
        deterministic: the backward pass adds in one order on every run.
    """

    query: int
    key: int
    size: int
    dtype: torch.dtype
    packed: bool
    windowed: bool
    many: bool = False
    queries: int = LENGTHS[1]
    keys: int = LENGTHS[1]
    deterministic: bool = False

    def __str__(self) -> str:
        """For people."""
        heads = f"{self.query} heads of {self.size} features with {self.key} of keys in {str(self.dtype)[6:]}"
        what = ("many " * self.many + "documents") if self.packed else "rows"
        more = ", a window" * self.windowed + ", deterministic" * self.deterministic
        return f"{heads}, {what} of up to {self.queries} tokens or more{more}"


def rounded(length: int) -> int:
    """Tokens on which to try the kernels of documents of up to `length` tokens."""
    least, most = LENGTHS
    return min(max(least, 2 ** (length - 1).bit_length()), most)


def why_not(capability: tuple[int, int], size: int) -> str:
    """Why the kernels do not run on GPUs of a compute capability for heads of `size` features, or ''."""
    if capability[0] not in ARCHITECTURES or size % 8 or size > MOST_SIZE:
        return "not for this GPU or head size"
    return "" if _installed() else INSTALL


@cache
def _installed() -> bool:
    """True if the library is installed; another one has a package of the same name, which is not imported."""
    try:
        return bool(distribution("flash-attn-4"))
    except PackageNotFoundError:
        return False


@cache
def takes(kind: Kind, device: torch.device) -> bool:
    """Tell whether the kernels are installed, and give what torch's flash attention gives on this device.

    Raises:
        torch.OutOfMemoryError: if there is no memory to try them, which says nothing of them.
    """
    if device.type != "cuda" or why_not(torch.cuda.get_device_capability(device), kind.size):
        return False
    try:
        _library()
        with warnings.catch_warnings(action="ignore"):  # whatever a young compiler warns of
            difference = _difference(kind, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    else:
        if difference <= TOLERATED:
            return True
        reason = f"it differs by {difference:.3f} of the norm"
    _tell(reason, kind)
    return False


_told: set[str] = set()


def _tell(reason: str, kind: Kind) -> None:
    """Say once for each reason that the kernels are not used; most reasons are those of many kinds."""
    if reason not in _told:
        _told.add(reason)
        tell(f"  attention  torch's, not FlashAttention 4, where that fails, as for {kind}: {reason}")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    scale: float | None,
    window: int | None,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, as q, and the logarithms of the sums, (B, H, S), or (H, T) of packed rows, float32.

    Args:
        q: (B, S, H, D), or (T, H, D) of packed rows; k, v: the same with fewer heads.
        window: tokens that a token attends to, itself included; None for all before it.
        room: as q, any stride between tokens. The output is written there, or where rows are not aligned into a tensor
            of its own.
    """
    out = None if room is None or not _aligned(room) else room
    out, log_sum, *_ = _library().forward(q, k, v, **_options(bounds, scale, window), return_lse=True, out=out)
    return out, log_sum


def _aligned(x: Tensor) -> bool:
    """Tell whether each row of each head lies at a multiple of ALIGNED."""
    return not any(count * x.element_size() % ALIGNED for count in (x.storage_offset(), *x.stride()[:-1]))


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    bounds: Bounds,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values; see forward."""
    options = _options(bounds, scale, window) | {"deterministic": torch.are_deterministic_algorithms_enabled()}
    dq, dk, dv, *_ = _library().backward(q, k, v, out, d_out, log_sum, **options)
    return dq, dk, dv


def _options(bounds: Bounds, scale: float | None, window: int | None) -> dict[str, Any]:
    ends_q, ends_k, longest, most_keys = bounds
    return {
        "cu_seqlens_q": ends_q,
        "cu_seqlens_k": ends_k,
        "max_seqlen_q": longest,
        "max_seqlen_k": most_keys,
        "softmax_scale": scale,
        "causal": True,
        "window_size_left": None if window is None else window - 1,
    }


@dataclass(frozen=True)
class _Library:
    """The two functions of the library, which autograd calls there."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@cache
def _library() -> _Library:
    warnings.filterwarnings("ignore", module=r"(cutlass|flash_attn|quack)\b")  # their compiler warns of their own code
    from flash_attn.cute import interface

    return _Library(interface._flash_attn_fwd, interface._flash_attn_bwd)


def _difference(kind: Kind, device: torch.device) -> float:
    """By how much outputs and gradients of a few tokens differ from torch's flash attention, of their norm.

    The output is once a tensor of its own, and once the first columns of wider rows, whose last ones must stay.
    """
    rows, window = 2, 3 * kind.keys // 8 if kind.windowed else None
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        shape = (rows * length,) if kind.packed else (rows, length)
        return torch.randn(*shape, heads, kind.size, dtype=kind.dtype, device=device, generator=generator)

    def ends(length: int) -> Tensor | None:
        empty = [rows * length] * (MANY * kind.many)
        documents = [0, 3 * length // 4, 3 * length // 4, length, rows * length, *empty]
        return torch.tensor(documents, dtype=torch.int32, device=device) if kind.packed else None

    q, d_out = (random(kind.query, kind.queries) for _ in range(2))
    k, v = (random(kind.key, kind.keys) for _ in range(2))
    bounds: Bounds = (ends(kind.queries), ends(kind.keys), kind.queries, kind.keys)
    wide = q.new_ones(*q.shape[:-2], kind.query * kind.size + ALIGNED)
    columns, behind = wide[..., :-ALIGNED].unflatten(-1, q.shape[-2:]), wide[..., -ALIGNED:]

    def found(room: Tensor | None) -> tuple[Tensor, ...]:
        out, log_sum = forward(q, k, v, bounds, None, window, room)
        return out, log_sum, *backward(d_out, q, k, v, out, log_sum, bounds, None, window)

    results = (*found(None), *found(columns), behind)
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out, log_sum, *state, _ = _aten._flash_attention_forward(q, k, v, *bounds, 0.0, True, False, **sides)
    gradients = _aten._flash_attention_backward(d_out, q, k, v, out, log_sum, *bounds, 0.0, True, *state, **sides)
    expected = (out, log_sum, *gradients[:3])
    pairs = zip(results, (*expected, *expected, torch.ones_like(behind)), strict=True)
    differences = [(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs]
    return float(torch.stack(differences).max())  # NaN if one is, which Python's max may pass over
