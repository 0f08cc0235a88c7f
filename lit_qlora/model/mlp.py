"""The layers of a block that read each token by itself: an MLP, or a mixture of experts."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.model.config import ModelConfig
from lit_qlora.model.norm import make_norm


def make_mlp(config: ModelConfig, block: int) -> nn.Module:
    """The MLP of one block, or its mixture of experts."""
    if config.has_experts(block) and not config.experts_beside:
        return MoE(config)
    size = config.shared_kv_ffn_size if config.reuses(block) else 0
    return make_expert(config, size or config.ffn_size)


def make_expert(config: ModelConfig, size: int) -> nn.Module:
    """An MLP with `size` features inside."""
    return GatedMLP(config, size) if config.ffn in GATES else PlainMLP(config, size)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's SwiGLU: limited to 7, steeper (1.702), and with one added to the linear part."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swiglu_clamped": clamped_swiglu,
}
"""The kinds of config.ffn that have a gate. Shazeer 2020."""


XIELU_SLOPE, XIELU_EPS = 0.5, -1e-6
"""The slope of xIELU at 0, and the least negative number that its exponential sees."""


class XIELU(nn.Module):
    """An activation with a slope that grows on both sides and learnt strengths. Huang & Schlag 2024 (xIELU)."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.zeros(1))  # strengths before the softplus that keeps them above 0
        self.negative = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(...,) -> (...,)."""
        positive, negative = F.softplus(self.positive), XIELU_SLOPE + F.softplus(self.negative)
        below = (torch.expm1(x.clamp(max=XIELU_EPS)) - x) * negative
        return torch.where(x > 0, positive * x * x, below) + XIELU_SLOPE * x


ACTIVATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "gelu": lambda: F.gelu,
    "gelu_tanh": lambda: partial(F.gelu, approximate="tanh"),
    "relu2": lambda: lambda x: F.relu(x).square(),
    "xielu": XIELU,
}
"""The kinds that have none, each made anew for a block."""


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)). Shazeer 2020."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.combine = GATES[config.ffn]
        self.gate = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.up = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.down = nn.Linear(size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        out: Tensor = self.down(self.combine(self.gate(x), self.up(x)))
        return out


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.ffn]()
        self.up = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.down = nn.Linear(size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


KINDS = (("gate", "up"), ("down",))
"""Layers of an expert that share an input."""


class MoE(nn.Module):
    """A mixture of experts: each token goes through a few of many MLPs. Shazeer et al. 2017.

    Every expert is a module of its own with ordinary linear layers, so quantisation and adapters reach it like any
    other. An expert that no token came to has no gradient, or a zero one where several processes train together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = nn.ModuleList(make_expert(config, config.expert_size) for _ in range(config.n_expert))
        self.shared = make_expert(config, config.shared_expert_size) if config.shared_expert_size else None
        self.shared_gate = nn.Linear(config.n_embd, 1, bias=False) if config.shared_expert_gate else None
        self.before = config.router_before

    def forward(self, x: Tensor, routed: Tensor | None = None) -> Tensor:
        """(B, T, E) -> (B, T, E); `routed` is what the router reads, if it is not x."""
        tokens = x.flatten(0, -2)  # (N, E)
        weights, chosen = self.router(tokens if routed is None else routed.flatten(0, -2))
        out = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        if self.shared_gate is not None:
            out = torch.sigmoid(self.shared_gate(tokens)) * out
        # All choices (N * k,) in the order of their experts, so that each expert takes its tokens in one piece.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts))
        for expert, choices in zip(self.experts, order.split(counts.tolist()), strict=True):
            if len(choices):
                of, share = choices // chosen.size(1), weights.flatten()[choices, None]
                read = tokens[of]
                part = expert((read * share).to(read.dtype)) if self.before else expert(read) * share
                out = out.index_add(0, of, part.to(out.dtype))
        return out.view_as(x)


