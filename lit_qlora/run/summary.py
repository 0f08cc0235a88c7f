"""The end of a run: summary.json, loss.png, the reports, and a table of its metrics."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from lit_qlora import cli
from lit_qlora.checkpoint.checkpoint import content_hash, count_parameters
from lit_qlora.commands import spell
from lit_qlora.data import RunData
from lit_qlora.evaluate.measures import best_and_worst
from lit_qlora.evaluate.validation_inputs import frames, question
from lit_qlora.files.atomic import write_text
from lit_qlora.files.manifest import read_manifest
from lit_qlora.lora.elsewhere import read_caveats
from lit_qlora.lora.layer import count_trainable
from lit_qlora.model.gpt import GPT
from lit_qlora.report import Record, RunLog, before_and_after, duration, metrics, short, smaller_is_better, tell
from lit_qlora.run import modules, states
from lit_qlora.run.figures import plot_losses
from lit_qlora.run.lessons import reviewed, section, unit_of
from lit_qlora.run.reports import Answer, Frame, Outcome, one_line, unframed, write_page, write_report
from lit_qlora.run.resume import SAMPLES, SUMMARY, read_log
from lit_qlora.run.saver import BEST, versions
from lit_qlora.run.states import FINAL
from lit_qlora.settings import FinetuneConfig, LoRAConfig, PreferenceRunConfig

SHOWN = 3  # best and worst answers


def finish(config: FinetuneConfig, model: GPT, data: RunData, log: RunLog, scores: Tensor | None = None) -> None:
    """Write summary.json, loss.png and the reports, and print the results and the next command.

    Args:
        scores: scores of the validation samples, see measures.score_rows.
    """
    assert config.out_dir is not None
    out_dir = config.out_dir
    log.close()
    summary = summarize(model, config.lora, config.quantization.describe(), config.precision, log.records)
    summary |= objective_of(config)
    warning, following = advise(config, log.records)
    best: Sequence[Answer] = ()
    worst: Sequence[Answer] = ()
    around: Sequence[Frame] = ()
    try:
        outcome = _outcome(
            config,
            model,
            data,
            log.records,
            scores,
            summary,
            f"# {warning}\n{following}" if warning else following,
        )
        best, worst, around = outcome.best, outcome.worst, outcome.frames
        write_pages(outcome, out_dir)
    except Exception as error:  # the adapter is saved, and a report is not worth the status of the run
        tell(f"  note    there is no whole report ({type(error).__name__}: {error})", sys.stderr)
    write_text(
        out_dir / SUMMARY, json.dumps(_without_nan(summary), indent=2) + "\n"
    )  # last, because it marks the run as over
    link = f"   best {out_dir / BEST} -> {(out_dir / BEST).readlink()}" if (out_dir / BEST).is_symlink() else ""
    lines = [
        *table(log.records),
        *_shortly(best, "best", around),
        *_shortly(worst, "worst", around),
        f"done    {duration(summary['seconds'])}   {summary['tokens']:,} tokens, {summary['tokens_per_second']:,.0f} "
        f"per second   peak {summary['peak_gib']:.2f} GiB",
        *beside_published(config.published.get(summary["base"], {}), summary),
        f"adapter {out_dir}/final{link}",
        *(f"        {line}" for line in read_caveats(out_dir / FINAL, model.config.tied_head)),
        f"report  {out_dir}/report.html   log.jsonl, loss.png, report.md beside it",
        *([f"worse   {warning}"] if warning else []),
        f"next    {following.splitlines()[0]}",
    ]
    tell("\n".join(lines))


def advise(config: FinetuneConfig, records: Sequence[Record]) -> tuple[str, str]:
    """Return a warning if the run ended worse than it began, else '', and the next commands, a line each."""
    assert config.out_dir is not None
    metric = "val_loss" if config.eval.best == "none" else config.eval.best
    values = metrics(records).get(metric, [])
    merge, best = f"{spell('scripts/merge_lora.py')} --lora_path", config.out_dir / BEST
    adapter = quote(f"{config.out_dir}/{FINAL}")
    chat = f"{spell('scripts/chat.py')} --lora_path {adapter}"
    if has_head(config):
        chat = f"{spell('scripts/classify.py')} --lora_path {adapter} --data.path FILE"
    if len(values) < 2 or values[0][0] != 0 or not _is_worse(metric, values[-1][1], values[0][1]):
        better = _better(metric, values) if best.is_symlink() else ""
        of_best = [f"{merge} {quote(str(best))}    # {better}"] if better else []
        return "", "\n".join([f"{merge} {adapter}", *of_best, chat])
    warning = f"{metric} {short(values[0][1])} -> {short(values[-1][1])}: worse than the base, do not merge."
    kept = [step for step, value in values[1:] if _is_worse(metric, values[0][1], value)]
    if kept and best.is_symlink():
        return warning, f"{merge} {quote(str(best))}\n{chat}"
    why = "No better step was kept" if kept else "No step was better: lower --train.learning_rate"
    return f"{warning} {why}.", chat


def objective_of(config: FinetuneConfig) -> dict[str, str]:
    """The objective of a run under its name for summary.json; {} where a run learns what its data says."""
    if isinstance(config, PreferenceRunConfig):
        how = config.preference
        beta = f", beta {how.or_published('beta'):g}" if how.published.beta else ""
        return {"objective": f"{how.loss}{beta}"}
    if config.head != "none":
        return {"objective": config.head}
    if config.teacher_dir is None:
        return {}
    how_taught = config.distill
    return {
        "objective": f"{config.teacher_dir.resolve().name} as teacher, weight {how_taught.weight:g}, "
        f"temperature {how_taught.temperature:g}, {how_taught.top_k} tokens"
    }


def has_head(config: FinetuneConfig) -> bool:
    """Tell if the run trains a head that reads labels."""
    return config.head != "none" or (isinstance(config, PreferenceRunConfig) and config.preference.loss == "reward")


def _better(metric: str, values: Sequence[tuple[int, float]]) -> str:
    """Name the step that was better than the last one; '' if none was."""
    trained = [pair for pair in values if pair[0]]
    if not trained:
        return ""
    step, value = (min if smaller_is_better(metric) else max)(trained, key=itemgetter(1))
    return f"step {step:,}: {metric} {short(value)}" if _is_worse(metric, trained[-1][1], value) else ""


def beside_published(published: Mapping[str, float], summary: Mapping[str, Any]) -> list[str]:
    """Write the values that a publication reports of the run, each with the run's own, in a line; none without any."""
    own = {**summary, "peak_gb": summary["peak_gib"] * 2**30 / 1e9}
    write = {"seconds": duration, "peak_gb": "{:.2f}".format, "trainable_parameters": "{:,.0f}".format}

    def text(name: str, value: float | None) -> str:
        return "none" if value is None else write.get(name, short)(value)

    pairs = [
        f"{name.replace('_', ' ')} {text(name, value)}, here {text(name, own[name])}"
        for name, value in published.items()
    ]
    return [f"known   published: {'   '.join(pairs)}"] if pairs else []


