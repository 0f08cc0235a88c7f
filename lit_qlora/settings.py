"""What a user may choose: one frozen dataclass per concern, checked when it is made.

The docstring under a field is its text in --help. Nothing here imports torch, so that --help and a mistyped flag
are answered at once.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from lit_qlora.errors import UsageError

Scheme = Literal["none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
SCHEMES: tuple[Scheme, ...] = ("none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")
Recompute = Literal["none", "mlp", "attn", "offload", "full"]
Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-mixed", "32-true"]
Target = Literal["query", "key", "value", "latent", "projection", "mlp", "head", "all"]
TARGETS: tuple[Target, ...] = ("query", "key", "value", "latent", "projection", "mlp", "head", "all")


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
    """Layers that learn, e.g. [query,value]; 'all' is every linear layer but the output head. Only DeepSeek's models
    have a latent."""

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
Finding = Literal["cut_answers", "dropped", "masked", "no_eos", "empty_answers", "no_prompt"]
FINDINGS: tuple[Finding, ...] = ("cut_answers", "dropped", "masked", "no_eos", "empty_answers", "no_prompt")


@dataclass(frozen=True, kw_only=True)
class DataConfig(PromptKnobs):
    """What it learns from."""

    path: tuple[str, ...] | str = "finetune/demo"
    """A .json, .jsonl, .csv, .tsv, .parquet or .txt file, a directory with train and val files of these kinds, or
    hf:ORG/NAME; or several, e.g. [a.jsonl,b.csv*0.5,c.json*2], where a number says how often an epoch sees each sample
    of that source (0.5: another half of it in each epoch)."""
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
    """Tokens of a packed row, train.micro_batch_size of which make a forward pass; by default max_length."""
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
    """Where encoded data is kept for the next run; by default ~/.cache/lit_qlora, and 'none' keeps nothing."""
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
        check(0 <= self.val_fraction < math.inf, f"data.val_fraction must not be negative, got {self.val_fraction}.")
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
    recompute: Literal["auto"] | Recompute = "auto"
    """What each block computes again in the backward pass instead of keeping it, from most to least memory: none, mlp,
    attn, full; 'offload' is attn with the rest in host memory. 'auto' is the fastest mix that fits. Without the fast
    path, mlp, attn and offload are full."""
    fast: bool = True
    """Take the fast path where GPU, precision and model allow it; it computes the same."""

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
    """Answers that are pursued at the same time, of which the likeliest is given; 1 does not search."""
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
            check(not self.samples, "Beams search for the likeliest answer and draw nothing: num_beams or do_sample.")
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
