"""The measure of losses of a run, whatever it learns from, which keeps the loss of each sample beside its log."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lit_qlora.data import RunData
from lit_qlora.data.batches import SampleBatch, validation_pairs
from lit_qlora.data.comparisons import Comparisons
from lit_qlora.evaluate import sample_losses
from lit_qlora.evaluate.labels import LabelScores
from lit_qlora.evaluate.measures import Losses, Show
from lit_qlora.evaluate.preferences import PairLosses
from lit_qlora.evaluate.sample_losses import SampleLosses
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import FinetuneConfig
from lit_qlora.signals import StopRequest
from lit_qlora.train.objective import Objective
from lit_qlora.train.preferences import Preferences

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def losses_of(
    fabric: "Fabric",
    model: GPT,
    config: FinetuneConfig,
    data: RunData,
    some: Sequence[SampleBatch] | Comparisons,
    objective: Objective,
    stop: StopRequest,
    show: Show,
    name: str = sample_losses.FILE_NAME,
) -> Losses | PairLosses | LabelScores:
    """Make the measure of the losses of some samples or comparisons.

    Args:
        objective: of the run.
        name: of the file in OUT that keeps the loss of each; there is none for a loss of single answers.
    """
    assert config.out_dir is not None
    if isinstance(some, Comparisons):
        assert isinstance(objective, Preferences)
        pairs = validation_pairs(some, data.batching)
        paired = objective.config.published.paired
        own = SampleLosses.of_pairs(pairs, objective.config) if paired else None
        keep = partial(sample_losses.keep, config.out_dir, own, name=name) if own else None
        return PairLosses(fabric, model, pairs, objective, stop, show, keep)
    keep = partial(sample_losses.keep, config.out_dir, SampleLosses.of(some), name=name)
    if data.scoring:
        return LabelScores(fabric, model, some, data.scoring, stop, keep)
    return Losses(fabric, model, some, stop, keep, show, config.distill)
