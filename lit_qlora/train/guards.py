"""Guards that stop a run whose loss or gradients went wrong."""

import math
from collections.abc import Iterable

from torch import nn

from lit_qlora.errors import NumericalError
from lit_qlora.settings import GuardConfig

WARM = 5  # steps until the average of the loss is meaningful
SCALER_TRIES = 20  # fp16 halves its scale from 65,536 until the gradients fit; beyond this they never will


class Guard:
    """Watches loss and gradients of each step.

    Its state depends on the records of the log alone, so a resumed run restores it from them.

    Args:
        scaled: True if the loss is scaled (fp16); gradients then overflow now and then, which is no fault.
    """

    def __init__(self, config: GuardConfig, scaled: bool = False) -> None:
        self.config = config
        self.most_skipped = SCALER_TRIES if scaled else config.skips
        self.average = 0.0
        self.best = math.inf
        self.seen = self.above = self.skipped = 0

    def recall(self, loss: float, skipped: bool) -> None:
        """Take a step of an earlier process into account."""
        self._see(loss)
        self.skipped = self.skipped + 1 if skipped else 0

    def _see(self, loss: float) -> None:
        self.seen += 1
        self.average = loss if self.seen == 1 else 0.9 * self.average + 0.1 * loss
        if self.seen >= WARM:
            self.best = min(self.best, self.average)
        # A factor alone would call a loss of 0.03 after 0.01 divergence.
        far = loss > max(self.config.divergence * self.best, self.best + 1)
        self.above = self.above + 1 if far and self.config.divergence else 0

    def check_loss(self, step: int, loss: float) -> None:
        """Raise NumericalError if the loss is not finite, or has been far above its best for too long."""
        if not math.isfinite(loss):
            raise NumericalError(
                f"The loss is {loss} at step {step}; the step was not taken.\n"
                "Lower train.learning_rate, or take --precision bf16-true or 32-true."
            )
        self._see(loss)
        if self.above >= self.config.patience:
            raise NumericalError(
                f"The loss diverged: {loss:.4g} at step {step}, for {self.above} steps more than "
                f"{self.config.divergence:g} times its best average, {self.best:.4g}.\n"
                "Lower train.learning_rate; --guard.divergence 0 goes on regardless."
            )

    def may_update(self, step: int, norm: float) -> bool:
        """Allow the update if the gradients are finite.

        Raises:
            NumericalError: if they were not finite for too many steps in a row.
        """
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped >= self.most_skipped:
            raise NumericalError(
                f"The gradients were not finite for {self.skipped} steps in a row, up to step {step}.\n"
                "Lower train.learning_rate, or take --precision bf16-true or 32-true."
            )
        return False


def check_first_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise NumericalError if a layer that should learn got no gradient from the first step.

    Experts and embeddings are exempt: a step does not reach all of them.
    """
    layers: dict[str, bool] = {}
    for name, parameter in parameters:
        layer = name.rpartition(".")[0]
        reached = parameter.grad is not None and bool(parameter.grad.any())
        layers[layer] = layers.get(layer, False) or reached or ".experts." in name or name.endswith("embed.rows")
    if idle := [layer for layer, reached in layers.items() if not reached]:
        some = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
        raise NumericalError(
            f"{len(idle)} of {len(layers)} layers got no gradient from the first step, so they learn nothing: {some}.\n"
            "Their inputs or outputs are zero: is the base damaged, or a whole step of the data masked?"
        )
