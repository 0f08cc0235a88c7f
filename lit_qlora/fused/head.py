"""The last norm, the output head and the loss together, forward and backward, a slice of tokens at a time.

Only labelled tokens take part. The logits of a slice become their own gradients, so nothing of size (T, V) exists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.fused.group import Group
from lit_qlora.fused.lesson import distill_
from lit_qlora.fused.memory import head_tokens
from lit_qlora.fused.offload import to_device
from lit_qlora.fused.trained_rows import HeadRows
from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.kernels.dropout import Dropout
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.norm import Norm, add_norm
from lit_qlora.model.lesson import Lesson

GATHERED = 128
"""Labelled tokens are gathered if more than one of so many has no label: on an H200 that takes a 110th of what the head
takes (Llama-3.1-8B)."""


@dataclass(frozen=True)
class Labelled:
    """The labelled tokens.

    Attributes:
        indices: (N,) int64, of the tokens among the T; None stands for all, some perhaps without a label.
        labels: (N,) int64, negative where there is none; weights: (N,) float32, None for 1 everywhere.
        lesson: what a teacher holds likely behind them; None without a teacher.
    """

    indices: Tensor | None
    labels: Tensor
    weights: Tensor | None
    lesson: Lesson | None = None

    @staticmethod
    def of(labels: Tensor, weights: Tensor | None, step: int = 1, lesson: Lesson | None = None) -> "Labelled":
        """From labels and weights of any shape.

        All tokens are taken where nearly all have a label, and on the device, so that it is not waited for.

        Args:
            step: N is brought to a multiple of it, or to T, by tokens without a label.
        """
        labels, weights = labels.flatten(), None if weights is None else weights.flatten()
        lesson = None if lesson is None else lesson.map(lambda tensor: tensor.flatten(0, 1))
        if labels.is_cuda:
            return Labelled(None, labels, weights, lesson)
        known = labels >= 0
        more = -int(known.sum()) % step
        indices = torch.cat((known.nonzero()[:, 0], (~known).nonzero()[:more, 0]))
        if len(labels) - len(indices) <= len(labels) // GATHERED:
            return Labelled(None, labels, weights, lesson)
        lesson = None if lesson is None else lesson.map(lambda tensor: tensor[indices])
        return Labelled(indices, labels[indices], None if weights is None else weights[indices], lesson)

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """Values of the labelled tokens (N,) as values of all T tokens (T, 1), 0 for the others."""
        values = values[:, None]
        return values if self.indices is None else values.new_zeros(tokens, 1).index_copy_(0, self.indices, values)

    def to(self, device: torch.device) -> "Labelled":
        """On a device."""
        indices, weights = (None if part is None else to_device(part, device) for part in (self.indices, self.weights))
        lesson = None if self.lesson is None else self.lesson.map(lambda tensor: to_device(tensor, device))
        return Labelled(indices, to_device(self.labels, device), weights, lesson)


class Head:
    """Norm, head and loss.

    Attributes:
        group: the head, with or without an adapter.
        cap: see kernels.cross_entropy.
        rows: its trained rows; None for none. Such a head has no adapter.
    """

    def __init__(self, norm: Norm, group: Group, cap: float | None, rows: HeadRows | None = None) -> None:
        self.norm, self.group, self.cap, self.rows = norm, group, cap, rows

    def losses(
        self,
        stream: list[Tensor],
        labelled: Labelled,
        workspace: Tensor | None,
        dropout: Dropout,
        learns: bool,
        hits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """The losses of labelled tokens; if it `learns`, the gradient of their sum at stream and adapter.

        Args:
            stream: (T, E), or a pair that it is the sum of, taken out of the list to free its memory early.
            workspace: for the head's weights if they are quantised.
            hits: see GPT.

        Returns:
            (N,) float32; (T, E) or None; pairs of a gradient of the adapter or rows and the term to add to it.
        """
        x, y = stream[0], stream[1] if len(stream) > 1 else None
        stream.clear()
        tokens, indices, group = x.size(0), labelled.indices, self.group
        if indices is not None:
            x = x.index_select(0, indices)
            y = None if y is None else y.index_select(0, indices)
        count = x.size(0)
        if not count:
            return torch.zeros(0, device=x.device), x.new_zeros(tokens, x.size(1)) if learns else None, []
        both = group.empty_input(count)
        x, statistics = add_norm(x, y, self.norm, both)
        del y
        z = group.project(both, both, dropout)
        rows = self.rows
        matrix = rows.low if rows and rows.whole else group.matrix(workspace)
        weights = torch.ones(count, device=x.device) if labelled.weights is None else labelled.weights
        loss = torch.empty(count, device=x.device)
        step = head_tokens(group.n)
        space = torch.empty(min(step, count), group.n, dtype=x.dtype, device=x.device)
        # These gradients wait for the gradient of the loss, which the backward pass brings.
        of_group = (group.grad_a, group.grad_b) if group.rank else ()
        own_gradients = [(g, torch.zeros_like(g)) for g in (*of_group, *((rows.gradient,) if rows else ())) if learns]
        pending = Pending()
        for first in range(0, count, step):
            here = slice(first, min(first + step, count))
            logits = group.product(both[here], matrix, out=space[: here.stop - first])
            if rows and not rows.whole:
                rows.write_logits(both[here], logits)
            if labelled.lesson is None:
                cross_entropy_(logits, labelled.labels[here], weights[here], loss[here], self.cap, hits)
            else:
                lesson = labelled.lesson.part(here)
                distill_(logits, labelled.labels[here], weights[here], loss[here], lesson, self.cap, hits)
            if z is not None and own_gradients:
                group.add_grad_b(logits, z[here], pending, into=own_gradients[1][1])
                pending.flush()
            if learns and rows:
                rows.logits_backward(both[here], logits, matrix, own_gradients[0][1])
            elif learns:
                torch.mm(logits, matrix, out=both[here])
        del space, logits
        if not learns:
            return loss, None, []
        of_a = own_gradients[0][1] if group.rank else None
        d_x = group.normed_backward(both, x, self.norm, statistics, z, None, dropout, pending, of_a)
        pending.flush()
        del both, x
        if indices is not None:
            d_x = d_x.new_zeros(tokens, d_x.size(1)).index_copy_(0, indices, d_x)
        return loss, d_x, own_gradients