class ExpertsBeside(nn.Module):
    """A mixture of experts beside an MLP, each with a norm of what it gives (Gemma 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm, self.mlp = make_norm(config, config.n_embd), MoE(config)
        self.mlp_post_norm, self.plain_post_norm = (make_norm(config, config.n_embd) for _ in range(2))

    def forward(self, plain: Tensor, x: Tensor) -> Tensor:
        """(B, T, E) that the MLP gives, and the stream that both read -> (B, T, E)."""
        mixed: Tensor = self.mlp_post_norm(self.mlp(self.norm(x), routed=x))
        return self.plain_post_norm(plain) + mixed


CORRECTION = ".router.correction"
"""Ending of the name of the one weight that stays float32: 16 bits would swap experts with close scores."""


Seen = list[tuple[Tensor, Tensor]]
"""Scores (N, n_expert) and choices (N, k) of routers, in the order in which they were computed."""


class Router(nn.Module):
    """Choose the experts of a token, and weigh them.

    A fraction of a percent of the weights decides which experts work: the router computes in float32 and is never
    quantised.

    Attributes:
        in_features, out_features: E and n_expert, as of a linear layer.
        taken: (n_expert,) int64, to which passes in training add how many tokens took each expert; None where nobody
            counts.
        seen: to which passes add scores, in autograd's graph, and choices; None where nobody looks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = config.n_embd, config.n_expert
        self.taken: Tensor | None = None
        self.seen: Seen | None = None
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_expert)) if config.router_bias else None
        self.correction = nn.Parameter(torch.zeros(config.n_expert)) if config.router_correction else None
        self.scale = nn.Parameter(torch.ones(config.n_embd)) if config.router_norm else None
        self.expert_scale = nn.Parameter(torch.ones(config.n_expert)) if config.router_norm else None
        nn.init.normal_(self.weight, std=config.n_embd**-0.5)

    def forward(self, x: Tensor, update: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(N, E) -> weights (N, k) float32 and the chosen experts (N, k) int64; k is n_expert_per_token.

        Args:
            update: what an adapter adds to the scores, given what the weight is multiplied with.
        """
        bias, x = None if self.bias is None else self.bias.float(), x.float()
        if self.scale is not None:
            x = F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps) * self.scale.float() * x.size(-1) ** -0.5
        scores = F.linear(x, self.weight.float(), bias)
        if update is not None:
            scores = scores + update(x)
        shares = self.shares(scores)
        chosen = self.choose(shares)
        if self.training and self.taken is not None:
            self.taken += chosen.flatten().bincount(minlength=self.out_features)
        if self.seen is not None:
            self.seen.append((scores, chosen))
        return self.weigh(shares, chosen), chosen

    def shares(self, scores: Tensor) -> Tensor:
        """(N, n_expert) -> the same: what an expert is chosen by and weighs, before its weight is scaled."""
        if self.config.router in ("softmax_chosen", "softmax_near"):
            return scores
        return scores.sigmoid() if self.config.router == "sigmoid" else scores.softmax(dim=-1)

    def choose(self, shares: Tensor) -> Tensor:
        """(N, n_expert) -> the chosen experts (N, k) int64, the best one first."""
        merit = shares if self.correction is None else shares + self.correction.float()
        return self.within_best_groups(merit).topk(self.config.n_expert_per_token).indices

    def weigh(self, shares: Tensor, chosen: Tensor) -> Tensor:
        """(N, n_expert) and (N, k) -> how much the chosen experts count, (N, k)."""
        if self.config.router == "softmax_near":
            return self.weigh_near(shares, chosen)
        weights = shares.gather(-1, chosen)
        if self.config.router == "softmax_chosen":
            return weights.softmax(dim=-1)
        if self.config.router_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.float()[chosen]
        return self.config.router_scale * weights

    def weigh_near(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """As weigh, for softmax_near, without the noise of its own training. Liu et al. 2024 (GRIN), sec. 2.2."""
        weights, left = [], scores
        for expert in chosen.split(1, dim=-1):
            best = left.gather(-1, expert)
            far = (best - scores) / torch.maximum(scores.abs(), best) > self.config.router_tolerance
            weights.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(-1, expert))
            left = left.scatter(-1, expert, -torch.inf)
        return torch.cat(weights, dim=-1)

    def within_best_groups(self, merit: Tensor) -> Tensor:
        """(N, n_expert) -> the same, -inf outside each token's best groups. DeepSeek-AI 2024a (V2), 2024b (V3)."""
        if self.config.router_groups == 1:
            return merit
        groups = merit.unflatten(-1, (self.config.router_groups, -1))  # (N, groups, experts of each)
        # A group is worth its best expert, in V3 its best two.
        worth = groups.topk(2 if self.config.router == "sigmoid" else 1).values.sum(dim=-1)
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept.scatter_(-1, worth.topk(self.config.router_groups_kept).indices, True)
        return groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
