"""The router of a block on the fast path: which experts a token takes, and the gradient through its scores."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_qlora.fused.large_rank import in_float32
from lit_qlora.fused.passes import Pass
from lit_qlora.fused.stacked import base_of
from lit_qlora.fused.uneven import PaddedB
from lit_qlora.kernels.dropout import NONE, Dropout, drop
from lit_qlora.kernels.experts import Choices, Counts, choose, choose_backward, sort
from lit_qlora.kernels.norm import Norm, add_norm, norm_backward
from lit_qlora.kernels.stack import Stack
from lit_qlora.lora.layer import LoRALinear, LoRARouter
from lit_qlora.model.mlp import Router


class RouterAdapter:
    """The adapter of a router, which computes in float32 as the router does; see Layers for the names."""

    carried: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    grad_a: Tensor
    grad_b: Tensor
    quantized = False
    workspace_size = extra_bytes = 0

    def __init__(self, layer: LoRARouter, number: int) -> None:
        self.layer, self.number = layer, number
        self.adapters: list[LoRALinear] = [layer]
        self.adapted: list[nn.Module] = [layer]
        self.padded: list[PaddedB] = []
        self.rank, self.k = layer.lora_a.shape
        self.stack = Stack((layer.out_features,), (0,), self.rank)
        self.p, self.scale = layer.dropout.p, layer.scale
        self.size_a, self.size_b = layer.lora_a.numel(), layer.lora_b.numel()

    @property
    def stored(self) -> list[Tensor]:
        """See Layers: the weights are a few, and its own."""
        return []

    def cache(self) -> None:
        """See Layers: there is nothing to cache."""

    def release(self) -> None:
        """See Layers: nothing is cached."""

    def scores(self, x: Tensor, run: Pass) -> Tensor:
        """The update of the scores, (T, n_expert) float32, of x (T, E)."""
        return self._z(drop(x.float(), self._dropout(run))) @ self.layer.lora_b.detach().T

    def backward(self, x: Tensor, d_scores: Tensor, run: Pass) -> Tensor:
        """The gradient of x (T, E) through the update, float32; those of A and B are added in place."""
        dropout = self._dropout(run)
        dropped, d_z = drop(x.float(), dropout), self.scale * d_scores @ self.layer.lora_b.detach()
        self.grad_b += d_scores.T @ self._z(dropped)
        self.grad_a += d_z.T @ dropped
        return drop(d_z @ self.layer.lora_a.detach(), dropout)

    def _z(self, dropped: Tensor) -> Tensor:
        return self.scale * dropped @ self.layer.lora_a.detach().T

    def _dropout(self, run: Pass) -> Dropout:
        return NONE if run.seed is None or not self.p else Dropout(self.p, run.seed, self.number)


class Routing:
    """A router: a token's choices, and the gradient that comes back through its scores.

    Softmax over the chosen, in one form or another, has kernels; other kinds are torch's operations, and autograd's.

    Attributes:
        adapter: None where the router does not learn.
        norm: of what it reads; None where it reads that as it is.
        factors: (n_expert,) float32, what the weights of each expert are multiplied by; None for 1.
    """

    def __init__(self, layer: Router | LoRARouter, number: int) -> None:
        self.adapter = RouterAdapter(layer, number) if isinstance(layer, LoRARouter) else None
        router: Router = base_of(layer)
        self.router, config = router, router.config
        over_chosen = config.router == "softmax_chosen"
        normalized = config.router == "softmax" and config.router_normalized
        self.has_kernel = over_chosen or (normalized and not config.router_correction and config.router_groups == 1)
        self.scale = 1.0 if over_chosen else config.router_scale
        self.k, self.experts = config.n_expert_per_token, config.n_expert
        self.weight = router.weight.detach()
        self.weight_back = self.weight.T  # views are made once
        self.bias = None if router.bias is None else router.bias.detach()
        self.norm: Norm | None = None
        self.factors: Tensor | None = None
        if router.scale is not None and router.expert_scale is not None:
            weight = router.scale.detach().float() * config.n_embd**-0.5
            self.norm = Norm("rms", config.norm_eps, weight)
            self.factors = router.expert_scale.detach().float()

    @property
    def reads_input(self) -> bool:
        """True if the backward pass reads more than the choices."""
        return self.adapter is not None or self.norm is not None or not self.has_kernel

    def scores(self, x: Tensor, run: Pass) -> Tensor:
        """(T, n_expert) float32 of x (T, E): products of 16-bit numbers are exact in it."""
        x = self._read(x)[0]
        same = x.dtype == self.weight.dtype
        scores = in_float32(x, self.weight_back) if same else x.float() @ self.weight.float().T
        if self.bias is not None:
            scores = scores + self.bias.to(scores.dtype)
        return scores if self.adapter is None else scores + self.adapter.scores(x, run)

    def choices(self, x: Tensor, run: Pass) -> Choices:
        """The choices of tokens x (T, E), which the router counts if it is to; whoever looks sees them."""
        scores, found = self.scores(x, run), None
        if self.has_kernel:
            found = Counts.room(len(x), self.k, self.experts, x.device)
            weights, chosen = choose(scores, self.k, self.scale, found)
            weights = weights if self.factors is None else weights * self.factors[chosen.long()]
        else:
            shares = self.router.shares(scores)
            best = self.router.choose(shares)
            weights, chosen = self.router.weigh(shares, best), best.int()
        if run.seen is not None:
            run.seen.append((scores, chosen))
        taken = self.router.taken if run.saves else None
        return sort(weights.contiguous(), chosen, self.experts, taken=taken, counts=found)

    def backward(self, x: Tensor, choices: Choices, d_weights: Tensor, run: Pass) -> Tensor:
        """The gradient of x (T, E) through the scores, from that of the weights of the choices (T, k)."""
        more = run.d_scores.pop() if run.d_scores else None
        rounded = more is None and self.adapter is None
        d_scores = self._d_scores(x, choices, d_weights, x.dtype if rounded else torch.float32, run)
        if more is not None:
            d_scores += more
        dx = d_scores.to(x.dtype) @ self.weight.to(x.dtype)
        read, statistics = self._read(x)
        dx = dx if self.adapter is None else dx + self.adapter.backward(read, d_scores, run).to(x.dtype)
        return dx if self.norm is None or statistics is None else norm_backward(dx, x, self.norm, statistics)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens (T, E) as the weight meets them, in float32 if they are normed, with statistics of the rows."""
        if self.norm is None or self.factors is None:
            return x, None
        out = torch.empty_like(x, dtype=self.factors.dtype)
        return out, add_norm(x, None, self.norm, out)[1]

    def _d_scores(self, x: Tensor, choices: Choices, d_weights: Tensor, dtype: torch.dtype, run: Pass) -> Tensor:
        """The gradient of the scores (T, n_expert), in `dtype` if a kernel computes it and else in float32."""
        if self.has_kernel:
            if self.factors is not None:  # the softmax's own weights again
                d_weights = d_weights * self.factors[choices.chosen.long()]
                choices = replace(choices, weights=choose(self.scores(x, run), self.k, self.scale)[0])
            return choose_backward(choices, d_weights, self.scale, dtype)
        with torch.enable_grad():
            leaf = self.scores(x, run).requires_grad_()
            weights = self.router.weigh(self.router.shares(leaf), choices.chosen.long())
            (gradient,) = torch.autograd.grad(weights, leaf, d_weights)
        return gradient
