"""The whole model, in the order a token meets it. This file is the meaning; faster paths must agree with it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_qlora.model.attention import Attention, Place, Places, drop, softcap
from lit_qlora.model.cache import BlockCache
from lit_qlora.model.cache import KVCache as KVCache
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.delta_net import DeltaNet
from lit_qlora.model.latent_attention import LatentAttention
from lit_qlora.model.lesson import Lesson, linear_distillation
from lit_qlora.model.mlp import ExpertsBeside, make_mlp
from lit_qlora.model.norm import make_norm
from lit_qlora.model.per_layer import PerLayerEmbedding, PerLayerInput
from lit_qlora.model.short_conv import ShortConv
from lit_qlora.model.state_space import StateSpace

LOGITS_AT_ONCE = 2**26
"""Logits that exist at a time while computing a loss: 0.25 GiB in float32."""
IGNORE = -100
"""Label of a position that carries no loss; torch's own default."""


class FastPath(Protocol):
    """A faster way to compute the loss of a model, with memory that can be released."""

    @property
    def loss(self) -> Callable[..., Tensor]:
        """As GPT.loss."""
        ...

    @property
    def token_losses(self) -> Callable[..., Tensor]:
        """As GPT.token_losses."""
        ...

    @property
    def states(self) -> Callable[..., Tensor]:
        """The last stream (N, E) at labelled tokens, before the last norm, given the arguments of GPT.scores."""
        ...

    @property
    def can_release(self) -> bool:
        """True if there are weights that release would free."""
        ...

    def flatten(self, group_of: Callable[[nn.Parameter], Any]) -> Sequence[nn.Parameter]:
        """Tensors that hold the adapters and have their gradients from now on; none where adapters are few.

        Args:
            group_of: the optimizer's group of an adapter's parameter; a tensor holds parameters of one.
        """
        ...

    def release(self) -> None:
        """Free cached and carried over weights, and say so. No loss may be waiting for its backward pass."""
        ...


class Gathers(Protocol):
    """Weights of blocks that lie over several processes and are gathered as a pass needs them.

    All processes make the same passes; see lit_qlora.sharded.
    """

    def holds(self, tensor: Tensor) -> bool:
        """True if a tensor is a view of the memory that the weights are gathered into."""
        ...

    def begin(self) -> None:
        """Begin a pass over the blocks, from the first one on."""
        ...

    def need(self, block: int) -> None:
        """Let the weights of a block be there; a pass asks for the blocks in their order, and backward in reverse."""
        ...

    def complete(self, backward: bool = True) -> None:
        """Take part in the rest of a pass, which computes nothing here."""
        ...

    def led(self) -> AbstractContextManager[None]:
        """Let this process, the first, compute alone inside; the others call `follow` meanwhile."""
        ...

    def follow(self) -> None:
        """Take part in what the first process computes inside of `led`."""
        ...

    def differs(self) -> bool:
        """True in all processes if they have not all made the same passes."""
        ...


class Rows(Protocol):
    """The part of each row that this process computes, where several share them; see lit_qlora.sharded.rows.

    All processes of a row make the same passes.
    """

    @property
    def processes(self) -> int:
        """Number of processes that share a row."""
        ...

    @property
    def groups(self) -> int:
        """Groups of so many processes; each takes other rows."""
        ...

    @property
    def group(self) -> int:
        """The number of the group of this process."""
        ...

    def part(self, row: Tensor, fill: float = 0) -> Tensor:
        """Cut (B, T), a column for each token, to this process's (B, t), perhaps with padding that has `fill`."""
        ...

    def place(self, place: Place, length: int) -> Place:
        """The positions of this part, from those of whole rows of so many tokens."""
        ...


