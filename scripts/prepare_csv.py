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
    columns: str = ""
    """Which column is what, e.g. question:instruction,reply:output; known are instruction, input, output, system. By
    default the columns have these names, or others that are recognised."""
    test_split_fraction: float = 0.1
    """Share of the samples that is held out, in val.jsonl."""


def main(config: Config) -> None:
    """Read, split, report."""
    from lit_qlora.data import read_examples
    from lit_qlora.data.prepare import prepare
    from lit_qlora.data.sources import find_file

    source = find_file(config.csv_path)
    print(prepare(read_examples(source, columns=config.columns, skip=config.on_error == "skip"), config))


if __name__ == "__main__":
    cli.run(main, Config)
