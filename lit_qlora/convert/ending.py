"""Endings of answers and the prompt style of a checkpoint, for programs that read exports."""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora.prompts.style import FILE_NAME, Style, read_style
from lit_qlora.prompts.tokenizer import MODELS, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The facts that an exported model needs to answer as it does here."""

    tokenizer: Tokenizer
    style: Style | None
    """The prompt style of the training; None: the model has its own chat template, or none."""
    stop_ids: tuple[int, ...]
    """Ids that end an answer: EOS, then that of the style."""


def read_ending(checkpoint_dir: Path) -> Ending | None:
    """The ending of a checkpoint; None where it has no tokenizer.

    Raises:
        CheckpointError: if the tokenizer or prompt_style.json is damaged.
    """
    if not any((checkpoint_dir / name).is_file() for name in MODELS):
        return None
    tokenizer = Tokenizer(checkpoint_dir)
    style = read_style(checkpoint_dir) if (checkpoint_dir / FILE_NAME).is_file() else None
    own = sorted(style.stop_ids(tokenizer)) if style else []
    stops = dict.fromkeys([tokenizer.eos_id, *own, *sorted(tokenizer.stop_ids)])
    return Ending(tokenizer=tokenizer, style=style, stop_ids=tuple(stops))