class GPT(nn.Module):
    """Tokens in, next-token logits out. See ModelConfig for the shape letters.

    Attributes:
        recompute: recompute each block in the backward pass instead of saving its activations.
        fast: what computes loss instead, see lit_qlora.fused.
        gathers: what brings the weights of blocks, where no process holds them all.
        rows: the part of each row that this process computes; None for all of it. `loss` is then of the labels there,
            and `hidden` returns the part; their arguments stay whole rows.
        dropout: see set_dropout.
        hits: () int64 on the model's device; loss adds the number of labelled tokens whose likeliest token is the
            label. None counts nothing.
        score: a trained head in float32 that reads labels off tokens, see scores; None where there is none.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.dropout = 0.0
        self.fast: FastPath | None = None
        self.gathers: Gathers | None = None
        self.rows: Rows | None = None
        self.hits: Tensor | None = None
        self.score: nn.Linear | None = None
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_norm = make_norm(config, config.n_embd) if config.embedding_norm else nn.Identity()
        self.per_layer = PerLayerEmbedding(config) if config.per_layer_size else None
        self.positions = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.embed.weight

    @classmethod
    def skeleton(cls, config: ModelConfig) -> "GPT":
        """The model on the meta device, with names and shapes but without memory, to be filled or counted."""
        with torch.device("meta"):
            return cls(config)

    def set_dropout(self, p: float) -> None:
        """Drop elements in training with probability p, at all places where GPT-NeoX and BERT do.

        These are the embeddings, the weights of attention, and the output of attention and of MLP before it is added.
        """
        parts: list[Any] = [self, *self.blocks, *(block.attn for block in self.blocks if block.attn)]
        for part in parts:
            part.dropout = p

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the token that follows each token.

        Args:
            tokens: (B, T) int64.
            cache: what came before `tokens`; it is extended by them.

        Returns:
            (B, T, V) in the dtype of the weights.
        """
        return self.logits(self.hidden(tokens, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E), what `hidden` returns, -> (..., V)."""
        logits: Tensor = self.head(hidden)
        return softcap(logits, self.config.logit_softcap)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """Cross-entropy summed over the labelled tokens.

        The arguments are the fields of a data.Batch and may lie on the host, where the fast path prefers them.

        Args:
            tokens: (B, T) int64.
            labels: (B, T) int64, the token that should follow each token, IGNORE where no loss is wanted.
            weights: (B, T) float32, the factor of each token's loss; None is 1 everywhere.
            positions, segments: see hidden.
            lesson: what a teacher holds likely; the loss is then the mix that it describes.

        Returns:
            float32 scalar; zero if every label is IGNORE.
        """
        if self.fast is not None:
            return self.fast.loss(tokens, labels, weights, positions, segments, lesson=lesson)
        tokens, labels, weights, positions, segments = self._here(tokens, labels, weights, positions, segments)
        hidden = self.hidden(tokens, positions=positions, segments=segments)
        if self.rows is not None:
            labels = self.rows.part(labels, IGNORE)
            weights = None if weights is None else self.rows.part(weights)
        if lesson is not None:
            lesson = lesson.to(hidden.device)
            at_once = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
            return linear_distillation(hidden, self.logits, labels, weights, lesson, at_once, self.hits)
        return linear_cross_entropy(hidden, self.head, labels, weights, cap=self.config.logit_softcap, hits=self.hits)

    def token_losses(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen_until: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of each labelled token, for losses that are no sum of it.

        Args:
            tokens, labels: see loss.
            positions, segments, seen_until: see hidden; a fast path needs positions and segments where seen_until is
                given.

        Returns:
            (B, T) float32, 0 where a label is IGNORE.
        """
        assert self.rows is None
        if self.fast is not None:
            return self.fast.token_losses(tokens, labels, positions, segments, seen_until)
        tokens, labels, positions, segments, seen_until = self._here(tokens, labels, positions, segments, seen_until)
        hidden = self.hidden(tokens, positions=positions, segments=segments, seen_until=seen_until)
        return token_cross_entropy(hidden, self.head, labels, cap=self.config.logit_softcap)

    def scores(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen_until: Tensor | None = None,
    ) -> Tensor:
        """The outputs of the head `score` at the labelled tokens, in their order.

        Args:
            tokens, labels: see loss.
            positions, segments, seen_until: see hidden.

        Returns:
            (N, C) float32.
        """
        assert self.score is not None
        assert self.rows is None
        if self.fast is not None:
            states = self.fast.states(tokens, labels, positions, segments, seen_until)
            return self.score(self.norm(states).to(self.score.weight.dtype))
        tokens, labels, positions, segments, seen_until = self._here(tokens, labels, positions, segments, seen_until)
        hidden = self.hidden(tokens, positions=positions, segments=segments, seen_until=seen_until)[labels >= 0]
        read = hidden.to(self.score.weight.dtype)
        return self.score(read / self.config.logit_multiplier)  # which the head of tokens alone has

    @property
    def can_release(self) -> bool:
        """True if there are weights that release would free."""
        return self.fast is not None and self.fast.can_release

    def release(self) -> bool:
        """Free the weights that the fast path has cached or carried over; return True if there were any.

        No loss may be waiting for its backward pass.
        """
        if self.fast is None or not self.fast.can_release:
            return False
        self.fast.release()
        return True

    def _here(self, *batch: Any) -> Any:
        """The tensors of a batch on the device of the weights."""
        device = self.embed.weight.device
        return (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in batch)

    def _block(self, i: int, *arguments: Any) -> Tensor:
        """The output of block i, once its weights are there."""
        if self.gathers is not None:
            self.gathers.need(i)
        out: Tensor = self.blocks[i](*arguments)
        return out

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen_until: Tensor | None = None,
    ) -> Tensor:
        """(B, T) int64 -> (B, T, E), what the head reads.

        Args:
            tokens: (B, T) int64.
            cache: see forward.
            positions: (B, T) int64, the index of each token in its document; None counts along the row.
            segments: (B, T) integers, the document of each token, documents being laid end to end; a token sees its
                own document alone. Padding is -1. None where a row is one document.
            seen_until: (B, T) int64, for documents that begin alike and share that: the column from which on no token
                sees this one. A shared beginning stands once, before all that goes on from it. Models with state_layers
                cannot share: the state behind the beginning is gone when a second document begins.
        """
        B, T = tokens.shape
        assert seen_until is None or not self.config.state_layers
        assert cache is None or self.rows is None
        if cache:
            positions = cache.positions(T)
        elif positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        places = Places(self.config, positions, cache, segments, seen_until)
        if self.rows is not None:
            tokens, positions = self.rows.part(tokens), self.rows.part(positions)
            places.change(partial(self.rows.place, length=T))
        x = self.embed_norm(times(self.embed(tokens), self.config.embedding_multiplier))
        if self.positions is not None:
            x = x + self.positions(positions)
        own = None if self.per_layer is None else self.per_layer(tokens, x).unbind(2)
        x = drop(x, self.dropout if self.training else 0.0)
        if self.gathers is not None:
            self.gathers.begin()
        for i in range(len(self.blocks)):
            arguments = (i, x, places.of(i), cache.layer(i, T) if cache else None, own[i] if own else None)
            if self.recompute and self.training:
                x = checkpoint(self._block, *arguments, use_reentrant=False)
            else:
                x = self._block(*arguments)
            if self.gathers is not None and x.requires_grad:
                x = _Needed.apply(x, self.gathers, i)
        if cache:
            cache.advance(T)
        normed: Tensor = self.norm(x)
        return times(normed, self.config.logit_multiplier)


