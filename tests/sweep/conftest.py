"""Sweeps of a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_qlora import cli
from lit_qlora.settings import SweepConfig

Configure = Callable[..., SweepConfig]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Python 3.12 warns of forks beside threads; those that are here share nothing with the children."""
    for item in items:
        if "sweep" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"))


@pytest.fixture
def flags(tiny_checkpoint: Path, examples_file: Path, tmp_path: Path) -> list[str]:
    """A run of four steps that validates after each second one."""
    return [
        f"--checkpoint_dir={tiny_checkpoint}",
        f"--data.path={examples_file}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--out_dir={tmp_path / 'out'}",
        "--data.prompt=qa",
        "--data.val_fraction=0.2",
        "--train.max_steps=4",
        "--train.batch_size=8",
        "--train.learning_rate=0.01",
        "--eval.every=2",
        "--quantize=bnb.nf4",
    ]


@pytest.fixture
def configure(flags: list[str]) -> Configure:
    """Makes the settings of a sweep of such runs."""

    def make(*more: str) -> SweepConfig:
        return cli.parse(SweepConfig, [*flags, *more])

    return make


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and sweeps draw no pictures, which take half of the time of such short ones."""

    def nothing(*given: Any) -> None:
        pass

    for name in ("run.summary.write_pages", "sweep.pages.curves_figure", "sweep.pages.parallel_figure"):
        monkeypatch.setattr(f"lit_qlora.{name}", nothing)
