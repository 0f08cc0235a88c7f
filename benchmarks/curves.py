"""Train the demo's model on the demo's data five times from the same start, and compare the loss curves.

Four run on the same nf4 weights in bf16: the fast path, the fast path in FP8, the plain path, and PEFT on transformers.
The fifth, the plain path in float32, is the reference. All start from the same adapters and read the same samples in
the same order.

python benchmarks/curves.py
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.data import Batch, Step, read_data, steps
from lit_qlora.device import pick_device
from lit_qlora.fused import fuse, why_not
from lit_qlora.lora.adapter import save_adapter
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig, TrainConfig

Loss = Callable[[Batch], Tensor]


def adapted(config: FinetuneConfig, dtype: torch.dtype) -> GPT:
    """Load the quantised base, with the same adapters each time."""
    model = load_model(config.checkpoint_dir, dtype, pick_device(), config.quantize)
    torch.manual_seed(config.seed)
    add_lora(model, config.lora)
    return model.train()


def peft_model(config: FinetuneConfig, start: GPT, style: Any, dtype: torch.dtype) -> Any:
    """Load PEFT on transformers and bitsandbytes, with the adapters of `start`."""
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        export_hf(config.checkpoint_dir, base)
        facts = {"base": {"name": start.config.name, "path": str(base), "sha256": ""}, "step": 0}
        save_adapter(adapter, start, config.lora, style, facts)
        storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=storage, dtype=dtype, device_map={"": pick_device()}
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def peft_loss(model: Any, dtype: torch.dtype) -> Loss:
    """Loss of a model of transformers, summed over labelled tokens as ours is."""
    device = pick_device()

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=batch.tokens.to(device)).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch.labels.to(device).flatten(), reduction="sum")

    return loss


def curve(model: Any, loss: Loss, work: list[Step], rate: float) -> Tensor:
    """Losses of all steps, (steps,) float64."""
    learners = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learners, lr=rate)
    losses = []
    for step in work:
        total = torch.zeros((), device=pick_device())
        for batch in step.batches:
            part = loss(batch) / step.weight
            part.backward()
            total += part.detach()
        torch.nn.utils.clip_grad_norm_(learners, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.stack(losses).double().cpu()


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 16 samples")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters, on all linear layers")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, constant")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = FinetuneConfig(
        quantize="bnb.nf4",
        lora=LoRAConfig(r=arguments.r, alpha=2 * arguments.r, dropout=0.0, targets="all"),
        data=DataConfig(path="finetune/demo", cache_dir="none"),
        train=TrainConfig(batch_size=16, micro_batch_size=8),
    )
    data = read_data(config)
    work = list(steps(data.train, data.batching, arguments.steps))

    exact = adapted(config, torch.float32)
    plain, fast, eight = (adapted(config, dtype) for _ in range(3))
    theirs = peft_model(config, fast, data.style, dtype)
    if reason := why_not(fast):
        raise SystemExit(f"the fast path is not taken: {reason}")
    fuse(fast)
    fuse(eight, fp8=True)
    curves: dict[str, Tensor] = {}
    for name, model, loss in (
        ("plain, float32", exact, lambda batch: exact.loss(*batch)),
        ("plain", plain, lambda batch: plain.loss(*batch)),
        ("fast", fast, lambda batch: fast.loss(*batch)),
        ("fast, fp8", eight, lambda batch: eight.loss(*batch)),
        ("peft", theirs, peft_loss(theirs, dtype)),
    ):
        curves[name] = curve(model, loss, work, arguments.rate)
    reference = curves["plain, float32"]
    shown = sorted({0, *(max(0, arguments.steps * part // 4 - 1) for part in range(1, 5))})
    print(f"{pick_device().type}, {str(dtype).removeprefix('torch.')}, {arguments.steps} steps; losses after")
    print(f"  {'':16}" + "".join(f"{i + 1:>9}" for i in shown) + "   from float32: mean  largest   from plain: largest")
    for name, losses in curves.items():
        away, beside = (losses - reference).abs(), (losses - curves["plain"]).abs()
        values = "".join(f"{losses[i]:9.4f}" for i in shown)
        print(f"  {name:16}{values}           {away.mean():9.5f}{away.max():9.5f}            {beside.max():9.5f}")


if __name__ == "__main__":
    main()
