"""Settings of validation during training."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.generation import GenerationConfig
from lit_qlora.settings.limits import Count, CountOrZero, NotNegative, Positive

ANSWER_TOKENS = 128
"""Default of eval.max_new_tokens."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """The validations before and during training, and their metrics. The model is always validated after training."""

    prefix = "eval."
    first = ("every", "generate")

    every: NotNegative = 0.0
    """Optimizer steps between validations, or a share of an epoch if below 1; 0 validates ten times in the run."""
    epochs: Positive | None = None
    """Epochs between validations, e.g. 0.5 or 2, instead of every."""
    before_training: bool = True
    """Validate before the first step too."""
    minutes: NotNegative = 0.0
    """Validate also N minutes after the last validation; 0 does not look at the clock."""
    max_samples: Count | None = None
    """Validate on the first N validation samples only. By default on all."""
    train_samples: CountOrZero = 0
    """Measure N training samples, or comparisons, too, evenly among all, as seen_loss. OUT/training_losses.json keeps
    each one's loss, and report.html says what the data taught."""
    best: str = "val_loss"
    """Metric that chooses the best run checkpoint, OUT/best, and may end the run early; 'none' keeps no best."""
    patience: CountOrZero = 0
    """End the run after N validations in a row that are no better than the best; 0 does not."""
    generate: CountOrZero = 0
    """Answer N of the validation samples and compare: exact match, BLEU, chrF, ROUGE-L."""
    prompts: Path | None = None
    """File of prompts to answer at each validation: one a line (.txt), or JSON lines with instruction, input and
    system. The answers go to OUT/samples.jsonl."""
    max_new_tokens: Count | None = None
    """Maximum tokens of an answer. By default 128."""
    min_new_tokens: CountOrZero | None = None
    """Minimum tokens of an answer. By default 0."""
    num_beams: Count | None = None
    """Beams of the search for an answer; 1 does not search. By default 1."""
    repetition_penalty: Positive | None = None
    """Above 1, tokens that prompt or answer already hold become less likely in answers. By default 1."""
    judge_url: str | None = None
    """Let a model behind a server with OpenAI's API score the answers of eval.generate: serve.py or another, e.g.
    http://localhost:8000/v1. The metric is 'judge'. Prompts and answers are sent there. By default nobody is asked."""
    judge_model: str | None = None
    """Name of the model that judges, as its server knows it."""
    judge_prompt: Path | None = None
    """Text file with the request to the judge; {prompt}, {answer} and {wanted} are replaced. The last 'score: N' of the
    reply counts. By default a request for a score from 0 to 10."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Variable of the environment with the server's key. Without one no key is sent."""
    judge_options: dict[str, bool | int | float] = field(default_factory=lambda: {"temperature": 0.0})
    """Other fields of a request, e.g. {temperature: 0, max_tokens: 500}; {} for servers that refuse these."""
    kl_text: Path | None = None
    """Text file on which to measure the distance between model and base, as kl_to_base; 'default' is a text that comes
    with the package."""
    tasks: tuple[str, ...] | str = ()
    """Tasks of lm-eval to ask during training, e.g. [mmlu]. Their metrics are called TASK/METRIC."""
    tasks_every: Count | None = None
    """Ask the tasks only at validations at least N optimizer steps after the last time. Before and after training they
    are always asked. By default at every validation."""
    tasks_limit: Positive | None = None
    """Ask only the first N questions of each task; below 1, this share of them. By default all."""
    tasks_num_fewshot: CountOrZero | None = None
    """Examples before each question. By default the task's own number."""
    tasks_include_path: Path | None = None
    """Directory with tasks of your own (YAML files)."""

    @property
    def answers(self) -> GenerationConfig:
        """The generation of answers in validations: by the likeliest tokens, or by beam search."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens or ANSWER_TOKENS,
            min_new_tokens=self.min_new_tokens or 0,
            num_beams=self.num_beams or 1,
            repetition_penalty=self.repetition_penalty or 1.0,
        )

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        for name in ("max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty"):
            check(
                getattr(self, name) is None or bool(self.generate or self.prompts),
                f"eval.{name} concerns answers, so it needs eval.generate or eval.prompts.",
            )
        most, least = self.max_new_tokens or ANSWER_TOKENS, self.min_new_tokens or 0
        check(least <= most, f"eval.min_new_tokens must be at most eval.max_new_tokens = {most}, got {least}.")
        self._check_judge()
        check(self.epochs is None or self.every == 0, "eval.every and eval.epochs both say when. Leave one out.")
        for name in ("tasks_every", "tasks_limit", "tasks_num_fewshot", "tasks_include_path"):
            check(getattr(self, name) is None or bool(self.tasks), f"eval.{name} has no effect without eval.tasks.")
        check(
            self.every < 1 or self.every == round(self.every),
            f"eval.every must be a whole number of steps or a share of an epoch below 1, got {self.every}.",
        )
        check(
            not (self.patience and self.best == "none"),
            "eval.patience compares validations, so eval.best must name a metric such as val_loss.",
        )

    def _check_judge(self) -> None:
        """Check the settings of the judge; no message shows what could be a key."""
        ours = EvalConfig.__dataclass_fields__
        given = [
            name
            for name in ("judge_model", "judge_prompt", "judge_key_variable")
            if getattr(self, name) != ours[name].default
        ]
        check(
            self.judge_url is not None or not given,
            f"eval.{(given or [''])[0]} has no effect without eval.judge_url.",
        )
        if self.judge_url is None:
            return
        check(
            re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.judge_url) is not None,
            "eval.judge_url must be of the form http://HOST:PORT/v1. A key belongs into the environment, see "
            "eval.judge_key_variable.",
        )
        check(
            re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.judge_key_variable) is not None,
            "eval.judge_key_variable must be the name of a variable of the environment, not the key itself.",
        )
        taken = ", ".join(sorted({"model", "messages", "stream", "n"}.intersection(self.judge_options)))
        check(not taken, f"eval.judge_options: {taken} is no option of a request to the judge.")
        check(self.judge_model is not None, "eval.judge_url needs eval.judge_model, the name of the model to ask.")
        check(bool(self.generate), "eval.judge_url scores answers to validation samples, so it needs eval.generate.")
