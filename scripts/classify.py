"""Read labels off texts with a head that finetune/lora.py has trained with --head classify or regress.

A reward model, which finetune/preference.py trains with --preference.loss reward, gives a number to an answer.

python scripts/classify.py --lora_path out/lora/tiny-world --text "What a wonderful day"
python scripts/classify.py --lora_path out/lora/tiny-world --data.path test.jsonl --out labels.jsonl
python scripts/classify.py --lora_path out/preference/tiny-world --prompt "What does the fox eat?" --text "Mice."
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_qlora import cli
from lit_qlora.files.atomic import write_text, writing
from lit_qlora.inference import InferenceConfig, LoadedModel, scoring_at
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts.conversation import Conversation
from lit_qlora.prompts.style import read_style
from lit_qlora.settings import Settings, check

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TextsConfig(Settings):
    """The file of texts."""

    prefix = "data."

    path: str | None = None
    """File of texts, as finetune/lora.py reads it. Where records have a label too, accuracy and F1, or the errors of
    numbers, are printed at the end. For a reward model the file has prompts and answers, in any format of these."""
    columns: str = ""
    """Columns of text and label, as NAME:text or NAME:text,NAME:label. By default those that the file has."""


@dataclass(frozen=True, kw_only=True)
class Config(InferenceConfig):
    """Read labels off texts. A text gets a JSON line with its label, and with the probability of each class."""

    first = ("text", "out", "data")

    text: tuple[str, ...] | str = ()
    """Texts, instead of a file of them."""
    prompt: str | None = None
    """Prompt that the texts answer, for a reward model."""
    data: TextsConfig = field(default_factory=TextsConfig)
    max_length: int | None = None
    """Maximum tokens of a text; longer ones lose their beginning. By default the context of the model, at most 2048."""
    batch_size: int = 8
    """Number of texts that are read together; it changes memory and speed."""
    out: Path | None = None
    """File for the JSON lines. By default stdout. An existing file is not overwritten."""

    def __post_init__(self) -> None:
        """Check the settings before the model is loaded."""
        super().__post_init__()
        check(bool(self.text) != bool(self.data.path), "Give either --text or --data.path.")
        check(self.prompt is None or bool(self.text), "prompt has no effect without text. Leave it out.")
        check(bool(self.data.path) or not self.data.columns, "data.columns has no effect without data.path.")
        check(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}.")
        check(self.max_length is None or self.max_length >= 1, f"max_length must be at least 1, got {self.max_length}.")
        texts = [self.text] if isinstance(self.text, str) else self.text
        check(not self.text or all(text.strip() for text in texts), "text is empty. Leave it out, or write one.")
        known = all(len(text) == len(text.encode(errors="ignore").decode()) for text in (*texts, self.prompt or ""))
        check(known, "text or prompt holds bytes that are no UTF-8.")
        check(self.out is None or not self.out.exists(), f"out {self.out} exists already. Give another name.")


def main(config: Config) -> None:
    """Read, load, answer, and measure where labels are known."""
    scoring = scoring_at(config.base, config.adapter)
    style = read_style(config.adapter or config.base)
    rewards = style is not None and style.name != "text"
    check(
        rewards or config.prompt is None,
        "prompt is for a reward model, and this head reads texts alone. Leave it out.",
    )
    check(
        not rewards or config.prompt is not None or bool(config.data.path),
        "A reward model gives a number to the answer to a prompt. Give --prompt too.",
    )
    conversations = read_conversations(config) if rewards else []
    texts, known = ([said.answers[-1].text for said in conversations], None) if rewards else read_texts(config)
    wanted = None if known is None else targets(scoring, known)
    if config.out:
        with writing(config.out):
            config.out.parent.mkdir(parents=True, exist_ok=True)
    loaded = config.load(heads=True)
    most = longest(config, loaded)
    if rewards and style:
        turns = style.encode_many(loaded.tokenizer, conversations)
        ids = [[i for turn in some for part in turn[:2] for i in part][-most:] for some in turns]
    else:
        from lit_qlora.data.scoring import ids_of

        ids = ids_of(texts, loaded.tokenizer, most)
    scores = score(loaded, ids, config.batch_size)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in answers(loaded, texts, scores))
    if config.out:
        with writing(config.out):
            write_text(config.out, lines, follow=True)
    else:
        sys.stdout.writelines(lines)
    if wanted is not None:
        metrics = measure(scoring, scores, wanted)
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), file=sys.stderr)


def read_texts(config: Config) -> tuple[list[str], list[Any] | None]:
    """The texts, and their labels if these are known."""
    from lit_qlora.data.scoring import read_plain

    if config.data.path:
        return read_plain(config.data.path, config.data.columns)
    return [config.text] if isinstance(config.text, str) else list(config.text), None


def read_conversations(config: Config) -> list[Conversation]:
    """The prompts with their answers, for a reward model."""
    from lit_qlora.data.examples import read_examples
    from lit_qlora.data.scoring import one_source

    if config.data.path:
        return list(read_examples(one_source(config.data.path), columns=config.data.columns).examples)
    texts = [config.text] if isinstance(config.text, str) else config.text
    return [Conversation.of((config.prompt or "", text)) for text in texts]


def longest(config: Config, loaded: LoadedModel) -> int:
    """Most tokens of a text."""
    from lit_qlora.data.load import DEFAULT_MAX_LENGTH

    room = loaded.model.config.block_size
    most = config.max_length or min(room, DEFAULT_MAX_LENGTH)
    check(most <= room, f"max_length {most} exceeds the {room} tokens of the model's context.")
    return most


def score(loaded: LoadedModel, ids: list[list[int]], rows: int) -> "Tensor":
    """The outputs (S, C) of the head for each text."""
    import torch

    from lit_qlora.data.scoring import text_batches

    assert loaded.model.score is not None
    scores = torch.zeros(len(ids), loaded.model.score.out_features)
    with torch.no_grad():
        for numbers, batch in text_batches(ids, rows):
            scores[numbers] = loaded.model.scores(batch.tokens, batch.labels).cpu()
    return scores


def answers(loaded: LoadedModel, texts: list[str], scores: "Tensor") -> Iterator[dict[str, Any]]:
    """The line of each text."""
    assert loaded.scoring is not None
    classes = loaded.scoring.classes
    for text, row in zip(texts, scores, strict=True):
        if not classes:
            yield {"text": text, "value": round(float(row[0]), 6)}
            continue
        shares = [round(share, 6) for share in row.softmax(dim=-1).tolist()]
        yield {"text": text, "label": classes[int(row.argmax())], "scores": dict(zip(classes, shares, strict=True))}


def targets(scoring: Scoring, known: list[Any]) -> list[float] | list[int]:
    """The known labels as numbers, or as numbers of classes.

    Raises:
        DataError: for a label that the head cannot give.
    """
    from lit_qlora.data.labels import class_of, number_of
    from lit_qlora.errors import DataError

    if not scoring.classes:
        return [number_of(label) for label in known]
    table = {name: number for number, name in enumerate(scoring.classes)}
    if unknown := sorted({class_of(label) for label in known} - table.keys()):
        raise DataError(f"data.path has the label {unknown[0]!r}, and the head knows {', '.join(table)}.")
    return [table[class_of(label)] for label in known]


def measure(scoring: Scoring, scores: "Tensor", wanted: list[float] | list[int]) -> dict[str, float]:
    """The metrics of a validation, against labels that are known."""
    import torch

    from lit_qlora.evaluate.metrics import class_metrics, number_metrics

    if not scoring.classes:
        return number_metrics(scores[:, 0], torch.tensor(wanted))
    return class_metrics(scores, torch.tensor(wanted))


if __name__ == "__main__":
    cli.run(main, Config)
