"""Split a data set in Alpaca's columns, or any that is recognised, into train.jsonl and val.jsonl.

python scripts/prepare_alpaca.py --data_path alpaca_data_cleaned.json --out_dir data/alpaca
"""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Config(PrepareConfig):
    """Split a data set in Alpaca's columns, or any that is recognised, into train.jsonl and val.jsonl."""

    data_path: Path
    """The data set: a .json, .jsonl, .csv, .tsv or .parquet file."""


def main(config: Config) -> None:
    """Read, split, report."""
    from lit_qlora.data.prepare import prepare, read

    print(prepare(read(config.data_path, config), config))


if __name__ == "__main__":
    cli.run(main, Config)
