"""Inputs of validations besides the validation samples, read and checked before weights are loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from lit_qlora.data import RunData, read_data
from lit_qlora.data.prompt_files import read_prompts
from lit_qlora.errors import DataError, UserError, did_you_mean
from lit_qlora.evaluate.judge import Judge, make_judge
from lit_qlora.files import reading
from lit_qlora.model.gpt import GPT
from lit_qlora.prompts.conversation import prompt_of
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.report import Record
from lit_qlora.settings import EvalConfig, FinetuneConfig, check

Ask = Callable[[GPT], Record]
"""Asks a model the tasks of eval.tasks; TASK/METRIC -> value."""

MARK = "Where?"
"""A question that shows where a prompt style puts it."""
PROBE_TOKENS = 512
"""Most tokens of the text that measures the distance to the base."""


@dataclass(frozen=True)
class Question:
    """A prompt for the model."""

    ids: list[int]
    prompt: str
    wanted: str = ""
    """The known answer, without its thought; '' if there is none."""


@dataclass(frozen=True)
class Probes:
    """Inputs of validations besides the validation samples."""

    questions: list[Question]
    """Prompts of some validation samples, whose answers are compared."""
    prompts: list[Question]
    """Prompts of eval.prompts."""
    text: list[int]
    """Ids of a text for the comparison of model and base."""
    judge: Judge | None = None
    """Scores the answers to the questions; None without one."""
    ask: Ask | None = None
    """Asks the tasks of eval.tasks; None without any."""


NEEDS = {
    **dict.fromkeys(("val_loss", "val_ppl", "val_accuracy"), "validation samples"),
    **dict.fromkeys(("exact_match", "bleu", "chrf", "rouge_l"), "--eval.generate"),
    "judge": "--eval.judge_url",
    "val_f1": "--head classify",
    **dict.fromkeys(("val_mse", "val_mae"), "--head regress"),
    **dict.fromkeys(("val_cross_entropy", "val_teacher_kl"), "--distill.teacher"),
    "kl_to_base": "--eval.kl_text",
    **dict.fromkeys(("val_reward_accuracy", "val_reward_margin", "val_logp_chosen"), "judged answers to validate on"),
}
"""Input that each metric needs; a task's metrics are named TASK/METRIC."""


def check_best(config: EvalConfig, data: RunData, teaches: bool = False) -> None:
    """Raise UsageError if eval.best names a metric that no validation of this run will have."""
    given = {
        "validation samples": data.val_batches,
        "--eval.generate": config.generate,
        "--eval.judge_url": config.judge_url,
        "--eval.kl_text": config.kl_text,
        f"--head {data.scoring.kind if data.scoring else 'none'}": data.val_batches,
        "--distill.teacher": teaches and data.val_batches,
        "judged answers to validate on": data.val,
    }
    best = config.best
    if best == "none" or (best == EvalConfig.best and not config.patience):
        return
    if best not in NEEDS:
        known = [*NEEDS, "none"]
        check(
            "/" in best and bool(config.tasks),
            f"eval.best {best!r} is not a metric of validations.{did_you_mean(best, known)} Known: {', '.join(known)}, "
            "and TASK/METRIC with --eval.tasks.",
        )
        return
    check(bool(given.get(NEEDS[best])), f"eval.best {best} needs {NEEDS[best]}.")


def read_probes(config: FinetuneConfig, data: RunData) -> Probes:
    """Read the inputs of eval.generate, eval.prompts and eval.kl_text.

    Raises:
        UsageError, DataError: if a file cannot be read, the validation samples hold no answers, or eval.best is not a
            metric.
    """
    check_best(config.eval, data, config.teacher_dir is not None)
    questions: list[Question] = []
    if config.eval.generate:
        # If prompts are labelled too, only the same data with masks shows where answers begin.
        masked = data if config.data.mask_prompt else read_data(_with_masks(config))
        rows = [row for batch in masked.val_batches for row in zip(batch.tokens, batch.labels, strict=True)]
        check(bool(rows), "eval.generate compares answers of validation samples, but there are none.")
        count = min(config.eval.generate, len(rows))  # of all lengths, because rows are sorted by length
        found = [question(data, *rows[i * len(rows) // count]) for i in range(count)]
        questions = [asked for asked in found if asked]
        check(
            questions == found, "eval.generate compares answers, but the validation samples are texts without prompts."
        )
    prompts = []
    if config.eval.prompts:
        try:
            for _, asked, _ in read_prompts(config.eval.prompts, config.data.system):
                ids = data.style.encode_prompt(data.tokenizer, asked)
                prompts.append(Question(ids, "\n".join(text for text in (asked.question, asked.input) if text)))
        except DataError as error:
            raise DataError(f"eval.prompts: {error}") from None
    text = read_text(config.eval.kl_text, data.tokenizer) if config.eval.kl_text else []
    return Probes(questions, prompts, text, make_judge(config.eval))


def _with_masks(config: FinetuneConfig) -> FinetuneConfig:
    # Without masks a conversation is one sample as the chat template writes it, and so it is here.
    return replace(config, data=replace(config.data, mask_prompt=True, split_rewritten=False))


def question(data: RunData, tokens: Tensor, labels: Tensor) -> Question | None:
    """Split a sample into its last answer and everything before; None if the sample has no prompt.

    Args:
        tokens, labels: (T,) a row of a Batch.
    """
    labelled = (labels >= 0).tolist()
    end = max(column for column, is_labelled in enumerate(labelled) if is_labelled) + 1
    start = next(column for column in range(end - 1, -1, -1) if column == 0 or not labelled[column - 1])
    if start == 0:
        return None
    ids, answer = tokens[: start + 1].tolist(), labels[start:end].tolist()
    stops = stop_ids(data)
    wanted = data.style.decoder(data.tokenizer).decode([token for token in answer if token not in stops])
    said = data.style.reader(data.tokenizer, ids).whole(data.style.said(wanted)).content
    return Question(ids, data.tokenizer.decode(ids).strip(), said.strip())


def frames(data: RunData) -> list[tuple[str, str]]:
    """Decode the words that the prompt style puts before and behind a question, without and with an input."""
    found = []
    for asked in (prompt_of(MARK), prompt_of(MARK, MARK)):
        try:
            text = data.tokenizer.decode(data.style.encode_prompt(data.tokenizer, asked)).strip()
        except UserError:  # a chat template may refuse to be asked so
            continue
        before, mark, behind = text.partition(MARK)
        found += [(before, behind.rpartition(MARK)[2])] if mark else []
    return found


def read_text(path: Path, tokenizer: Tokenizer, most: int = PROBE_TOKENS, setting: str = "eval.kl_text") -> list[int]:
    """Read the first ids of a text file that a setting names; 'default' is the package's probe.txt."""
    try:
        own = files("lit_qlora") / "probe.txt"
        text = own.read_text(encoding="utf-8") if path == Path("default") else reading.read_text(path, DataError)
    except OSError as error:
        raise DataError(f"{setting} {path} cannot be read: {error.strerror}.") from None
    ids = tokenizer.encode(text)[:most]
    if len(ids) < 2:
        raise DataError(f"{setting} {path} has {len(ids)} tokens; at least 2 are needed.")
    return ids


def stop_ids(data: RunData) -> frozenset[int]:
    """Return the ids that end an answer."""
    return data.tokenizer.stop_ids | data.style.stop_ids(data.tokenizer)
