"""Causal attention, forward and backward, by the fastest implementation for its shape.

FlashAttention 4 takes rows and packed documents (variable lengths) where it is installed. Without it cuDNN takes rows
of one length, if that is worth a plan of its own, and torch's flash attention the others and documents. Plain torch is
for a CPU and for GPUs that have none of them. All take strided views without a copy. Capped scores, dropout, and heads
of more features than flash attention takes, have kernels of their own.

A sink is one more score in the softmax of a head, without a value (Xiao et al. 2024, "Efficient streaming language
models with attention sinks"). It only scales the output, by the share of the softmax's sum that is not the sink's. The
backward pass of any attention computes the probabilities from that sum, and their gradients from the output. So with
the sum and the output of the whole softmax it gives the exact gradients of queries, keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.fused import flash_4
from lit_qlora.fused.offload import to_device
from lit_qlora.kernels import attention as kernels
from lit_qlora.kernels.attention import Scores
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.launch import INTERPRETED, shared_memory
from lit_qlora.model.attention import attend
from lit_qlora.sharded import RowParts

_aten = torch.ops.aten
MOST_FLASH = 256
"""Features of the largest heads that flash attention takes."""
CUDNN_MULTIPLE = 256  # cuDNN builds a plan for each new length, which takes longer than it saves for odd ones


@dataclass(frozen=True)
class Tree:
    """The keys that each run of tokens attends to where documents share their beginnings.

    A run is what stands behind a shared beginning, or the beginning with the first document that goes on from it. Its
    keys are gathered, those of the beginning before its own. So a run is a document with fewer queries than keys.

    Attributes:
        keys: (K,) int64, the token of each gathered key; K is T and once more the beginnings.
        ends: (runs + 1,) int32, the first gathered key of each run and the end of the last.
        longest: most keys of a run.
        own: (T,) int64, the gathered key of each token in its own run.
        others: the remaining gathered keys, int64, in parts that have no token twice. A GPU adds the rows of one part
            in any order.
    """

    keys: Tensor
    ends: Tensor
    longest: int
    own: Tensor
    others: tuple[Tensor, ...]

    @staticmethod
    def of(positions: Tensor, bounds: Tensor, device: torch.device, chunk: int | None = None) -> "Tree":
        """The tree of tokens at `positions` (B, T), on the host, in runs with these `bounds` (runs + 1,).

        A run whose first position is p follows on the last tokens before it with the positions 0 to p - 1. Where
        windows are chunks of so many tokens, a run lies in one, and attends to what lies there too.
        """
        firsts = positions.flatten()[bounds[:-1]].tolist()
        path, parts, own, others, turns = bounds.new_zeros(0), [], [], [], []
        end, seen = 0, bounds.new_zeros(positions.numel())
        for (first, last), position in zip(pairwise(bounds.tolist()), firsts, strict=True):
            path, new = path[:position], torch.arange(first, last)
            assert len(path) == position
            beginning = path if chunk is None else path[position // chunk * chunk :]
            path = torch.cat((path, new))
            parts.append(torch.cat((beginning, new)))
            others.append(torch.arange(end, end + len(beginning)))
            turns.append(seen[beginning])
            seen[beginning] += 1
            own.append(torch.arange(end + len(beginning), end + len(parts[-1])))
            end += len(parts[-1])
        ends = F.pad(torch.tensor([len(part) for part in parts]).cumsum(0), (1, 0)).int()
        every, turn = torch.cat(others), torch.cat(turns)
        tensors = (torch.cat(parts), ends, torch.cat(own), *(every[turn == i] for i in range(int(seen.max()))))
        keys, ends, mine, *rest = (to_device(tensor, device) for tensor in tensors)
        return Tree(keys, ends, max(map(len, parts)), mine, tuple(rest))

    def gathered(self, x: Tensor) -> Tensor:
        """(T, K, D) -> (keys, K, D)."""
        return x.index_select(0, self.keys)

    def summed(self, d: Tensor) -> Tensor:
        """Gradients of gathered keys or values, summed by token: (keys, K, D) -> (T, K, D)."""
        total = d.index_select(0, self.own)
        for others in self.others:
            total.index_add_(0, self.keys[others], d.index_select(0, others))
        return total


@dataclass(frozen=True)
class Layout:
    """The documents among the T tokens of a micro-batch.

    Attributes:
        rows, length: T = rows * length, the shape of the batch. Where processes share rows it is that of whole ones.
        longest: tokens of the longest document.
        ends: (documents + 1,) int32, the first token of each document and the end of the last; None if each row is one.
        masks: by window, the tokens that each token attends to where documents share their beginnings
            (lit_qlora.model.attention.tree_mask); for passes that no backward pass follows.
        tree: the keys of each run where documents share their beginnings, in passes that learn; `longest` and `ends`
            are then of the runs.
        parts: the part of each row that this process computes; None for all of it.
        chunks: the layout for blocks whose windows are chunks, where documents end with their chunks; None where that
            makes no difference.
    """

    rows: int
    length: int
    longest: int
    ends: Tensor | None = None
    masks: dict[int | None, Tensor] | None = None
    tree: Tree | None = None
    parts: RowParts | None = None
    chunks: "Layout | None" = None

    @property
    def own_length(self) -> int:
        """Tokens of a row that this process computes."""
        return self.length if self.parts is None else self.length // self.parts.processes

    @property
    def most_keys(self) -> int:
        """Keys of the longest document."""
        return self.longest if self.tree is None else self.tree.longest

    @staticmethod
    def of(
        rows: int,
        length: int,
        segments: Tensor | None,
        device: torch.device,
        shared: Tensor | None = None,
        chunk: int | None = None,
    ) -> "Layout":
        """The layout of rows whose documents are numbered by `segments` (B, T), or are the rows if it is None.

        The device is waited for only if segments lie there.

        Args:
            shared: (B, T), positions of documents that share their beginnings, on the host; see Tree.
            chunk: tokens of a window that is a chunk; None where windows slide.
        """
        whole = Layout._of(rows, length, segments, device, shared)
        if chunk is None or whole.most_keys <= chunk:
            return whole
        segments = torch.zeros(rows, length, dtype=torch.int64) if segments is None else segments.long()
        positions = _positions(segments) if shared is None else shared
        numbers = segments * length + positions // chunk
        return replace(whole, chunks=Layout._of(rows, length, numbers, device, shared, chunk))

    @staticmethod
    def _of(
        rows: int,
        length: int,
        segments: Tensor | None,
        device: torch.device,
        shared: Tensor | None,
        chunk: int | None = None,
    ) -> "Layout":
        """As `of`; with `chunk` the segments are chunks of documents."""
        if segments is None:
            return Layout(rows, length, length)
        first = torch.ones_like(segments, dtype=torch.bool)  # a row begins a document, padding included
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = first.flatten().nonzero()[:, 0]
        ends = F.pad(starts, (0, 1), value=rows * length).int()
        tree = None if shared is None else Tree.of(shared, ends.long(), device, chunk)
        return Layout(rows, length, int(ends.diff().max()), to_device(ends, device), tree=tree)

    @staticmethod
    def of_parts(
        rows: int,
        length: int,
        segments: Tensor | None,
        device: torch.device,
        parts: RowParts,
        chunk: int | None = None,
    ) -> "Layout":
        """As `of`, for rows that lie over several processes, and are padded to equal parts."""
        whole = parts.length(length) * parts.processes
        segments = None if segments is None else F.pad(segments, (0, whole - length), value=-1)
        return replace(Layout.of(rows, whole, segments, device, chunk=chunk), parts=parts)

    def of_window(self, window: int | None) -> "Layout":
        """The layout for blocks with this window."""
        return self if window is None or self.chunks is None else replace(self.chunks, parts=self.parts)


def _positions(segments: Tensor) -> Tensor:
    """The position of each token (B, T) in its document, given its number."""
    column = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    begins = F.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
    return column - torch.where(begins, column, 0).cummax(dim=1).values


@dataclass(frozen=True)
class Heads:
    """Sizes of the attention: query heads, key and value heads, features of each.

    Attributes:
        scale: of the scores, None for 1 / sqrt(size).
        window: tokens that a token attends to, itself included; None for all before it.
        cap: scores x become cap * tanh(x / cap).
        sinks: (H,), frozen.
        dropout: of the weights of attention, in this pass.
    """

    query: int
    key: int
    size: int
    scale: float | None = None
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None
    dropout: Dropout = NONE

    def shared(self, parts: RowParts) -> "Heads":
        """The heads of this process, where others compute the rest; those of keys may be copies."""
        query, key = (self.query // parts.processes, self.key * parts.copies(self.key) // parts.processes)
        sinks = None if self.sinks is None else self.sinks.chunk(parts.processes)[parts.number]
        return replace(self, query=query, key=key, sinks=sinks)

    @property
    def scores(self) -> Scores:
        """As kernels.attention takes them."""
        scale = self.size**-0.5 if self.scale is None else self.scale
        return Scores(scale, self.cap, self.window, self.dropout)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, at least (H + 2 K) D) -> views (T, H, D), (T, K, D), (T, K, D)."""
        heads = self.query + 2 * self.key
        parts = qkv[:, : heads * self.size].unflatten(1, (heads, self.size))
        q, k, v = parts.split((self.query, self.key, self.key), dim=1)
        return q, k, v


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout, room: Tensor | None = None
) -> tuple[Tensor, Any]:
    """The attention's output (T, H D), and the other tensors that its backward pass reads.

    Args:
        q: (T, H, D); k, v: (T, K, D); any stride between tokens, heads dense.
        room: (T, H D), rows contiguous, where FlashAttention 4 writes its output, if its kernels take rows that lie so.
    """
    layout = layout.of_window(heads.window)
    if layout.parts is None:
        return _attention(q, k, v, heads, layout, room)
    own, (q, k, v) = heads.shared(layout.parts), _to_heads(layout, q, k, v)
    out, saved = _attention(q, k, v, own, replace(layout, parts=None))
    (out,) = _to_tokens(layout, out.view(-1, own.query, own.size))
    return out.flatten(1), saved


