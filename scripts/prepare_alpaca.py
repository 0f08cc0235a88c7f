"""Split Alpaca, or another data set, into train.jsonl and val.jsonl.

python scripts/prepare_alpaca.py --checkpoint_dir checkpoints/mistralai/Mistral-7B-v0.1
python scripts/prepare_alpaca.py --data.path alpaca_data_cleaned.json --out_dir data/alpaca
"""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import PrepareConfig

ALPACA = "hf:yahma/alpaca-cleaned"


@dataclass(frozen=True, kw_only=True)
class Config(PrepareConfig):
    """Split Alpaca, or another data set, into train.jsonl and val.jsonl."""

    data_path: str = ALPACA
    """Data set: a .json, .jsonl, .csv, .tsv or .parquet file, hf:ORG/NAME, or a name such as dolly or longform (see
    docs/data_sets.md). By default the cleaned Alpaca of the Hugging Face hub, 51,760 samples."""


def main(config: Config) -> None:
    """Read, split, report."""
    from lit_qlora.data.prepare import prepare, read

    out_dir = config.out_dir or Path("data", "alpaca" if config.data_path == ALPACA else Path(config.data_path).stem)
    print(prepare(read(config.data_path, out_dir, config), out_dir, config))


if __name__ == "__main__":
    cli.run(main, Config)
