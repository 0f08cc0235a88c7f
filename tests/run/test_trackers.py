"""TensorBoard, Weights & Biases, MLflow and Trackio get what the log gets, and cannot stop a run."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_qlora.run.trackers import WRITERS, Trackers
from lit_qlora.settings import TRACKERS, Tracker
from tests.test_report import VAL, step

SETTINGS = {"train.epochs": 3.0, "data.path": ["a.jsonl"], "quantize": "bnb.nf4"}
EXPECTED = {"train/loss": {1: 2.0, 2: 1.5, 3: 1.25}, "train/lr": {1: 3e-4, 2: 3e-4, 3: 3e-4}, "val/loss": {3: 1.5}}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*filesystem tracking backend.*:FutureWarning",  # mlflow's file store is old, and needs no server
)


def write(name: Tracker, out: Path, records: list[dict], start: int = 0) -> None:
    trackers = Trackers([name], out, SETTINGS, start)
    for record in records:
        trackers(record)
    trackers.close()


def read_tensorboard(out: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {name: {e.step: round(e.value, 6) for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def read_wandb(out: Path) -> dict[str, dict[int, float]]:
    """The runs' files are LevelDB logs: 32 KiB blocks of records, each with a sum, a length and a kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, float]] = {}
    paths = sorted((out / "wandb").glob("*/*.wandb"))
    assert len({path.name for path in paths}) == 1, "a run that goes on has the same id"
    for path in paths:
        content, at, whole = path.read_bytes(), 7, b""
        assert content[:4] == b":W&B"
        while at + 7 <= len(content):
            if 2**15 - at % 2**15 < 7:
                at += 2**15 - at % 2**15
                continue
            length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            if kind == 0:
                break
            whole += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = Record.FromString(whole)
                whole = b""
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                for name, value in row.items():
                    if "/" in name:
                        found.setdefault(name, {})[row["step"]] = value
    return found


def read_mlflow(out: Path) -> dict[str, dict[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient((out / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("lit_qlora")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    names = run.data.metrics
    return {name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in names}


def read_trackio(out: Path) -> dict[str, dict[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("lit_qlora") == [str(out.resolve())]
    found: dict[str, dict[int, float]] = {}
    for row in SQLiteStorage.get_logs("lit_qlora", str(out.resolve())):
        for name, value in row.items():
            if "/" in name:
                found.setdefault(name, {})[row["step"]] = value
    return found


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("WANDB_MODE", "WANDB_SILENT", "MLFLOW_ALLOW_FILE_STORE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKERS)
def test_what_was_logged_is_read_back_by_its_own_library(
    tmp_path: Path, name: Tracker, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that is interrupted after step 3, and goes on from its checkpoint of step 1."""
    pytest.importorskip(name)
    write(name, tmp_path, [step(1), step(2, 9.0), step(3, 9.0)])
    write(name, tmp_path, [step(2, 1.5), step(3, 1.25), VAL], start=1)
    found = READERS[name](tmp_path)
    assert {key: found[key] for key in EXPECTED} == EXPECTED
    assert {"train/grad_norm", "train/tokens_per_second", "train/peak_gib", "val/ppl"} <= set(found)
    assert capfd.readouterr() == ("", "")


def test_trackio_keeps_to_itself_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def init(**given: Any) -> SimpleNamespace:
        print("* Trackio project initialized")
        calls.append({name: given[name] for name in ("name", "resume", "embed", "auto_log_gpu", "auto_log_cpu")})
        return SimpleNamespace(log=lambda metrics, step: calls.append((step, metrics["train/loss"])))

    theirs = SimpleNamespace(init=init, finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "trackio", theirs)
    for start in (0, 1):
        write("trackio", tmp_path, [step(start + 1)], start)
    quiet = {"name": str(tmp_path), "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    assert calls == [{**quiet, "resume": "never"}, (1, 2.0), "finish", {**quiet, "resume": "allow"}, (2, 2.0), "finish"]
    assert capsys.readouterr() == ("", "")


class Broken:
    """A writer that fails at some point."""

    def __init__(self, at: str, error: type[Exception] = ConnectionError) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, *given: Any) -> "Broken":
        """Make it."""
        self.fail("open")
        return self

    def fail(self, now: str) -> None:
        """Fail if it is time."""
        self.calls += 1
        if now == self.at:
            raise self.error("the server is gone\nand more")

    def write(self, *given: Any) -> None:
        """See Writer."""
        self.fail("write")

    def close(self) -> None:
        """See Writer."""
        self.fail("close")


@pytest.mark.parametrize(("at", "calls"), [("open", 1), ("write", 2), ("close", 4)])
def test_one_that_fails_is_named_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str, calls: int
) -> None:
    broken = Broken(at)
    monkeypatch.setitem(WRITERS, "wandb", broken)
    write("wandb", tmp_path, [step(1), step(2)])
    said = "  note    log.to wandb failed and is left out: ConnectionError: the server is gone\n"
    assert capsys.readouterr().err == said
    assert broken.calls == calls


def test_one_that_lacks_a_library_only_when_it_writes_is_named_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(WRITERS, "wandb", Broken("write", ImportError))
    write("wandb", tmp_path, [step(1), step(2)])
    assert capsys.readouterr().err.count("log.to wandb is not installed") == 1


def test_one_that_is_not_installed_is_named_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    write("mlflow", tmp_path, [step(1)])
    assert "pip install 'lit_qlora[mlflow]'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
