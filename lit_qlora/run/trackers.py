"""Trackers, which show a run while it goes on: TensorBoard, Weights & Biases, MLflow, Trackio. None can stop it."""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from lit_qlora.report import Record, tell
from lit_qlora.settings import Tracker


class Writer(Protocol):
    """A tracker."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step, or of a validation after it."""
        ...

    def close(self) -> None:
        """Write what is buffered, and end."""
        ...


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out_dir: Path, settings: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run repeats the steps after its last checkpoint.
        self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=start + 1 if start else None)
        if not start:
            rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
            self.writer.add_text("settings", f"| | |\n|---|---|\n{rows}", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Writer."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See Writer."""
        self.writer.close()


class WandB:
    """A run in OUT/wandb, offline unless WANDB_MODE is set; a resumed run has the same id."""

    def __init__(self, out_dir: Path, settings: Mapping[str, Any], start: int) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        earlier = sorted((out_dir / "wandb").glob("*run-*-*"))
        self.run = wandb.init(
            project="lit_qlora",
            name=out_dir.name,
            dir=str(out_dir),
            id=earlier[-1].name.rpartition("-")[2] if start and earlier else None,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        self.run.define_metric("*", step_metric="step")  # wandb's own counter would run ahead

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Writer."""
        self.run.log({**values, "step": step})

    def close(self) -> None:
        """See Writer."""
        self.run.finish()


class MLflow:
    """A run in the file store OUT/mlruns; a resumed run is the same one."""

    def __init__(self, out_dir: Path, settings: Mapping[str, Any], start: int) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # mlflow >= 3.2 reports its use to its makers unless one of these says no.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric = Metric
        self.client = MlflowClient((out_dir.resolve() / "mlruns").as_uri())
        experiment = self.client.get_experiment_by_name("lit_qlora")
        number = experiment.experiment_id if experiment else self.client.create_experiment("lit_qlora")
        earlier = self.client.search_runs([number], max_results=1) if start else []
        if earlier:
            self.run_id = earlier[0].info.run_id
            self.client.set_terminated(self.run_id, "RUNNING")
        else:
            self.run_id = self.client.create_run(number, run_name=out_dir.name).info.run_id
            params = [Param(name, str(value)[:500]) for name, value in settings.items()]
            self.client.log_batch(self.run_id, params=params)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Writer."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [self.metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """See Writer."""
        self.client.set_terminated(self.run_id)


class Trackio:
    """A run in Trackio's own folder, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set.

    A resumed run is the same one. Its name is the path of OUT, which no other run has.
    """

    def __init__(self, out_dir: Path, settings: Mapping[str, Any], start: int) -> None:
        import trackio

        self.trackio, plain = trackio, {name: value for name, value in settings.items() if value is not None}
        with open(os.devnull, "w") as nobody, redirect_stdout(nobody):  # it prints how to start its page
            self.run = trackio.init(
                project="lit_qlora",
                name=str(out_dir.resolve()),
                config=plain,
                resume="allow" if start else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Writer."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """See Writer."""
        with open(os.devnull, "w") as nobody, redirect_stdout(nobody):
            self.trackio.finish()


WRITERS: dict[Tracker, Callable[[Path, Mapping[str, Any], int], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Trackers:
    """The trackers of a run; one that fails is named once and then left out.

    Args:
        settings: settings of the run by their full names.
        start: steps done before.
    """

    def __init__(self, names: Sequence[Tracker], out_dir: Path, settings: Mapping[str, Any], start: int) -> None:
        self.writers: dict[Tracker, Writer] = {}
        for name in names:
            self._try(name, lambda name=name: self.writers.update({name: WRITERS[name](out_dir, settings, start)}))  # type: ignore[misc]

    def __call__(self, record: Record) -> None:
        """Take a record of the log."""
        group = "train" if "loss" in record else "val"
        values = {
            f"{group}/{name.removeprefix('val_')}": float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name, writer in list(self.writers.items()):
            self._try(name, lambda writer=writer: writer.write(record["step"], values))  # type: ignore[misc]

    def close(self) -> None:
        """Close all trackers."""
        for name, writer in list(self.writers.items()):
            self._try(name, writer.close)

    def _try(self, name: Tracker, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # a failing tracker is no reason to lose a run
            self.writers.pop(name, None)
            reason = str(error).partition("\n")[0]
            if isinstance(error, ImportError):
                said = f"is not installed ({reason}): pip install 'lit_qlora[{name}]'."
            else:
                said = f"failed and is left out: {type(error).__name__}: {reason}"
            tell(f"  note    log.to {name} {said}", sys.stderr)
