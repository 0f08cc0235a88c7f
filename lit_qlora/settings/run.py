"""Settings of a whole run: base, machine, run folder, and one section per concern."""

from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lit_qlora.commands import find
from lit_qlora.settings.checks import Settings, check, check_cache_folder
from lit_qlora.settings.data import DataConfig
from lit_qlora.settings.distill import BASE, DistillConfig
from lit_qlora.settings.eval import EvalConfig
from lit_qlora.settings.guard import GuardConfig
from lit_qlora.settings.limits import Count, NotNegative, Pattern, Positive, SeedOrAny
from lit_qlora.settings.log import LogConfig
from lit_qlora.settings.lora import LoRAConfig
from lit_qlora.settings.optimizer import OptimizerConfig
from lit_qlora.settings.quantization import Quantization, check_budget
from lit_qlora.settings.schemes import Scheme
from lit_qlora.settings.train import TrainConfig

Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"]
Strategy = Literal["auto", "ddp", "sharded"]
DEMO_CHECKPOINT = find("checkpoints/lit-qlora/tiny-world")
READ_BY_HEADS = (
    *("path", "val_path", "val_fraction", "validation_strategy", "columns", "max_length", "overlong"),
    *("max_samples", "exclude"),
    *("packing", "pack_length", "pad_to_multiple_of", "shuffle", "drop_last", "group_by_length"),
    *("seed", "split_seed", "cache_dir", "on_error", "allow", "length_quantile", "token_dropout"),
)
"""Settings of data that mean something where labels are learnt; the last two have a message of their own."""
PUBLISHED = ("trainable_parameters", "peak_gb", "seconds", "train_loss", "val_loss")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings):
    """Fine-tune a checkpoint with LoRA; with --quantize bnb.nf4 this is QLoRA."""

    first = (
        *("checkpoint_dir", "out_dir", "quantize", "dry_run", "resume"),
        *("lora", "data", "train", "optimizer", "eval", "log", "guard"),
    )

    checkpoint_dir: Path = DEMO_CHECKPOINT
    """The base: a directory written by scripts/convert_hf_checkpoint.py."""
    out_dir: Path | None = None
    """Run folder. By default out/lora/<checkpoint name>."""
    quantize: Literal["auto"] | Scheme = "none"
    """Storage of the frozen base weights. bnb.nf4 needs about a quarter of the 16-bit memory; -dq also quantises its
    scales. 'auto' chooses for each layer within quantize_budget; OUT/config.yaml then holds what it chose."""
    quantize_head: bool = False
    """Quantise the output head too."""
    quantize_layers: dict[Pattern, Scheme] = field(default_factory=dict)
    """Other storage of some layers, e.g. {head: bnb.int8, 'blocks.0.mlp.*': none}, with keys as in lora.rank_pattern.
    The first that matches decides. Layers that read the same input should agree, or the run takes the plain path."""
    quantize_budget: str | None = None
    """With quantize auto, the room for the base's weights, e.g. 14GB, or bits a weight of its linear layers, e.g.
    5.2bits. The choice has the least effect on the output; scripts/plan_quantization.py has to measure effects once."""
    quantize_cache: str = "auto"
    """Folder that caches quantised weights. 'auto' is ~/.cache/lit_qlora, on a GPU, if they take less than a tenth of
    the free space; 'none' caches nothing. Entries unused for 30 days are deleted; so are the longest unused ones if the
    cache exceeds that tenth."""
    precision: Precision = "auto"
    """Dtype of weights and activations; adapters and optimizer are always float32. 'auto' is bf16-true on a GPU with
    bfloat16, 16-mixed on other GPUs, 32-true on a CPU. On the fast path 16-mixed is 16-true."""
    devices: Count | Literal["auto"] = 1
    """Number of devices on each node. Under torchrun, the number of its processes there."""
    num_nodes: Count = 1
    """Number of nodes (machines)."""
    strategy: Strategy = "auto"
    """How several devices train together. ddp: each holds the whole base; 'auto' takes it. sharded: each holds an equal
    share of every block's weights, and they gather a block ahead of its use; see docs/gpus.md."""
    sequence_parallel: Count = 1
    """Number of devices that share each row: each computes a part of its tokens, and in attention a part of the heads.
    So rows may be about as many times as long. It divides the number of all devices; see docs/gpus.md."""
    collective_timeout: NotNegative = 600.0
    """Seconds that a process may stay at one line of its program while others wait for it in a collective; then all end
    with a message. A process that validates, saves or compiles moves on, so it may take longer. 0: without an end."""
    seed: SeedOrAny = 1337
    """Seed of everything random. -1 draws one, which OUT/config.yaml then holds and a resumed run keeps."""
    head: Literal["none", "classify", "regress"] = "none"
    """Learn a label of each text instead of what to write. A small head reads it off the last token, and is trained
    with the adapter. classify chooses one of the classes that the labels name, regress gives a number. Records have a
    text and a label; --data.columns NAME:text,NAME:label says which columns these are."""
    deterministic: bool = False
    """Use only operations that give the same bits each time, even where these are slower on a GPU."""
    resume: str = "auto"
    """Run checkpoint to resume from. 'auto' takes the newest whole one in out_dir if its run is unfinished; 'never'
    starts anew. A path names a run folder or a run checkpoint, beside which its state lies."""
    extend: bool = False
    """Resume with another train.epochs or train.max_steps, even a finished run. The schedule is then computed for the
    new length."""
    resume_changed_data: bool = False
    """Resume although the data has changed since the run began."""
    skip_disk_check: bool = False
    """Start although the disk has no room for the run checkpoints."""
    force: bool = False
    """Start although the plan needs more memory than the GPU has."""
    dry_run: bool = False
    """Check everything, print the plan, time some steps with random weights, and end before any weight is loaded."""
    price_per_hour: Positive | None = None
    """With dry_run, the price of an hour on this machine; the dry run then says what the run will cost."""
    quiet: bool = False
    """Print only warnings and errors."""
    allow_code: bool = False
    """Let tasks in eval.tasks_include_path run their own Python (!function). Only the command line may say so, never a
    config file."""
    expect_trainable: dict[str, int] = field(default_factory=dict)
    """Expected number of trained parameters for a base of this name, e.g. {meta-llama/Llama-2-7b-hf: 4194304}. Any
    other number is refused. finetune/configs/ sets it for published experiments."""
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    """Values that a publication reports of this run on a base of this name: trainable_parameters, peak_gb (10^9 bytes),
    seconds, train_loss or val_loss. At its end the run prints its own beside them."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def quantization(self) -> Quantization:
        """The storage of the base; a budget has been settled before."""
        assert self.quantize != "auto"
        return Quantization(self.quantize, self.quantize_head, tuple(self.quantize_layers.items()))

    def __post_init__(self) -> None:
        """Check combinations of settings."""
        super().__post_init__()
        check_cache_folder("quantize_cache", self.quantize_cache)
        check_budget(self.quantize, self.quantize_head, self.quantize_layers, self.quantize_budget)
        check(
            self.quantize != "auto" or self.quantize_budget is not None,
            "quantize auto needs a quantize_budget, e.g. --quantize_budget 14GB or 5.2bits.",
        )
        check(
            self.lora.init != "loftq" or {self.quantize, *self.quantize_layers.values()} != {"none"},
            "lora.init loftq makes up for the error of quantisation, so it needs --quantize.",
        )
        reason = why_not_sharded(self) if self.strategy == "sharded" else ""
        check(not reason, f"strategy sharded: {reason}.\nLeave one of them out.")
        reason = why_not_in_parts(self) if self.sequence_parallel > 1 else ""
        check(not reason, f"sequence_parallel {self.sequence_parallel}: {reason}.\nLeave one of them out.")
        for name in {name for values in self.published.values() for name in values}:
            check(name in PUBLISHED, f"published: {name} is not one of {', '.join(PUBLISHED)}.")
        check(self.price_per_hour is None or self.dry_run, "price_per_hour has no effect without --dry_run.")
        self._check_teacher()
        self._check_head()
        check(
            not (self.extend and self.resume == "never"),
            "extend resumes a run, but '--resume never' begins another one. Leave one out.",
        )

    @property
    def teacher_dir(self) -> Path | None:
        """The checkpoint that teaches; None without one."""
        return self.checkpoint_dir if self.distill.teacher == BASE else self.distill.teacher

    def _check_teacher(self) -> None:
        """Check that the teacher reads what the model reads."""
        if self.distill.teacher is None:
            return
        check(
            self.data.length_quantile == 1 and not self.data.token_dropout,
            "data.length_quantile and data.token_dropout alter samples at each step, but the teacher reads them once, "
            "before the first.\nLeave them out, or distill.teacher.",
        )

    def _check_head(self) -> None:
        """Check that no setting of texts to write is given where labels are learnt."""
        if self.head == "none":
            return
        concerns = f"concerns what a model writes, and --head {self.head} learns labels. Leave it out."
        for setting in fields(DataConfig):
            given = getattr(self.data, setting.name) not in (setting.default, _made(setting))
            check(setting.name in READ_BY_HEADS or not given, f"data.{setting.name} {concerns}")
        check(
            self.data.cache_dir in ("auto", "none"),
            "data.cache_dir: texts with labels are read anew by each run, without a cache. Leave it out.",
        )
        for name in ("generate", "prompts", "tasks", "kl_text"):
            check(not getattr(self.eval, name), f"eval.{name} {concerns}")
        learns = "head" in self.lora.targets or self.lora.train_embeddings or bool(self.lora.train_tokens)
        check(not learns, f"lora.targets head, lora.train_tokens and lora.train_embeddings: each {concerns}")
        check(self.distill.teacher is None, f"distill.teacher {concerns}")
        check(self.quantize_budget is None, f"quantize_budget {concerns}")
        check(
            self.data.length_quantile == 1 and not self.data.token_dropout,
            f"data.length_quantile and data.token_dropout cut and hide tokens, and --head {self.head} learns "
            "of one alone. Leave them out.",
        )
        check(
            not (self.train.router_balance_loss or self.train.router_z_loss),
            f"train.router_balance_loss and train.router_z_loss are not computed with --head {self.head}. "
            "Leave them out.",
        )


def _made(setting: "Field[Any]") -> Any:
    """The default of a setting that a function makes; MISSING where none does."""
    return setting.default_factory() if setting.default_factory is not MISSING else MISSING


def why_not_sharded(config: FinetuneConfig) -> str:
    """The first setting that needs the whole base in one process, and the reason; '' if there is none."""
    lora, train = config.lora, config.train
    refused = {
        "lora.dora": (lora.dora, "its adapters read the lengths of the base's rows"),
        f"lora.init {lora.init}": (lora.init != "default", "it changes the base"),
        "train.fp8": (train.fp8, "it copies the base's weights"),
        f"train.keep_dequantized {train.keep_dequantized}": (
            train.keep_dequantized not in (0, "auto"),
            "it copies the base's weights",
        ),
        f"head {config.head}": (config.head != "none", "its validations would make other passes in each process"),
        "distill.teacher": (config.distill.teacher is not None, "it reads the data with a whole base"),
        f"quantize_cache {config.quantize_cache}": (
            config.quantize_cache not in ("auto", "none"),
            "no process has the whole base to put there",
        ),
        f"train.recompute {train.recompute} on the plain path": (
            train.recompute not in ("auto", "full") and not train.fast,
            "a block's weights are gone before its backward pass",
        ),
    }
    return _first(refused)


def why_not_in_parts(config: FinetuneConfig) -> str:
    """The first setting that needs whole rows in one process, and the reason; '' if there is none."""
    refused = {
        f"head {config.head}": (
            config.head != "none",
            "one process alone would have the token that labels are read off",
        ),
        "distill.teacher": (config.distill.teacher is not None, "what the teacher holds likely is of whole rows"),
        "train.neftune": (config.train.neftune > 0, "the noise depends on the length of a whole row"),
    }
    return _first(refused)


def _first(refused: dict[str, tuple[bool, str]]) -> str:
    """The first setting that is on, and the reason against it; '' if none is."""
    return next((f"{name} does not work with it: {reason}" for name, (on, reason) in refused.items() if on), "")
