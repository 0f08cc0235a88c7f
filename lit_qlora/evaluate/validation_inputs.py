"""What validations ask a model besides the loss: read and checked before any weight is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from lit_qlora.data import RunData, read_data
from lit_qlora.data.prompt_files import read_prompts
from lit_qlora.errors import DataError, did_you_mean
from lit_qlora.files import reading
from lit_qlora.model.gpt import GPT
from lit_qlora.report import Record
from lit_qlora.settings import EvalConfig, FinetuneConfig, check

Ask = Callable[[GPT], Record]
"""Asks a model the tasks of eval.tasks; TASK/METRIC -> value."""

PROBE_TOKENS = 512
"""Most tokens of the text on which the distance to the base is measured."""


@dataclass(frozen=True)
class Question:
    """What the model is asked."""

    ids: list[int]
    prompt: str
    wanted: str = ""
    """'' where no answer is known."""


@dataclass(frozen=True)
class Probes:
    """What the model is asked at validations, besides the validation samples."""

    questions: list[Question]
    """Some of the validation samples, whose answers are compared."""
    prompts: list[Question]
    """Those of eval.prompts."""
    text: list[int]
    """Ids of a text on which model and base are compared."""
    ask: Ask | None = None
    """Those of eval.tasks."""


NEEDS = {
    **dict.fromkeys(("val_loss", "val_ppl", "val_accuracy"), "validation samples"),
    **dict.fromkeys(("exact_match", "bleu", "chrf", "rouge_l"), "--eval.generate"),
    "kl_to_base": "--eval.kl_text",
}
"""What each figure is made from; those of tasks are called TASK/METRIC."""


def check_best(config: EvalConfig, data: RunData) -> None:
    """Raise UsageError if eval.best names a figure that no validation of this run will have."""
    given = {
        "validation samples": data.val_batches,
        "--eval.generate": config.generate,
        "--eval.kl_text": config.kl_text,
    }
    best = config.best
    if best == "none" or (best == EvalConfig.best and not config.patience):
        return
    if best not in NEEDS:
        known = [*NEEDS, "none"]
        check(
            "/" in best and bool(config.tasks),
            f"eval.best {best!r} is not a figure of validations.{did_you_mean(best, known)} Known: {', '.join(known)}, "
            "and TASK/METRIC with --eval.tasks.",
        )
        return
    check(bool(given[NEEDS[best]]), f"eval.best {best} needs {NEEDS[best]}.")


def read_probes(config: FinetuneConfig, data: RunData) -> Probes:
    """What eval.generate, eval.prompts and eval.kl_text ask for.

    Raises:
        UsageError, DataError: if a file cannot be read, the validation samples hold no answers, or eval.best is none of
            the figures.
    """
    check_best(config.eval, data)
    questions: list[Question] = []
    if config.eval.generate:
        # Where prompts are learnt too, only the same data with masks shows where answers begin.
        masked = data if config.data.mask_prompt else read_data(_with_masks(config))
        rows = [row for batch in masked.val_batches for row in zip(batch.tokens, batch.labels, strict=True)]
        check(bool(rows), "eval.generate compares answers of validation samples, and there is none.")
        count = min(config.eval.generate, len(rows))  # of all lengths, for the rows are sorted by them
        found = [question(data, *rows[i * len(rows) // count]) for i in range(count)]
        questions = [asked for asked in found if asked]
        check(
            questions == found, "eval.generate compares answers, and the validation samples are texts without prompts."
        )
    prompts = []
    if config.eval.prompts:
        for _, asked, _ in read_prompts(config.eval.prompts, config.data.system):
            ids = data.style.encode_prompt(data.tokenizer, asked)
            prompts.append(Question(ids, "\n".join(text for text in (asked.question, asked.input) if text)))
    return Probes(questions, prompts, read_text(config.eval.kl_text, data) if config.eval.kl_text else [])


def _with_masks(config: FinetuneConfig) -> FinetuneConfig:
    return replace(config, data=replace(config.data, mask_prompt=True))


def question(data: RunData, tokens: Tensor, labels: Tensor) -> Question | None:
    """The last answer of a sample, and all that comes before it; None for a text that is learnt from its beginning.

    Args:
        tokens, labels: (T,) a row of a Batch.
    """
    learnt = (labels >= 0).tolist()
    end = max(place for place, is_learnt in enumerate(learnt) if is_learnt) + 1
    start = next(place for place in range(end - 1, -1, -1) if place == 0 or not learnt[place - 1])
    if start == 0:
        return None
    ids, answer = tokens[: start + 1].tolist(), labels[start:end].tolist()
    stops = stop_ids(data)
    wanted = data.tokenizer.decode([token for token in answer if token not in stops])
    return Question(ids, data.tokenizer.decode(ids).strip(), data.style.said(wanted).strip())


def read_text(path: Path, data: RunData) -> list[int]:
    """The first ids of a text file; 'default' is probe.txt of the package."""
    try:
        own = files("lit_qlora") / "probe.txt"
        text = own.read_text(encoding="utf-8") if path == Path("default") else reading.read_text(path, DataError)
    except OSError as error:
        raise DataError(f"eval.kl_text {path} cannot be read: {error}.") from None
    ids = data.tokenizer.encode(text)[:PROBE_TOKENS]
    if len(ids) < 2:
        raise DataError(f"eval.kl_text {path} has {len(ids)} tokens, so nothing in it can be predicted.")
    return ids


def stop_ids(data: RunData) -> frozenset[int]:
    """Ids that end an answer."""
    return data.tokenizer.stop_ids | data.style.stop_ids(data.tokenizer)
