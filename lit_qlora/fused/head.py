"""The last norm, the output head and the loss together, forward and backward, a slice of tokens at a time.

Only tokens with a label take part. The logits of a slice become their own gradients, so that nothing of size (T, V) is
ever kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.fused.group import Group
from lit_qlora.fused.memory import head_tokens
from lit_qlora.fused.offload import to_device
from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.kernels.dropout import Dropout
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.norm import Norm, add_norm


@dataclass(frozen=True)
class Labelled:
    """The tokens that have a label.

    Attributes:
        places: (N,) int64, which of the T tokens they are; None stands for all, some of which may have none.
        labels: (N,) int64, negative where there is none; weights: (N,) float32, None for 1 everywhere.
    """

    places: Tensor | None
    labels: Tensor
    weights: Tensor | None

    @staticmethod
    def of(labels: Tensor, weights: Tensor | None, step: int = 1) -> "Labelled":
        """From labels and weights of any shape; those of a batch on the device, which is not asked, are all taken.

        Args:
            step: as many tokens without a label are taken too as bring N to a multiple of it, or to T.
        """
        labels, weights = labels.flatten(), None if weights is None else weights.flatten()
        if labels.is_cuda:
            return Labelled(None, labels, weights)
        known = labels >= 0
        more = -int(known.sum()) % step
        places = torch.cat((known.nonzero()[:, 0], (~known).nonzero()[:more, 0]))
        if len(places) == len(labels):
            return Labelled(None, labels, weights)
        return Labelled(places, labels[places], None if weights is None else weights[places])

    def to(self, device: torch.device) -> "Labelled":
        """On a device."""
        places, weights = (None if part is None else to_device(part, device) for part in (self.places, self.weights))
        return Labelled(places, to_device(self.labels, device), weights)


class Head:
    """Norm, head and loss.

    Attributes:
        group: the head, with or without an adapter.
        cap: see kernels.cross_entropy.
    """

    def __init__(self, norm: Norm, group: Group, cap: float | None) -> None:
        self.norm, self.group, self.cap = norm, group, cap

    def loss(
        self, stream: list[Tensor], labelled: Labelled, workspace: Tensor | None, dropout: Dropout, learns: bool
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """The sum of the losses; its gradient at the stream and at the adapter, if it `learns`.

        Args:
            stream: a pair (T, E) whose sum it is; taken out of the list, so that its memory is free as soon as can be.
            workspace: for the head's weights if they are quantised.

        Returns:
            float32 scalar; (T, E) or None; pairs of an adapter's gradient and what has to be added to it.
        """
        x, y = stream
        stream.clear()
        tokens, places, group = x.size(0), labelled.places, self.group
        if places is not None:
            x = x.index_select(0, places)
            y = y.index_select(0, places)
        count = x.size(0)
        if not count:
            return torch.zeros((), device=x.device), x.new_zeros(tokens, x.size(1)) if learns else None, []
        both = group.empty_input(count)
        x, numbers = add_norm(x, y, self.norm, both)
        del y
        z = group.project(both, both, dropout)
        matrix = group.matrix(workspace)
        weights = torch.ones(count, device=x.device) if labelled.weights is None else labelled.weights
        loss = torch.empty(count, device=x.device)
        step = head_tokens(group.n)
        room = torch.empty(min(step, count), group.n, dtype=x.dtype, device=x.device)
        # What the adapter will learn waits for the gradient of the loss, which the backward pass brings.
        waiting = [(g, torch.zeros_like(g)) for g in (group.grad_a, group.grad_b)] if learns and group.rank else []
        pending = Pending()
        for first in range(0, count, step):
            here = slice(first, min(first + step, count))
            logits = group.product(both[here], matrix, room[: here.stop - first])
            cross_entropy_(logits, labelled.labels[here], weights[here], loss[here], self.cap)
            if z is not None and waiting:
                group.learn_b(logits, z[here], pending, into=waiting[1][1])
                pending.flush()
            if learns:
                torch.mm(logits, matrix, out=both[here])
        del room, logits
        if not learns:
            return loss.sum(), None, []
        if waiting:
            group.learn_a(x, both, pending, dropout, self.norm, numbers, into=waiting[0][1])
            pending.flush()
        d_x = group.d_stream(both, x, self.norm, numbers, z, None, dropout)
        del both, x
        if places is not None:
            d_x = d_x.new_zeros(tokens, d_x.size(1)).index_copy_(0, places, d_x)
        return loss.sum(), d_x, waiting
