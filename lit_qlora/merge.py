"""Folding an adapter into its base: W + (alpha / r) B A, in float32, a tensor at a time, without bitsandbytes."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_qlora import checkpoint, tokenizer
from lit_qlora.adapter import Adapter, check_base, our_tensors
from lit_qlora.config import ModelConfig
from lit_qlora.errors import CheckpointError
from lit_qlora.hub import SOURCE
from lit_qlora.prompts import FILE_NAME as STYLE_FILE

Base = Literal["original", "quantized"]


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale B A for every adapted weight W, in W's dtype; other weights are passed through.

    Args:
        base: name -> weight.
        adapter: "<layer>.lora_a" -> A (r, in) and "<layer>.lora_b" -> B (out, r).
        scale: alpha / r.

    Raises:
        CheckpointError: if the adapter belongs to a layer that the base does not have, or that is of another shape.
    """
    merged = dict(base)
    for layer in (name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")):
        name = f"{layer}.weight"
        if name not in base:
            raise CheckpointError(f"The adapter has {layer}, but the base model has no {name}. Wrong base checkpoint?")
        merged[name] = merge_weight(base[name], adapter[f"{layer}.lora_a"], adapter[f"{layer}.lora_b"], scale)
    return merged


def merge_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, computed in float32, in W's dtype."""
    delta = scale * (b.float() @ a.float())
    if delta.shape != weight.shape:
        raise CheckpointError(
            f"The adapter fits a weight of shape {tuple(delta.shape)}, the base has {tuple(weight.shape)}. Wrong base?"
        )
    return (weight.float() + delta).to(weight.dtype)


def merge_checkpoint(adapter: Adapter, checkpoint_dir: Path, out_dir: Path, base: Base = "original") -> dict[str, Any]:
    """Write the checkpoint that computes what `adapter` on the base in `checkpoint_dir` computes.

    Args:
        base: what the update is added to, the weights as they were ("original") or as the 4- or 8-bit training saw
            them ("quantized", which needs bitsandbytes); the dtype stays that of the original.

    Returns:
        What merge_report.json holds: base, adapter, and for each adapted layer the size of the update and of what
        rounding to the base's dtype lost of it, both relative to the weight.

    Raises:
        CheckpointError: if base and adapter do not belong together or the adapter never learnt anything.
    """
    check_base(adapter, checkpoint_dir)
    config = ModelConfig.load(checkpoint_dir)
    state = our_tensors(adapter, config)
    if not any(bool(t.any()) for name, t in state.items() if name.endswith(".lora_b")):
        raise CheckpointError(f"{adapter.path} is a fresh adapter: it learnt nothing, so merging it changes nothing.")
    source = checkpoint.open_weights(checkpoint_dir)
    specs = dict(source.specs)
    scale = adapter.config.alpha / adapter.config.r
    # An adapter on a tied head belongs to the head alone: the merged model has a head of its own.
    untie = config.tied_head and "head.lora_a" in state
    if untie:
        config = dataclasses.replace(config, tied_head=False)
        specs["head.weight"] = specs["embed.weight"]
    layers: dict[str, dict[str, float]] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, spec in specs.items():
            weight = source.read("embed.weight" if untie and name == "head.weight" else name)
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_a" in state:
                original = weight
                if base == "quantized":
                    weight = _as_trained(weight, layer, adapter)
                a, b = state[f"{layer}.lora_a"], state[f"{layer}.lora_b"]
                exact = merge_weight(weight.float(), a, b, scale)
                weight = exact.to(spec.dtype)
                layers[layer] = _measure(original.float(), exact, weight.float())
            elif base == "quantized" and layer != name and weight.ndim == 2 and layer != "embed":
                weight = _as_trained(weight, layer, adapter)
            yield name, weight

    out_dir.mkdir(parents=True, exist_ok=True)
    for file in (*tokenizer.FILES, "config.json", SOURCE, STYLE_FILE):
        for directory in (checkpoint_dir, adapter.path):  # the adapter's prompt style wins
            if (directory / file).is_file():
                shutil.copy(directory / file, out_dir / file)
    digest = checkpoint.save_weights(out_dir, config, specs, tensors())
    report = {
        "base": {"path": str(checkpoint_dir), "name": config.name, "sha256": checkpoint.content_hash(checkpoint_dir)},
        "adapter": {"path": str(adapter.path), "r": adapter.config.r, "alpha": adapter.config.alpha},
        "onto": base,
        "sha256": digest,
        "largest_update": max(row["update"] for row in layers.values()),
        "largest_rounding": max(row["rounding"] for row in layers.values()),
        "layers": layers,
    }
    (out_dir / "merge_report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _as_trained(weight: Tensor, layer: str, adapter: Adapter) -> Tensor:
    """The weight as the quantised training saw it."""
    from lit_qlora.quantize import QuantizedLinear, is_quantized

    facts = adapter.manifest or {}
    scheme = facts.get("quantize", "none")
    if not is_quantized(layer, scheme, facts.get("quantize_head", False)):
        return weight
    trained = torch.bfloat16 if facts.get("precision") == "bf16-true" else torch.float32
    return QuantizedLinear(weight.to(trained), None, scheme).dequantize().to(weight.dtype)


def _measure(original: Tensor, exact: Tensor, rounded: Tensor) -> dict[str, float]:
    size = float(original.norm())
    return {"update": float((exact - original).norm()) / size, "rounding": float((rounded - exact).norm()) / size}