def _is_worse(metric: str, value: float, than: float) -> bool:
    """Tell if a value of a metric is worse than another; NaN is."""
    return not (value <= than if smaller_is_better(metric) else value >= than)


def _outcome(
    config: FinetuneConfig,
    model: GPT,
    data: RunData,
    records: Sequence[Record],
    scores: Tensor | None,
    summary: Mapping[str, Any],
    following: str,
) -> Outcome:
    """Collect what the reports show."""
    assert config.out_dir is not None
    final = config.out_dir / FINAL
    last = records[-1]["step"] if records else 0
    said = [record for record in read_log(config.out_dir / SAMPLES, last) if "answer" in record]
    best, worst = best_and_worst_answers(said, data, scores)
    return Outcome(
        title=f"LoRA on {model.config.name}",
        summary=summary,
        records=records,
        lengths=data.audit.lengths.tolist(),
        limit=data.audit.max_length,
        data=[data.audit.describe(), *data.audit.sources, *data.audit.warnings, *data.audit.notes()],
        config=cli.to_yaml(config),
        hashes=hashes(config.checkpoint_dir, data.files, final),
        following=following,
        best=best,
        worst=worst,
        frames=frames(data) if best or worst else (),
        modules=modules.section(
            modules.modules_of(model, config.optimizer, states.find(final) or final) if _has_own_base(config) else []
        ),
        lessons=section(reviewed(config, data), unit=unit_of(config)) if config.eval.train_samples else "",
        said=[record for record in said if "wanted" not in record and record["step"] in (said[0]["step"], last)],
    )


def _has_own_base(config: FinetuneConfig) -> bool:
    """Tell if the updates are those of whole, published weights."""
    return config.strategy != "sharded" and config.lora.init == "default"


