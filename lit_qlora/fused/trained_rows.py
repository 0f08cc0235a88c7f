"""Rows of the embedding that learn, and a head that shares them."""

import torch
from torch import Tensor

from lit_qlora.fused.large_rank import in_float32
from lit_qlora.lora.embeddings import TiedHead, TrainedEmbedding
from lit_qlora.model.gpt import GPT, times


class TrainedRows:
    """The trained rows of a model's embedding.

    Attributes:
        rows: (n, E) float32, which learn; gradient: theirs.
        shared: the head shares them.
        low: (n, E), their copy in the dtype of products, for the head.
    """

    def __init__(self, model: GPT, embedding: TrainedEmbedding) -> None:
        self.embedding, self.rows = embedding, embedding.rows
        self.gradient = torch.zeros_like(self.rows.data)
        self.multiplier, self.shared = model.config.embedding_multiplier, isinstance(model.head, TiedHead)
        bias: Tensor | None = model.head.base.bias if isinstance(model.head, TiedHead) else None  # type: ignore[assignment]
        self.bias = None if bias is None else bias.detach()[embedding.tokens]
        self.low = self.rows.detach().to(embedding.weight.dtype) if self.shared else None

    @property
    def whole(self) -> bool:
        """True if all rows learn, in the order of their ids."""
        return self.embedding.whole

    def refresh(self) -> None:
        """Bring the copy up to date."""
        if self.low is not None:
            self.low.copy_(self.rows.detach())

    def add_gradient(self, tokens: Tensor, d: Tensor) -> None:
        """Add what comes back to the embeddings (T, E) of tokens (T,), times ModelConfig.embedding_multiplier.

        Rows are sorted before they are added, so the sums are the same on every run.
        """
        row, d = self.embedding.row_of[tokens], times(d, self.multiplier).float()
        if not self.whole:
            d, row = d * (row >= 0)[:, None], row.clamp(min=0)
        self.gradient.index_put_((row,), d, accumulate=True)

    def write_logits(self, x: Tensor, logits: Tensor) -> None:
        """Replace the logits (T, V) of trained tokens, given the head's input x (T, E)."""
        assert self.low is not None
        own = x @ self.low.T
        logits[:, self.embedding.tokens] = own if self.bias is None else own + self.bias

    def logits_backward(self, x: Tensor, d_logits: Tensor, matrix: Tensor, gradient: Tensor) -> None:
        """Overwrite x (T, E) with its gradient, and add that of the rows to `gradient`.

        Args:
            d_logits: (T, V); those of trained tokens are set to zero, unless all are.
            matrix: (V, E), what the other logits were made of.
        """
        own = d_logits if self.whole else d_logits[:, self.embedding.tokens]
        gradient.add_(in_float32(own.T, x))
        if self.whole:
            torch.mm(d_logits, matrix, out=x)
            return
        assert self.low is not None
        d_logits[:, self.embedding.tokens] = 0
        torch.mm(d_logits, matrix, out=x)
        x.addmm_(own, self.low)


def rows_of(model: GPT) -> TrainedRows | None:
    """The trained rows of a model, if there are some."""
    return TrainedRows(model, model.embed) if isinstance(model.embed, TrainedEmbedding) else None
