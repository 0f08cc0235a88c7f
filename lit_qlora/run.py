"""A run around its loop: the data it reads, the folder it owns, the plan it prints, what it leaves behind."""

import fcntl
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from lit_qlora import __version__, cli
from lit_qlora.adapter import save_adapter
from lit_qlora.checkpoint import content_hash, count_parameters
from lit_qlora.config import ModelConfig
from lit_qlora.data import RunData, boundary, count_steps, show
from lit_qlora.device import gpu_bytes, pick_device, weights_dtype
from lit_qlora.errors import ResourceError, UsageError
from lit_qlora.lora import count_trainable
from lit_qlora.model import GPT
from lit_qlora.optim import warmup_steps
from lit_qlora.peft_layout import check_layers
from lit_qlora.plan import GIB, Plan, make_plan
from lit_qlora.report import RunLog, duration, plot_losses, tell, write_report
from lit_qlora.settings import FinetuneConfig


def default_out_dir(checkpoint_dir: Path) -> Path:
    """Where a run on this checkpoint goes when nobody says."""
    return Path("out/lora") / checkpoint_dir.resolve().name


def total_steps(config: FinetuneConfig, data: RunData) -> int:
    """Optimizer steps of the run.

    Raises:
        UsageError: if the warm-up is longer than that, so that the learning rate would never reach its peak.
    """
    train = config.train
    total = count_steps(len(data.train), data.batching, train.epochs, train.max_steps)
    warmup = warmup_steps(train, total)
    if warmup > total:
        raise UsageError(f"train.warmup is {warmup} steps, but the run has only {total}. A share such as 0.03 adapts.")
    return total


