"""What a user may choose: one frozen dataclass per concern, checked when it is made.

The docstring under a field is its text in --help. Nothing here imports torch, so that --help and a mistyped flag
are answered at once.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from lit_qlora.errors import UsageError, did_you_mean

Scheme = Literal["none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
SCHEMES: tuple[Scheme, ...] = ("none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")
Recompute = Literal["none", "mlp", "attn", "offload", "full"]
Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-mixed", "32-true"]
Schedule = Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial", "inverse-sqrt", "wsd"]
Target = Literal["query", "key", "value", "latent", "projection", "mlp", "head", "all"]
Mirror = Literal["tensorboard", "wandb", "mlflow"]
MIRRORS: tuple[Mirror, ...] = ("tensorboard", "wandb", "mlflow")
TARGETS: tuple[Target, ...] = ("query", "key", "value", "latent", "projection", "mlp", "head", "all")


def check(condition: bool, message: str) -> None:
    """Raise UsageError(message) unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def first_match(patterns: Mapping[str, float], path: str, default: float) -> float:
    """PEFT's rule: a pattern is a regular expression for the end of the path, from a dot on; the first one counts."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


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
    """Layers that learn, e.g. [query,value]; 'all' is every linear layer but the output head. Only DeepSeek's models
    have a latent."""
    first_layers: int | None = None
    """Adapt the first so many blocks only; with last_layers, those at both ends."""
    last_layers: int | None = None
    """Adapt the last so many blocks only."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: a regular expression for the end of their path, as in PEFT, e.g. {mlp.down: 32} or
    {'blocks.[01].attn.query': 4}."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
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
    loftq_steps: int | None = None
    """init loftq: how often base and adapter are fitted to each other; by default once."""
    train_tokens: tuple[int, ...] | int = ()
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
        """Check the ranges, and that no setting would be without effect."""
        for name, single in (("targets", str), ("train_tokens", int)):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, single) else tuple(value))
        check(self.r >= 1, f"lora.r must be at least 1, got {self.r}.")
        for name in ("first_layers", "last_layers", "loftq_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"lora.{name} must be at least 1, got {value}.")
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for pattern, value in getattr(self, name).items():
                check(_is_pattern(pattern), f"lora.{name}: {pattern!r} is not a regular expression.")
                fine = least <= value < math.inf and value != 0
                check(fine, f"lora.{name}: {pattern} must be above 0 and finite, got {value}.")
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
        check(
            min(tokens, default=0) >= 0 and len(set(tokens)) == len(tokens),
            f"lora.train_tokens must be different ids, not negative, got {tokens}.",
        )
        check(
            not (tokens and self.train_embeddings),
            "lora.train_embeddings trains all tokens, so lora.train_tokens would have no effect. Leave one out.",
        )
        check(0 < self.alpha < math.inf, f"lora.alpha must be above 0 and finite, got {self.alpha}.")
        check(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), got {self.dropout}.")
        check(bool(self.targets), "lora.targets is empty, so nothing would learn. Name at least one: [query,value].")
        for target in self.targets:
            check(target in TARGETS, f"lora.targets: {target!r} is not a target. Known: {', '.join(TARGETS)}.")


@dataclass(frozen=True, kw_only=True)
class PromptKnobs:
    """The prompt style 'knobs', made of these texts; the names are those of H2O LLM Studio."""

    text_system_start: str = ""
    """Style 'knobs': text before a system message."""
    text_prompt_start: str = ""
    """Style 'knobs': text before each prompt."""
    text_answer_separator: str = ""
    """Style 'knobs': text between prompt and answer."""
    add_eos_token_to_system: bool = True
    """Style 'knobs': end a system message with the end-of-text token."""
    add_eos_token_to_prompt: bool = True
    """Style 'knobs': end a prompt with the end-of-text token."""
    add_eos_token_to_answer: bool = True
    """Style 'knobs': end an answer with the end-of-text token, without which a model does not learn to stop."""


Overlong = Literal["truncate_left", "truncate_right", "drop", "error"]
Finding = Literal["cut_answers", "dropped", "masked", "no_eos", "empty_answers"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(PromptKnobs):
    """What it learns from."""

    path: tuple[str, ...] | str = "finetune/demo"
    """A .json, .jsonl, .csv, .tsv, .parquet or .txt file, a directory with train and val files of these kinds, or
    hf:ORG/NAME or hf:ORG/NAME:CONFIG; or several, e.g. [a.jsonl,b.csv*0.5,c.json*2], where a number says how often an
    epoch sees each sample of that source (0.5: another half of it in each epoch)."""
    val_path: str | None = None
    """Validation file; by default the directory's own, else a share of the training data."""
    format: str = "auto"
    """What a record looks like: alpaca, dolly, sharegpt, messages, oasst1, text, ...; 'auto' recognises it and says
    what it saw."""
    columns: str = ""
    """Which column is what, e.g. question:instruction,reply:output; known are instruction, input, output, system."""
    on_error: Literal["stop", "skip"] = "stop"
    """'skip' leaves out the records that cannot be read or hold no answer, and counts them."""
    max_samples: int | None = None
    """Learn from so many samples only, chosen at random."""
    validation_strategy: Literal["auto", "automatic", "custom"] = "auto"
    """Where validation samples come from: a validation file ('custom'), a share of the training data ('automatic'), or
    a file if there is one ('auto')."""
    val_fraction: float = 0.05
    """What is held out of the training data for validation: a share if below 1, else a number of samples."""
    validation_size: float | None = None
    """Another name of val_fraction, that of H2O LLM Studio."""
    prompt: str = "auto"
    """Prompt style: alpaca, alpaca-end, plain, qa, text, llama2, llama3, chatml, mistral, vicuna, zephyr, phi, phi3,
    gemma, guanaco, knobs (see text_prompt_start), or template, the tokenizer's own chat template; 'auto' is the style
    that the checkpoint was made with, else its chat template if it has one, else alpaca."""
    system: str = ""
    """What the model is told before all, where a sample does not say."""
    max_length: int | None = None
    """Most tokens of a sample, prompt, answer and end of text together; by default the model's context, at most
    2048."""
    max_length_prompt: int | None = None
    """Most tokens of a prompt (the source)."""
    max_length_answer: int | None = None
    """Most tokens of an answer (the target), its end included."""
    overlong: Overlong = "truncate_left"
    """What becomes of a sample that is too long: its prompt's own words are cut at their beginning or their end, never
    those of the style, and of a conversation the first or last turns go; then the answer's end is cut, but never the
    end-of-text token. Or the sample is dropped, or the run refused."""
    mask_prompt: bool = True
    """Learn the answers only, not the prompts."""
    only_last_answer: bool = False
    """Of a conversation, learn the last answer only."""
    packing: bool = False
    """Lay several samples into each row, each seeing itself alone; the gradient is the same, padding hardly any."""
    pack_length: int | None = None
    """Most tokens of a packed row, train.micro_batch_size of which make a forward pass; by default max_length."""
    weighting: Literal["tokens", "samples"] = "tokens"
    """The loss of a step is the mean over its labelled tokens, or the mean over its samples of such means."""
    group_by_length: bool = False
    """Make steps of samples of similar length, so that less is padding."""
    pad_to_multiple_of: int = 1
    """Pad rows that are not packed to a multiple of so many tokens."""
    shuffle: bool = True
    """Another random order in each epoch; false keeps that of the files."""
    drop_last: bool = False
    """Leave out the last step of an epoch where it would be smaller than the others."""
    seed: int | None = None
    """Seed of the order, of the split and of what max_samples chooses; by default the run's."""
    cache_dir: str = "auto"
    """Where encoded data is kept for the next run; by default ~/.cache/lit_qlora, and 'none' keeps nothing.
    What nobody has used for 30 days goes, and the longest unused if together they take more than a tenth of the free
    space."""
    allow: tuple[Finding, ...] | Finding = ()
    """Go on in spite of these findings, which else stop the run."""

    @property
    def knobs(self) -> PromptKnobs:
        """The settings of the style 'knobs'."""
        return PromptKnobs(**{setting.name: getattr(self, setting.name) for setting in fields(PromptKnobs)})

    def __post_init__(self) -> None:
        """Check the ranges, and that no setting would be without effect."""
        for name in ("path", "allow"):
            if isinstance(value := getattr(self, name), str | Path):
                object.__setattr__(self, name, (str(value),))
        check(bool(self.path), "data.path names no file.")
        if self.validation_size is not None:
            standard = DataConfig.val_fraction
            check(self.val_fraction == standard, "data.validation_size and data.val_fraction are the same. Give one.")
            check(self.val_path is None, "data.val_path is what to validate on, so data.validation_size has no effect.")
            object.__setattr__(self, "val_fraction", self.validation_size)
            object.__setattr__(self, "validation_size", None)  # so that a config.yaml holds it once
        share = self.val_fraction
        check(
            0 <= share < 1 or share % 1 == 0 <= share,
            f"data.val_fraction must be a share below 1 or a whole number of samples, got {share}.",
        )
        check(
            not self.columns or self.format == "auto",
            "data.columns says what is what, so data.format would have no effect. Leave one out.",
        )
        check(
            self.validation_strategy != "custom" or self.val_path is not None,
            "data.validation_strategy is custom, so data.val_path must name a file.",
        )
        check(
            self.validation_strategy != "automatic" or self.val_path is None,
            "data.validation_strategy is automatic, so data.val_path would have no effect. Leave one out.",
        )
        for name in ("max_length", "max_length_prompt", "max_length_answer"):
            value = getattr(self, name)
            least = 8 if name == "max_length" else 2
            check(value is None or value >= least, f"data.{name} must be at least {least} tokens, got {value}.")
        for name in ("max_samples", "pack_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"data.{name} must be at least 1, got {value}.")
        check(self.packing or self.pack_length is None, "data.pack_length has no effect without --data.packing.")
        check(
            not (self.packing and self.pad_to_multiple_of > 1),
            "data.pad_to_multiple_of has no effect with data.packing, whose rows are data.pack_length long.",
        )
        check(self.shuffle or not self.group_by_length, "data.group_by_length needs data.shuffle.")
        check(
            self.prompt == "knobs" or self.knobs == PromptKnobs(),
            "data.text_... and data.add_eos_... need --data.prompt knobs.",
        )
        check(self.seed is None or 0 <= self.seed < 2**32, f"data.seed must be in [0, 2**32), got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a data set is split into train.jsonl and val.jsonl."""

    out_dir: Path
    """Where train.jsonl, val.jsonl and report.md go; then --data.path OUT_DIR."""
    test_split_fraction: float = 0.03865
    """Share of the samples that is held out, in val.jsonl."""
    seed: int = 42
    """Seed of the split."""
    format: str = "auto"
    """What a record looks like: alpaca, dolly, sharegpt, messages, ...; 'auto' recognises it and says what it saw."""
    columns: str = ""
    """Which column is what, e.g. question:instruction,reply:output; known are instruction, input, output, system. By
    default the columns have these names, or others that are recognised."""
    checkpoint_dir: Path | None = None
    """A directory with a tokenizer; then the report says how long the samples are in its tokens."""
    prompt: str = "alpaca"
    """Prompt style in which they are counted."""
    max_seq_length: int | None = None
    """Limit in tokens that the report counts with; by default 2048."""
    on_error: Literal["stop", "skip"] = "stop"
    """'skip' leaves out the records that cannot be read or hold no answer, and counts them."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        fraction, seed = self.test_split_fraction, self.seed
        check(0 <= fraction < 1, f"test_split_fraction must be in [0, 1), got {fraction}.")
        check(0 <= seed < 2**32, f"seed must be in [0, 2**32), got {seed}.")
        check(
            self.max_seq_length is None or self.checkpoint_dir is not None,
            "max_seq_length counts tokens, so --checkpoint_dir must name a tokenizer.",
        )
        check(
            self.prompt == PrepareConfig.prompt or self.checkpoint_dir is not None,
            "prompt is the style in which tokens are counted, so --checkpoint_dir must name a tokenizer.",
        )
        check(
            not self.columns or self.format == "auto",
            "columns says what is what, so format would have no effect. Leave one out.",
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
    """Most samples per forward pass on one device; changes memory and speed, not the result."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """What the learning rate does after the warm-up; docs/schedules.png shows them. wsd is warm-up-stable-decay."""
    warmup: float = 0.03
    """Linear warm-up: a share of the steps if below 1, else a number of steps."""
    floor: float = 0.0
    """Share of the peak that the schedule falls to, instead of zero."""
    cycles: int | None = None
    """Schedule cosine-restarts: how often the rate falls; by default 3."""
    power: float | None = None
    """Schedule polynomial: the rate falls as this power of what is left of the run; by default 2."""
    decay: float | None = None
    """Schedule wsd: when the rate falls, a share of the steps if below 1, else a number of steps; by default 0.1."""
    weight_decay: float = 0.01
    """Weight decay of matrices; vectors have none. adamw, lion and adafactor keep it apart from the gradient; adam,
    sgd, rmsprop and adadelta add it."""
    neftune: float = 0.0
    """Uniform noise on the embeddings while training, of so much / sqrt(tokens x width), e.g. 5 (NEFTune, Jain et al.
    2023)."""
    max_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 leaves it to train.save_minutes."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; 0 leaves it to train.save_every."""
    keep_last: int = 2
    """Checkpoints that stay when newer ones are saved; the best and the final one stay anyway."""
    recompute: Literal["auto"] | Recompute = "auto"
    """What each block computes again in the backward pass instead of keeping it, from most to least memory: none, mlp,
    attn, full; 'offload' is attn with the rest in host memory, where every other block has its queries, keys and values
    as well. 'auto' is the fastest mix that fits. Without the fast path, mlp, attn and offload are full."""
    fast: bool = True
    """Take the fast path where GPU, precision and model allow it; it computes the same."""
    fp8: bool = False
    """Multiply with the frozen weights of the blocks in FP8, which is faster and rounds what is learnt more coarsely,
    as validation does; adapters and the head stay in 16 bit. Needs the fast path and a GPU that has FP8 (from Ada and
    Hopper on)."""
    keep_dequantized: int | Literal["auto"] = "auto"
    """Blocks of a quantised base whose weights the fast path keeps dequantised as well, in memory that would be left
    over (0.4 GB for each of a 7B), instead of dequantising them twice a micro-batch, which is half the time of a short
    one; 'auto' is as many as fit. Of the other blocks, weights that a backward pass dequantises stay for the next
    forward pass where activations were, unless this is 0. The numbers are the same bits, and the memory is given back
    where it runs out."""
    cuda_graphs: Literal["auto", "never"] = "auto"
    """'auto' launches small micro-batches (up to 1,280 tokens of a 7B, 4,096 of a 1B) as CUDA graphs where they are
    usual and there is memory left, which is three times as fast for a sample of 135 tokens; rows are padded to one of a
    few lengths. 'never' launches kernel by kernel."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(0 < self.epochs < math.inf, f"train.epochs must be above 0 and finite, got {self.epochs}.")
        check(self.max_steps is None or self.max_steps > 0, f"train.max_steps must be above 0, got {self.max_steps}.")
        check(self.batch_size >= 1, f"train.batch_size must be at least 1, got {self.batch_size}.")
        blocks = self.keep_dequantized
        check(blocks == "auto" or blocks >= 0, f"train.keep_dequantized must not be negative, got {blocks}.")
        check(
            blocks in (0, "auto") or not self.fp8,
            "train.keep_dequantized has no effect with --train.fp8. Leave one out.",
        )
        check(self.micro_batch_size >= 1, f"train.micro_batch_size must be at least 1, got {self.micro_batch_size}.")
        check(
            0 < self.learning_rate < math.inf,
            f"train.learning_rate must be above 0 and finite, got {self.learning_rate}.",
        )
        check(0 <= self.warmup < math.inf, f"train.warmup must be finite and not negative, got {self.warmup}.")
        check(0 <= self.floor <= 1, f"train.floor must be in [0, 1], got {self.floor}.")
        check(self.cycles is None or self.cycles >= 1, f"train.cycles must be at least 1, got {self.cycles}.")
        for name in ("power", "decay"):
            value = getattr(self, name)
            check(value is None or 0 < value < math.inf, f"train.{name} must be above 0 and finite, got {value}.")
        for name, schedule in (("cycles", "cosine-restarts"), ("power", "polynomial"), ("decay", "wsd")):
            check(
                getattr(self, name) is None or self.schedule == schedule,
                f"train.{name} has no effect with --train.schedule {self.schedule}; it belongs to {schedule}.",
            )
        check(self.schedule != "constant" or not self.floor, "train.floor has no effect on a constant rate.")
        check(
            0 <= self.weight_decay < math.inf,
            f"train.weight_decay must be finite and not negative, got {self.weight_decay}.",
        )
        check(0 <= self.neftune < math.inf, f"train.neftune must be finite and not negative, got {self.neftune}.")
        check(self.max_norm >= 0, f"train.max_norm must not be negative, got {self.max_norm}.")
        check(self.save_every >= 0, f"train.save_every must not be negative, got {self.save_every}.")
        check(
            0 <= self.save_minutes < math.inf,
            f"train.save_minutes must be finite and not negative, got {self.save_minutes}.",
        )
        check(self.keep_last >= 1, f"train.keep_last must be at least 1, got {self.keep_last}.")


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
"""Short names of optimizers, and the classes that they stand for."""
CLASS_PATH = re.compile(r"(torch|bitsandbytes)\.optim\.[A-Z]\w*")
"""Classes that may be named themselves."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which rule updates the adapter; a setting that the optimizer does not have is refused."""

    name: str = "adamw"
    """adamw (fused on a GPU), adam, sgd, rmsprop, adadelta, adafactor or lion; adamw8bit and lion8bit, whose state has
    8 bits; paged-adamw, paged-adamw8bit and paged-adamw32bit, whose state leaves a GPU that is full; or any class of
    torch.optim or bitsandbytes.optim, e.g. torch.optim.NAdam."""
    betas: tuple[float, ...] | None = None
    """Decay rates of the running averages, e.g. [0.9,0.999]; by default, as what follows, the optimizer's own."""
    eps: float | None = None
    """Added to the denominator of the update."""
    momentum: float | None = None
    """Share of the last update that is kept; by default 0.9 for sgd."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    options: dict[str, bool | int | float] = field(default_factory=dict)
    """Other arguments of the optimizer's class, e.g. {rho: 0.95} for adadelta."""
    lora_plus: float = 1.0
    """B of each adapter learns so many times as fast as A. LoRA+ (Hayou et al. 2024) takes 16."""

    def __post_init__(self) -> None:
        """Check name and ranges; whether the optimizer has a setting is seen when it is made."""
        check(
            self.name in OPTIMIZERS or CLASS_PATH.fullmatch(self.name) is not None,
            f"optimizer.name {self.name!r} is not known.{did_you_mean(self.name, list(OPTIMIZERS))} "
            f"Known: {', '.join(OPTIMIZERS)}; or torch.optim.NAME or bitsandbytes.optim.NAME.",
        )
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
            check(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must be in [0, 1), got {self.betas}.")
        check(self.eps is None or 0 < self.eps < math.inf, f"optimizer.eps must be above 0 and finite, got {self.eps}.")
        check(
            self.momentum is None or 0 <= self.momentum < 1,
            f"optimizer.momentum must be in [0, 1), got {self.momentum}.",
        )
        check(0 < self.lora_plus < math.inf, f"optimizer.lora_plus must be above 0 and finite, got {self.lora_plus}.")
        taken = {"params", "lr", "weight_decay", "fused", *(setting.name for setting in fields(OptimizerConfig))}
        twice = ", ".join(sorted(taken.intersection(self.options)))
        check(not twice, f"optimizer.options: {twice} has a setting of its own and is not set there.")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What ends a run whose numbers went wrong; a loss that is not finite always does."""

    divergence: float = 3.0
    """The loss diverged when it is more than so many times its best running average, and 1 more; 0 does not look."""
    patience: int = 10
    """Steps in a row for which it has to be."""
    skips: int = 3
    """Steps in a row that may have gradients that are not finite; the updates of the others are left out."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(
            self.divergence == 0 or 1 < self.divergence < math.inf,
            f"guard.divergence must be 0 or above 1 and finite, got {self.divergence}.",
        )
        check(self.patience >= 1, f"guard.patience must be at least 1, got {self.patience}.")
        check(self.skips >= 1, f"guard.skips must be at least 1, got {self.skips}.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When the model is validated, which it always is before and after training, and what is measured then."""

    every: float = 0.0
    """Optimizer steps between validations, or a share of an epoch if below 1; 0 validates ten times in the run."""
    minutes: float = 0.0
    """Validate also when so many minutes have gone by since the last validation; 0 does not look at the clock."""
    max_samples: int | None = None
    """Validate on the first so many validation samples only."""
    best: str = "val_loss"
    """The figure of a validation by which the best checkpoint is kept, as OUT/best, and the run may end early; 'none'
    keeps none."""
    patience: int = 0
    """End the run when so many validations in a row were not better than the best; 0 does not."""
    generate: int = 0
    """Let the model answer so many of the validation samples and compare: exact match, BLEU, chrF, ROUGE-L."""
    prompts: Path | None = None
    """A file of prompts that are answered at each validation, a line each (.txt), or JSON lines with instruction, input
    and system; the answers go to OUT/samples.jsonl."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; by default 128."""
    kl_text: Path | None = None
    """A text file on which to measure how far the model has moved from its base, as kl_to_base; 'default' is a text
    that comes with the package."""
    tasks: tuple[str, ...] | str = ()
    """Tasks of lm-eval that the model is asked during training, e.g. [mmlu]; their figures are called TASK/METRIC."""
    tasks_every: int | None = None
    """Ask them only at validations that are at least so many optimizer steps after the last ones at which they were
    asked; before and after training always."""
    tasks_limit: float | None = None
    """Ask the first so many questions of each task only; below 1, this share of them."""
    tasks_num_fewshot: int | None = None
    """Examples before each question; by default what the task says."""
    tasks_include_path: Path | None = None
    """Directory with tasks of your own (YAML files)."""

    def __post_init__(self) -> None:
        """Check the ranges, and that no setting would be without effect."""
        if isinstance(self.tasks, str):
            object.__setattr__(self, "tasks", (self.tasks,))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        check(0 <= self.every < math.inf, f"eval.every must be finite and not negative, got {self.every}.")
        check(self.generate >= 0, f"eval.generate must not be negative, got {self.generate}.")
        for name in ("max_new_tokens", "tasks_every", "tasks_num_fewshot"):
            value, least = getattr(self, name), int(name != "tasks_num_fewshot")
            check(value is None or value >= least, f"eval.{name} must be at least {least}, got {value}.")
        check(
            self.tasks_limit is None or 0 < self.tasks_limit < math.inf,
            f"eval.tasks_limit must be above 0 and finite, got {self.tasks_limit}.",
        )
        check(
            self.max_new_tokens is None or bool(self.generate or self.prompts),
            "eval.max_new_tokens concerns answers, so it needs eval.generate or eval.prompts.",
        )
        for name in ("tasks_every", "tasks_limit", "tasks_num_fewshot", "tasks_include_path"):
            check(getattr(self, name) is None or bool(self.tasks), f"eval.{name} has no effect without eval.tasks.")
        check(
            self.every < 1 or self.every == round(self.every),
            f"eval.every must be a whole number of steps or a share of an epoch below 1, got {self.every}.",
        )
        check(0 <= self.minutes < math.inf, f"eval.minutes must be finite and not negative, got {self.minutes}.")
        check(self.patience >= 0, f"eval.patience must not be negative, got {self.patience}.")
        check(
            not (self.patience and self.best == "none"),
            "eval.patience needs to know what is better: name a figure such as val_loss with eval.best.",
        )
        check(
            self.max_samples is None or self.max_samples > 0,
            f"eval.max_samples must be above 0, got {self.max_samples}.",
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Who is told of the run besides OUT/log.jsonl."""

    to: tuple[Mirror, ...] | Mirror = ()
    """Programs that get the same figures, e.g. [tensorboard,wandb]: their files lie in OUT/tensorboard, OUT/wandb and
    OUT/mlruns. wandb is offline unless WANDB_MODE says otherwise. If one fails, the run goes on without it."""

    def __post_init__(self) -> None:
        """Check the names."""
        if isinstance(self.to, str):
            object.__setattr__(self, "to", (self.to,))
        object.__setattr__(self, "to", tuple(self.to))
        for name in self.to:
            check(name in MIRRORS, f"log.to: {name!r} is not known. Known: {', '.join(MIRRORS)}.")
        check(len(set(self.to)) == len(self.to), f"log.to names one twice: {', '.join(self.to)}.")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is made: the likeliest token after token, tokens that are drawn, or a search with beams."""

    max_new_tokens: int = 128
    """Most tokens of an answer."""
    min_new_tokens: int = 0
    """Tokens that an answer has before it may end."""
    do_sample: bool | None = None
    """Draw the next token (true) or take the likeliest (false); by default tokens are drawn where temperature, top_k,
    top_p, min_p or typical_p is given."""
    temperature: float | None = None
    """1 draws from the model's own distribution, below 1 from a sharper one, 0 takes the likeliest token; by default 1
    where tokens are drawn."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability only."""
    min_p: float = 0.0
    """Draw among the tokens only that are at least this share as likely as the likeliest."""
    typical_p: float = 1.0
    """Draw among the tokens only that surprise as much as is to be expected and together reach this probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that prompt or answer have already, below 1 likelier."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens occurs twice in prompt and answer; 0 allows it."""
    num_return_sequences: int = 1
    """Answers to each prompt."""
    num_beams: int = 1
    """Answers that are pursued at the same time, of which the likeliest is given; 1 does not search. Where tokens are
    drawn, so are those that go on, among all that the answers could go on with."""
    length_penalty: float = 1.0
    """Beams compare log-probability / tokens ** length_penalty, so above 0 favours longer answers, below 0 shorter."""
    early_stopping: bool | Literal["never"] = False
    """When a search with beams ends: true as soon as num_beams answers are finished, false when the best unfinished one
    is behind at its present length, 'never' when it could not catch up at any length."""
    num_beam_groups: int = 1
    """Groups of beams that search one after the other, each kept apart from those before it by diversity_penalty."""
    diversity_penalty: float = 0.0
    """What a token loses in log-probability for each beam of an earlier group that has chosen it at the same place."""
    seed: int = 1337
    """Seed of the drawing."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.do_sample is not False and self.temperature != 0 and (self.do_sample is True or bool(self._draws()))

    def __post_init__(self) -> None:
        """Check the ranges, and that no setting would be without effect."""
        check(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        check(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be in [0, max_new_tokens = {self.max_new_tokens}], got {self.min_new_tokens}.",
        )
        check(
            self.temperature is None or 0 <= self.temperature < math.inf,
            f"temperature must be finite and not negative, got {self.temperature}.",
        )
        check(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}.")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}.")
        check(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}.")
        check(0 < self.typical_p <= 1, f"typical_p must be in (0, 1], got {self.typical_p}.")
        check(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}.",
        )
        check(
            self.no_repeat_ngram_size >= 0,
            f"no_repeat_ngram_size must not be negative, got {self.no_repeat_ngram_size}.",
        )
        check(
            self.num_return_sequences >= 1, f"num_return_sequences must be at least 1, got {self.num_return_sequences}."
        )
        check(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), got {self.seed}.")
        if self.do_sample is False and self.temperature != 0:
            check(not self._draws(), f"do_sample is false, so {self._draws()} would have no effect. Leave one out.")
        check(
            not (self.do_sample and self.temperature == 0),
            "temperature 0 takes the likeliest token, so do_sample cannot be true. Leave one out.",
        )
        self._check_beams()

    def _check_beams(self) -> None:
        check(self.num_beams >= 1, f"num_beams must be at least 1, got {self.num_beams}.")
        check(math.isfinite(self.length_penalty), f"length_penalty must be finite, got {self.length_penalty}.")
        check(
            self.num_beam_groups >= 1 and self.num_beams % self.num_beam_groups == 0,
            f"num_beam_groups ({self.num_beam_groups}) must divide num_beams ({self.num_beams}).",
        )
        check(
            0 <= self.diversity_penalty < math.inf,
            f"diversity_penalty must be finite and not negative, got {self.diversity_penalty}.",
        )
        if self.num_beams == 1:
            check(
                (self.length_penalty, self.early_stopping) == (1.0, False),
                "length_penalty and early_stopping need num_beams above 1.",
            )
            check(
                self.num_return_sequences == 1 or self.samples,
                "num_return_sequences above 1 would give the same answer again; set do_sample true or num_beams.",
            )
        else:
            check(
                self.num_beam_groups == 1 or not self.samples,
                "Groups of beams are kept apart by a penalty and draw nothing: num_beam_groups or do_sample.",
            )
            check(
                self.num_return_sequences <= self.num_beams,
                f"num_return_sequences ({self.num_return_sequences}) must not exceed num_beams ({self.num_beams}).",
            )
        check(
            (self.num_beam_groups > 1) == (self.diversity_penalty > 0),
            "num_beam_groups above 1 and a diversity_penalty above 0 need each other: groups without it are all alike.",
        )

    def _draws(self) -> str:
        """Names of the settings that were given and concern drawing, ', ' between them."""
        given = {
            "temperature": self.temperature is not None and self.temperature > 0,
            "top_k": self.top_k is not None,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
            "typical_p": self.typical_p < 1,
        }
        return ", ".join(name for name, is_given in given.items() if is_given)


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
    quantize_cache: str = "auto"
    """Where quantised weights are kept for the next run; by default ~/.cache/lit_qlora, on a GPU and if they take less
    than a tenth of the free space. 'none' keeps nothing. What nobody has used for 30 days goes, and the longest unused
    if together they take more than that tenth."""
    precision: Precision = "auto"
    """Dtype of weights and activations; adapters and optimizer are always float32. 'auto' is bf16-true on a GPU that
    has it, 16-mixed on another GPU, 32-true on a CPU."""
    devices: int | Literal["auto"] = 1
    """Number of devices on each node; under torchrun it is the number of its processes there."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices work together."""
    seed: int = 1337
    """Seed of everything random."""
    deterministic: bool = False
    """Take only operations that give the same bits each time, on a GPU too, where that is slower."""
    resume: str = "auto"
    """Where to go on: 'auto' is the newest whole checkpoint of an unfinished run in out_dir if there is one, 'never'
    starts anew, and a run's or a checkpoint's directory goes on from there."""
    extend: bool = False
    """Go on with another train.epochs or train.max_steps, of a finished run too; the schedule is then that of the new
    length."""
    resume_changed_data: bool = False
    """Go on although the data is not what the run began with."""
    skip_disk_check: bool = False
    """Begin although the disk has no room for the checkpoints."""
    force: bool = False
    """Begin although the plan needs more memory than the GPU has."""
    dry_run: bool = False
    """Check everything, print the plan, time some steps with random weights, and stop before any weight is loaded."""
    quiet: bool = False
    """Print nothing but warnings and errors."""
    expect_trainable: dict[str, int] = field(default_factory=dict)
    """How many parameters must learn where the base has one of these names, e.g. {meta-llama/Llama-2-7b-hf: 4194304};
    the run is refused if others do. finetune/configs/ say it of published experiments."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        """Check what concerns several settings together."""
        check(
            self.lora.init != "loftq" or self.quantize != "none",
            "lora.init loftq makes up for what quantisation loses, so it needs --quantize.",
        )
        check(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), got {self.seed}.")
        check(self.num_nodes >= 1, f"num_nodes must be at least 1, got {self.num_nodes}.")
        if self.devices != "auto":
            check(self.devices >= 1, f"devices must be at least 1, got {self.devices}.")
        check(
            not (self.extend and self.resume == "never"), "extend goes on with a run, and --resume never starts anew."
        )