class Block(nn.Module):
    """Attention, or what takes its place, and MLP, each with norms around it and added to the stream.

    Attributes:
        dropout: see GPT.set_dropout.
    """

    dropout = 0.0

    def __init__(self, config: ModelConfig, i: int) -> None:
        super().__init__()
        self.config = config
        before, after = config.norm_position != "after", config.norm_position != "before"
        self.norm_1 = make_norm(config, config.n_embd) if before else nn.Identity()
        self.attn = None if i in config.state_layers else make_attention(config, i)
        self.delta = make_delta(config) if config.is_delta(i) else None
        self.conv = ShortConv(config) if config.is_conv(i) else None
        self.post_norm_1 = make_norm(config, config.n_embd) if after else nn.Identity()
        self.norm_2 = make_norm(config, config.n_embd) if before and not config.shared_norm else nn.Identity()
        self.mlp = make_mlp(config, i)
        self.beside = ExpertsBeside(config) if config.experts_beside and config.has_experts(i) else None
        self.post_norm_2 = make_norm(config, config.n_embd) if after else nn.Identity()
        self.per_layer = PerLayerInput(config) if config.per_layer_size else None
        self.scale = nn.Parameter(torch.ones(1)) if config.block_scale else None

    def forward(self, x: Tensor, place: Place, cache: BlockCache | None, own: Tensor | None = None) -> Tensor:
        """(B, T, E) -> (B, T, E); `own` is the block's part of what PerLayerEmbedding returns."""
        share, p = self.config.residual_multiplier, self.dropout if self.training else 0.0
        read = self.norm_1(x)
        mix: Any = self.attn or self.delta or self.conv
        attended = times(drop(self.post_norm_1(mix(read, place, cache)), p), share)
        if self.config.parallel_residual:
            read = read if self.config.shared_norm else self.norm_2(x)
            return x + attended + times(drop(self.post_norm_2(self.mlp(read)), p), share)
        x = x + attended
        fed = self.mlp(self.norm_2(x))
        if self.beside is not None:
            fed = self.beside(fed, x)
        x = x + times(drop(self.post_norm_2(fed), p), share)
        if self.per_layer is not None:
            x = self.per_layer(x, own)
        return x if self.scale is None else x * self.scale


