"""The head of a merged checkpoint that reads labels off texts, in files of its own."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_qlora.checkpoint import safetensors_io
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files.reading import read_json
from lit_qlora.model.scoring import Scoring

WEIGHTS, FACTS = "score.safetensors", "score.json"
NAME = "score.weight"


def facts_of(scoring: Scoring) -> dict[str, Any]:
    """The task of a head, for a manifest and for score.json."""
    return {"kind": scoring.kind, "classes": list(scoring.classes)}


def read_facts(facts: Any, outputs: int, location: str) -> Scoring:
    """The task of a head with so many outputs.

    Args:
        facts: see facts_of; None for a head that PEFT wrote, which does not name its classes.

    Raises:
        CheckpointError: if the facts are damaged.
    """
    if facts is None:
        return Scoring("classify", tuple(f"LABEL_{i}" for i in range(outputs))) if outputs > 1 else Scoring("regress")
    found = facts if isinstance(facts, dict) else {}
    kind, classes = found.get("kind"), found.get("classes")
    if kind == "regress" and classes == [] and outputs == 1:
        return Scoring("regress")
    if kind == "classify" and isinstance(classes, list) and len({*map(str, classes)}) == outputs > 1:
        return Scoring("classify", tuple(map(str, classes)))
    raise CheckpointError(f"{location} is damaged: it does not say what its head with {outputs} outputs means.")


def write(folder: Path, weight: Tensor, scoring: Scoring) -> None:
    """Write the files of a head into the folder of a checkpoint."""
    safetensors_io.write(folder / WEIGHTS, {NAME: weight}, [(NAME, weight)])
    (folder / FACTS).write_text(json.dumps(facts_of(scoring), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[Tensor, Scoring] | None:
    """The head of a merged checkpoint; None where it has none.

    Raises:
        CheckpointError: if it is damaged.
    """
    if not (folder / FACTS).is_file():
        return None
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has {FACTS} and no {WEIGHTS}.")
    weight = safetensors_io.read_all(folder / WEIGHTS).get(NAME)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise CheckpointError(f"{folder / WEIGHTS} holds no {NAME} of two dimensions and finite numbers.")
    return weight, read_facts(read_json(folder / FACTS), len(weight), str(folder / FACTS))


def refuse(location: Path) -> UsageError:
    """The error for a command that writes texts, or measures them, with a model that has a head."""
    return UsageError(
        f"{location} was trained with --head, so it reads labels off texts and writes none.\n"
        "scripts/classify.py asks it, scripts/merge_lora.py merges it."
    )
