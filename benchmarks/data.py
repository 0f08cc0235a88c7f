"""Time the data of a run: reading, encoding, packing, and a second start from the cache. Measure how full the rows are.

python benchmarks/data.py --tokenizer_dir checkpoints/meta-llama/Llama-2-7b-hf --source alpaca.json --samples 50000
"""

import json
import resource
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import DEMO_CHECKPOINT, DataConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the data part of a run on this machine."""

    source: Path = Path("finetune/demo/train.jsonl")
    """A .json or .jsonl file; its samples are repeated, each with a number of its own, until there are enough."""
    samples: int = 50_000
    """Samples to measure with."""
    tokenizer_dir: Path = DEMO_CHECKPOINT
    """A directory with the tokenizer."""
    prompt: str = "alpaca"
    """Prompt style."""
    pack_length: int = 2048
    """Tokens of a packed row."""


def main(config: Config) -> None:
    """Write the file, then measure."""
    from lit_qlora.data import Batching
    from lit_qlora.data.examples import read_examples
    from lit_qlora.data.load import encode_source
    from lit_qlora.data.packing import pack
    from lit_qlora.data.sources import Source
    from lit_qlora.prompts.style import find_style
    from lit_qlora.prompts.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        _write(file, config)
        print(f"{config.samples:,} samples, {file.stat().st_size / 2**20:.1f} MiB, {config.tokenizer_dir}")
        data = DataConfig(path=str(file), prompt=config.prompt, cache_dir=str(Path(folder) / "cache"))
        tokenizer, style = Tokenizer(config.tokenizer_dir), find_style(config.prompt, directory=config.tokenizer_dir)

        def encode():
            return encode_source(Source(str(file)), data, config.tokenizer_dir, tokenizer, style, max_length=2048)

        timed("read and check", lambda: read_examples(file))
        timed("read, encode and keep", encode)
        encoded = timed("from the cache", encode)
        assert encoded.cached
        lengths = (encoded.samples.lengths - 1).tolist()
        rows = timed("pack", lambda: pack(lengths, config.pack_length))
        print(
            f"{sum(lengths):,} tokens in {len(rows):,} rows: {sum(lengths) / len(rows) / config.pack_length:.2%} full"
        )
        for batch_size, devices in product((32, 128), (1, 2, 4)):
            batching = Batching(batch_size=batch_size, micro_batch_size=4, seed=0, row_length=config.pack_length)
            print(f"steps of {batch_size} on {devices}: {fullness(encoded.samples, batching, devices):.2%} full")
        for packed, devices in product((config.pack_length, None), (2, 4, 8)):
            batching = Batching(batch_size=128, micro_batch_size=4, seed=0, row_length=packed)
            tokens, squares = evenness(encoded.samples, batching, devices)
            kind = "packed" if packed else "a sample a row"
            print(f"steps of 128 on {devices}, {kind}: even to {tokens:.2%} in positions, {squares:.2%} in attention")
        print(f"most memory ever held: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def fullness(samples, batching, devices):
    """Fraction of the tokens read, of all tokens that every device could read while the busiest one works."""
    from lit_qlora.data import steps

    total = min(200, max(1, len(samples) // batching.batch_size))
    ranks = (steps(samples, batching, total, rank, devices) for rank in range(devices))
    read = slots = 0
    for step in zip(*ranks, strict=True):
        read += step[0].tokens - step[0].samples
        slots += devices * max(sum(batch.tokens.numel() for batch in rank.batches) for rank in step)
    return read / slots


def evenness(samples, batching, devices):
    """Work of all processes, as a fraction of what they would do if each did as much as a step's busiest.

    Counted twice: positions that are computed, padding too; and the squares of the lengths that attention reads.
    """
    from lit_qlora.data import steps

    total = max(1, len(samples) // batching.batch_size)
    ranks = (steps(samples, batching, total, rank, devices) for rank in range(devices))
    done, most = [0, 0], [0, 0]
    for step in zip(*ranks, strict=True):
        for i, work in enumerate((positions, attention)):
            of_ranks = [sum(work(batch) for batch in rank.batches) for rank in step]
            done[i] += sum(of_ranks)
            most[i] += devices * max(of_ranks)
    return [part / whole for part, whole in zip(done, most, strict=True)]


def positions(batch):
    """Positions of a micro-batch."""
    return batch.tokens.numel()


def attention(batch):
    """Sum of the squares of the lengths of a micro-batch's rows, or of its documents."""
    rows, width = batch.tokens.shape
    if batch.segments is None:
        return rows * width**2
    return sum(int((row[row >= 0].bincount() ** 2).sum()) for row in batch.segments)


def timed(what, function):
    """Run it; print the seconds by the clock and of the processors."""
    clock, processors = time.perf_counter(), time.process_time()
    result = function()
    print(f"{what:<22} {time.perf_counter() - clock:6.2f} s   {time.process_time() - processors:6.2f} s of processor")
    return result


def _write(file: Path, config: Config) -> None:
    text = config.source.read_text(encoding="utf-8")
    rows = json.loads(text) if config.source.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    with file.open("w", encoding="utf-8") as out:
        for number in range(config.samples):
            row = rows[number % len(rows)]
            out.write(json.dumps(row | {"instruction": f"{row['instruction']} ({number})"}) + "\n")


if __name__ == "__main__":
    cli.run(main, Config)
