"""The accuracy of guessing, to compare a model's accuracy with."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def against_chance(task: "Task", metrics: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the accuracy of guessing in a multiple-choice task; None if accuracy is not the share of right choices.

    Returns:
        accuracy; chance, the mean of 1 / number of choices; noise, two standard deviations of the accuracy of someone
        who guesses; questions, their number.
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
    """Tell whether guessing often scores like this; for the results of against_chance."""
    return abs(figures["accuracy"] - figures["chance"]) <= figures["noise"]
