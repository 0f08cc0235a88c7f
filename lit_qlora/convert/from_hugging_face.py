"""A Hugging Face model folder into a checkpoint of ours, a tensor at a time."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_qlora.checkpoint import checkpoint, shards
from lit_qlora.checkpoint.packed import weight_specs
from lit_qlora.convert.families import (
    check_kept,
    check_rules,
    family_of,
    fill,
    find_rule,
    is_beside,
    is_kept,
    read_config,
    read_whole,
    to_ours,
)
from lit_qlora.convert.families.unpacking import read_packed
from lit_qlora.convert.families.wrappers import text_table
from lit_qlora.convert.hub import SOURCE
from lit_qlora.errors import CheckpointError
from lit_qlora.files.reading import read_json
from lit_qlora.model.config import ModelConfig, missing_checkpoint
from lit_qlora.model.mlp import CORRECTION
from lit_qlora.prompts import tokenizer

Dtype = Literal["keep", "bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
THEIR_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Hugging Face's names of the file of weights, best first."""


def convert_hf_checkpoint(
    source: Path,
    out_dir: Path,
    dtype: Dtype = "keep",
    name: str | None = None,
    limit: int = shards.SHARD_BYTES,
) -> ModelConfig:
    """Make `out_dir` the checkpoint of the Hugging Face model in `source`, whole or not at all.

    Host memory holds one of their tensors and its parts, or embedding and head to compare them.

    Args:
        name: of the model; by default the last two parts of `source`, ORG/NAME.
        limit: most bytes of weights in a file.

    Raises:
        CheckpointError: naming everything in `source` that is missing, damaged, or has no rule.
        ResourceError: if there is not enough room.
    """
    config = read_config(_their_config(source), name or "/".join(source.resolve().parts[-2:]))
    weights = find_weights(source)
    check_rules(weights.specs, config)
    config = replace(config, tied_head=config.tied_head and not _has_own_head(weights, config))
    whole = [their_name for their_name in weights.specs if not is_beside(their_name, weights.specs)]
    kept = {n: read_whole(n, weights, config, spec=True) for n in whole if is_kept(n, config)}
    used = [their_name for their_name in whole if their_name not in kept]
    packed = _taken_packed(used, weights, config) if dtype == "keep" else {}

    def ours_of(their_name: str, spec: bool) -> dict[str, Tensor]:
        if layer := packed.get(their_name):
            _, parts = read_packed(their_name, weights, spec) or ("", {})
            return {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        tensors = to_ours(their_name, read_whole(their_name, weights, config, spec), config)
        return {ours: _cast(ours, tensor, dtype) for ours, tensor in tensors.items()}

    specs: dict[str, Tensor] = {}
    for their_name in used:
        specs |= ours_of(their_name, spec=True)
    checkpoint.check_weights(weight_specs(specs, str(source)), config, location=str(source))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for their_name in used:
            yield from ours_of(their_name, spec=False).items()

    in_place = out_dir.resolve() == source.resolve()
    beside = [source / name for name in (*tokenizer.FILES, "config.json", SOURCE) if (source / name).is_file()]
    others = ((n, check_kept(n, read_whole(n, weights, config), config)) for n in kept)
    checkpoint.save_weights(
        out_dir, config, specs, tensors(), limit, also=[] if in_place else beside, kept=(kept, others)
    )
    return config


def _taken_packed(names: list[str], weights: shards.Weights, config: ModelConfig) -> dict[str, str]:
    """The weights that are taken as they are, in 4 bits, and the layer of ours that each is.

    Those that a layer of ours cannot hold so, and all where there is more than one scheme, are unpacked.
    """
    found, schemes, family = {}, set(), family_of(config)
    for name in names:
        rule, numbers = find_rule(name, family)
        if not isinstance(rule, str) or not rule.endswith(".weight"):
            continue
        if packed := read_packed(name, weights, spec=True):
            schemes.add(packed[0])
            found[name] = fill(rule.removesuffix(".weight"), numbers)
    return found if len(schemes) == 1 else {}


def describe(config: ModelConfig, out_dir: Path) -> str:
    """Return a line about a conversion: the model, what it is inside of, its size, and how it was published."""
    family = f"{config.family} inside {config.wrapper}" if config.wrapper else config.family
    theirs: dict[str, Any] = read_json(out_dir / "config.json")
    packed = theirs.get("quantization_config") or text_table(theirs).get("quantization_config")
    scheme = checkpoint.published_scheme(out_dir)
    now = "now in 16 bits" if scheme == "none" else f"kept so: --quantize {scheme} takes it as it is"
    was = f", published in {packed['quant_method']} and {now}" if packed else ""
    parameters = checkpoint.count_parameters(config)
    return f"converted {config.name} ({family}, {parameters:,} parameters{was}): {out_dir}"


def find_weights(source: Path) -> shards.Weights:
    """The weights of a Hugging Face folder.

    Raises:
        CheckpointError: if there are none, or a file of theirs is absent or damaged.
    """
    path = shards.find(source, *THEIR_WEIGHTS)
    if not path:
        raise CheckpointError(f"{source} has no {' and no '.join(THEIR_WEIGHTS)}, nor an index of several such files.")
    return shards.open_weights(path)


def _their_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        reason = missing_checkpoint(source) if not source.exists() else f"{source} has no config.json."
        raise CheckpointError(reason)
    content: dict[str, Any] = read_json(path)
    return content


def _has_own_head(weights: shards.Weights, config: ModelConfig) -> bool:
    """Tell if a head is stored whose values differ from the embedding's: transformers 5 reads it then."""
    family = family_of(config)
    embedding, *heads = (
        [name for name in weights.specs if family.weights.get(name) == f"{ours}.weight"] for ours in ("embed", "head")
    )
    own = [read_whole(name, weights, config) for name in heads[0]]
    return any(not torch.equal(head, read_whole(embedding[0], weights, config)) for head in own if embedding)


def _cast(name: str, tensor: Tensor, dtype: Dtype) -> Tensor:
    return tensor if dtype == "keep" or name.endswith(CORRECTION) else tensor.to(DTYPES[dtype])
