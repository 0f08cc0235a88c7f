"""Split a table with any columns into train.jsonl and val.jsonl.

python scripts/prepare_csv.py --data.path faq.csv --columns question:instruction,reply:output --out_dir data/faq
"""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import PrepareConfig, check


@dataclass(frozen=True, kw_only=True)
class Config(PrepareConfig):
    """Split a table with any columns into train.jsonl and val.jsonl."""

    csv_path: Path | None = None
    """Table to split: a .csv or .tsv file."""
    csv_dir: Path | None = None
    """Another name of csv_path, as in Lit-GPT."""
    test_split_fraction: float = 0.1
    """Share of the samples that val.jsonl holds out."""

    def __post_init__(self) -> None:
        """Check that one table is named."""
        super().__post_init__()
        check(bool(self.csv_path) != bool(self.csv_dir), "Name one table, with --data.path or --csv_dir.")

    @property
    def table(self) -> Path:
        """Return the table, by either of its two names."""
        path = self.csv_path or self.csv_dir
        assert path is not None
        return path


def main(config: Config) -> None:
    """Read, split, report."""
    from lit_qlora.data.prepare import prepare, read

    out_dir = config.out_dir or Path("data", config.table.stem)
    print(prepare(read(config.table, out_dir, config), out_dir, config))


if __name__ == "__main__":
    cli.run(main, Config)
