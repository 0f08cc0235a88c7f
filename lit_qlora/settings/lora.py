"""Settings of adapters: rank, targets, initial values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import FINITE, Count, CountOrZero, Pattern, Positive, ShareBelowOne, at_least

Target = Literal[
    "query", "key", "value", "latent", "projection", "delta", "conv", "per_layer", "mlp", "router", "head", "all"
]
RopeScaling = Literal["none", "linear", "dynamic", "yarn", "llama3"]
TARGETS: tuple[Target, ...] = get_args(Target)


def first_match(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of the path after a dot, as PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Settings):
    """The layers that get adapters, and the form and initial values of these."""

    prefix = "lora."
    first = ("r", "alpha", "targets")

    r: Count = 8
    """Rank of each adapter."""
    alpha: Positive = 16.0
    """Each update B A is multiplied by alpha / r."""
    dropout: ShareBelowOne = 0.05
    """Probability of zeroing an element of an adapter's input during training."""
    targets: tuple[Target, ...] | Target = ("query", "value")
    """Layers that get an adapter, e.g. [query,value]. 'all' is every linear layer except the output head. 'router' is
    the choice of a mixture's experts, which has its own word: it moves tokens to other experts. Only
    DeepSeek's models have a latent. Only Qwen3-Next's and Qwen3.5's have gated delta nets, and Granite 4's state
    spaces: all their layers are 'delta', some of them query, key, value and projection. In Qwen's models 'query' means
    attention's output gate, too. Only LFM2 has a conv. Only Gemma 4's E2B and E4B have a per_layer."""
    first_layers: Count | None = None
    """Adapt only the first N blocks; with last_layers, N at both ends. By default all blocks."""
    last_layers: Count | None = None
    """Adapt only the last N blocks. By default all blocks."""
    rank_pattern: dict[Pattern, Count] = field(default_factory=dict)
    """Other ranks for some layers, e.g. {mlp.down: 32} or {'blocks.[01].attn.query': 4}. A key is a regular expression
    for the end of the layer's path, as in PEFT."""
    alpha_pattern: dict[Pattern, Positive] = field(default_factory=dict)
    """Other alphas for some layers, with keys as in rank_pattern."""
    rslora: bool = False
    """Multiply updates by alpha / sqrt(r) instead, which keeps high ranks learning (rsLoRA, Kalajdzievski 2023)."""
    tied: bool = False
    """Let gate and up of each expert share one A, as PEFT's adapters of stacked experts do (target_parameters)."""
    dora: bool = False
    """Train the norm of each weight row apart from its direction (DoRA, Liu et al. 2024). With experts, or an adapter
    on the head, it takes the plain path."""
    init: Literal["default", "pissa", "olora", "loftq"] = "default"
    """Initial A and B. 'default' changes nothing. 'pissa' takes the largest singular directions of the weight (Meng et
    al. 2024), 'olora' its QR decomposition (Bueyuekakyuez 2024); both are subtracted from the base. 'loftq' makes up
    for the error of quantisation (Li et al. 2023). These three save adapters of twice the rank, as changes of the
    original base."""
    loftq_steps: Count | None = None
    """With init loftq, how many times base and adapter are fitted to each other. By default once."""
    train_tokens: tuple[CountOrZero, ...] | CountOrZero = ()
    """Ids of tokens whose embeddings are trained too, such as new tokens. A tied head shares them."""
    train_head_rows: bool = False
    """Train the output head's rows of train_tokens too, which a model needs to say new tokens."""
    train_embeddings: bool = False
    """Train all embeddings too."""
    rope_scaling: RopeScaling = "none"
    """Lengthen the context of the base under the adapter by scaling its rotary positions: 'yarn' (Peng et al. 2023),
    'linear' (Chen et al. 2023), 'dynamic' (NTK-aware; shorter texts stay as they are) or 'llama3'. The adapter's folder
    and what is merged and exported know it."""
    rope_factor: Annotated[float, at_least(1), FINITE] = 1.0
    """With rope_scaling, how many times as long the context becomes, e.g. 4."""
    start: Path | None = None
    """Start from this adapter folder, ours or PEFT's. Its settings replace the ones above, except dropout."""

    def rank(self, layer: str) -> int:
        """Return the rank of the layer with this path."""
        return int(first_match(self.rank_pattern, layer, self.r))

    def scale(self, layer: str) -> float:
        """Return the factor of B A in the layer with this path."""
        return first_match(self.alpha_pattern, layer, self.alpha) / self.rank(layer) ** (0.5 if self.rslora else 1)

    @property
    def rope(self) -> tuple[RopeScaling, float]:
        """The kind and the factor of scaled positions."""
        return self.rope_scaling, self.rope_factor

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(
            self.loftq_steps is None or self.init == "loftq",
            f"lora.loftq_steps has no effect with --lora.init {self.init}.",
        )
        check(
            not self.tied or self.init == "default",
            f"lora.tied: lora.init {self.init} gives gate and up an A each. Leave one out.",
        )
        check(
            self.start is None or self.init == "default",
            "lora.start and lora.init both set the initial adapter. Leave one out.",
        )
        tokens = self.train_tokens
        assert isinstance(tokens, tuple)
        check(len(set(tokens)) == len(tokens), f"lora.train_tokens must be different ids, got {tokens}.")
        check(
            not (tokens and self.train_embeddings),
            "lora.train_embeddings trains all tokens, so lora.train_tokens would have no effect. Leave one out.",
        )
        check(bool(tokens) or not self.train_head_rows, "lora.train_head_rows has no effect without lora.train_tokens.")
        check(
            not (self.train_head_rows and "head" in self.targets),
            "lora.train_head_rows: the head cannot have an adapter and be trained as well.\n"
            "Leave head out of lora.targets.",
        )
        check(
            (self.rope_scaling != "none") == (self.rope_factor > 1),
            f"lora.rope_scaling {self.rope_scaling} and lora.rope_factor {self.rope_factor:g} contradict each other.\n"
            "Give a kind and a factor above 1, or neither.",
        )
        check(
            bool(self.targets), "lora.targets is empty, so nothing would be trained. Name at least one: [query,value]."
        )
