"""A whole run of fine-tuning: the base, the machine, where the run goes, and the settings of each concern."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.data import DataConfig
from lit_qlora.settings.eval import EvalConfig
from lit_qlora.settings.guard import GuardConfig
from lit_qlora.settings.limits import Count, Seed
from lit_qlora.settings.log import LogConfig
from lit_qlora.settings.lora import LoRAConfig
from lit_qlora.settings.optimizer import OptimizerConfig
from lit_qlora.settings.train import TrainConfig

Scheme = Literal["none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-mixed", "32-true"]
DEMO_CHECKPOINT = Path("checkpoints/lit-qlora/tiny-world")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings):
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
    devices: Count | Literal["auto"] = 1
    """Number of devices on each node; under torchrun it is the number of its processes there."""
    num_nodes: Count = 1
    """Number of machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices work together."""
    seed: Seed = 1337
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
        super().__post_init__()
        check(
            self.lora.init != "loftq" or self.quantize != "none",
            "lora.init loftq makes up for what quantisation loses, so it needs --quantize.",
        )
        check(
            not (self.extend and self.resume == "never"), "extend goes on with a run, and --resume never starts anew."
        )
