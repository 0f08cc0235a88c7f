"""Read labels off texts with a head that finetune/lora.py has trained with --head classify or regress.

python scripts/classify.py --lora_path out/lora/tiny-world --text "What a wonderful day"
python scripts/classify.py --lora_path out/lora/tiny-world --data.path test.jsonl --out labels.jsonl
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_qlora import cli
from lit_qlora.inference import InferenceConfig, LoadedModel
from lit_qlora.settings import Settings, check

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TextsConfig(Settings):
    """The file of texts."""

    prefix = "data."

    path: str | None = None
    """File of texts, as finetune/lora.py reads it. Where records have a label too, accuracy and F1, or the errors of
    numbers, are printed at the end."""
    columns: str = ""
    """Columns of text and label, as NAME:text or NAME:text,NAME:label. By default those that the file has."""


@dataclass(frozen=True, kw_only=True)
class Config(InferenceConfig):
    """Read labels off texts. A text gets a JSON line with its label, and with the probability of each class."""

    first = ("text", "out", "data")

    text: tuple[str, ...] | str = ()
    """Texts, instead of a file of them."""
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
        check(bool(self.data.path) or not self.data.columns, "data.columns has no effect without data.path.")
        check(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}.")
        check(self.max_length is None or self.max_length >= 1, f"max_length must be at least 1, got {self.max_length}.")
        check(self.out is None or not self.out.exists(), f"out {self.out} exists already. Give another name.")


def main(config: Config) -> None:
    """Read, load, answer, and measure where labels are known."""
    from lit_qlora.data.scoring import read_plain

    if config.data.path:
        texts, known = read_plain(config.data.path, config.data.columns)
    else:
        texts, known = ([config.text] if isinstance(config.text, str) else list(config.text)), None
    loaded = config.load(heads=True)
    scores = score(config, loaded, texts)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in answers(loaded, texts, scores))
    if config.out:
        from lit_qlora.files.atomic import write_text, writing

        with writing(config.out):
            write_text(config.out, lines, follow=True)
    else:
        sys.stdout.writelines(lines)
    if known is not None:
        metrics = measure(loaded, scores, known)
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), file=sys.stderr)


def score(config: Config, loaded: LoadedModel, texts: list[str]) -> "Tensor":
    """The outputs (S, C) of the head for each text."""
    import torch

    from lit_qlora.data.load import DEFAULT_MAX_LENGTH
    from lit_qlora.data.scoring import ids_of, text_batches

    room = loaded.model.config.block_size
    most = config.max_length or min(room, DEFAULT_MAX_LENGTH)
    check(most <= room, f"max_length {most} exceeds the {room} tokens of the model's context.")
    ids = ids_of(texts, loaded.tokenizer, most)
    assert loaded.model.score is not None
    scores = torch.zeros(len(texts), loaded.model.score.out_features)
    with torch.no_grad():
        for numbers, batch in text_batches(ids, config.batch_size):
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


def measure(loaded: LoadedModel, scores: "Tensor", known: list[Any]) -> dict[str, float]:
    """The metrics of a validation, against labels that are known."""
    import torch

    from lit_qlora.data.labels import class_of, number_of
    from lit_qlora.errors import DataError
    from lit_qlora.evaluate.metrics import class_metrics, number_metrics

    assert loaded.scoring is not None
    if not loaded.scoring.classes:
        return number_metrics(scores[:, 0], torch.tensor([number_of(label) for label in known]))
    table = {name: number for number, name in enumerate(loaded.scoring.classes)}
    if unknown := sorted({class_of(label) for label in known} - table.keys()):
        raise DataError(f"data.path has the label {unknown[0]!r}, and the head knows {', '.join(table)}.")
    return class_metrics(scores, torch.tensor([table[class_of(label)] for label in known]))


if __name__ == "__main__":
    cli.run(main, Config)
