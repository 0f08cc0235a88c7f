"""Split a table with any columns into train.jsonl and val.jsonl.

python scripts/prepare_csv.py --csv_path faq.csv --columns question:instruction,reply:output --out_dir data/faq
"""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Config(PrepareConfig):
    """Split a table with any columns into train.jsonl and val.jsonl."""

    csv_path: Path
    """The table that is split, a .csv or .tsv file."""
    test_split_fraction: float = 0.1
    """Share of the samples that is held out, in val.jsonl."""


def main(config: Config) -> None:
    """Read, split, report."""
    from lit_qlora.data.prepare import prepare, read

    print(prepare(read(config.csv_path, config), config))


if __name__ == "__main__":
    cli.run(main, Config)
