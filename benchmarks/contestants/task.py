"""The task of all contestants, and its tokens."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shapes import model_config

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

EXAMPLES_A_STEP = 16  # of the workload "short"
LONGEST_EXAMPLE = 512


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task of a contestant."""

    name: str
    """One of contestant.CONTESTANTS."""
    checkpointing: bool = False
    """Whether the library computes activations again, in the way it recommends."""
    shape: str
    dir: str
    """Folder of a Hugging Face checkpoint of this shape; for all but ours."""
    workload: str
    """fixed: rows of one length. short: one example a micro-batch, 16 of them a step. packed: examples end to end.
    pairs: a prompt of `length` tokens and two answers to it in each row, for DPO."""
    rows: int
    length: int
    answer: int = 256
    """Tokens of an answer of the workload "pairs"."""
    r: int
    targets: str
    quantize: bool
    dropout: float
    graphs: bool = True
    """Whether ours replays CUDA graphs of micro-batches of few tokens, as a run does."""
    dequantized: int = 0
    """Blocks whose weights ours keeps in 16 bit as well."""


@dataclass(frozen=True, eq=False)
class Micro:
    """A micro-batch: ids (B, T), and the lengths of the documents in its only row if it is packed.

    Of pairs a row has the prompt and both answers, so a prompt counts once.
    """

    ids: "Tensor"
    documents: list[int] | None = None


Loss = Callable[[Micro], "Tensor"]


@dataclass(frozen=True, eq=False)
class Built:
    """A library's model and step for a task."""

    model: "nn.Module"
    loss: Loss
    set_recompute: Callable[[str], None] | None = None
    """Chooses what blocks compute again; for ours alone."""
    optimizer: "Optimizer | None" = None
    """Updates the adapters, if it is not torch's fused AdamW over each of them."""


def example_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths like those of Alpaca's examples: log-normal, median 110, mean about 127."""
    draw = random.Random(seed)
    return [min(LONGEST_EXAMPLE, max(40, int(draw.lognormvariate(math.log(110), 0.55)))) for _ in range(count)]


def make_steps(task: Task, count: int) -> list[list[Micro]]:
    """The micro-batches of each step."""
    import torch

    from lit_qlora.device import pick_device

    generator = torch.Generator().manual_seed(0)
    vocab = model_config(task.shape).vocab_size

    def ids(rows: int, length: int) -> "Tensor":
        return torch.randint(3, vocab, (rows, length), generator=generator).to(pick_device())

    if task.workload == "pairs":
        return [[Micro(ids(task.rows, task.length + 2 * task.answer))] for _ in range(count)]
    if task.workload == "fixed":
        return [[Micro(ids(task.rows, task.length))] for _ in range(count)]
    lengths = iter(example_lengths(100_000))
    if task.workload == "short":
        return [[Micro(ids(1, next(lengths))) for _ in range(EXAMPLES_A_STEP)] for _ in range(count)]
    return [[Micro(ids(1, task.rows * task.length), pack(task.rows * task.length, lengths))] for _ in range(count)]


def pack(room: int, lengths: Iterator[int]) -> list[int]:
    """Lengths of the documents that fill a row, the last of them cut."""
    documents: list[int] = []
    while room:
        documents.append(min(room, next(lengths)))
        room -= documents[-1]
    return documents
