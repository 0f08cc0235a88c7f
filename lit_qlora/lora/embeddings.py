"""Embeddings in a run: trained ones, and noise on them during training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.errors import UsageError
from lit_qlora.quantize import frozen_weight
from lit_qlora.settings import LoRAConfig


class TrainedEmbedding(nn.Module):
    """A frozen embedding with some or all rows replaced by trainable float32 rows.

    Attributes:
        tokens: (n,) int64, the ids of those rows.
        rows: (n, E), at first what the embedding has.
    """

    tokens: Tensor
    row_of: Tensor

    def __init__(self, base: nn.Embedding, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self.base = base
        V, device = base.num_embeddings, base.weight.device
        self.whole = not tokens
        ids = torch.tensor(tokens or range(V), device=device)
        row_of = torch.full((V,), -1, device=device)  # id -> trainable row, or -1
        self.register_buffer("tokens", ids, persistent=False)
        row_of[ids] = torch.arange(len(ids), device=device)
        self.register_buffer("row_of", row_of, persistent=False)
        self.rows = nn.Parameter(base.weight.detach()[self.tokens].float())

    @property
    def weight(self) -> Tensor:
        """Weight (V, E) of the frozen embedding."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., E) in the dtype of the frozen embedding."""
        row = self.row_of[tokens]
        trained = F.embedding(row.clamp(min=0), self.rows).to(self.weight.dtype)
        return trained if self.whole else torch.where((row >= 0)[..., None], trained, self.base(tokens))


class TrainedHead(nn.Module):
    """A frozen output head with some or all rows replaced by trainable float32 rows.

    Attributes:
        tokens: (n,) int64, the ids of those rows; whole: they are all rows.
        rows: (n, E), at first what the head has.
    """

    tokens: Tensor

    def __init__(self, base: nn.Module, tokens: Tensor, rows: nn.Parameter | None, whole: bool = False) -> None:
        super().__init__()
        self.base, self.whole = base, whole
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_parameter("rows", rows)

    @property
    def weight(self) -> Tensor:
        """Weight (V, E) of the frozen head."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def trained(self) -> nn.Parameter:
        """The rows (n, E), wherever they belong."""
        rows: Any = self.rows
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        logits = x @ self.trained.T.to(x.dtype)
        bias: Any = self.base.bias
        if bias is not None:
            logits = logits + bias[self.tokens].to(x.dtype)
        return logits if self.whole else self.base(x).index_copy(-1, self.tokens, logits)


class TiedHead(TrainedHead):
    """An output head that shares the rows of a TrainedEmbedding."""

    def __init__(self, base: nn.Module, embedding: TrainedEmbedding) -> None:
        super().__init__(base, embedding.tokens, None, embedding.whole)
        self._embedding = (embedding,)  # in a tuple, so that its parameters are not registered twice

    @property
    def trained(self) -> nn.Parameter:
        """See TrainedHead."""
        return self._embedding[0].rows


def train_embeddings(model: nn.Module, config: LoRAConfig) -> None:
    """Make the embeddings that the settings name trainable, in place; a tied head follows.

    Raises:
        UsageError: for an unknown token, or a tied head with an adapter of its own.
    """
    tokens: Any = config.train_tokens
    if not tokens and not config.train_embeddings:
        return
    embed: Any = model.embed
    if max(tokens, default=0) >= embed.num_embeddings:
        raise UsageError(f"lora.train_tokens: {max(tokens)} is no token; the model has {embed.num_embeddings}.")
    tied, head = model.config.tied_head, model.head  # type: ignore[union-attr]
    if tied and "head" in config.targets:
        raise UsageError(
            "The model's head is its embedding, so it cannot have an adapter and be trained as well.\n"
            "Leave head out of lora.targets, or lora.train_embeddings and lora.train_tokens."
        )
    model.embed = TrainedEmbedding(embed, tokens)
    if tied:
        model.head = TiedHead(head, model.embed)  # type: ignore[arg-type]
    elif config.train_head_rows:
        rows = frozen_weight(head)[model.embed.tokens].float()  # type: ignore[arg-type]
        model.head = TrainedHead(head, model.embed.tokens, nn.Parameter(rows))  # type: ignore[arg-type]


def add_noise(model: nn.Module, alpha: float) -> None:
    """Add noise to the embeddings of `model` during training. NEFTune, Jain et al. 2023.

    Args:
        alpha: the noise is uniform within alpha / sqrt(T * E) around zero, T being the length of the row.
    """

    def disturb(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        most = alpha / (output.size(-2) * output.size(-1)) ** 0.5
        return output + torch.empty_like(output).uniform_(-most, most)

    if alpha:
        embed: Any = model.embed
        embed.register_forward_hook(disturb)
