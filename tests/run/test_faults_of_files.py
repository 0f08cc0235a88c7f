"""A fault, a kill or a signal at any operation on a file, anywhere in a run, costs at most what was not saved."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_qlora.data import cache
from tests.conftest import run_here
from tests.disturbed import die, disturbed, fail, litter, stop
from tests.run.forked import ending


@pytest.fixture
def finetune(tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """A run of two steps in OUT of a folder, with both caches, answers, a best checkpoint and the report."""
    monkeypatch.setattr(cache, "WORTH_KEEPING", 1)

    def run(folder: Path) -> int:
        return int(
            run_here(
                "finetune/lora.py",
                *(f"--checkpoint_dir={tiny_checkpoint}", f"--data.path={examples_file}", f"--out_dir={folder}/out"),
                *(f"--data.cache_dir={folder}/cache", f"--quantize_cache={folder}/quantized", "--quantize=bnb.nf4"),
                *("--data.prompt=qa", "--data.val_fraction=0.1", "--train.batch_size=4", "--train.micro_batch_size=2"),
                *("--train.max_steps=2", "--train.save_every=1", "--train.keep_last=1", "--train.learning_rate=0.01"),
                *("--eval.every=1", "--eval.generate=1", "--eval.max_new_tokens=2"),
            ).returncode
            or 0
        )

    return run


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".jsonl"}


def check_disturbed(finetune: Callable[[Path], int], whole: Path, disturbance: Callable[[], None], number: int) -> bool:
    """Disturb the operation of this number on files; the run, or the same command after it, ends as it would have.

    Returns:
        whether there was such an operation.
    """
    folder = whole.with_name("disturbed")
    folder.mkdir()
    status, came = disturbed(folder, number, disturbance, lambda: finetune(folder))
    assert status in {fail: (0, 6), die: (-9,), stop: (143, 0)}[disturbance] or not came, number
    if disturbance is stop or status == 6:
        assert litter(folder) == [], number
    if status:
        assert finetune(folder) == 0, number
    assert ending(folder / "out") == ending(whole / "out"), number
    assert litter(folder) == [], number
    if status:
        assert names(folder / "out") == names(whole / "out"), number
    shutil.rmtree(folder)
    return came


@pytest.fixture
def whole(finetune: Callable[[Path], int], tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    folder.mkdir()
    assert finetune(folder) == 0
    return folder


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("disturbance", [fail, die, stop])
def test_a_fault_at_any_touch_of_a_file_costs_at_most_what_was_not_saved(
    finetune: Callable[[Path], int], whole: Path, disturbance: Callable[[], None]
) -> None:
    number = 1
    while check_disturbed(finetune, whole, disturbance, number):
        number += 1
    assert number > 100
