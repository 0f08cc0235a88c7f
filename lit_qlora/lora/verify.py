"""The loss of merging: quantised base and adapter against each way to merge them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_qlora import cli
from lit_qlora.checkpoint.checkpoint import count_parameters, load_stored
from lit_qlora.data import validation_batches
from lit_qlora.data.batches import SampleBatch
from lit_qlora.data.load import DEFAULT_MAX_LENGTH, choose_style, encode_source, length_limit, load, model_of
from lit_qlora.data.preferences import read_preferences
from lit_qlora.data.prepared import choose_data
from lit_qlora.data.samples import Samples
from lit_qlora.data.sources import find_sources
from lit_qlora.device import gpu_bytes, host_bytes, pick_device
from lit_qlora.errors import DataError, NumericalError, ResourceError
from lit_qlora.files.reading import read_yaml_text
from lit_qlora.lora.adapter import Adapter
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.lora.merge import Base, Merge
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, IGNORE, LOGITS_AT_ONCE
from lit_qlora.prompts.style import read_style
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.quantize import Storage
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig, PreferenceRunConfig

MOST_ON_CPU = 10**9
"""Parameters of the largest model that a CPU measures unasked."""


def read_batches(
    file: str, adapter: Adapter, checkpoint_dir: Path, max_samples: int | None, batch_size: int
) -> list[SampleBatch]:
    """Read the samples of a file as in the adapter's training.

    Raises:
        DataError: if the file cannot be read or no sample is left.
    """
    (source,), _ = find_sources([file], None)
    data = DataConfig(path=file, cache_dir="none")
    style = read_style(adapter.path) or choose_style(data, checkpoint_dir)
    most = min(ModelConfig.load(checkpoint_dir).block_size, DEFAULT_MAX_LENGTH)
    samples = encode_source(source, data, checkpoint_dir, Tokenizer(checkpoint_dir), style, most).samples
    if not len(samples):
        raise DataError(f"{file} holds no sample that fits into {most} tokens in the style {style.name}.")
    return validation_batches(samples.take(range(len(samples))[:max_samples]), batch_size)


def own_batches(adapter: Adapter, checkpoint_dir: Path, max_samples: int, batch_size: int) -> list[SampleBatch]:
    """The first validation samples of the run that trained the adapter, encoded as there.

    Raises:
        UserError: if the settings or the data of the run are not there any more, or have changed.
    """
    settings = adapter.path.resolve().parent / "config.yaml"
    if adapter.manifest is None or not settings.is_file():
        raise DataError(f"{adapter.path} lies in no folder of a run, which has a config.yaml.")
    files, samples = _validated(settings, checkpoint_dir)
    if files != adapter.manifest.get("data"):
        raise DataError("the data of the run has changed since.")
    if not len(samples):
        raise DataError("the run had no validation samples.")
    return validation_batches(samples.take(range(len(samples))[:max_samples]), batch_size)


def _validated(settings: Path, checkpoint_dir: Path) -> tuple[dict[str, str], Samples]:
    """The sums of the data of a run with these settings, and its validation samples; of comparisons the chosen ones."""
    if "\npreference:" in read_yaml_text(settings):
        judged = cli.parse(PreferenceRunConfig, ["--config", str(settings)])
        run = read_preferences(replace(judged, checkpoint_dir=checkpoint_dir), judged.preference)
        assert run.val is not None
        return run.files, run.val.samples.take(run.val.bounds[:-1].tolist())
    config = cli.parse(FinetuneConfig, ["--config", str(settings)])
    data = choose_data(config.data, checkpoint_dir)
    most = length_limit(data, model_of(replace(config, checkpoint_dir=checkpoint_dir)))
    seed = config.seed if data.seed is None else data.seed
    loaded = load(data, checkpoint_dir, Tokenizer(checkpoint_dir), most, seed)
    return loaded.files, loaded.val


def check_affordable(merge: Merge) -> None:
    """Raise ResourceError if a measurement would take more than a command should take unasked.

    Both models have to fit, the trained one and the merged one, and a CPU is too slow for more than a billion
    parameters.
    """
    parameters, gpu = count_parameters(merge.config), gpu_bytes()
    if gpu is None and parameters > MOST_ON_CPU:
        raise ResourceError(f"{parameters / 1e9:.1f} billion parameters take a CPU too long.")
    width = merge.trained.dtype.itemsize
    needed = parameters * (width + (1 if not merge.trained.plain else width))
    free = host_bytes() if gpu is None else gpu
    if free is not None and needed > free:
        raise ResourceError(f"the two models need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free.")


def verify(merges: Sequence[Merge], batches: Sequence[SampleBatch]) -> dict[Base, dict[str, float]]:
    """Compare each merged model with the trained one.

    At most two models are in memory: the trained one, with its base quantised as in training, and a merged one.

    Args:
        merges: merges of the same adapters, onto the original base before the quantised one.

    Returns:
        For each: val_loss_trained and val_loss, nats per labelled token; kl, the mean divergence of the merged
        distributions from the trained ones, in nats; top1, the share of labelled positions where both have the same
        likeliest token; tokens, how many there are.
    """
    first, device = merges[0], pick_device()
    trained = load_stored(first.checkpoint_dir, first.trained, device).eval()
    first.attach_to(trained)
    trained.eval()
    merged = load_stored(first.checkpoint_dir, Storage(first.trained.dtype), device).eval()
    metrics: dict[Base, dict[str, float]] = {}
    for merge in merges:
        merge.put_into(merged)
        metrics[merge.base] = compare(trained, merged, batches)
    return metrics


def recommend(metrics: dict[Base, dict[str, float]]) -> Base:
    """Return the better base to merge onto: the one with the lower validation loss."""
    return min(metrics, key=lambda base: metrics[base]["val_loss"])


def check_tolerance(base: Base, metrics: dict[Base, dict[str, float]], tolerance: float) -> None:
    """Raise NumericalError if merging onto `base` raises the validation loss by more than `tolerance` nats a token."""
    row = metrics[base]
    rise = row["val_loss"] - row["val_loss_trained"]
    if rise <= tolerance:  # NaN is not
        return
    other = recommend(metrics)
    hint = f" Merged with --base {other} it is {metrics[other]['val_loss']:.4f}." if other != base else ""
    raise NumericalError(
        f"Merged onto the {base} base, the validation loss is {row['val_loss']:.4f} instead of "
        f"{row['val_loss_trained']:.4f}: {rise:+.4f}, more than the tolerance of {tolerance:g}.\n"
        f"Nothing was written.{hint}"
    )


@torch.no_grad()
def compare(trained: GPT, merged: GPT, batches: Sequence[SampleBatch]) -> dict[str, float]:
    """See verify."""
    device = trained.embed.weight.device
    total = torch.zeros(5, dtype=torch.float64)
    rows = max(1, LOGITS_AT_ONCE // trained.config.vocab_size // 2)
    for batch in batches:
        tokens, labels = batch.tokens.to(device), batch.labels.to(device)
        at = labels != IGNORE
        hidden = [model.hidden(tokens)[at] for model in (trained, merged)]  # (labelled, E)
        for here in range(0, int(at.sum()), rows):
            some = slice(here, here + rows)
            p, q = (
                model.logits(states[some]).float().log_softmax(dim=-1)
                for model, states in zip((trained, merged), hidden, strict=True)
            )
            total += _metrics(p, q, labels[at][some])
    loss_trained, loss, kl, same, tokens_seen = total.tolist()
    return {
        "val_loss_trained": loss_trained / tokens_seen,
        "val_loss": loss / tokens_seen,
        "kl": kl / tokens_seen,
        "top1": same / tokens_seen,
        "tokens": int(tokens_seen),
    }


def _metrics(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    """Sum over the rows of log-probabilities (N, V) of two models: two losses, KL(p || q), agreements, rows."""
    losses = [-log_probs.gather(-1, labels[:, None]).double().sum() for log_probs in (p, q)]
    kl = (p.exp() * (p - q)).double().sum()
    same = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().sum()
    return torch.stack([*losses, kl, same, torch.tensor(len(p), dtype=torch.float64, device=p.device)]).cpu()


def report_lines(metrics: dict[Base, dict[str, Any]]) -> list[str]:
    """Format the metrics as a markdown table with a recommendation."""
    lines = [
        "| merged onto | val loss | against quantised + adapter | KL | same likeliest token |",
        "|---|---:|---:|---:|---:|",
    ]
    for base, row in metrics.items():
        rise = row["val_loss"] - row["val_loss_trained"]
        lines.append(f"| {base} | {row['val_loss']:.4f} | {rise:+.4f} | {row['kl']:.2e} | {row['top1']:.2%} |")
    first = next(iter(metrics.values()))
    return [
        *lines,
        f"quantised + adapter: {first['val_loss_trained']:.4f} over {first['tokens']:,} tokens; "
        f"recommended: --base {recommend(metrics)}",
    ]


def losses_of(
    adapter: Adapter,
    checkpoint_dir: Path,
    versions: Mapping[int, tuple[Mapping[str, Tensor], LoRAConfig]],
    batches: Sequence[SampleBatch],
) -> dict[int, float]:
    """Measure the validation loss, in nats per labelled token, of versions of an adapter on its training's base.

    Args:
        versions: rank -> adapter, as lit_qlora.lora.shrink.cut returns it.
    """
    model = load_stored(checkpoint_dir, Storage.of_training(adapter.manifest or {}), pick_device()).eval()
    largest = max(versions)
    add_lora(model, versions[largest][1])
    model.eval()
    parameters = lora_state(model)
    losses = {}
    for rank, (state, _) in versions.items():
        for name, parameter in parameters.items():  # all have the scale of B A; zeros fill up smaller ranks
            tensor = state[name]
            parameter.zero_()[tuple(slice(size) for size in tensor.shape)] = tensor.to(parameter)
        losses[rank] = mean_loss(model, batches)
    return losses


@torch.no_grad()
def mean_loss(model: GPT, batches: Sequence[SampleBatch]) -> float:
    """Nats per labelled token."""
    device = model.embed.weight.device
    pairs = [(batch.tokens.to(device), batch.labels.to(device)) for batch in batches]
    total = sum(float(model.loss(tokens, labels)) for tokens, labels in pairs)
    return total / sum(int((labels != IGNORE).sum()) for _, labels in pairs)
