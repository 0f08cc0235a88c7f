"""Rows of embedding and output head that learn."""

from typing import Any

import torch
from torch import Tensor

from lit_qlora.fused.large_rank import in_float32
from lit_qlora.lora.embeddings import TiedHead, TrainedEmbedding, TrainedHead
from lit_qlora.model.gpt import GPT, times


class EmbeddingRows:
    """The trained rows of a model's embedding.

    Attributes:
        rows: (n, E) float32, which learn; gradient: theirs.
    """

    def __init__(self, model: GPT, embedding: TrainedEmbedding) -> None:
        self.embedding, self.rows = embedding, embedding.rows
        self.gradient = torch.zeros_like(self.rows.data)
        self.multiplier = model.config.embedding_multiplier

    def add_gradient(self, tokens: Tensor, d: Tensor) -> None:
        """Add what comes back to the embeddings (T, E) of tokens (T,), times ModelConfig.embedding_multiplier.

        Rows are sorted before they are added, so the sums are the same on every run.
        """
        row, d = self.embedding.row_of[tokens], times(d, self.multiplier).float()
        if not self.embedding.whole:
            d, row = d * (row >= 0)[:, None], row.clamp(min=0)
        self.gradient.index_put_((row,), d, accumulate=True)


class HeadRows:
    """The trained rows of a model's head, which may be those of its embedding.

    Attributes:
        rows: (n, E) float32, which learn; gradient: theirs.
        tokens: (n,), their ids; whole: they are all rows, in the order of their ids.
        low: (n, E), their copy in the dtype of products.
    """

    def __init__(self, head: TrainedHead, dtype: torch.dtype, gradient: Tensor | None) -> None:
        self.rows, self.tokens, self.whole = head.trained, head.tokens, head.whole
        self.gradient = torch.zeros_like(self.rows.data) if gradient is None else gradient
        bias: Tensor | None = head.base.bias  # type: ignore[assignment]
        self.bias = None if bias is None else bias.detach()[self.tokens]
        self.low = self.rows.detach().to(dtype)

    def refresh(self) -> None:
        """Bring the copy up to date."""
        self.low.copy_(self.rows.detach())

    def write_logits(self, x: Tensor, logits: Tensor) -> None:
        """Replace the logits (T, V) of trained tokens, given the head's input x (T, E)."""
        own = x @ self.low.T
        logits[:, self.tokens] = own if self.bias is None else own + self.bias

    def logits_backward(self, x: Tensor, d_logits: Tensor, matrix: Tensor, gradient: Tensor) -> None:
        """Overwrite x (T, E) with its gradient, and add that of the rows to `gradient`.

        Args:
            d_logits: (T, V); those of trained tokens are set to zero, unless all are.
            matrix: (V, E), what the other logits were made of.
        """
        own = d_logits if self.whole else d_logits[:, self.tokens]
        gradient.add_(in_float32(own.T, x))
        if self.whole:
            torch.mm(d_logits, matrix, out=x)
            return
        d_logits[:, self.tokens] = 0
        torch.mm(d_logits, matrix, out=x)
        x.addmm_(own, self.low)


def rows_of(model: GPT) -> tuple[EmbeddingRows | None, HeadRows | None]:
    """The trained rows of a model's embedding and of its head, where there are some."""
    if not isinstance(model.embed, TrainedEmbedding):
        return None, None
    embedding = EmbeddingRows(model, model.embed)
    head: Any = model.head
    if not isinstance(head, TrainedHead):
        return embedding, None
    shared = embedding.gradient if isinstance(head, TiedHead) else None
    return embedding, HeadRows(head, model.embed.weight.dtype, shared)
