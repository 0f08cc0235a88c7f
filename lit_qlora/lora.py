"""Low-rank adaptation: W x becomes W x + (alpha / r) B A x, and only A and B learn. Hu et al. 2021."""

import math

import torch
from torch import Tensor, nn

from lit_qlora.errors import UsageError
from lit_qlora.settings import LoRAConfig


class LoRALinear(nn.Module):
    """A frozen linear layer (plain or quantised) plus a trainable low-rank update, which is float32.

    Attributes:
        lora_a: (r, in), random as in the paper's code; lora_b: (out, r), zero, so that a fresh adapter changes nothing.
    """

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.base = base
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.scale = config.alpha / config.r
        self.dropout = nn.Dropout(config.dropout)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.lora_a = nn.Parameter(torch.empty(config.r, self.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, config.r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.base(x)
        update = self.dropout(x) @ self.lora_a.T.to(x.dtype) @ self.lora_b.T.to(x.dtype)
        return y + self.scale * update


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze `model`, then give an adapter to each linear layer whose path holds a target word, in place.

    Raises:
        UsageError: for a target word that matches no layer of this model.
    """
    linears = {path: module for path, module in model.named_modules() if is_linear(module)}
    found = {path: words_of(path).intersection(config.targets) for path in linears}
    missing = sorted(set(config.targets).difference(*found.values()))
    if missing:
        raise UsageError(f"lora.targets {missing} match no layer of this model, so they would learn nothing.")
    model.requires_grad_(False)
    for path, module in linears.items():
        if found[path]:
            model.set_submodule(path, LoRALinear(module, config))


def words_of(path: str) -> set[str]:
    """The target words that a layer answers to: the parts of its path and, unless it is the output head, 'all'."""
    return {*path.split("."), *(() if path == "head" else ("all",))}


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can be put around `module`: a plain or quantised linear layer, not one that has one."""
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not isinstance(module, LoRALinear)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors: "<layer>.lora_a" (r, in) and "<layer>.lora_b" (out, r) for each adapted layer."""
    return {
        f"{path}.{name}": getattr(module, name).detach()
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for name in ("lora_a", "lora_b")
    }


def count_trainable(model: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
