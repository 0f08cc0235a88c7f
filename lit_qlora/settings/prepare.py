"""How a file of records is split into training and validation files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, Seed, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Settings):
    """How a data set is split into train.jsonl and val.jsonl."""

    out_dir: Path
    """Where train.jsonl, val.jsonl and report.md go; then --data.path OUT_DIR."""
    test_split_fraction: ShareBelowOne = 0.03865
    """Share of the samples that is held out, in val.jsonl."""
    seed: Seed = 42
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
    max_seq_length: Count | None = None
    """Limit in tokens that the report counts with; by default 2048."""
    on_error: Literal["stop", "skip"] = "stop"
    """'skip' leaves out the records that cannot be read or hold no answer, and counts them."""

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
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
