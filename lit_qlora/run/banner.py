"""The banner of a run: data, model, plan and some samples, and a refusal if the plan does not fit."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from lit_qlora import __version__
from lit_qlora.checkpoint.checkpoint import check_weights, open_weights
from lit_qlora.checkpoint.score import read as read_head
from lit_qlora.data import Batch, Batching, RunData, boundary, count_steps, longest_step, show, steps
from lit_qlora.data.batches import AnyBatch, Content, epoch_length
from lit_qlora.data.samples import Sample
from lit_qlora.device import fast_dtype, gpu_bytes, has_fp8, host_bytes, pick_device, weights_dtype
from lit_qlora.errors import ResourceError
from lit_qlora.lora.peft_layout import check_layers
from lit_qlora.model.config import ModelConfig
from lit_qlora.prompts.added_tokens import read_new_tokens
from lit_qlora.quantize import Storage
from lit_qlora.report import tell
from lit_qlora.run import fits
from lit_qlora.run.distillation import Teacher, describe
from lit_qlora.run.plan import GIB, MicroBatches, Plan, Planner, Room
from lit_qlora.settings import FinetuneConfig, PreferenceRunConfig, check, why_not_in_parts, why_not_sharded
from lit_qlora.sharded import why_whole
from lit_qlora.train.optim import measure_state_bytes
from lit_qlora.train.parallel import Devices, processes_here, row_groups, world_size

FEW = 50  # steps; a run of fewer learns little
FIRST_STEPS = 8  # over which a usual micro-batch is averaged
LARGE = 0.1  # share of the memory of a run from which on adapters of experts are worth a word


def plan_run(config: FinetuneConfig, data: RunData, teacher: Teacher | None = None) -> Plan:
    """Plan the run, and its teacher's reading before.

    Raises:
        CheckpointError: if weights are missing or belong to another model.
        UsageError: if the LoRA settings do not fit the model, the adapter could not be saved or has another number of
            parameters than expected, or the optimizer or FP8 cannot be used.
        ResourceError: if GPU or host have too little memory, unless config.force.
    """
    model, parts = ModelConfig.load(config.checkpoint_dir), config.sequence_parallel
    groups = row_groups(config.devices, config.num_nodes, parts)
    reason = why_whole(model, parts) if parts > 1 else ""
    check(
        not reason, f"sequence_parallel {parts} does not suit {model.name}: {reason}.\nTake another, or leave it out."
    )
    check(
        read_head(config.checkpoint_dir) is None,
        f"checkpoint_dir {config.checkpoint_dir} has a head that reads labels, which this training would leave out.\n"
        "Give the base that it was merged from.",
    )
    weights = open_weights(config.checkpoint_dir)
    check_weights(weights.specs, model, str(weights.location))
    caveat = check_layers(model, config.lora)
    check(
        config.train.batch_size >= groups,
        f"train.batch_size {config.train.batch_size} leaves some of {groups * parts} devices without a sample.\n"
        "Take more samples per step, or fewer devices.",
    )
    graphs = data.val is None and data.scoring is None and config.teacher_dir is None  # only plain losses have any
    usual = usual_tokens(data, groups) if graphs and parts == 1 else None
    plan = _plan(config, longest_batch(data.train, data.batching, groups), usual, _outputs(data))
    plan = replace(plan, caveat=caveat)
    check_trainable(config.expect_trainable, model.name, plan.trainable)
    check(
        not (plan.processes and plan.slow_because and config.train.recompute == "none"),
        f"train.recompute none does not work with --strategy sharded on the plain path ({plan.slow_because}): "
        "the weights of a block are gone before its backward pass.\nTake auto or full.",
    )
    check(
        not plan.fp8 or has_fp8(),
        "train.fp8 needs a GPU that multiplies in FP8, of compute capability 8.9 or above.\nLeave out --train.fp8.",
    )
    room = _room(config.devices)
    if room.gpu and plan.total > room.gpu and not config.force:
        raise ResourceError(
            f"The run needs about {plan.total / GIB:.1f} GiB and the GPU has {room.gpu / GIB:.1f} free.\n"
            f"{savings(config, data)} --force starts anyway."
        )
    if teacher and room.gpu and teacher.bytes > room.gpu and not config.force:
        raise ResourceError(
            f"The teacher needs about {teacher.bytes / GIB:.1f} GiB before training, and the GPU has "
            f"{room.gpu / GIB:.1f} free.\n--distill.quantize bnb.nf4 needs less. --force starts anyway."
        )
    if room.host is not None and plan.host > room.host and not config.force:
        shared = " for each process" if config.devices != 1 else ""
        less = "full-offload or full" if "offload" in plan.recompute else "full"
        raise ResourceError(
            f"train.recompute {plan.recompute[0]} needs {plan.host / GIB:.1f} GiB of the host's memory, "
            f"and {room.host / GIB:.1f} GiB are free{shared}.\n"
            f"Take --train.recompute {less}, or fewer tokens at a time. --force starts anyway."
        )
    return plan


def check_trainable(expected: Mapping[str, int], base: str, trainable: int) -> None:
    """Raise UsageError unless the adapter has the number of parameters that expect_trainable gives for this base."""
    wanted = expected.get(base, trainable)
    check(
        trainable == wanted,
        f"expect_trainable wants {wanted:,} trainable parameters for {base}, and these settings give {trainable:,}.\n"
        "Correct lora.r or lora.targets, or leave expect_trainable out.",
    )


def longest_batch(samples: Content, batching: Batching, groups: int) -> AnyBatch:
    """Return the largest micro-batch of a device, or of devices that share its rows."""
    return longest_step(samples, batching, groups).batches[0]


def usual_tokens(data: RunData, processes: int) -> float:
    """Average the tokens of a device's first micro-batches, padding included."""
    first = steps(data.train, data.batching, FIRST_STEPS, world_size=processes)
    return fmean(batch.tokens.numel() for step in first for batch in step.batches)