def _attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout, room: Tensor | None = None
) -> tuple[Tensor, Any]:
    """As attention, in one process."""
    tokens = q.size(0)
    if layout.masks is not None:
        q, k, v = (_by_row(x, layout) for x in (q, k, v))
        mask = layout.masks[heads.window]
        out = attend(q, k, v, mask, heads.scale, heads.cap, heads.sinks)
        return out.transpose(1, 2).reshape(tokens, -1), None
    if layout.tree is not None:
        k, v = layout.tree.gathered(k), layout.tree.gathered(v)
    if _takes_kernel(q, heads, layout):
        out, log_sum = kernels.attend(q, k, v, heads.scores, _ends(layout, q.device), layout.longest)
        out, log_sum = _with_sinks(out, log_sum.T, heads.sinks)
        return out.flatten(1), log_sum.T.contiguous()
    if not has_flash(heads.size, q.device):
        return _plain(q, k, v, heads, layout), None
    by_flash_4 = _takes_flash_4(q, heads, layout)
    if not by_flash_4 and _takes_cudnn(heads, layout):
        rows = [_by_row(x, layout) for x in (q, k, v)]
        out = _aten._scaled_dot_product_cudnn_attention(*rows, None, True, 0.0, True, False, scale=heads.scale)
        return out[0].transpose(1, 2).reshape(tokens, -1), (out[1], out[6], out[7])
    if layout.ends is None:
        q, k, v = (x.unflatten(0, (layout.rows, layout.length)) for x in (q, k, v))
    state: tuple[Tensor, ...] = ()
    if by_flash_4:
        room = None if room is None else room.view(q.shape)
        out, log_sum = flash_4.forward(q, k, v, _bounds(layout), heads.scale, _window(heads, layout), room)
    else:
        out, log_sum, *state, _ = _aten._flash_attention_forward(
            q, k, v, *_bounds(layout), 0.0, True, False, **_options(heads, layout)
        )
    if heads.sinks is not None:  # log_sum is (H, T), or (B, H, S) for rows of one length
        out, by_token = _with_sinks(out, log_sum.mT, heads.sinks)
        log_sum = by_token.mT.contiguous()
    return out.reshape(tokens, -1), (log_sum, *state)


