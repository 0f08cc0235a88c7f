"""Settings of distillation: learning what a teacher holds likely, beside the tokens of the data."""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, Positive, ShareAboveZero
from lit_qlora.settings.schemes import Scheme

BASE = Path("base")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """Distillation: the adapter learns the probabilities of a teacher at the labelled tokens."""

    prefix = "distill."

    teacher: Path | None = None
    """Checkpoint that teaches; its tokenizer must be the base's. 'base' is the base as it was published, so that a
    quantised base with its adapter comes nearer to it. By default there is no teacher."""
    quantize: Scheme = "none"
    """Storage of the teacher's weights."""
    top_k: Count = 64
    """Likeliest tokens of the teacher that are kept at each labelled token, in 8 bytes each; all others count as one.
    As many as the vocabulary has give the divergence over all tokens."""
    temperature: Positive = 1.0
    """Temperature of the probabilities of both; above 1, unlikely tokens weigh more (Hinton et al. 2015, arXiv
    1503.02531). The divergence is multiplied by its square, so that gradients keep their size."""
    weight: ShareAboveZero = 0.5
    """Weight of the divergence KL(teacher || model) in the loss; the cross-entropy of the labels has the rest. 1 learns
    from the teacher alone."""

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        for name in ("quantize", "top_k", "temperature", "weight"):
            default = DistillConfig.__dataclass_fields__[name].default
            check(
                self.teacher is not None or getattr(self, name) == default,
                f"distill.{name} has no effect without distill.teacher. Leave it out.",
            )
