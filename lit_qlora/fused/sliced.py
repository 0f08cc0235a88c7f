"""Long rows go through an MLP a slice of tokens at a time, since gate and up are its largest activations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_qlora.fused.memory import slice_tokens
from lit_qlora.fused.mlp import Mlp
from lit_qlora.fused.offload import OnHost
from lit_qlora.fused.passes import Backward, Pass

SEEDS = 4096
"""The seeds of dropout that a slice has; a pass numbers fewer inputs."""


def forward(mlp: Mlp, normed: list[Tensor], statistics: Tensor, stream: Tensor, run: Pass) -> tuple[Tensor, list[Any]]:
    """As mlp.forward, which recomputes the large activations in its backward pass; what each slice saves."""
    whole = normed.pop()
    out: Tensor | None = None
    saved = []
    for i, part in enumerate(slices(len(whole))):
        if part == slice(0, len(whole)):
            normed.append(whole)
            del whole
            out, only = mlp.forward(normed, statistics, stream, run, saves=False)
            return out, [only]
        y, one = mlp.forward([whole[part]], statistics[:, part], stream[part], seeded(run, i), saves=False)
        out = y.new_empty(len(whole), y.size(1)) if out is None else out
        out[part] = y
        saved.append(one)
    assert out is not None
    return out, saved


def backward(
    mlp: Mlp,
    d_y: list[Tensor],
    stream: list[Tensor | OnHost],
    saved: list[Any],
    d_out: Tensor,
    back: Backward,
    ahead: Sequence[Tensor | OnHost | None],
    keeps: bool,
) -> Tensor:
    """As mlp.backward, from what each slice saved.

    Args:
        keeps: d_out is still needed; otherwise the result takes its memory.
    """
    if len(saved) == 1:
        return mlp.backward(d_y, stream, saved[0], d_out, back, ahead)
    gradient, parts = d_y.pop(), list(slices(len(d_out)))
    whole = [back.forward.offload.get(one) for one in stream]
    out = torch.empty_like(d_out) if keeps else d_out
    for i, (part, one) in enumerate(zip(parts, saved, strict=True)):
        of_slice = replace(back, forward=seeded(back.forward, i))
        inputs: list[Tensor | OnHost] = [tensor[part] for tensor in whole]
        read_next = ahead if i == 0 else ()
        out[part] = mlp.backward([gradient[part]], inputs, one, d_out[part], of_slice, read_next)
        back.pending.flush()  # two slices may not add to the same gradient in one launch
    return out


def slices(tokens: int) -> Iterator[slice]:
    """Yield the slices of so many tokens."""
    each = slice_tokens(tokens)
    return (slice(first, min(first + each, tokens)) for first in range(0, tokens, each))


def seeded(run: Pass, number: int) -> Pass:
    """The pass with other elements to drop in each slice, whose rows are numbered from 0."""
    return run if run.seed is None else replace(run, seed=(run.seed + SEEDS * number) % 2**31)
