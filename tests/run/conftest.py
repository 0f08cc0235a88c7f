"""Runs of a tiny model in processes of their own."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_qlora import cli
from lit_qlora.settings import FinetuneConfig
from tests.conftest import load_script, write_examples
from tests.run.forked import STEPS, Child, Start, at_save, ending, signals

Finetune = Callable[..., int]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Python 3.12 warns of forks beside threads; those that are here share nothing with the children."""
    for item in items:
        if "run" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"))


def starter(checkpoint: Path, data: Path, cache: Path) -> Start:
    """Begins a run of eight steps that saves after each and validates after every third."""

    def begin(out: Path, *flags: str, before: Callable[[], object] | None = None) -> Child:
        given = {flag.split("=")[0] for flag in flags}
        defaults = [
            f"--checkpoint_dir={checkpoint}",
            f"--data.path={data}",
            f"--data.cache_dir={cache}",
            f"--out_dir={out}",
            "--data.prompt=qa",
            "--data.val_fraction=0.1",
            f"--train.max_steps={STEPS}",
            "--train.batch_size=4",
            "--train.micro_batch_size=2",
            "--train.save_every=1",
            "--train.learning_rate=0.01",
            "--eval.every=3",
            "--lora.dropout=0.2",
        ]
        mine = [flag for flag in defaults if flag.split("=")[0] not in given]
        return Child([*mine, *flags], out.with_name(out.name + ".txt"), before)

    return begin


@pytest.fixture
def start(tiny_checkpoint: Path, examples_file: Path, tmp_path: Path) -> Start:
    """Begins a run of eight steps that saves after each and validates after every third."""
    return starter(tiny_checkpoint, examples_file, tmp_path / "cache")


@pytest.fixture(scope="session")
def start_once(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Begins runs that several tests look at."""
    directory = tmp_path_factory.mktemp("runs")
    return starter(tiny_checkpoint, write_examples(directory), directory / "cache")


@pytest.fixture(scope="session")
def whole(start_once: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], bytes]:
    """How the run ends when nothing happens to it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    child = start_once(out)
    assert child.wait() == 0, child.said.read_text()
    return ending(out)


@pytest.fixture(scope="session")
def killed(start_once: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed when it had saved its checkpoint of step 5. Read only."""
    out = tmp_path_factory.mktemp("killed") / "out"
    assert start_once(out, before=at_save(5, signals(signal.SIGKILL))).wait() == -signal.SIGKILL
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def finetune(tiny_checkpoint: Path, examples_file: Path, out: Path) -> Finetune:
    """Runs finetune/lora.py in this process for two steps, with more flags if given; returns the exit status."""
    script = load_script("finetune/lora.py")

    def run(*flags: str) -> int:
        given = {flag.split("=")[0] for flag in flags}
        defaults = [
            f"--checkpoint_dir={tiny_checkpoint}",
            f"--data.path={examples_file}",
            f"--out_dir={out}",
            "--data.prompt=qa",
            "--data.val_fraction=0.1",
            "--train.max_steps=2",
            "--train.batch_size=8",
        ]
        try:
            cli.run(
                script.main, FinetuneConfig, [*(flag for flag in defaults if flag.split("=")[0] not in given), *flags]
            )
        except SystemExit as end:
            return end.code  # type: ignore[return-value]
        return 0

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails."""

    def refuse(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lit_qlora.checkpoint.quantized_cache.load_stored", refuse)


def log_of(out: Path) -> tuple[list[dict], list[dict]]:
    """The records of steps and of validations."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
