"""When a run ends because its numbers went wrong."""

from dataclasses import dataclass

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, NotNegative


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Settings):
    """What ends a run whose numbers went wrong; a loss that is not finite always does."""

    prefix = "guard."

    divergence: NotNegative = 3.0
    """The loss diverged when it is more than so many times its best running average, and 1 more; 0 does not look."""
    patience: Count = 10
    """Steps in a row for which it has to be."""
    skips: Count = 3
    """Steps in a row that may have gradients that are not finite; the updates of the others are left out."""

    def __post_init__(self) -> None:
        """Check what the limits leave open."""
        super().__post_init__()
        check(
            self.divergence == 0 or self.divergence > 1,
            f"guard.divergence must be 0 or above 1, got {self.divergence}.",
        )
