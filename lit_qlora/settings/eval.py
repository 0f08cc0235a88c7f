"""When a model is validated during training, and what is measured then."""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, CountOrZero, NotNegative, Positive


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """When the model is validated, which it always is before and after training, and what is measured then."""

    prefix = "eval."

    every: NotNegative = 0.0
    """Optimizer steps between validations, or a share of an epoch if below 1; 0 validates ten times in the run."""
    minutes: NotNegative = 0.0
    """Validate also when so many minutes have gone by since the last validation; 0 does not look at the clock."""
    max_samples: Count | None = None
    """Validate on the first so many validation samples only."""
    best: str = "val_loss"
    """The figure of a validation by which the best checkpoint is kept, as OUT/best, and the run may end early; 'none'
    keeps none."""
    patience: CountOrZero = 0
    """End the run when so many validations in a row were not better than the best; 0 does not."""
    generate: CountOrZero = 0
    """Let the model answer so many of the validation samples and compare: exact match, BLEU, chrF, ROUGE-L."""
    prompts: Path | None = None
    """A file of prompts that are answered at each validation, a line each (.txt), or JSON lines with instruction, input
    and system; the answers go to OUT/samples.jsonl."""
    max_new_tokens: Count | None = None
    """Most tokens of an answer; by default 128."""
    kl_text: Path | None = None
    """A text file on which to measure how far the model has moved from its base, as kl_to_base; 'default' is a text
    that comes with the package."""
    tasks: tuple[str, ...] | str = ()
    """Tasks of lm-eval that the model is asked during training, e.g. [mmlu]; their figures are called TASK/METRIC."""
    tasks_every: Count | None = None
    """Ask them only at validations that are at least so many optimizer steps after the last ones at which they were
    asked; before and after training always."""
    tasks_limit: Positive | None = None
    """Ask the first so many questions of each task only; below 1, this share of them."""
    tasks_num_fewshot: CountOrZero | None = None
    """Examples before each question; by default what the task says."""
    tasks_include_path: Path | None = None
    """Directory with tasks of your own (YAML files)."""

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(
            self.max_new_tokens is None or bool(self.generate or self.prompts),
            "eval.max_new_tokens concerns answers, so it needs eval.generate or eval.prompts.",
        )
        for name in ("tasks_every", "tasks_limit", "tasks_num_fewshot", "tasks_include_path"):
            check(getattr(self, name) is None or bool(self.tasks), f"eval.{name} has no effect without eval.tasks.")
        check(
            self.every < 1 or self.every == round(self.every),
            f"eval.every must be a whole number of steps or a share of an epoch below 1, got {self.every}.",
        )
        check(
            not (self.patience and self.best == "none"),
            "eval.patience needs to know what is better: name a figure such as val_loss with eval.best.",
        )
