"""What generation, chat and evaluation have in common: which model they load, and how its prompts are written.

Torch is imported when a model is loaded, so that --help and a mistyped flag are answered at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora.errors import UsageError, did_you_mean
from lit_qlora.prompts import STYLES, Style
from lit_qlora.settings import DEMO_CHECKPOINT, Precision, Scheme

if TYPE_CHECKING:
    from lit_qlora.adapter import Loaded
    from lit_qlora.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class UseConfig:
    """Which model."""

    checkpoint_dir: Path = DEMO_CHECKPOINT
    """The model: a directory written by scripts/convert_hf_checkpoint.py or
    scripts/merge_lora.py."""
    lora_path: Path | None = None
    """An adapter that was trained on this checkpoint, such as OUT/final of finetune/lora.py."""
    quantize: Scheme = "none"
    """Storage of the weights; bnb.nf4 needs about a quarter of the 16-bit memory."""
    quantize_head: bool = False
    """Quantise the output head too."""
    precision: Precision = "auto"
    """Dtype of weights and activations. 'auto' is bf16-true on a GPU that has it, 32-true elsewhere."""

    def load(self, checkpoint_dir: Path | None = None) -> "Loaded":
        """The model, its tokenizer and its prompt style, on the best device there is.

        Args:
            checkpoint_dir: another directory than the configured one.

        Raises:
            CheckpointError: if anything is missing or damaged, or checkpoint and adapter do not belong together.
        """
        from lit_qlora.adapter import load_for_use

        return load_for_use(
            checkpoint_dir or self.checkpoint_dir,
            self.lora_path,
            quantize=self.quantize,
            quantize_head=self.quantize_head,
            precision=self.precision,
        )


def check_style(name: str) -> None:
    """Raise UsageError unless choose_style knows `name`."""
    known = ["auto", "none", *STYLES]
    if name not in known:
        raise UsageError(f"style {name!r} is not known.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def choose_style(name: str, recorded: Style | None) -> Style | None:
    """The style that --style `name` stands for; None means that prompts are given to the model as they are typed."""
    check_style(name)
    return recorded if name == "auto" else STYLES.get(name)


def encode_prompt(tokenizer: "Tokenizer", style: Style | None, instruction: str, input: str = "") -> list[int]:
    """Ids of a prompt in `style`; without one, of the instruction and the input as they are, a line each."""
    if style:
        return style.encode_prompt(tokenizer, instruction, input)
    return tokenizer.encode(f"{instruction}\n{input}" if input else instruction)


def peak_memory() -> str:
    """The most memory that this process has held, on the GPU if it uses one: '1.23 GiB of GPU memory'."""
    from lit_qlora.device import peak_gib, pick_device

    device = pick_device()
    return f"{peak_gib(device):.2f} GiB of {'GPU ' if device.type == 'cuda' else ''}memory"