def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Any, heads: Heads, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries (T, H, D), keys and values (T, K, D); heads dense, any stride between tokens."""
    layout = layout.of_window(heads.window)
    if layout.parts is not None:
        return _backward_in_parts(d_out, q, k, v, out, saved, heads, layout)
    if layout.tree is not None:
        tree = layout.tree
        dq, dk, dv = _backward(d_out, q, tree.gathered(k), tree.gathered(v), out, saved, heads, layout)
        return dq, tree.summed(dk), tree.summed(dv)
    return _backward(d_out, q, k, v, out, saved, heads, layout)


def _backward_in_parts(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Any, heads: Heads, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """As attention_backward, where other processes have parts of the rows."""
    assert layout.parts is not None
    own = heads.shared(layout.parts)

    def gradients() -> Sequence[Tensor]:
        qh, kh, vh = _to_heads(layout, q, k, v)
        d_y, y = (_to_heads(layout, x.view(-1, heads.query, heads.size))[0].flatten(1) for x in (d_out, out))
        return _backward(d_y.contiguous(), qh, kh, vh, y.contiguous(), saved, own, replace(layout, parts=None))

    dq, dk, dv = _to_tokens(layout, *gradients())
    copies = layout.parts.copies(heads.key)
    dk, dv = (x.unflatten(1, (-1, copies)).sum(dim=2) for x in (dk, dv)) if copies > 1 else (dk, dv)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _to_heads(layout: Layout, *parts: Tensor) -> list[Tensor]:
    """See RowParts.to_heads: (own T, heads, D) each -> (T, heads / N, D)."""
    assert layout.parts is not None
    by_row = (x.unflatten(0, (layout.rows, -1)) for x in parts)
    return [x.flatten(0, 1) for x in layout.parts.to_heads(*by_row)]


def _to_tokens(layout: Layout, *parts: Tensor) -> Sequence[Tensor]:
    """See RowParts.to_tokens: (T, heads, D) each -> (own T, N heads, D)."""
    assert layout.parts is not None
    by_row = (x.unflatten(0, (layout.rows, -1)) for x in parts)
    return [x.flatten(0, 1) for x in layout.parts.to_tokens(*by_row)]


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Any, heads: Heads, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """As attention_backward, for keys and values that are gathered where documents share their beginnings."""
    if _takes_kernel(q, heads, layout):
        d_out, out, ends = d_out.reshape(q.shape).contiguous(), out.view(q.shape), _ends(layout, q.device)
        return kernels.attend_backward(d_out, q, k, v, out, saved, heads.scores, ends, layout.longest)
    if not has_flash(heads.size, q.device):
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            dq, dk, dv = torch.autograd.grad(_plain(q, k, v, heads, layout), (q, k, v), d_out)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    tokens = q.size(0)
    d_out, out = (x.view(tokens, heads.query, heads.size) for x in (d_out, out))
    by_flash_4 = _takes_flash_4(q, heads, layout)
    if not by_flash_4 and _takes_cudnn(heads, layout):
        log_sum, seed, offset = saved
        rows = [_by_row(x, layout) for x in (d_out, q, k, v, out)]
        gradients = _aten._scaled_dot_product_cudnn_attention_backward(
            *rows, log_sum, seed, offset, None, None, None, layout.length, layout.length, 0.0, True, scale=heads.scale
        )
        dq, dk, dv = (x.transpose(1, 2).reshape(tokens, -1, heads.size) for x in gradients)
        return dq, dk, dv
    log_sum, *state = saved
    if layout.ends is None:
        d_out, q, k, v, out = (x.unflatten(0, (layout.rows, layout.length)) for x in (d_out, q, k, v, out))
    everything, bounds = (d_out, q, k, v, out, log_sum), _bounds(layout)
    if by_flash_4:
        gradients = flash_4.backward(*everything, bounds, heads.scale, _window(heads, layout))
    else:
        gradients = _aten._flash_attention_backward(*everything, *bounds, 0.0, True, *state, **_options(heads, layout))
    dq, dk, dv = (x.view(-1, x.size(-2), heads.size) for x in gradients[:3])
    return dq, dk, dv


def _with_sinks(out: Tensor, log_sum: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put the sinks into the softmax: the output (..., H, D), in place, and the logarithm of its sum (..., H)."""
    if sinks is None:
        return out, log_sum
    whole = torch.logaddexp(log_sum, sinks.float())
    return out.mul_((log_sum - whole).exp()[..., None]), whole  # in place, the product is rounded once


