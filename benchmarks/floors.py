"""Compare the least memory that a training step needs with the measured peak and with the plan of a run.

python benchmarks/floors.py        # for the newest row that step.py wrote of each setting
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from results import TABLE, read_rows
from shapes import model_config

from lit_qlora.fused.memory import slice_tokens
from lit_qlora.lora.layer import LoRALinear, add_lora
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage
from lit_qlora.run.plan import MicroBatches, Room, make_plan
from lit_qlora.settings import LoRAConfig, Recompute, Scheme, TrainConfig

H100 = 80e9  # bytes; the plan needs a GPU to plan for
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.03, "paged-adamw8bit": 0.0}
"""What step.py may train with, and the bytes that it keeps for each number that learns; pages can leave the GPU."""
FLAGS = re.compile(
    r"(?P<scheme>\S+) r(?P<r>\d+) (?P<targets>\S+) dropout (?P<dropout>\S+) recompute (?P<recompute>\S+)"
    r"( packed)?(?P<graphs> graphs)?( dequantized (?P<dequantized>\d+))?(?P<fp8> fp8)?( (?P<optimizer>\S+))?"
)


def memory_floor(
    model: ModelConfig, lora: LoRAConfig, scheme: Scheme, recompute: Recompute, tokens: int, state_bytes: float = 8.0
) -> float:
    """Bytes at the peak of a step on `tokens` tokens, if memory holds only necessary tensors.

    These are stored weights; adapters and their gradients in float32; `state_bytes` of an optimizer for each
    parameter; the widest stacked weight, dequantised; the saved activations of the blocks; and the tensors of one
    block's backward pass. Activations are in 16 bit, except a float32 for each head and token of attention. A backward
    pass that overwrites its input with gradients needs a little less.
    """
    gpt = GPT.skeleton(model)
    add_lora(gpt, lora)
    z = lora.r * sum(isinstance(module, LoRALinear) for module in gpt.blocks[0].modules())
    plan = make_plan(model, lora, Storage(torch.bfloat16, scheme), MicroBatches(tokens), TrainConfig(), Room())

    residual, attended = model.n_embd, model.n_head * model.head_size
    qkv = attended + 2 * model.n_kv_head * model.head_size
    gate_up = model.ffn_size * (2 if "glu" in model.ffn else 1)
    if recompute != "none":  # a slice of a long row at a time
        gate_up = round(gate_up * slice_tokens(tokens) / tokens)
    small = 2 * z + 4 * model.n_head  # bytes: the adapters' middles and the sums of attention
    kept = {
        "none": 2 * (2 * residual + qkv + attended + gate_up) + small,
        "mlp": 2 * (2 * residual + qkv + attended) + small,
        "attn": 2 * (2 * residual + attended) + small,
        "offload": 0,
        "full": 2 * residual,
        "full-offload": 0,
    }[recompute]
    again = {
        "none": 0,
        "mlp": gate_up,
        "attn": gate_up + qkv,
        "offload": gate_up + qkv + attended + 4 * residual,  # and two residuals on their way out, two on their way in
        "full": gate_up + qkv + attended,
        "full-offload": gate_up + qkv + attended + 2 * residual,
    }[recompute]
    working = 2 * (gate_up + residual + again)  # gradients of gate and up and of the residual, and what is made again
    widest = 0 if scheme == "none" else 2 * max(model.ffn_size * (2 if "glu" in model.ffn else 1), qkv) * residual
    return plan.weights + (8 + state_bytes) * plan.trainable + widest + tokens * (model.n_layer * kept + working)


def sizes(row: dict[str, Any]) -> tuple[float, float, float | None]:
    """Return bytes for a row of step.py: the peak, the peak of the plan, and the floor.

    There is no floor for the plain path or mixtures of experts. CUDA graphs have none, because they own a memory pool;
    cached weights have none, because they use spare memory for speed.
    """
    found = FLAGS.fullmatch(row["flags"])
    assert found, f"not the flags of a row of step.py: {row['flags']}"
    model = model_config(row["shape"])
    r, dropout = int(found["r"]), float(found["dropout"])
    lora = LoRAConfig(r=r, alpha=2 * r, targets=tuple(found["targets"].split(",")), dropout=dropout)  # type: ignore[arg-type]
    scheme: Any = found["scheme"]
    setting: Any = found["recompute"]
    rows, length, state = int(row["micro_batch"]), int(row["tokens"]), STATE_BYTES[found["optimizer"] or "adamw"]
    train = TrainConfig(
        fast=setting != "plain",
        recompute="none" if setting == "plain" else setting,
        micro_batch_size=rows,
        batch_size=rows,
        cuda_graphs="auto" if found["graphs"] else "never",
        keep_dequantized=int(found["dequantized"] or 0),
        fp8=bool(found["fp8"]),
    )
    usual = length if found["graphs"] else None
    batches = MicroBatches(rows * length, usual=usual)
    plan = make_plan(model, lora, Storage(torch.bfloat16, scheme), batches, train, Room(H100), state)
    peak = float(row["peak_gib"]) * 2**30
    if setting == "plain" or found["graphs"] or found["dequantized"] or model.n_expert:
        return peak, plan.total, None
    return peak, plan.total, memory_floor(model, lora, scheme, setting, rows * length, state)


def beside(row: dict[str, Any]) -> str:
    """Format the peak of a row of step.py beside its floor and its plan."""
    peak, plan, floor = sizes(row)
    told = f"{peak / 1e9:.2f} GB, {peak / plan:.3f} of the plan of {plan / 1e9:.2f}"
    return told + (f", {peak / floor:.3f} of the floor of {floor / 1e9:.2f}" if floor else "")


def main() -> None:
    """Print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=TABLE, help="the table to read")
    described = ("shape", "micro_batch", "tokens", "flags")
    rows = [row for row in read_rows(parser.parse_args().results) if row["program"] == "step.py"]
    for setting, row in {tuple(row[name] for name in described): row for row in rows}.items():
        print("{:11} {} x {:5} {:60} ".format(*setting), beside(row))


if __name__ == "__main__":
    main()
