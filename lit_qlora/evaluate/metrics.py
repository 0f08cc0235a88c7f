"""Metrics that compare an answer with a reference: exact match, BLEU, chrF and ROUGE-L.

BLEU and ROUGE-L come from torchmetrics, chrF from sacreBLEU. chrF of torchmetrics 1.9 also averages over character
n-grams longer than the text, so "mice" for "mice" would score 0.67.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def text_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score `predictions`, each against the reference with the same index; 1 is best, 0 is worst.

    Returns:
        exact_match: share of predictions equal to their reference, except for white space at both ends.
        bleu: of the corpus, up to four words, without smoothing (so 0 if no four words in a row match), tokenised as
            sacreBLEU's 13a. Papineni et al. 2002, Post 2018.
        chrf: F2 of character n-grams up to six, of the corpus. Popovic 2015.
        rouge_l: mean over the samples of the F1 of the longest common subsequence of words, which are runs of Latin
            letters and digits: meaningless in other scripts. Lin 2004.

    Raises:
        ValueError: if there are none, or their numbers differ.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(f"There are {len(predictions)} predictions and {len(references)} references.")
    from sacrebleu import corpus_chrf
    from torchmetrics.functional.text import sacre_bleu_score
    from torchmetrics.functional.text.rouge import rouge_score

    pairs = list(zip(predictions, references, strict=True))
    return {
        "exact_match": sum(prediction.strip() == reference.strip() for prediction, reference in pairs) / len(pairs),
        "bleu": float(sacre_bleu_score(predictions, [[reference] for reference in references])),
        "chrf": corpus_chrf(predictions, [references]).score / 100,
        "rouge_l": float(rouge_score(list(predictions), list(references), rouge_keys="rougeL")["rougeL_fmeasure"]),
    }


def chrf(prediction: str, reference: str) -> float:
    """Score one answer by chrF, in [0, 1]; it also ranks short answers and answers in any script."""
    from sacrebleu import sentence_chrf

    score: float = sentence_chrf(prediction, [reference]).score
    return score / 100


def class_metrics(scores: "Tensor", labels: "Tensor") -> dict[str, float]:
    """Score classes: the share that is right, and the mean over the classes of the F1 of each (macro).

    Args:
        scores: (N, C); labels: (N,) int64.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    count = scores.size(1)
    return {
        "accuracy": float(multiclass_accuracy(scores, labels, count, average="micro")),
        "f1": float(multiclass_f1_score(scores, labels, count, average="macro")),
    }


def number_metrics(predicted: "Tensor", wanted: "Tensor") -> dict[str, float]:
    """Mean squared and mean absolute error of numbers (N,)."""
    from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error

    return {
        "mse": float(mean_squared_error(predicted, wanted)),
        "mae": float(mean_absolute_error(predicted, wanted)),
    }
