"""Measure the perplexity of a model on a text file.

python eval/perplexity.py --data.path wiki.test.txt --lora_path out/lora/Llama-2-7b-hf
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_qlora import cli
from lit_qlora.errors import DataError
from lit_qlora.files.reading import read_text
from lit_qlora.inference import InferenceConfig, peak_memory
from lit_qlora.settings import check


@dataclass(frozen=True, kw_only=True)
class Config(InferenceConfig):
    """Measure the perplexity of a model on a text file. The file is one text, which begins with BOS if there is one."""

    file: Path
    """Text file in UTF-8, such as the test part of WikiText."""
    max_length: int | None = None
    """Tokens that the model reads at once. By default its whole context, at most 2048."""
    stride: int | None = None
    """Tokens that are predicted at a time. Fewer than max_length give each token more context, and take longer. By
    default max_length."""
    batch_size: int | Literal["auto"] = "auto"
    """Windows per forward pass; 'auto' takes as many as suit the device. Changes memory and speed, not the result."""

    def __post_init__(self) -> None:
        """Check the settings before anything is loaded."""
        super().__post_init__()
        check(self.file.is_file(), f"file: {self.file} is not a file.")
        for name in ("max_length", "stride", "batch_size"):
            value = getattr(self, name)
            check(value in (None, "auto") or value >= 1, f"{name} must be at least 1, got {value}.")


def main(config: Config) -> None:
    """Load, score, print."""
    text = read_text(config.file, DataError)
    if not text:
        raise DataError(f"{config.file} is empty.")

    from tqdm import tqdm

    from lit_qlora.evaluate.score import Scorer, windows
    from lit_qlora.fused import reader

    loaded = config.load()
    tokenizer = loaded.tokenizer
    most = config.max_length or min(loaded.model.config.block_size, 2048)
    scorer = Scorer(loaded.model, config.batch_size, most)
    scorer.hidden = reader(loaded.model)
    stride = config.stride or scorer.max_length
    check(stride <= scorer.max_length, f"stride is {stride}, above max_length, {scorer.max_length}.")
    ids = tokenizer.encode(text, bos=False)
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    requests = list(windows(ids, begin, scorer.max_length, stride))
    with tqdm(total=len(requests), disable=None, desc="Scoring") as progress:
        nats = -sum(log_prob for log_prob, _ in scorer.score(requests, progress.update))
    words, size = len(text.split()), len(text.encode())
    print(
        f"perplexity      {math.exp(nats / len(ids)):.4f}   per token; {len(ids):,} tokens\n"
        f"word perplexity {math.exp(min(nats / max(1, words), 700.0)):.4f}   per word between spaces; {words:,} words\n"
        f"bits per byte   {nats / size / math.log(2):.4f}   {size:,} bytes\n"
        f"loss            {nats / len(ids):.4f}   nats per token"
    )
    print(f"windows of {scorer.max_length} tokens, {stride} predicted at a time; {peak_memory()}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, Config)
