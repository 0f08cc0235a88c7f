"""The losses of validation samples are kept so that runs can be compared sample by sample."""

from pathlib import Path

import torch

from lit_qlora.data import Batch, Batching
from lit_qlora.data.batches import pair_rows, validation_pairs
from lit_qlora.evaluate.sample_losses import FILE_NAME, SampleLosses, digest, keep
from lit_qlora.settings import PreferenceConfig
from tests.train.test_preferences import comparisons

SHORT = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[-100, 3, 4]]))
PADDED = Batch(torch.tensor([[1, 2, 3, 0], [5, 6, 7, 8]]), torch.tensor([[-100, 3, 4, -100], [6, 7, 8, 9]]))


def scores(*losses: float) -> torch.Tensor:
    return torch.tensor([[loss, 0.0, 1.0] for loss in losses], dtype=torch.float64)


def test_a_sample_is_known_by_its_ids_and_labels_not_by_its_padding() -> None:
    short, padded = SampleLosses.of([SHORT]), SampleLosses.of([PADDED])
    assert short.samples[0] == padded.samples[0] != padded.samples[1]
    assert padded.labelled == (2, 4)
    assert digest(SHORT.tokens[0], torch.tensor([2, 3, 4])) != short.samples[0]


def test_a_validation_that_is_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    for step, loss in ((0, 3.0), (4, 2.0), (8, 1.0), (4, 2.5)):
        keep(tmp_path, SampleLosses.of([PADDED]), step, scores(loss, 2 * loss))
    kept = SampleLosses.read(tmp_path)
    assert kept
    assert kept.losses == {0: (3.0, 6.0), 4: (2.5, 5.0)}
    assert kept.up_to(4).losses == {0: (3.0, 6.0)}


def test_losses_of_other_samples_are_replaced(tmp_path: Path) -> None:
    keep(tmp_path, SampleLosses.of([PADDED]), 0, scores(3.0, 6.0))
    keep(tmp_path, SampleLosses.of([SHORT]), 4, scores(1.0))
    kept = SampleLosses.read(tmp_path)
    assert kept
    assert kept.losses == {4: (1.0,)}


def test_a_damaged_file_is_none(tmp_path: Path) -> None:
    assert SampleLosses.read(tmp_path) is None
    for text in ("{", "{}", '{"samples": 3}', '{"samples": [], "labelled": [], "losses": []}'):
        (tmp_path / FILE_NAME).write_text(text)
        assert SampleLosses.read(tmp_path) is None


def test_a_comparison_is_known_by_its_answers_and_its_loss() -> None:
    data = comparisons()
    alone, packed = (
        validation_pairs(data, Batching(batch_size=5, micro_batch_size=2, seed=0, row_length=length))
        for length in (None, 64)
    )
    dpo, ipo = PreferenceConfig(), PreferenceConfig(loss="ipo")
    found = SampleLosses.of_pairs(alone, dpo)
    assert len(set(found.samples)) == len(data)
    assert set(found.labelled) == {1}
    assert sorted(SampleLosses.of_pairs(packed, dpo).samples) == sorted(found.samples)
    assert not set(SampleLosses.of_pairs(alone, ipo).samples) & set(found.samples)
    order = [number for row in pair_rows(data, Batching(batch_size=5, micro_batch_size=2, seed=0)) for number in row]
    assert (
        SampleLosses.of_pairs(alone, dpo).samples[order.index(1)]
        == SampleLosses.of_pairs(
            validation_pairs(data.take([1]), Batching(batch_size=5, micro_batch_size=2, seed=0)), dpo
        ).samples[0]
    )
