"""Look at data as a run would see it, before the run.

python scripts/inspect_data.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --data.path alpaca.json
"""

from dataclasses import dataclass, field
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import DEMO_CHECKPOINT, DataConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show data as a run would see it. The status is 3 if a run would refuse the data."""

    checkpoint_dir: Path = DEMO_CHECKPOINT
    """Checkpoint of the run; a directory with only a tokenizer is enough."""
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 1337
    """Seed of the run."""
    png: Path | None = None
    """File for a plot of the lengths."""


def main(config: Config) -> None:
    """Read, encode, print."""
    from lit_qlora.data import boundary, show
    from lit_qlora.data.load import length_limit, load
    from lit_qlora.data.prepared import choose_data
    from lit_qlora.errors import DataError
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.prompts.tokenizer import Tokenizer
    from lit_qlora.run.figures import plot_lengths

    tokenizer = Tokenizer(config.checkpoint_dir)
    known = (config.checkpoint_dir / "model_config.json").is_file()
    limit = length_limit(config.data, ModelConfig.load(config.checkpoint_dir) if known else None)
    seed = config.seed if config.data.seed is None else config.data.seed
    data = choose_data(config.data, config.checkpoint_dir)
    loaded = load(data, config.checkpoint_dir, tokenizer, limit, seed)
    audit, counts = loaded.audit, loaded.audit.counts

    of_demo = "   of the demo; --checkpoint_dir names another" if config.checkpoint_dir == DEMO_CHECKPOINT else ""
    print(f"tokenizer {config.checkpoint_dir}{of_demo}")
    for source in audit.sources:
        print(f"source    {source}")
    print(f"style     {loaded.style.name} (sha256 {loaded.style.digest[:12]})")
    print(f"samples   {audit.describe()}")
    print(f"limits    {limit} tokens: {counts.cut_prompts:,} prompts, {counts.cut_turns:,} turns and "
          f"{counts.cut_answers:,} answers cut, {counts.dropped:,} samples dropped")  # fmt: skip
    print(
        f"empty     {counts.empty_prompts:,} prompts, {counts.empty_answers:,} answers, {counts.masked:,} masked whole"
    )
    print(f"twice     {audit.duplicates:,} in training, {audit.overlap:,} in both training and validation")
    print(f"ends      {counts.ended:,} of {counts.turns:,} answers end with an end-of-text token")
    print(f"labelled  {audit.labelled:,} of {audit.tokens:,} tokens ({audit.labelled / audit.tokens:.1%})")
    for warning in audit.warnings:
        print(f"WARNING   {warning}")
    for note in audit.notes():
        print(f"note      {note}")
    print(f"\ntokens of a sample, and number of samples\n{audit.histogram()}\n")
    for sample in audit.shown:
        print(f"sample    {show(sample, tokenizer, most=600)}")
        print(f"          prompt || answer: {boundary(sample, tokenizer)}")
    if config.png:
        plot_lengths(audit.lengths.tolist(), limit, config.png)
        print(f"picture   {config.png}")
    if audit.red:
        raise DataError("\n       ".join(audit.red))


if __name__ == "__main__":
    cli.run(main, Config)
