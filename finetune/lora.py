"""Fine-tune a checkpoint with LoRA; with --quantize bnb.nf4 this is QLoRA.

python finetune/lora.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --quantize bnb.nf4 --data.path alpaca.json
"""

from lit_qlora import cli
from lit_qlora.settings import FinetuneConfig


def main(config: FinetuneConfig) -> None:
    """Train the adapter that `config` describes and leave it in OUT/final."""
    # These take seconds, which --help and a mistyped flag should not.
    from dataclasses import replace

    from lightning.fabric import Fabric

    from lit_qlora import run
    from lit_qlora.checkpoint import load_model
    from lit_qlora.data import read_data, steps
    from lit_qlora.device import pick_device, resolve_precision, weights_dtype
    from lit_qlora.lora import add_lora
    from lit_qlora.optim import make_optimizer
    from lit_qlora.train import train

    # What can be refused is refused before a weight is loaded.
    precision = resolve_precision(config.precision, pick_device())
    config = replace(config, precision=precision, out_dir=config.out_dir or run.default_out_dir(config.checkpoint_dir))
    data = read_data(config)
    total = run.total_steps(config, data)
    if config.dry_run:
        run.print_plan(config, data, total)
        return

    fabric = Fabric(
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        # Pure bf16 is a matter of the weights' dtype, which load_model sees to; adapters stay in float32.
        precision="32-true" if precision == "bf16-true" else precision,
    )
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    with run.claim(config, fabric) as out_dir, run.open_log(out_dir, total, fabric) as log:
        plan = run.print_plan(config, data, total, silent=not fabric.is_global_zero)
        model = load_model(
            config.checkpoint_dir, weights_dtype(precision), fabric.device, config.quantize, config.quantize_head
        )
        add_lora(model, config.lora)
        run.take_path(model, plan)
        learners = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(learners, config.optimizer, config.train)
        fabric_model, optimizer = fabric.setup(model, optimizer)
        fabric_model.mark_forward_method("loss")

        train_steps = steps(data.train, data.batching, total, fabric.global_rank, fabric.world_size)
        train(
            fabric,
            fabric_model,
            optimizer,
            train_steps,
            total,
            data.val_batches,
            config.train,
            run.eval_every(config, total),
            log,
            save=run.saver(config, model, data, total, fabric),
        )
        if fabric.is_global_zero:
            run.finish(config, model, data, log)


if __name__ == "__main__":
    cli.run(main, FinetuneConfig)