class _Needed(torch.autograd.Function):
    """The output of a block, unchanged; its backward pass begins when the block's weights are there.

    A frozen layer reads them in its backward pass too, perhaps before anything of the block is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathers: Gathers, block: int) -> Tensor:
        ctx.gathers, ctx.block = gathers, block
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor, None, None]:
        ctx.gathers.need(ctx.block)
        return d_out[0], None, None


def make_attention(config: ModelConfig, block: int) -> nn.Module:
    """The kind of attention that this model uses."""
    return LatentAttention(config) if config.kv_latent_size else Attention(config, block)


def make_delta(config: ModelConfig) -> nn.Module:
    """The kind of state that this model keeps in the place of keys and values."""
    return StateSpace(config) if config.state_space else DeltaNet(config)


def times(x: Tensor, factor: float) -> Tensor:
    """Multiply x by a factor that is rounded to the dtype of x, as it is in the reference."""
    return x if factor == 1 else x * torch.tensor(factor, dtype=x.dtype).item()


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    weights: Tensor | None = None,
    at_once: int = LOGITS_AT_ONCE,
    cap: float | None = None,
    hits: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of head(hidden) against labels, summed, without ever holding all the logits.

    Where B * T * V exceeds `at_once`, the logits of a slice of tokens exist at a time. The backward pass recomputes
    them.

    Args:
        hidden: (B, T, E), any float dtype; the softmax is float32.
        head: any module (..., E) -> (..., V).
        labels: (B, T) int64, IGNORE where no loss is wanted.
        weights: (B, T) float32, the factor of each token's loss; None is 1 everywhere.
        cap: see softcap.
        hits: see GPT.

    Returns:
        float32 scalar; zero if every label is IGNORE.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    weights = None if weights is None else weights.flatten()
    vocab_size: int = head.out_features  # type: ignore[assignment]
    rows = max(1, at_once // vocab_size)

    def slice_loss(hidden: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = softcap(head(hidden).float(), cap)
        right = None if hits is None else (logits.detach().argmax(dim=-1) == labels).sum()
        if weights is None:
            return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), right
        return (weights * F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")).sum(), right

    if len(labels) <= rows:
        total, right = slice_loss(hidden, labels, weights)
        if hits is not None and right is not None:
            hits += right
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), rows):
        here = slice(start, start + rows)
        some = None if weights is None else weights[here]
        part: Any = checkpoint(slice_loss, hidden[here], labels[here], some, use_reentrant=False)
        total = total + part[0]
        if hits is not None:  # outside of what is recomputed
            hits += part[1]
    return total


def token_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, at_once: int = LOGITS_AT_ONCE, cap: float | None = None
) -> Tensor:
    """Cross-entropy of head(hidden) against each label; see linear_cross_entropy.

    Returns:
        (B, T) float32, 0 where a label is IGNORE.
    """
    known = (labels.flatten() >= 0).nonzero()[:, 0]
    hidden, wanted = hidden.flatten(0, 1)[known], labels.flatten()[known]
    vocab_size: int = head.out_features  # type: ignore[assignment]
    rows = max(1, at_once // vocab_size)

    def slice_losses(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(softcap(head(hidden).float(), cap), wanted, reduction="none")

    parts: list[Tensor] = [
        slice_losses(*some) if len(known) <= rows else checkpoint(slice_losses, *some, use_reentrant=False)
        for some in zip(hidden.split(rows), wanted.split(rows), strict=True)
    ]
    losses = torch.zeros(labels.numel(), device=labels.device)
    return losses.index_copy(0, known, torch.cat(parts)).view(labels.shape)