def savings(config: FinetuneConfig, data: RunData) -> str:
    """List changes that need less memory, and how much each saves."""
    processes, train = world_size(config.devices, config.num_nodes), config.train
    model, groups = ModelConfig.load(config.checkpoint_dir), processes // config.sequence_parallel
    batch = longest_batch(data.train, data.batching, groups)
    if train.keep_dequantized == "auto":  # cached weights would fill the memory that another change saves
        train = replace(train, keep_dequantized=0)
        config = replace(config, train=train)
    plan = _plan(config, batch, outputs=_outputs(data))
    now = plan.total
    half = max(1, train.micro_batch_size // 2)
    longest = data.batching.row_length or int(data.train.lengths.max())
    others = {
        f"--train.micro_batch_size {train.micro_batch_size // 2}": (
            replace(config, train=replace(train, micro_batch_size=half)),
            longest_batch(data.train, replace(data.batching, micro_batch_size=half), groups),
        ),
        "--train.recompute offload": (replace(config, train=replace(train, recompute="offload")), batch),
        "--train.recompute full": (replace(config, train=replace(train, recompute="full")), batch),
        "--train.recompute full-offload": (replace(config, train=replace(train, recompute="full-offload")), batch),
        f"--data.{'pack' if config.data.pack_length else 'max'}_length {longest // 2}": (
            config,
            Batch(batch.tokens[:, : longest // 2], batch.labels[:, : longest // 2]),
        ),
        "--train.keep_dequantized 0": (replace(config, train=replace(train, keep_dequantized=0)), batch),
        "--quantize bnb.nf4-dq": (replace(config, quantize="bnb.nf4-dq", quantize_layers={}), batch),
    }
    alone = not isinstance(config, PreferenceRunConfig)  # samples, not comparisons
    if alone and processes > 1 and not why_not_sharded(config):
        others["--strategy sharded"] = (replace(config, strategy="sharded"), batch)
    parts = 2 * config.sequence_parallel
    if alone and groups % 2 == 0 and not (why_not_in_parts(config) or why_whole(model, parts)):
        fewer = longest_batch(data.train, data.batching, groups // 2)
        others[f"--sequence_parallel {parts}"] = (replace(config, sequence_parallel=parts), fewer)
    if plan.slow_because:  # there, these mean full
        del others["--train.recompute offload"], others["--train.recompute full-offload"]
    saved = {
        words: now - _plan(other, smaller, outputs=_outputs(data)).total for words, (other, smaller) in others.items()
    }
    tips = [f"{words} saves about {size / GIB:.2g} GiB" for words, size in saved.items() if size > 0.02 * now]
    tips += [experts] if (experts := of_experts(plan, config)) else []
    return f"To need less: {', '.join(tips)}." if tips else "No setting would save memory: the run needs a larger GPU."


def most_rows(config: FinetuneConfig, data: RunData) -> int:
    """Rows of the largest micro-batch that fits the GPU if all are as long as the longest; 0 without a GPU."""
    room, tokens = _room(config.devices), longest_batch(data.train, data.batching, 1).tokens
    return fits.most_rows(_planner(config, _outputs(data)), tokens.size(1), room) if room.gpu else 0


def _plan(config: FinetuneConfig, longest: AnyBatch, usual: float | None = None, outputs: int = 0) -> Plan:
    lesson = config.distill.top_k if config.teacher_dir else 0
    rows, length = longest.tokens.shape
    own = -(-length // config.sequence_parallel)
    batches = MicroBatches(rows * own, rows, usual, config.data.packing, lesson)
    return _planner(config, outputs).plan(batches, _room(config.devices))


def _outputs(data: RunData) -> int:
    """Outputs of the head that the run trains; 0 for none."""
    return data.scoring.outputs if data.scoring else 0


def _planner(config: FinetuneConfig, outputs: int = 0) -> Planner:
    return Planner(
        ModelConfig.load(config.checkpoint_dir),
        config.lora,
        Storage(weights_dtype(config.precision), *config.quantization),
        config.train,
        measure_state_bytes(config.optimizer, config.train, pick_device(), vectors=config.lora.dora),
        fast_dtype(config.precision),
        outputs,
        world_size(config.devices, config.num_nodes) if config.strategy == "sharded" else 0,
        config.sequence_parallel,
    )


def _room(devices: Devices) -> Room:
    """Measure free memory; the processes on a machine share the host's."""
    host = host_bytes()
    return Room(gpu_bytes(), None if host is None else host / processes_here(devices))


def tell_plan(
    config: FinetuneConfig, data: RunData, total: int, plan: Plan, start: int = 0, teacher: Teacher | None = None
) -> None:
    """Print the banner of steps `start` + 1 to `total`."""
    model, train = ModelConfig.load(config.checkpoint_dir), config.train
    device = pick_device()
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    memory = gpu_bytes()
    room = f" of {memory / GIB:.1f}" if memory else ""
    cached = f", {plan.cached_blocks} blocks cached in 16 bit {plan.cached / GIB:.2f}" if plan.cached_blocks else ""
    graphs = f", graphs {plan.graphs / GIB:.2f}" if plan.graphs else ""
    host = f"; on the host {plan.host / GIB:.2f}" if plan.host else ""
    kind = "DoRA" if config.lora.dora else "LoRA"
    if config.lora.init != "default":
        kind += f" from {config.lora.init}"
    storage = config.quantization.describe()
    base = kind if storage == "none" else f"{storage} + {kind}"
    words = ",".join(config.lora.targets)
    rows = f" in rows of at most {data.batching.row_length:,} tokens" if data.batching.row_length else ""
    rows += f", each row over {plan.parts} devices" if plan.parts > 1 else ""
    held = min(train.batch_size, epoch_length(len(data.train), data.batching))
    steps = f"steps {start + 1:,} to {total:,}" if start else f"{total:,} steps"
    enough = count_steps(len(data.train), data.batching, train.epochs)
    longer = f"train.max_steps {total:,} goes on beyond the {enough:,} steps of train.epochs" if total > enough else ""
    told = (plan.caveat, longer, few_steps(config, data, total), of_experts(plan, config), idle_tokens(config, model))
    notes = "".join(f"  note    {note}\n" for note in told if note)
    learn = f"warm-up {train.warmup:g}   {train.schedule} {train.learning_rate:g}   {config.optimizer.name}"
    tell(
        f"lit_qlora {__version__}   {model.name}   {base} r={config.lora.r} on {words}   {config.precision}   {where}\n"
        f"{_data_lines(data)}\n"
        f"  model   {plan.frozen:,} frozen parameters ({plan.weights / GIB:.2f} GiB{_sharing(plan)})   "
        f"{plan.trainable:,} trainable ({100 * plan.trainable / plan.frozen:.3g} %)\n"
        f"  plan    {steps} x {held} samples{rows}, {train.micro_batch_size} at a time   {learn}\n"
        f"  memory  about {plan.total / GIB:.2f}{room} GiB: weights {plan.weights / GIB:.2f}, adapter and optimizer "
        f"{plan.learning / GIB:.2f}, activations {plan.activations / GIB:.2f}{graphs}{cached}{host}\n"
        f"  path    {_path(plan)}\n"
        f"{describe(teacher, data) if teacher else ''}"
        f"{notes}{_samples(data)}"
    )


def idle_tokens(config: FinetuneConfig, model: ModelConfig) -> str:
    """Say which flags train the new tokens of a base, if not all of them learn; else ''."""
    lora, added = config.lora, list(read_new_tokens(config.checkpoint_dir).values())
    learnt: Any = lora.train_tokens
    says = model.tied_head or lora.train_head_rows or "head" in lora.targets
    if lora.train_embeddings or (says and set(added) <= set(learnt)) or not added:
        return ""
    ids = ",".join(map(str, sorted({*learnt, *added})))
    head = "" if model.tied_head else " --lora.train_head_rows true"
    return f"new tokens of the base are not all learnt: --lora.train_tokens [{ids}]{head}"


def few_steps(config: FinetuneConfig, data: RunData, total: int) -> str:
    """Say how a run gets more steps, if it has few and nobody has asked for so few; else ''."""
    train, visits = config.train, epoch_length(len(data.train), data.batching)
    if total >= FEW or train.max_steps is not None:
        return ""
    smaller = max(1, math.floor(visits * train.epochs / FEW))
    epochs = math.ceil(FEW * train.epochs / total)
    batch = f"--train.batch_size {smaller} or " if smaller < train.batch_size else ""
    return f"{total:,} steps are few to learn from: {batch}--train.epochs {epochs:g} makes more"


def of_experts(plan: Plan, config: FinetuneConfig) -> str:
    """Say that adapters of experts need much memory, and how they need less; '' where they do not."""
    lora, each = config.lora, plan.learning / max(1, plan.trainable)
    size = each * plan.experts
    if size < LARGE * (plan.total - plan.cached):
        return ""
    saved = {"--lora.targets [query,key,value,projection]": size}
    if not lora.rank_pattern and (less := lora.r // 4):
        saved[f"--lora.rank_pattern '{{experts.*: {less}}}'"] = size * (1 - less / lora.r)
    if config.optimizer.name in ("adamw", "adam"):
        saved["--optimizer.name adamw8bit"] = 6.0 * plan.trainable  # a byte for each moment instead of four
    ways = ", ".join(f"{flag} saves {bytes_ / GIB:.2g}" for flag, bytes_ in saved.items())
    return (
        f"adapters of experts have {plan.experts:,} of the trainable parameters, {size / GIB:.2f} GiB with gradients "
        f"and optimizer: {ways}"
    )


def _sharing(plan: Plan) -> str:
    """Say over how many processes the base is sharded."""
    if not plan.processes:
        return ""
    return f" in each of {plan.processes} processes that share it, {plan.buffers} blocks at a time"


def _path(plan: Plan) -> str:
    """Name the path of the training, and how blocks recompute."""
    counts = Counter(plan.recompute)
    again = ", ".join(f"{count} blocks {policy}" for policy, count in counts.items())
    taken = f"plain ({plan.slow_because})" if plan.slow_because else "fast"
    taken += f", attention {plan.attention}" if plan.attention else ""
    taken += f", delta rule {plan.delta_rule}" if plan.delta_rule else ""
    taken += ", frozen weights in FP8" if plan.fp8 else ""
    taken += f", CUDA graphs up to {plan.graph_tokens:,} tokens" if plan.graphs else ""
    taken += ", dequantised weights carried over" if plan.carries else ""
    return f"{taken}   recompute: {again}"


def _data_lines(data: RunData) -> str:
    """Summarise the audit in a few lines."""
    audit = data.audit
    lines = [
        f"  data    {audit.describe()}   style {data.style.name}   lengths {audit.spark()}",
        *(f"          {source}" for source in audit.sources),
        *(f"  WARNING {warning}" for warning in audit.warnings),
        *(f"  note    {note}" for note in audit.notes()),
    ]
    return "\n".join(lines)


def _samples(data: RunData) -> str:
    """Show some samples as the model sees them, and where the answer of the first begins."""
    if (scoring := data.scoring) and data.val is None:
        texts = [Sample(sample.tokens[:-1], sample.trained[:-1]) for sample in data.audit.shown]
        return "\n".join(
            f"  sample  {show(text, data.tokenizer, most=300)} -> {scoring.name(int(sample.tokens[-1]))}"
            for text, sample in zip(texts, data.audit.shown, strict=True)
        )
    lines = [f"  sample  {show(sample, data.tokenizer, most=300)}" for sample in data.audit.shown]
    return "\n".join([*lines, f"  answer  begins after: {boundary(data.audit.shown[0], data.tokenizer)}"])
