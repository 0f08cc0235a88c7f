"""Which programs are told of a run."""

from dataclasses import dataclass
from typing import Literal, get_args

from lit_qlora.settings.checks import Settings, check

Mirror = Literal["tensorboard", "wandb", "mlflow"]
MIRRORS: tuple[Mirror, ...] = get_args(Mirror)


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings):
    """Who is told of the run besides OUT/log.jsonl."""

    prefix = "log."

    to: tuple[Mirror, ...] | Mirror = ()
    """Programs that get the same figures, e.g. [tensorboard,wandb]: their files lie in OUT/tensorboard, OUT/wandb and
    OUT/mlruns. wandb is offline unless WANDB_MODE says otherwise. If one fails, the run goes on without it."""

    def __post_init__(self) -> None:
        """Check that none is named twice."""
        super().__post_init__()
        check(len(set(self.to)) == len(self.to), f"log.to names one twice: {', '.join(self.to)}.")
