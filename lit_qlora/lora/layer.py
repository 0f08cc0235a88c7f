"""Low-rank adaptation: W x becomes W x + (alpha / r) B A x, and only A and B learn. Hu et al. 2021."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.errors import UsageError
from lit_qlora.lora.embeddings import TrainedEmbedding, TrainedHead, train_embeddings
from lit_qlora.model.mlp import MoE, Router
from lit_qlora.model.rope_scaling import scale
from lit_qlora.quantize import frozen_weight
from lit_qlora.settings import LoRAConfig, first_match

ALIASES = {"query_gate": "query"}
"""Part of a path -> the target word that means it too: Hugging Face's q_proj is both."""


class LoRALinear(nn.Module):
    """A frozen linear layer (plain or quantised) plus a trainable low-rank update, which is float32.

    Attributes:
        lora_a: (r, in), random as in the paper's code; lora_b: (out, r), zero, so that a fresh adapter changes nothing.
        magnitude: (out,), the lengths of the rows of the weight, which learn with DoRA; else None.
        origin: A and B as they were when something was taken out of the base for them, see
            lit_qlora.lora.initialization; else None.
    """

    def __init__(self, base: nn.Module, config: LoRAConfig, path: str = "") -> None:
        super().__init__()
        self.base = base
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        r, self.scale = config.rank(path), config.scale(path)
        self.dropout = nn.Dropout(config.dropout)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.lora_a = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=torch.float32))
        if not self.lora_a.is_meta:  # where it changes nothing, and takes a fifth of the time to plan 18,624 layers
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.magnitude = nn.Parameter(self.row_norms()) if config.dora else None
        self.origin: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.base(x)
        update = self.update(x)
        if self.magnitude is None:
            return y + update
        gain = (self.magnitude / self.row_norms()).to(y.dtype)
        bias: Any = self.base.bias
        return gain * (y + update) if bias is None else gain * (y - bias + update) + bias

    def update(self, x: Tensor) -> Tensor:
        """Compute what A and B add, (..., in) -> (..., out)."""
        return self.scale * (self.dropout(x) @ self.lora_a.T.to(x.dtype) @ self.lora_b.T.to(x.dtype))

    @property
    def beyond_low_rank(self) -> str:
        """Name the part of the update that low_rank lacks, or return ''."""
        return "" if self.magnitude is None else "DoRA"

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and the factor of their product, which is added to the output of the base; without dropout."""
        assert not self.beyond_low_rank
        return self.lora_a.detach(), self.lora_b.detach(), self.scale

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Compute the lengths (out,) of W + scale B A, constant to the gradient (DoRA, Liu et al. 2024, sec. 4.3)."""
        kind = self.lora_a.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return lengths(frozen_weight(self.base).float() + self.scale * (self.lora_b @ self.lora_a))


class LoRARouter(LoRALinear):
    """A frozen router of experts with an update of its scores."""

    base: Router

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """See Router."""
        weights, chosen = self.base(x, self.update)
        return weights, chosen