def _ends(layout: Layout, device: torch.device) -> Tensor:
    """The first token of each document, which may be a row, and the end of the last."""
    if layout.ends is not None:
        return layout.ends
    return torch.arange(0, layout.rows * layout.length + 1, layout.length, dtype=torch.int32, device=device)


def _bounds(layout: Layout) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Flash attention's bounds of queries and of keys, and the longest of each.

    The last of fewer queries than keys attends to the last key, so causal is what it should be.
    """
    keys = layout.ends if layout.tree is None else layout.tree.ends
    return layout.ends, keys, layout.longest, layout.most_keys


def _window(heads: Heads, layout: Layout) -> int | None:
    """The window, if a document is longer."""
    return heads.window if heads.window is not None and layout.most_keys > heads.window else None


def _options(heads: Heads, layout: Layout) -> dict[str, Any]:
    """Flash attention's arguments: the scale, and the tokens to the left and right that a token attends to."""
    window = _window(heads, layout)
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return {"scale": heads.scale, **sides}


def _takes_kernel(q: Tensor, heads: Heads, layout: Layout) -> bool:
    """Tell whether the project's own kernels run: see the module."""
    if not (q.is_cuda or INTERPRETED):
        return False
    if heads.cap is not None or heads.dropout.p:
        assert layout.tree is None
        return True
    return layout.tree is None and has_kernel(heads.size, shared_memory(q), q.element_size())


