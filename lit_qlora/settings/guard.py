"""Settings of the guards, which end a run whose loss or gradients went wrong."""

from dataclasses import dataclass

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, NotNegative


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Settings):
    """The end of a run whose loss or gradients went wrong. A loss that is not finite always ends it."""

    prefix = "guard."
    first = ()

    divergence: NotNegative = 3.0
    """A loss diverges above this factor times its best running average, plus 1; 0 does not look."""
    patience: Count = 10
    """Number of diverging steps in a row that ends the run."""
    skips: Count = 3
    """Number of steps in a row whose gradients may be infinite or NaN. Their updates are skipped."""

    def __post_init__(self) -> None:
        """Check the limit that is in two pieces."""
        super().__post_init__()
        check(
            self.divergence == 0 or self.divergence > 1,
            f"guard.divergence must be 0 or above 1, got {self.divergence}.",
        )
