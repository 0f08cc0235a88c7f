"""Measure what quantisation does to a model, layer by layer, and choose the storage of each layer within a budget.

python scripts/plan_quantization.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --budget 5GB
python finetune/lora.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --quantize auto --quantize_budget 5GB
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora import cli
from lit_qlora.commands import spell
from lit_qlora.errors import ResourceError
from lit_qlora.settings import DEMO_CHECKPOINT, Budget, Precision, Quantization, Settings
from lit_qlora.settings.limits import Count

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lit_qlora.checkpoint.quantization_table import Table
    from lit_qlora.evaluate.quantization import Effects
    from lit_qlora.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PlanQuantizationConfig(Settings):
    """Measure the effect of 4 and 8 bits on each group of layers that read the same input.

    It is the KL divergence from the model as it is, which must fit into memory unquantised. The table is written once,
    into the folder of the checkpoint; runs with --quantize auto read it.
    """

    checkpoint_dir: Path = DEMO_CHECKPOINT
    """The model: a directory written by scripts/convert_hf_checkpoint.py."""
    budget: str | None = None
    """Room for all weights, e.g. 14GB, or bits a weight of the linear layers, e.g. 5.2bits. The storage of each layer
    within it is printed, and its effect is measured beside that of uniform storage."""
    text: Path = Path("default")
    """Text file on which effects are measured; best one like the data that the model is for. 'default' is a short one
    of the package."""
    tokens: Count = 8192
    """Measure on the first N tokens of the text."""
    length: Count = 512
    """Tokens that the model reads at a time; at most its block_size."""
    precision: Precision = "auto"
    """Dtype of weights that stay as they are, and of the measurement. 'auto' is bf16-true on a GPU that has it, and
    measures in float32 where that fits: in 16 bits rounding hides the effects of 8 bits."""
    again: bool = False
    """Measure although there is a table of these weights, e.g. on another text."""

    def __post_init__(self) -> None:
        """Check the budget."""
        super().__post_init__()
        if self.budget is not None:
            Budget.parse(self.budget)


def main(config: PlanQuantizationConfig) -> None:
    """Measure once, and print the choice for the budget."""
    from lit_qlora.checkpoint.checkpoint import load_model
    from lit_qlora.checkpoint.quantization_table import FILE, read_table
    from lit_qlora.device import pick_device, resolve_precision, weights_dtype
    from lit_qlora.evaluate.quantization import Effects
    from lit_qlora.model.config import ModelConfig

    model = ModelConfig.load(config.checkpoint_dir)
    device = pick_device()
    dtype = weights_dtype(resolve_precision(config.precision, device))
    rows = read_rows(config, model.block_size)
    table = None if config.again else read_table(config.checkpoint_dir)
    if table is not None:
        same = "this text" if table.text == text_of(rows) else "another text"
        print(f"{config.checkpoint_dir / FILE} is of these weights and {same}. --again measures anew.")
    if config.budget is None and table is not None:
        return
    if table is None:
        check_place(config.checkpoint_dir)
    measured_in = dtype if config.precision != "auto" else dtype_of_measurement(model, dtype, device)
    effects = Effects(load_model(config.checkpoint_dir, measured_in, device), rows)
    table = table or measure(config, effects, rows)
    if config.budget is None:
        return
    chosen = table.within(Budget.parse(config.budget), model, dtype)
    print(listing(table, chosen), comparison(table, chosen, effects, model, dtype), sep="\n\n")
    print(
        f"\nTo train on it: {spell('finetune/lora.py')} --checkpoint_dir {config.checkpoint_dir} "
        f"--quantize auto --quantize_budget {config.budget}"
    )


def read_rows(config: PlanQuantizationConfig, most: int) -> "Tensor":
    """The text in rows of ids."""
    from lit_qlora.evaluate.quantization import rows_of
    from lit_qlora.evaluate.validation_inputs import read_text
    from lit_qlora.prompts.tokenizer import Tokenizer

    ids = read_text(config.text, Tokenizer(config.checkpoint_dir), config.tokens, "text")
    return rows_of(ids, min(config.length, most))


def dtype_of_measurement(model: "ModelConfig", dtype: "torch.dtype", device: "torch.device") -> "torch.dtype":
    """Float32, with products in TF32, if the weights take at most 0.8 of the free memory; else `dtype`.

    A change of any layer, however small, is rounded anew in all layers above it. In bfloat16 that alone is a KL of some
    1e-5, which adds up over all groups.
    """
    import torch

    from lit_qlora.checkpoint.quantization_table import other_bytes

    if device.type != "cuda" or other_bytes(model, (), torch.float32) > 0.8 * torch.cuda.mem_get_info(device)[0]:
        return dtype
    torch.set_float32_matmul_precision("high")
    return torch.float32


def check_place(folder: Path) -> None:
    """Raise ResourceError if a table could not be written, before it is measured."""
    from lit_qlora.checkpoint.quantization_table import FILE

    path = folder / FILE
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ResourceError(f"{path} cannot be written: it is a folder, or {folder} is read-only.")


def text_of(rows: "Tensor") -> str:
    """The sha256 by which a table knows its text."""
    from lit_qlora.files.hashing import hash_text

    return hash_text(" ".join(map(str, rows.flatten().tolist())))


def measure(config: PlanQuantizationConfig, effects: "Effects", rows: "Tensor") -> "Table":
    """Measure each group, and write the table."""
    from lit_qlora.checkpoint.checkpoint import content_hash
    from lit_qlora.checkpoint.quantization_table import FILE, Table, write_table
    from lit_qlora.evaluate.quantization import groups_of
    from lit_qlora.report import tell

    count, groups = len(groups_of(effects.model)), []
    dtype = str(effects.model.embed.weight.dtype).removeprefix("torch.")
    tell(f"{count} groups of layers, {rows.numel():,} tokens, in {dtype}")
    for group in effects.groups():
        groups.append(group)
        words = "  ".join(f"{scheme} {kl:.3g}" for scheme, kl in group.kl.items())
        tell(f"  {len(groups)}/{count}  {' '.join(group.layers)}  KL: {words}")
    table = Table(content_hash(config.checkpoint_dir), text_of(rows), rows.numel(), dtype, tuple(groups))
    write_table(config.checkpoint_dir, table)
    print(f"{config.checkpoint_dir / FILE} holds the effects on {rows.numel():,} tokens.")
    return table


def listing(table: "Table", chosen: Quantization) -> str:
    """Name the layers of each scheme."""
    lines = []
    for scheme, groups in table.by_scheme(chosen).items():
        weights = sum(group.weights for group in groups)
        names = ", ".join(group.name for group in groups)
        lines.append(f"{scheme:<10} {weights:>13,} weights  {names}")
    return "\n".join(lines)


def comparison(
    table: "Table", chosen: Quantization, effects: "Effects", model: "ModelConfig", dtype: "torch.dtype"
) -> str:
    """Write a table of the choice, of uniform storage and of fixed rules, each beside the choice for as many bytes."""
    rows = {"the budget": chosen, **fixed_rules(model)}
    lines = [
        "| storage | GB | bits a weight | KL | sum of the effects | KL of the choice for as many bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, storage in rows.items():
        size, bits = table.sizes(storage, model, dtype)
        best = chosen if storage is chosen else table.within(Budget(size, bits=False), model, dtype)
        kl, added, least = effects.of_storage(storage), table.predicted(storage), effects.of_storage(best)
        lines.append(f"| {name} | {size / 1e9:.4g} | {bits:.3f} | {kl:.4g} | {added:.4g} | {least:.4g} |")
    return "\n".join(lines)


def fixed_rules(model: "ModelConfig") -> dict[str, Quantization]:
    """Storage that nothing was measured for."""
    ends = rf"blocks\.(0|{model.n_layer - 1})\..*"
    return {
        "nf4-dq, head too": Quantization("bnb.nf4-dq", not model.tied_head),
        "nf4, head too": Quantization("bnb.nf4", not model.tied_head),
        "nf4-dq, 8 bits in the first and last block": Quantization("bnb.nf4-dq", layers=((ends, "bnb.int8"),)),
        "the same, head in 8 bits": Quantization("bnb.nf4-dq", layers=((ends, "bnb.int8"), ("head", "bnb.int8"))),
        "int8, head too": Quantization("bnb.int8", not model.tied_head),
    }


if __name__ == "__main__":
    cli.run(main, PlanQuantizationConfig)
