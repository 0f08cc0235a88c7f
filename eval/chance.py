"""The accuracy of someone who guesses, to hold a model's against."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def against_chance(task: "Task", metrics: Mapping[str, Any]) -> dict[str, float] | None:
    """Accuracy by guessing in a multiple-choice task, or None where accuracy is not a share of right choices.

    Returns:
        accuracy; chance, the mean of 1 / number of choices; noise, two standard deviations of the accuracy of someone
        who guesses; questions, how many there were.
    """
    accuracy = next((value for key, value in metrics.items() if key.startswith("acc,")), None)
    own_rule = task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results or task.multiple_target
    if accuracy is None or own_rule:
        return None
    docs = {instance.doc_id: instance.doc for instance in task.instances}.values()
    odds = [1 / len(task.doc_to_choice(doc)) for doc in docs]
    chance = sum(odds) / len(odds)
    noise = 2 * math.sqrt(sum(p * (1 - p) for p in odds)) / len(odds)
    return {"accuracy": float(accuracy), "chance": chance, "noise": noise, "questions": len(odds)}


def like_chance(figures: Mapping[str, float]) -> bool:
    """True if someone who guesses often scores like this; for figures of against_chance."""
    return abs(figures["accuracy"] - figures["chance"]) <= figures["noise"]