def eval_every(config: FinetuneConfig, total: int) -> int:
    """Optimizer steps between validations."""
    return config.eval.every or max(1, total // 10)


def print_plan(config: FinetuneConfig, data: RunData, total: int, silent: bool = False) -> Plan:
    """Say what is going to happen, and whether it fits."""
    model = ModelConfig.load(config.checkpoint_dir)
    train = config.train
    check_layers(model, config.lora)  # an adapter that cannot be saved is refused before it is trained
    longest = data.batching.row_length or int(data.train.lengths.max())
    plan = make_plan(
        model,
        config.lora,
        config.quantize,
        config.quantize_head,
        weights_dtype(config.precision),
        train.micro_batch_size * longest,
        train,
        gpu_bytes() if (config.devices, config.num_nodes) == (1, 1) else None,
    )
    if silent:
        return plan
    device = pick_device()
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    memory = gpu_bytes()
    room = f" of {memory / GIB:.1f}" if memory else ""
    base = "LoRA" if config.quantize == "none" else f"{config.quantize} + LoRA"
    words = ",".join(config.lora.targets)
    rows = f"rows of {data.batching.row_length} tokens" if data.batching.row_length else "samples"
    learn = f"warm-up {train.warmup:g}   {train.schedule} {train.learning_rate:g}   {config.optimizer.name}"
    tell(
        f"lit_qlora {__version__}   {model.name}   {base} r={config.lora.r} on {words}   {config.precision}   {where}\n"
        f"{_data_lines(data)}\n"
        f"  model   {plan.frozen:,} frozen parameters ({plan.weights / GIB:.2f} GiB)   "
        f"{plan.trainable:,} trainable ({100 * plan.trainable / plan.frozen:.3g} %)\n"
        f"  plan    {total:,} steps x {train.batch_size} samples, {train.micro_batch_size} {rows} at a time   {learn}\n"
        f"  memory  about {plan.total / GIB:.2f}{room} GiB: weights {plan.weights / GIB:.2f}, adapter and optimizer "
        f"{plan.learning / GIB:.2f}, activations {plan.activations / GIB:.2f}\n"
        f"  path    {_path(plan)}\n"
        f"{_samples(data)}"
    )
    return plan


def _path(plan: Plan) -> str:
    """Which path the training takes, and what it computes again."""
    counts = Counter(plan.recompute)
    again = ", ".join(f"{count} blocks {policy}" for policy, count in counts.items())
    taken = f"plain ({plan.slow_because})" if plan.slow_because else "fast"
    return f"{taken}   recompute: {again}"


def take_path(model: GPT, plan: Plan) -> None:
    """Let the model compute its loss as the plan says; call it before the optimizer is made."""
    if plan.slow_because:
        model.recompute = plan.recompute[0] == "full"
        return
    from lit_qlora.fused import fuse, why_not

    if reason := why_not(model):  # only the loaded model shows it
        tell(f"  path    plain after all ({reason})")
        model.recompute = "none" not in plan.recompute
        return
    fuse(model).set_recompute(plan.recompute)


def _data_lines(data: RunData) -> str:
    """What the audit found, in a few lines."""
    audit = data.audit
    lines = [
        f"  data    {audit.describe()}   style {data.style.name}   lengths {audit.spark()}",
        *(f"          {source}" for source in audit.sources),
        *(f"  note    {note}" for note in audit.notes()),
    ]
    return "\n".join(lines)


def _samples(data: RunData) -> str:
    """Some samples as the model sees them, and where the answer of the first begins."""
    lines = [f"  sample  {show(sample, data.tokenizer, most=300)}" for sample in data.audit.shown]
    return "\n".join([*lines, f"  answer  begins behind: {boundary(data.audit.shown[0], data.tokenizer)}"])


@contextmanager
def claim(config: FinetuneConfig, fabric: Fabric) -> Iterator[Path]:
    """The run's folder, held until the run ends, with config.yaml in it.

    An earlier run in the same place is moved aside, never overwritten.

    Raises:
        ResourceError: if the folder cannot be written or another run is using it.
    """
    assert config.out_dir is not None
    out_dir = config.out_dir
    if not fabric.is_global_zero:
        fabric.barrier()
        yield out_dir
        return
    lock = None
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(out_dir)
        if (out_dir / "log.jsonl").exists():
            here = out_dir.resolve()  # "." has no name of its own
            aside = next(p for n in range(1, 10_000) if not (p := here.with_name(f"{here.name}.{n}")).exists())
            here.rename(aside)
            tell(f"The earlier run in {out_dir} is now {aside}.")
            lock.close()
            out_dir.mkdir()
            lock = _lock(out_dir)
        (out_dir / "config.yaml").write_text(cli.to_yaml(config))
    except OSError as error:
        raise ResourceError(f"out_dir {out_dir} cannot be written: {error.strerror}.") from None
    fabric.barrier()
    try:
        yield out_dir
    finally:
        lock.close()


def _lock(out_dir: Path) -> Any:
    handle = open(out_dir / ".lock", "a+")  # noqa: SIM115 - held until the run ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with handle:
            handle.seek(0)
            owner = handle.read().strip()
        raise ResourceError(
            f"out_dir {out_dir} is in use by the run with process id {owner}.\nWait for it, or take another --out_dir."
        ) from None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


@contextmanager
def open_log(out_dir: Path, total: int, fabric: Fabric) -> Iterator[RunLog]:
    """The run's log, closed whatever happens, so that an error message gets a line of its own; mute on other ranks."""
    first = fabric.is_global_zero
    with open(os.devnull, "w") as nobody:
        log = RunLog(out_dir / "log.jsonl" if first else Path(os.devnull), total, None if first else nobody)
        try:
            yield log
        finally:
            log.close()


def saver(config: FinetuneConfig, model: GPT, data: RunData, total: int, fabric: Fabric) -> Callable[[int], None]:
    """The function that saves the adapter after `step` steps, and removes the checkpoints that are too many."""
    assert config.out_dir is not None
    out_dir = config.out_dir
    base = {"name": model.config.name, "path": str(config.checkpoint_dir)}
    if fabric.is_global_zero:
        base["sha256"] = content_hash(config.checkpoint_dir)
    facts = {
        "base": base,
        "data": data.files,
        "quantize": config.quantize,
        "quantize_head": config.quantize_head,
        "precision": config.precision,
        "versions": versions(),
    }

    def save(step: int) -> None:
        if fabric.is_global_zero:
            folder = out_dir / ("final" if step == total else f"step-{step:06d}")
            save_adapter(folder, model, config.lora, data.style, {**facts, "step": step})
            for old in sorted(out_dir.glob("step-*"))[: -config.train.keep_last]:
                shutil.rmtree(old)
        fabric.barrier()

    return save


def finish(config: FinetuneConfig, model: GPT, data: RunData, log: RunLog) -> None:
    """Write summary.json, loss.png and report.md, and say what came out and what to type next."""
    assert config.out_dir is not None
    out_dir = config.out_dir
    log.close()
    train = [record for record in log.records if "loss" in record]
    val = [record["val_loss"] for record in log.records if "val_loss" in record]
    tokens, seconds = sum(record["tokens"] for record in train), train[-1]["seconds"]
    cuda = torch.cuda.is_available()
    summary = {
        "base": model.config.name,
        "quantize": config.quantize,
        "precision": config.precision,
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "trainable_parameters": count_trainable(model),
        "frozen_parameters": count_parameters(model.config),
        "steps": len(train),
        "tokens": tokens,
        "samples": sum(record["samples"] for record in train),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": train[-1]["peak_gib"],
        "train_loss": sum(r["loss"] for r in train[-10:]) / len(train[-10:]),
        "val_loss_before": val[0] if val else None,
        "val_loss": val[-1] if val else None,
        "versions": versions(),
    }
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    following = (
        f"python scripts/merge_lora.py --lora_path {out_dir}/final --checkpoint_dir {config.checkpoint_dir}\n"
        f"python scripts/chat.py --checkpoint_dir {config.checkpoint_dir} --lora_path {out_dir}/final"
    )
    plot_losses(log.records, out_dir / "loss.png")
    write_report(out_dir / "report.md", f"LoRA on {model.config.name}", summary, log.records, following)
    before_after = f"val_loss {val[0]:.4f} -> {val[-1]:.4f}   " if val else ""
    tell(
        f"done    {before_after}{tokens / seconds:,.0f} tokens/s   peak {summary['peak_gib']:.2f} GiB   "
        f"{duration(seconds)}\n"
        f"adapter {out_dir}/final   log, loss.png, report.md in {out_dir}\n"
        f"next    {following.splitlines()[0]}"
    )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    names = ("torch", "lightning", "bitsandbytes", "safetensors")
    return {"lit_qlora": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