def lengths(rows: Tensor) -> Tensor:
    """Compute the norms of rows, (N, K) -> (N,); zero rows (padding of a vocabulary) get a tiny one, a safe divisor."""
    return rows.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze `model`, then give an adapter to each layer whose path holds a target word, in place.

    Raises:
        UsageError: for a setting that does not fit this model, such as a target word that matches no layer.
    """
    blocks = len(getattr(model, "blocks", ()))
    modules = dict(model.named_modules())
    linears = {path: module for path, module in modules.items() if is_linear(module)}
    found = {path: words_of(path).intersection(config.targets) for path in linears}
    missing = sorted(set(config.targets).difference(*found.values()))
    if missing:
        raise UsageError(f"lora.targets {missing} match no layer of this model, so they would learn nothing.")
    for name in ("first_layers", "last_layers"):
        if (getattr(config, name) or 0) > blocks:
            raise UsageError(f"lora.{name} is {getattr(config, name)}, but the model has {blocks} blocks.")
    chosen = [path for path in linears if found[path] and _is_chosen(path, blocks, config)]
    _check_routers(config, linears, chosen)
    _check_patterns(config, chosen)
    scale(model, *config.rope)
    model.requires_grad_(False)
    for path in chosen:
        kind = LoRARouter if isinstance(linears[path], Router) else LoRALinear
        layer = kind(linears[path], config, path)
        if config.init != "default" and config.rank(path) > min(layer.in_features, layer.out_features):
            raise UsageError(
                f"lora.init {config.init}: {path} is {layer.out_features} x {layer.in_features}, "
                f"so it has no {config.rank(path)} directions."
            )
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, layer)
    if config.tied:
        _tie(model)
    train_embeddings(model, config)


def shares_a(layers: Sequence[nn.Module]) -> bool:
    """Tell whether these layers have adapters with one A."""
    return len(layers) > 1 and len({id(getattr(layer, "lora_a", layer)) for layer in layers}) == 1


def _tie(model: nn.Module) -> None:
    """Let gate and up of each expert share one A.

    Raises:
        UsageError: where they cannot, or there are no experts that learn.
    """
    pairs = [
        (f"{path}.experts.{e}", expert.gate, expert.up)
        for path, module in model.named_modules()
        if isinstance(module, MoE)
        for e, expert in enumerate(module.experts)
        if isinstance(expert.gate, LoRALinear) and isinstance(expert.up, LoRALinear)
    ]
    if not pairs:
        raise UsageError("lora.tied has no effect: it is for adapters on the experts (mlp, all) of a mixture.")
    for path, gate, up in pairs:
        if gate.lora_a.shape != up.lora_a.shape or gate.scale != up.scale:
            raise UsageError(f"lora.tied: gate and up of {path} need the same rank and alpha.")
        up.lora_a = gate.lora_a


def words_of(path: str) -> set[str]:
    """Return the target words of a layer: the parts of its path and, except for the output head, 'all'.

    A router is no part of an MLP: its few weights decide which experts learn, so it has a word of its own.
    """
    if path.endswith(".router"):
        return {"router"}
    parts = (ALIASES.get(part, part) for part in path.split("."))
    return {*parts, *(() if path == "head" else ("all",))}


def _is_chosen(path: str, blocks: int, config: LoRAConfig) -> bool:
    """Tell whether the layer is in a block that learns, or in no block."""
    first, last = config.first_layers, config.last_layers
    if (first is None and last is None) or not path.startswith("blocks."):
        return True
    number = int(path.split(".")[1])
    return number < (first or 0) or number >= blocks - (last or 0)


def _check_routers(config: LoRAConfig, linears: Mapping[str, nn.Module], layers: list[str]) -> None:
    """Raise UsageError for a setting that routers cannot have."""
    routers = [path for path in layers if isinstance(linears[path], Router)]
    for setting, is_on in (("dora", config.dora), (f"init {config.init}", config.init != "default")):
        if routers and is_on:
            raise UsageError(
                f"lora.{setting} changes the base's weights, and {routers[0]} keeps its own. Leave it out."
            )


def _check_patterns(config: LoRAConfig, layers: list[str]) -> None:
    """Raise UsageError for a pattern that no layer uses."""
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        used = {next((key for key in patterns if first_match({key: 1.0}, path, 0.0)), None) for path in layers}
        if unused := [pattern for pattern in patterns if pattern not in used]:
            raise UsageError(f"lora.{name}: {unused[0]} matches no layer that learns, so it would have no effect.")


def is_linear(module: nn.Module) -> bool:
    """Tell whether `module` can get an adapter: a plain or quantised linear layer, or a router, that has none yet."""
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not isinstance(module, LoRALinear)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters: "<layer>.lora_a" (r, in) and "<layer>.lora_b" (out, r) of each adapted layer.

    With DoRA also "<layer>.magnitude" (out,); "embed.rows" and "head.rows" (n, E) if rows of embedding and head learn.
    """
    learners = (LoRALinear, TrainedEmbedding, TrainedHead)
    return {
        f"{path}.{name}": parameter.detach()
        for path, module in model.named_modules()
        if isinstance(module, learners)
        for name, parameter in module.named_parameters(recurse=False)
    }


def saved_state(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, Tensor], LoRAConfig]:
    """Return the adapter as a change of the published base, and its settings.

    If the initial product B0 A0 was subtracted from the base, the change is B A - B0 A0, of rank 2 r.
    """
    state = lora_state(model)
    config = dataclasses.replace(config, start=None)
    if config.init == "default":
        return state, config
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            assert module.origin is not None, "the adapter was not initialised"
            a, b = module.origin
            state[f"{path}.lora_a"] = torch.cat((module.lora_a.detach(), a))
            state[f"{path}.lora_b"] = torch.cat((module.lora_b.detach(), -b), dim=1)
    more = math.sqrt(2) if config.rslora else 2  # keeps the scale
    doubled = dataclasses.replace(
        config,
        init="default",
        loftq_steps=None,
        r=2 * config.r,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha=more * config.alpha,
        alpha_pattern={pattern: more * alpha for pattern, alpha in config.alpha_pattern.items()},
    )
    return state, doubled


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Compute with the published base inside: without adapters, and with their initial values added back."""
    learners = [
        (path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear | TrainedEmbedding | TrainedHead)
    ]
    try:
        for path, module in learners:
            plain = module.base if getattr(module, "origin", None) is None else _WithOrigin(module)  # type: ignore[arg-type]
            model.set_submodule(path, plain)
        yield
    finally:
        for path, module in learners:
            model.set_submodule(path, module)


class _WithOrigin(nn.Module):
    """A base layer with the initial values of its adapter added back."""

    def __init__(self, adapter: LoRALinear) -> None:
        super().__init__()
        assert adapter.origin is not None
        self.base, self.scale, (self.a, self.b) = adapter.base, adapter.scale, adapter.origin
        self.in_features, self.out_features = adapter.in_features, adapter.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.base(x)
        return y + self.scale * (x @ self.a.T.to(x.dtype) @ self.b.T.to(x.dtype))


def count_trainable(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
