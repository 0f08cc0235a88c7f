"""A whole run, from its settings to its final adapter."""

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora.settings import EvalConfig, FinetuneConfig, PreferenceRunConfig, check

if TYPE_CHECKING:
    import torch

    from lit_qlora.model.gpt import GPT
    from lit_qlora.prompts.tokenizer import Tokenizer
    from lit_qlora.quantize import Storage

MakeAsk = Callable[[EvalConfig, "Tokenizer", bool], Callable[["GPT"], dict[str, float]]]
"""See finetune: from eval, tokenizer and allow_code of a run, a function that asks a model the tasks of eval."""

Load = Callable[[FinetuneConfig, "Storage", "torch.device"], "GPT"]
"""Returns the base of a run, which nothing else uses as long as the run lasts."""


def load_base(config: FinetuneConfig, storage: "Storage", device: "torch.device") -> "GPT":
    """Read and quantise the base of a run, or take it from the cache."""
    from lit_qlora.checkpoint import quantized_cache

    return quantized_cache.load(config.checkpoint_dir, storage, device, config.quantize_cache)


def load_shares(config: FinetuneConfig, storage: "Storage", device: "torch.device", buffers: int) -> "GPT":
    """Read and quantise a base that lies over the processes of a run, so many blocks at a time; there is no cache."""
    from lit_qlora.checkpoint.checkpoint import load_stored
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.sharded import lies_on_host

    on_host = lies_on_host(ModelConfig.load(config.checkpoint_dir), config.lora)
    return load_stored(config.checkpoint_dir, storage, device, True, on_host, buffers)


def finetune(
    config: FinetuneConfig, make_ask: MakeAsk | None = None, load: Load = load_base, pause: float | None = None
) -> Path:
    """Train the adapter that `config` describes and leave it in OUT/final.

    Args:
        make_ask: asks lm-eval's tasks; finetune/lora.py gives it, because this package does not know lm-eval.
        load: loads the base.
        pause: share of the run after which it ends for now, at the next validation; a resumed run goes on.

    Returns:
        OUT, the folder of the run.

    Raises:
        Paused: if `pause` ends the run.
        UserError: for whatever the user can mend; most of it before any weight is loaded.
    """
    check(not config.eval.tasks or make_ask is not None, "eval.tasks are asked by finetune/lora.py alone. Start it.")
    if not config.quiet:
        return _finetune(config, make_ask, load, pause)
    with open(os.devnull, "w") as nobody, redirect_stdout(nobody):
        return _finetune(config, make_ask, load, pause)


def _finetune(config: FinetuneConfig, make_ask: MakeAsk | None, load: Load, pause: float | None) -> Path:
    # Errors come before weights are loaded, and errors in the data even before Lightning is imported.
    from lit_qlora.data.of_run import read_of_run
    from lit_qlora.data.prepared import choose_data
    from lit_qlora.device import fabric_precision, let_segments_grow, pick_device, resolve_precision, weights_dtype

    let_segments_grow()
    precision = resolve_precision(config.precision, pick_device())
    config = replace(config, data=choose_data(config.data, config.checkpoint_dir))
    if config.seed == -1:
        from lit_qlora.run.folder import default_out_dir
        from lit_qlora.run.resume import settle_seed

        config = replace(config, out_dir=config.out_dir or default_out_dir(config))
        config = replace(config, seed=settle_seed(config))
    if config.lora.start is not None:  # which may have a longer context
        from lit_qlora.lora.adapter import settle

        config = replace(config, lora=settle(config.lora, config.checkpoint_dir))
    data = read_of_run(config)

    from lightning.fabric import Fabric

    from lit_qlora.checkpoint.quantization_table import within_budget
    from lit_qlora.evaluate.validation_inputs import read_probes
    from lit_qlora.lora.adapter import start_adapters
    from lit_qlora.lora.embeddings import add_noise
    from lit_qlora.lora.layer import add_lora
    from lit_qlora.lora.score import add_score
    from lit_qlora.quantize import Storage
    from lit_qlora.report import tell
    from lit_qlora.run import distillation, dry_run, folder, learning, preferences, resume, saver, summary
    from lit_qlora.run.banner import plan_run, savings, tell_plan
    from lit_qlora.sharded import RowParts
    from lit_qlora.train import parallel, watch

    out_dir = config.out_dir or folder.default_out_dir(config)
    devices, num_nodes = parallel.processes(config.devices, config.num_nodes)
    config = replace(
        within_budget(config, weights_dtype(precision)),
        precision=precision,
        devices=devices,
        num_nodes=num_nodes,
        out_dir=out_dir,
        train=learning.settle_warmup(config.train, data),
    )
    if isinstance(config, PreferenceRunConfig):
        config = preferences.off_the_fast_path(config)
    total = learning.total_steps(config.train, data)
    teacher = distillation.find_teacher(config, data.max_length)
    plan = plan_run(config, data, teacher)
    checkpoint = resume.find(config, total, data.files, data.style.digest, saver.versions())
    start = checkpoint.step if checkpoint else 0
    probes = read_probes(config, data)
    if config.eval.tasks:
        assert make_ask
        probes = replace(probes, ask=make_ask(config.eval, data.tokenizer, config.allow_code))
    if config.deterministic:
        learning.set_deterministic()
    if config.dry_run:
        if parallel.is_first():
            tell_plan(config, data, total, plan, start, teacher)
            data = distillation.untaught_data(data, teacher) if teacher else data
            dry_run.tell_time(config, data, plan, total, start)
        return out_dir

    fabric = Fabric(
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=parallel.strategy(config.strategy, config.devices, config.num_nodes),
        precision=fabric_precision(precision),
    )
    with (
        parallel.launched(fabric) as children,
        folder.claim(config, fabric, checkpoint, plan := learning.agree_on(plan)),
        folder.open_log(config.log, resume.flat(resume.plain(config)), out_dir, total, fabric) as log,
        watch.watched(fabric, resume.advice(out_dir), config.collective_timeout, children.end) as watching,
    ):
        fabric.seed_everything(config.seed, verbose=False)
        if fabric.is_global_zero:
            tell_plan(config, data, total, plan, start, teacher)
            if checkpoint:
                tell(f"  resume  from {checkpoint.path}, after step {start:,} of {total:,}; --resume never starts anew")
        if teacher:
            data = distillation.with_teacher(fabric, data, teacher)
        storage = Storage(weights_dtype(precision), *config.quantization)
        with learning.explained(out_dir, data.tokenizer, partial(savings, config, data)):
            if plan.processes:
                model = load_shares(config, storage, fabric.device, plan.buffers)
            else:
                model = load(config, storage, fabric.device)
        if config.sequence_parallel > 1:
            model.rows = RowParts(config.sequence_parallel)
            watching.follow(model.rows.members)
        add_lora(model, config.lora)
        start_adapters(model, config.lora, config.checkpoint_dir)
        if data.scoring:
            add_score(model, data.scoring.outputs)
        add_noise(model, config.train.neftune)
        model.set_dropout(config.train.hidden_dropout)
        learning.take_path(model, plan)
        if isinstance(config, PreferenceRunConfig):
            data = preferences.with_reference(fabric, model, data, config)
        scores = learning.learn(fabric, model, config, data, probes, log, checkpoint, pause)
        if fabric.is_global_zero:
            summary.finish(config, model, data, log, scores)
    return out_dir
