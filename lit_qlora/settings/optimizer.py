"""Settings of the optimizer."""

import re
from dataclasses import dataclass, field, fields

from lit_qlora.errors import did_you_mean
from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Pattern, Positive, ShareBelowOne

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "rmsprop": "torch.optim.RMSprop",
    "adadelta": "torch.optim.Adadelta",
    "adafactor": "torch.optim.Adafactor",
    "lion": "bitsandbytes.optim.Lion",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "paged-adamw": "bitsandbytes.optim.PagedAdamW",
    "paged-adamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "paged-adamw32bit": "bitsandbytes.optim.PagedAdamW32bit",
}
"""Short names of optimizers, and their classes."""
CLASS_PATH = re.compile(r"(torch|bitsandbytes)\.optim\.[A-Z]\w*")
"""Classes that a user may name."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """The rule that updates the adapter. A setting that the optimizer does not have is refused."""

    prefix = "optimizer."
    first = ("name",)

    name: str = "adamw"
    """adamw (fused on a GPU), adam, sgd, rmsprop, adadelta, adafactor or lion; with 8-bit state adamw8bit or lion8bit;
    with state that can leave a full GPU paged-adamw, paged-adamw8bit or paged-adamw32bit; or a class of torch.optim or
    bitsandbytes.optim, e.g. torch.optim.NAdam."""
    betas: tuple[ShareBelowOne, ...] | None = None
    """Decay rates of the running averages, e.g. [0.9,0.999]. By default the optimizer's own."""
    eps: Positive | None = None
    """Added to the denominator of the update. By default the optimizer's own."""
    momentum: ShareBelowOne | None = None
    """Share of the last update that is added to the next. By default the optimizer's own, 0.9 for sgd."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    options: dict[str, bool | int | float] = field(default_factory=dict)
    """Other arguments of the optimizer's class, e.g. {rho: 0.95} for adadelta."""
    rate_pattern: dict[Pattern, Positive] = field(default_factory=dict)
    """Other learning rates for some layers, as multiples of train.learning_rate, e.g. {mlp.down: 0.5}. A key is a
    regular expression for the end of the layer's path, as in lora.rank_pattern."""
    lora_plus: Positive = 1.0
    """Learning rate of each B, as a multiple of that of A. LoRA+ (Hayou et al. 2024) takes 16."""

    def __post_init__(self) -> None:
        """Check the names. An optimizer refuses settings that it does not have when it is made."""
        super().__post_init__()
        check(
            self.name in OPTIMIZERS or CLASS_PATH.fullmatch(self.name) is not None,
            f"optimizer.name {self.name!r} is not known.{did_you_mean(self.name, list(OPTIMIZERS))} "
            f"Known: {', '.join(OPTIMIZERS)}; or torch.optim.NAME or bitsandbytes.optim.NAME.",
        )
        taken = {"params", "lr", "weight_decay", "fused", *(setting.name for setting in fields(OptimizerConfig))}
        twice = ", ".join(sorted(taken.intersection(self.options)))
        check(not twice, f"optimizer.options: {twice} is set by a setting of its own, not here.")
