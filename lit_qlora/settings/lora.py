"""What learns: rank, targets and start of an adapter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, CountOrZero, Pattern, Positive, ShareBelowOne

Target = Literal["query", "key", "value", "latent", "projection", "mlp", "head", "all"]
TARGETS: tuple[Target, ...] = get_args(Target)


def first_match(patterns: Mapping[str, float], path: str, default: float) -> float:
    """PEFT's rule: a pattern is a regular expression for the end of the path, from a dot on; the first one counts."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Settings):
    """What learns."""

    prefix = "lora."

    r: Count = 8
    """Rank of each update."""
    alpha: Positive = 16.0
    """Updates are scaled by alpha / r."""
    dropout: ShareBelowOne = 0.05
    """Probability of dropping an adapter input during training."""
    targets: tuple[Target, ...] | Target = ("query", "value")
    """Layers that learn, e.g. [query,value]; 'all' is every linear layer but the output head. Only DeepSeek's models
    have a latent."""
    first_layers: Count | None = None
    """Adapt the first so many blocks only; with last_layers, those at both ends."""
    last_layers: Count | None = None
    """Adapt the last so many blocks only."""
    rank_pattern: dict[Pattern, Count] = field(default_factory=dict)
    """Other ranks for some layers: a regular expression for the end of their path, as in PEFT, e.g. {mlp.down: 32} or
    {'blocks.[01].attn.query': 4}."""
    alpha_pattern: dict[Pattern, Positive] = field(default_factory=dict)
    """Other alphas for some layers, in the same way."""
    rslora: bool = False
    """Scale updates by alpha / sqrt(r) instead, which keeps high ranks learning (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the length of each row of the weight apart from its direction (DoRA, Liu et al. 2024)."""
    init: Literal["default", "pissa", "olora", "loftq"] = "default"
    """Where A and B start: 'default' is no update; 'pissa' the largest singular directions of the weight (Meng et al.
    2024) and 'olora' its QR decomposition (Bueyuekakyuez 2024), taken out of the frozen base; 'loftq' what
    quantisation lost of the weight (Li et al. 2023). Adapters are saved as changes of the base as it was, of twice the
    rank."""
    loftq_steps: Count | None = None
    """init loftq: how often base and adapter are fitted to each other; by default once."""
    train_tokens: tuple[CountOrZero, ...] | CountOrZero = ()
    """Ids of tokens whose embeddings learn too, such as new ones; a tied head shares them."""
    train_embeddings: bool = False
    """Let all embeddings learn too."""
    start: Path | None = None
    """An adapter folder, ours or PEFT's, to start from; the settings above are then its own, but for dropout."""

    def rank(self, layer: str) -> int:
        """Rank of the layer with this path."""
        return int(first_match(self.rank_pattern, layer, self.r))

    def scale(self, layer: str) -> float:
        """What B A of the layer is multiplied by."""
        return first_match(self.alpha_pattern, layer, self.alpha) / self.rank(layer) ** (0.5 if self.rslora else 1)

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(
            self.loftq_steps is None or self.init == "loftq",
            f"lora.loftq_steps has no effect with --lora.init {self.init}.",
        )
        check(
            self.start is None or self.init == "default",
            "lora.start and lora.init both say where the adapter starts. Leave one out.",
        )
        tokens = self.train_tokens
        assert isinstance(tokens, tuple)
        check(len(set(tokens)) == len(tokens), f"lora.train_tokens must be different ids, got {tokens}.")
        check(
            not (tokens and self.train_embeddings),
            "lora.train_embeddings trains all tokens, so lora.train_tokens would have no effect. Leave one out.",
        )
        check(bool(self.targets), "lora.targets is empty, so nothing would learn. Name at least one: [query,value].")
