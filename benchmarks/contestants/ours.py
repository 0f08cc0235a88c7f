"""This package."""

from functools import cache
from typing import TYPE_CHECKING, Any

from shapes import random_model

from contestants.task import LONGEST_EXAMPLE, Built, Micro, Task

if TYPE_CHECKING:
    from torch import Tensor

    from lit_qlora.data import Batch
    from lit_qlora.data.comparisons import PairBatch
    from lit_qlora.model.config import ModelConfig


@cache  # made once, on the host, as the data of a run is
def as_batch(micro: Micro) -> "Batch":
    """Return the micro-batch as our model reads it."""
    import torch

    from lit_qlora.data import Batch
    from lit_qlora.model.gpt import IGNORE

    ids, documents = micro.ids.cpu(), micro.documents or [micro.ids.size(1)]
    positions = torch.cat([torch.arange(n) for n in documents]).expand_as(ids)
    labels = ids.roll(-1, 1).masked_fill(positions.roll(-1, 1) == 0, IGNORE)
    if not micro.documents:
        return Batch(ids, labels)
    numbers = torch.arange(len(documents), dtype=torch.int32)
    return Batch(ids, labels, None, positions, numbers.repeat_interleave(torch.tensor(documents))[None])


@cache
def as_pairs(task: Task, micro: Micro) -> "tuple[PairBatch, PairBatch]":
    """Return the pairs as our model reads them, on the host and on the GPU."""
    import numpy as np
    import torch

    from lit_qlora.data import Sample, Samples
    from lit_qlora.data.batches import Batching, validation_pairs
    from lit_qlora.data.comparisons import CHOSEN, REJECTED, Comparisons, Layout
    from lit_qlora.train.preferences import on

    samples = []
    for row in micro.ids.tolist():
        prompt, answers = row[: task.length], (row[task.length : -task.answer], row[-task.answer :])
        samples += [Sample.of([*prompt, *answer], task.length) for answer in answers]
    count = len(micro.ids)
    sides, bounds = np.array([CHOSEN, REJECTED] * count, np.int8), np.arange(0, 2 * count + 1, 2)
    data = Comparisons(Samples.of(samples), bounds, sides, np.zeros(count, np.float32), Layout())
    (batch,) = validation_pairs(data, Batching(batch_size=count, micro_batch_size=count, seed=0))
    return batch, on(batch, torch.device(micro.ids.device))


def build(task: Task) -> Built:
    """The fast path, on random weights made on the GPU."""
    from lit_qlora.device import let_segments_grow, precede_other_streams
    from lit_qlora.fused import fuse, why_not
    from lit_qlora.lora.layer import add_lora
    from lit_qlora.settings import LoRAConfig, OptimizerConfig, PreferenceConfig, TrainConfig
    from lit_qlora.train.optim import make_optimizer
    from lit_qlora.train.preferences import Preferences, token_losses

    let_segments_grow()  # as a run does
    model = random_model(task.shape, "bnb.nf4-dq" if task.quantize else "none")
    targets = tuple(task.targets.split(","))
    add_lora(model, LoRAConfig(r=task.r, alpha=16, targets=targets, dropout=task.dropout))  # type: ignore[arg-type]
    if reason := why_not(model):
        raise RuntimeError(f"the fast path is not taken: {reason}")
    graph_tokens = _graph_tokens(task, model.config) if task.graphs else 0
    kept, whole = task.dequantized, task.dequantized >= model.config.n_layer
    fused = fuse(model, graph_tokens, cached_blocks=kept, copies_at_once=whole)  # as a run does that has the memory
    if fused.ahead:
        precede_other_streams()

    def loss(micro: Micro) -> "Tensor":
        value: Tensor = model.loss(*as_batch(micro)) / micro.ids.numel()
        return value

    if task.workload == "pairs":
        objective = Preferences(PreferenceConfig(), fused.device)

        def loss(micro: Micro) -> "Tensor":
            batch, there = as_pairs(task, micro)
            return objective.of_losses(there, token_losses(model, batch), len(micro.ids), 1)

    def set_recompute(setting: Any) -> None:
        fused.set_recompute([setting] * len(fused.blocks))

    optimizer = make_optimizer(
        model.named_parameters(), OptimizerConfig(), TrainConfig(learning_rate=1e-4), flatten=fused.flatten
    )
    return Built(model.train(), loss, set_recompute, optimizer)


def _graph_tokens(task: Task, config: "ModelConfig") -> int:
    """Tokens of the largest micro-batch, padding included; which of them are few enough is for the model to say."""
    from lit_qlora.fused.graphs import padded_length, row_width

    if task.workload == "fixed":
        return task.rows * row_width(config, task.length, packed=False)
    return padded_length(LONGEST_EXAMPLE) if task.workload == "short" else 0
