"""Settings of trackers."""

from dataclasses import dataclass
from typing import Literal, get_args

from lit_qlora.settings.checks import Settings, check

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings):
    """Trackers of the run besides OUT/log.jsonl."""

    prefix = "log."
    first = ()

    to: tuple[Tracker, ...] | Tracker = ()
    """Trackers that get the same metrics, e.g. [tensorboard,wandb]. They write to OUT/tensorboard, OUT/wandb and
    OUT/mlruns, trackio to its own folder (TRACKIO_DIR), which 'trackio show' reads. Nothing leaves the machine unless
    WANDB_MODE, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says so. If a tracker fails, the run goes on without it."""

    def __post_init__(self) -> None:
        """Check that no tracker is named twice."""
        super().__post_init__()
        check(len(set(self.to)) == len(self.to), f"log.to names a tracker twice: {', '.join(self.to)}.")