def _takes_flash_4(q: Tensor, heads: Heads, layout: Layout) -> bool:
    kind = flash_4.Kind(
        heads.query,
        heads.key,
        heads.size,
        q.dtype,
        packed=layout.ends is not None,
        windowed=_window(heads, layout) is not None,
        many=layout.ends is not None and len(layout.ends) - 1 > flash_4.MANY,
        queries=flash_4.rounded(layout.longest),
        keys=flash_4.rounded(layout.most_keys),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return flash_4.takes(kind, q.device)


def _takes_cudnn(heads: Heads, layout: Layout) -> bool:
    if torch.are_deterministic_algorithms_enabled():
        return False  # torch does not ask cuDNN for its deterministic backward pass, and flash attention has one
    fits = heads.size % 8 == 0 and heads.size <= 128 and layout.length % CUDNN_MULTIPLE == 0
    fits = fits and layout.ends is None and _window(heads, layout) is None
    return fits and heads.sinks is None and _has_cudnn()


@cache
def has_flash(size: int, device: torch.device) -> bool:
    """Tell whether torch's flash attention runs on a device, forward and backward, with heads of `size` features."""
    return device.type == "cuda" and flash_on(torch.cuda.get_device_capability(device), size)


def flash_on(capability: tuple[int, int], size: int) -> bool:
    """Tell whether torch's flash attention runs on GPUs of a compute capability, with heads of `size` features.

    It is built for Ampere and later. The backward pass of 193 to 224 features does not fit the shared memory of cards
    that have 99 KiB of it. Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if size % 8 or size > MOST_FLASH or capability < (8, 0):
        return False
    return not (192 < size <= 224 and capability in ((8, 6), (8, 9), (12, 0), (12, 1)))


def has_kernel(size: int, room: int, element: int = 2) -> bool:
    """Tell whether the project's own kernels run because heads of `size` features are too large for flash attention.

    Args:
        room: bytes of shared memory that a program may take.
        element: bytes of a feature.
    """
    return size > MOST_FLASH and kernels.takes(size, element, room)


@cache
def _has_cudnn() -> bool:
    """Tell whether cuDNN has attention for training; asked only where has_flash is True."""
    return torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= 90000


def _by_row(x: Tensor, layout: Layout) -> Tensor:
    """(T, H, D) -> (B, H, S, D), a view."""
    return x.unflatten(0, (layout.rows, layout.length)).transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout) -> Tensor:
    bounds = range(0, q.size(0) + 1, layout.length) if layout.ends is None else layout.ends.tolist()
    of_keys = bounds if layout.tree is None else layout.tree.ends.tolist()
    outs = []
    for (first, end), (first_key, last) in zip(pairwise(bounds), pairwise(of_keys), strict=True):
        q_ = q[first:end].transpose(0, 1)[None]
        k_, v_ = (x[first_key:last].transpose(0, 1)[None] for x in (k, v))
        before = (last - first_key) - (end - first)
        mask = torch.ones(end - first, last - first_key, dtype=torch.bool, device=q.device).tril(before)
        if heads.window is not None:
            mask = mask.triu(before + 1 - heads.window)
        out = _of_document(q_, k_, v_, mask, heads)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).reshape(q.size(0), -1)


def _of_document(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: Heads) -> Tensor:
    if heads.cap is not None or heads.sinks is not None:
        return attend(q, k, v, mask, heads.scale, heads.cap, heads.sinks)
    grouped = heads.query != heads.key
    if q.is_cuda and heads.size > MOST_FLASH and heads.window is None:
        # torch's memory-efficient attention takes heads of any size, but neither this mask nor keys that are shared.
        k, v = (t.repeat_interleave(heads.query // heads.key, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped, scale=heads.scale)
