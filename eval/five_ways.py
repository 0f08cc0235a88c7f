"""One adapter, five models: the cost of quantising the base, the gain of training, the loss of merging.

The questions are the same for all five, so differences are taken question by question. Their intervals come from
drawing questions again with replacement (Efron 1979). They are much narrower than intervals from separate scores.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chance import like_chance

from lit_qlora.errors import UsageError
from lit_qlora.inference import InferenceConfig, LoadedModel, load_for_inference
from lit_qlora.settings import Quantization

if TYPE_CHECKING:
    from lit_qlora.lora.adapter import Adapter

BASE, QUANTIZED, ADAPTED, MERGED, REQUANTIZED = "base", "quantized", "adapted", "merged", "requantized"
EFFECTS = {
    "quantising cost": (QUANTIZED, BASE),
    "training gained": (ADAPTED, QUANTIZED),
    "merging lost": (MERGED, ADAPTED),
    "merging and quantising again lost": (REQUANTIZED, ADAPTED),
}
"""Name of an effect -> two models, whose difference, the first minus the second, is the effect."""
RESAMPLES = 10_000
METRICS = ("acc", "exact_match", "mc2", "f1", "bleu", "rougeL")
"""Metrics to compare: the first of these that a task has, else the first metric of the task."""


def compare(
    config: InferenceConfig,
    lora_path: Path,
    measure: Callable[[LoadedModel, bool], dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Evaluate the five, one after the other, with one model in memory at a time.

    Args:
        measure: the results of a model in lm-eval's schema, with or without "samples".
        seed: of the intervals.

    Returns:
        Results of lm-eval by model under "models", and under "comparison" a list for each task, see compare_task.

    Raises:
        UsageError: if neither the settings nor the adapter quantise the base.
    """
    from lit_qlora.lora.adapter import check_base, read_adapter

    adapter = read_adapter(lora_path)
    check_base(adapter, config.base)
    storage = config.storage
    if storage.schemes == {"none"}:
        raise UsageError(
            "compare needs a base that is quantised, and so was not the adapter's. Say --quantize, e.g. bnb.nf4."
        )
    results: dict[str, Any] = {}
    for name, loaded in models(config, adapter, storage):
        results[name] = measure(loaded, True)
    samples = {name: result.pop("samples") for name, result in results.items()}
    tasks = {
        task: compare_task({name: by_task[task] for name, by_task in samples.items()}, seed) for task in samples[BASE]
    }
    seconds = sum(float(result["total_evaluation_time_seconds"]) for result in results.values())
    return {
        "results": {f"{task} ({name})": row for name, r in results.items() for task, row in r["results"].items()},
        "models": results,
        "comparison": {task: found for task, found in tasks.items() if found},
        "quantize": f"{storage.quantize}, mixed" if storage.layers else storage.quantize,
        "total_evaluation_time_seconds": f"{seconds:.1f}",
    }


def models(config: InferenceConfig, adapter: "Adapter", storage: Quantization) -> Iterator[tuple[str, LoadedModel]]:
    """Yield each of the five with its name; the model before is gone, or has become the next."""
    from lit_qlora.lora.merge import Merge
    from lit_qlora.quantize import quantize_linears

    merge = Merge([adapter], config.base)
    loaded = load_for_inference(config.base, precision=config.precision)
    yield BASE, loaded
    merge.put_into(loaded.model)
    yield MERGED, loaded
    quantize_linears(loaded.model, storage.quantize, storage.quantize_head, dict(storage.layers))
    yield REQUANTIZED, loaded
    del loaded
    loaded = load_for_inference(config.base, precision=config.precision, **storage.facts())
    yield QUANTIZED, loaded
    merge.attach_to(loaded.model)
    loaded.model.eval()
    yield ADAPTED, loaded


def compare_task(samples: Mapping[str, list[dict[str, Any]]], seed: int) -> dict[str, Any] | None:
    """Return the scores of all models on a task, and the effects; None if no metric has a value for each question.

    Args:
        samples: by model, lm-eval's record of each question.

    Returns:
        metric; questions, their number; scores, by model; effects, by name: difference, low and high end of its
        95 % interval.
    """
    import numpy as np

    first = samples[BASE][0]
    usable = [name for name in first["metrics"] if isinstance(first[name], int | float)]
    if not usable:
        return None
    metric = next((name for name in METRICS if name in usable), usable[0])
    values = {
        name: np.array([float(sample[metric]) for sample in sorted(rows, key=lambda sample: sample["doc_id"])])
        for name, rows in samples.items()
    }
    effects = {}
    for effect, (ours, others) in EFFECTS.items():
        difference = values[ours] - values[others]
        low, high = interval(difference, seed)
        effects[effect] = {"difference": float(difference.mean()), "low": low, "high": high}
    return {
        "metric": metric,
        "questions": len(values[BASE]),
        "scores": {name: float(scores.mean()) for name, scores in values.items()},
        "effects": effects,
    }


def interval(differences: Any, seed: int, share: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of paired differences (N,), by its percentiles."""
    import numpy as np

    # How often each value is drawn says all, and there are few values: a score is mostly 0 or 1.
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=RESAMPLES)
    means = drawn @ values / len(differences)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def table(results: Mapping[str, Any]) -> str:
    """Return the comparison as markdown."""
    scheme = results["quantize"].removeprefix("bnb.")
    dtype = results["models"][BASE]["config"]["model_dtype"].removeprefix("torch.")
    titles = {
        BASE: f"base, {dtype}",
        QUANTIZED: f"base, {scheme}",
        ADAPTED: f"base, {scheme} + adapter",
        MERGED: f"merged, {dtype}",
        REQUANTIZED: f"merged, {scheme}",
    }
    effect_of = {ours: (effect, others) for effect, (ours, others) in EFFECTS.items()}
    lines = ["| task | model | score | against | difference | 95 % interval |", "|---|---|---:|---|---:|---|"]
    guessed = False
    for task, found in results["comparison"].items():
        label = f"{task} ({found['metric']}, {found['questions']})"
        for name, title in titles.items():
            chance = results["models"][name]["chance"].get(task)
            mark = " ~" if chance and like_chance(chance) else ""
            guessed = guessed or bool(mark)
            cells = ["", "", ""]
            if name in effect_of:
                effect, others = effect_of[name]
                x = found["effects"][effect]
                sure = "" if x["low"] <= 0 <= x["high"] else " *"
                cells = [
                    titles[others],
                    f"{x['difference']:+.3f}{sure}",
                    f"{x['low']:+.3f} to {x['high']:+.3f}: {effect}",
                ]
            lines.append(f"| {label} | {title} | {found['scores'][name]:.3f}{mark} | {' | '.join(cells)} |")
            label = ""
    lines += ["", "* zero is not in the interval, which comes from drawing the same questions for both models"]
    if guessed:
        lines.append("~ within noise of chance: two standard deviations of someone who guesses")
    if left_out := results["models"][BASE]["results"].keys() - results["comparison"].keys():
        lines.append(f"not compared, because they have no score for each question: {', '.join(sorted(left_out))}")
    return "\n".join(lines)
