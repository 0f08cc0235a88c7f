"""What a user may choose: one frozen dataclass per concern, checked when it is made.

The docstring under a field is its text in --help. Nothing here imports torch, so that --help and a mistyped flag
are answered at once.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_qlora.errors import UsageError

Scheme = Literal["none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
SCHEMES: tuple[Scheme, ...] = ("none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")
Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-mixed", "32-true"]
Target = Literal["query", "key", "value", "projection", "mlp", "head", "all"]
TARGETS: tuple[Target, ...] = ("query", "key", "value", "projection", "mlp", "head", "all")


def check(condition: bool, message: str) -> None:
    """Raise UsageError(message) unless `condition` holds."""
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What learns."""

    r: int = 8
    """Rank of each update."""
    alpha: float = 16.0
    """Updates are scaled by alpha / r."""
    dropout: float = 0.05
    """Probability of dropping an adapter input during training."""
    targets: tuple[Target, ...] | Target = ("query", "value")
    """Layers that learn, e.g. [query,value]; 'all' is every linear layer but the output head."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        check(self.r >= 1, f"lora.r must be at least 1, got {self.r}.")
        check(0 < self.alpha < math.inf, f"lora.alpha must be above 0 and finite, got {self.alpha}.")
        check(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), got {self.dropout}.")
        check(bool(self.targets), "lora.targets is empty, so nothing would learn. Name at least one: [query,value].")
        for target in self.targets:
            check(target in TARGETS, f"lora.targets: {target!r} is not a target. Known: {', '.join(TARGETS)}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it learns from."""

    path: Path = Path("finetune/demo")
    """A .json, .jsonl or .csv file with the columns instruction, input and output, or a directory with train and val
    files of these kinds."""
    val_path: Path | None = None
    """Validation file; by default the directory's own, else a share of the training file."""
    val_fraction: float = 0.05
    """Share of the samples that is held out for validation where there is no validation file."""
    prompt: str = "auto"
    """Prompt style: alpaca, plain or qa; 'auto' is the style that the checkpoint was made with, else alpaca."""
    max_length: int | None = None
    """Most tokens of a sample, prompt, answer and end of text together; by default the model's context, at most 2048.
    What is too long loses the beginning of its prompt, then the end of its answer, never the end-of-text token."""
    mask_prompt: bool = True
    """Learn the answers only, not the prompts."""
    allow_cut_answers: bool = False
    """Go on even if most answers are cut, which teaches half-sentences."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(0 <= self.val_fraction < 1, f"data.val_fraction must be in [0, 1), got {self.val_fraction}.")
        check(
            self.max_length is None or self.max_length >= 8,
            f"data.max_length must be at least 8 tokens, got {self.max_length}.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it learns."""

    epochs: float = 3.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule ends there too."""
    batch_size: int = 32
    """Samples per optimizer step, over all devices."""
    micro_batch_size: int = 4
    """Samples per forward pass on one device; changes memory and speed, not the result."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after the warm-up."""
    warmup: float = 0.03
    """Linear warm-up: a share of the steps if below 1, else a number of steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the optimizer."""
    max_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    save_every: int = 0
    """Optimizer steps between checkpoints of the adapter; 0 saves at the end only."""
    keep_last: int = 2
    """Checkpoints that stay when newer ones are saved."""
    recompute: Literal["none", "full"] = "none"
    """'full' computes each block again in the backward pass instead of keeping its activations: less memory, a third
    more time."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(0 < self.epochs < math.inf, f"train.epochs must be above 0 and finite, got {self.epochs}.")
        check(self.max_steps is None or self.max_steps > 0, f"train.max_steps must be above 0, got {self.max_steps}.")
        check(self.batch_size >= 1, f"train.batch_size must be at least 1, got {self.batch_size}.")
        check(self.micro_batch_size >= 1, f"train.micro_batch_size must be at least 1, got {self.micro_batch_size}.")
        check(
            0 < self.learning_rate < math.inf,
            f"train.learning_rate must be above 0 and finite, got {self.learning_rate}.",
        )
        check(0 <= self.warmup < math.inf, f"train.warmup must be finite and not negative, got {self.warmup}.")
        check(
            0 <= self.weight_decay < math.inf,
            f"train.weight_decay must be finite and not negative, got {self.weight_decay}.",
        )
        check(self.max_norm >= 0, f"train.max_norm must not be negative, got {self.max_norm}.")
        check(self.save_every >= 0, f"train.save_every must not be negative, got {self.save_every}.")
        check(self.keep_last >= 1, f"train.keep_last must be at least 1, got {self.keep_last}.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which rule updates the adapter."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When the validation loss is measured; before and after training it always is."""

    every: int = 0
    """Optimizer steps between validations; 0 validates ten times in the run."""
    max_samples: int | None = None
    """Validate on the first so many validation samples only."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.every >= 0, f"eval.every must not be negative, got {self.every}.")
        check(
            self.max_samples is None or self.max_samples > 0,
            f"eval.max_samples must be above 0, got {self.max_samples}.",
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's own distribution, below 1 from a sharper one."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability only."""
    seed: int = 1337
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        check(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}.")
        check(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}.")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}.")


DEMO_CHECKPOINT = Path("checkpoints/lit-qlora/tiny-world")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a checkpoint with LoRA; with --quantize bnb.nf4 this is QLoRA."""

    checkpoint_dir: Path = DEMO_CHECKPOINT
    """The base model: a directory written by scripts/convert_hf_checkpoint.py."""
    out_dir: Path | None = None
    """Where everything of this run goes; by default out/lora/<checkpoint name>."""
    quantize: Scheme = "none"
    """Storage of the frozen base weights; bnb.nf4 needs about a quarter of the 16-bit memory."""
    quantize_head: bool = False
    """Quantise the output head too."""
    precision: Precision = "auto"
    """Dtype of weights and activations; adapters and optimizer are always float32. 'auto' is bf16-true on a GPU that
    has it, 16-mixed on another GPU, 32-true on a CPU."""
    devices: int | Literal["auto"] = 1
    """Number of devices on each node."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices work together."""
    seed: int = 1337
    """Seed of everything random."""
    dry_run: bool = False
    """Check everything, print the plan and stop before any weight is loaded."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """Check what concerns several settings together."""
        check(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), got {self.seed}.")
        check(self.num_nodes >= 1, f"num_nodes must be at least 1, got {self.num_nodes}.")
        if self.devices != "auto":
            check(self.devices >= 1, f"devices must be at least 1, got {self.devices}.")