def summarize(model: GPT, lora: LoRAConfig, quantize: str, precision: str, records: Sequence[Record]) -> dict[str, Any]:
    """Collect the values of summary.json."""
    train = [record for record in records if "loss" in record]
    val = [value for _, value in metrics(records).get("val_loss", [])]
    right = [record["accuracy"] for record in train[-10:] if "accuracy" in record]
    end = train[-1] if train else {"seconds": 0.0, "peak_gib": 0.0}
    tokens, seconds = sum(record["tokens"] for record in train), end["seconds"]
    storage = "" if quantize == "none" else f"{quantize} + "
    targets = ",".join(map(str, lora.targets))
    return {
        "base": model.config.name,
        "quantize": quantize,
        "adapter": f"{storage}LoRA r={lora.r} on {targets}",
        "precision": precision,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "trainable_parameters": count_trainable(model),
        "frozen_parameters": count_parameters(model.config),
        "steps": len(train),
        "skipped_steps": sum(record.get("skipped", False) for record in train),
        "tokens": tokens,
        "samples": sum(record["samples"] for record in train),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_gib": end["peak_gib"],
        "train_loss": sum(r["loss"] for r in train[-10:]) / len(train[-10:]) if train else None,
        "train_accuracy": sum(right) / len(right) if right else None,
        "val_loss_before": val[0] if val else None,
        "val_loss": val[-1] if val else None,
        "metrics": {
            name: {"before": values[0][1], "after": values[-1][1]} for name, values in metrics(records).items()
        },
        "versions": versions(),
    }


def _without_nan(value: Any) -> Any:
    """Return the value with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hashes(checkpoint_dir: Path, data: Mapping[str, str], adapter: Path) -> dict[str, str]:
    """Collect the sha256 of base, data and adapter.

    Args:
        data: source -> sha256.
    """
    manifest = read_manifest(adapter) or {}
    return {
        f"base {checkpoint_dir}": content_hash(checkpoint_dir),
        **{f"data {source}": digest for source, digest in data.items()},
        **{f"{FINAL}/{name}": facts["sha256"] for name, facts in manifest.get("files", {}).items()},
    }


def best_and_worst_answers(
    said: Sequence[Record], data: RunData, scores: Tensor | None
) -> tuple[list[Answer], list[Answer]]:
    """Sort by chrF if the model answered validation samples, else by the loss of the wanted answers."""
    compared = [record for record in said if "wanted" in record]
    if compared:
        early, late = ([r for r in compared if r["step"] == step] for step in (0, compared[-1]["step"]))
        before = {r["prompt"]: r["answer"] for r in early} if early != late else {}
        answers = [
            Answer(
                prompt=r["prompt"],
                wanted=r["wanted"],
                said=r["answer"],
                score=r["chrf"],
                before=before.get(r["prompt"]),
            )
            for r in late
        ]
        answers.sort(key=lambda answer: -answer.score)
        best = answers[: min(SHOWN, -(-len(answers) // 2))]
        return best, answers[len(best) :][-SHOWN:][::-1]
    if scores is None:
        return [], []
    rows = [row for batch in data.val_batches for row in zip(batch.tokens, batch.labels, strict=True)]

    def with_losses(numbers: Sequence[int]) -> list[Answer]:
        return [
            Answer(
                prompt=asked.prompt, wanted=asked.wanted, said=None, score=float(scores[number, 0] / scores[number, 2])
            )
            for number in numbers
            if (asked := question(data, *rows[number]))
        ]

    best_rows, worst_rows = best_and_worst(scores, SHOWN)
    return with_losses(best_rows), with_losses(worst_rows)


def write_pages(outcome: Outcome, out_dir: Path) -> None:
    """Write loss.png, report.md and report.html."""
    plot_losses(outcome.records, out_dir / "loss.png")
    write_report(out_dir / "report.md", outcome)
    write_page(out_dir / "report.html", outcome)


def table(records: Sequence[Record]) -> list[str]:
    """Make a table with a line for each metric: before training, after it, and the best."""
    rows = before_and_after(records)
    if not rows:
        return []
    rows.insert(0, ("", "before", "after", "best"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  "
        + "   ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _shortly(answers: Sequence[Answer], kind: str, frames: Sequence[Frame]) -> list[str]:
    """Write a line for each of some answers, unless the model was not asked."""
    return [
        f"  {kind:<7} chrF {answer.score:.2f}  {one_line(unframed(answer.prompt, frames)[1], 60)} -> "
        f"{one_line(answer.said, 60)}"
        for answer in answers
        if answer.said is not None
    ]
