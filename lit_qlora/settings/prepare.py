"""Settings of scripts that split a file of records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, Seed, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Settings):
    """The split of a data set into train.jsonl and val.jsonl."""

    out_dir: Path | None = None
    """Folder for train.jsonl, val.jsonl and report.md; then train with --data.path OUT_DIR. By default data/NAME, where
    NAME is that of the data."""
    test_split_fraction: ShareBelowOne = 0.03865
    """Share of the samples that val.jsonl holds out."""
    seed: Seed = 42
    """Seed of the split."""
    format: str = "auto"
    """Record format: alpaca, dolly, sharegpt, messages, ... 'auto' recognises it and prints the result."""
    columns: str = ""
    """Meaning of columns, e.g. question:instruction,reply:output. The known meanings are instruction, input, output and
    system. By default columns are recognised by their names."""
    checkpoint_dir: Path | None = None
    """A directory with a tokenizer; the report then gives lengths in its tokens. finetune/lora.py with the same
    checkpoint_dir takes the prepared data by itself."""
    prompt: str = "alpaca"
    """Prompt style of the counted tokens."""
    max_seq_length: Count | None = None
    """Maximum tokens of a sample, for the report. By default 2048."""
    on_error: Literal["stop", "skip"] = "stop"
    """'stop' ends at a record that cannot be read or has no answer; 'skip' leaves such records out and counts them."""

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(
            self.max_seq_length is None or self.checkpoint_dir is not None,
            "max_seq_length counts tokens, so --checkpoint_dir must name a directory with a tokenizer.",
        )
        check(
            self.prompt == PrepareConfig.prompt or self.checkpoint_dir is not None,
            "prompt is the style of the counted tokens, so --checkpoint_dir must name a directory with a tokenizer.",
        )
        check(
            not self.columns or self.format == "auto",
            "columns gives the meaning of columns, so format would have no effect. Leave one out.",
        )
