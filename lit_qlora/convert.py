"""A Hugging Face model folder into a checkpoint of ours, a tensor at a time."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_qlora import checkpoint, safetensors_io, tokenizer
from lit_qlora.config import ModelConfig, missing_checkpoint
from lit_qlora.errors import CheckpointError
from lit_qlora.families import find_family, find_rule, read_config, to_ours

Dtype = Literal["keep", "bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert_hf_checkpoint(source: Path, out_dir: Path, dtype: Dtype = "keep", name: str | None = None) -> ModelConfig:
    """Write model_config.json and lit_model.safetensors for the Hugging Face model in `source` into `out_dir`.

    Host memory holds one tensor at a time. The weights get their final name when they are complete.

    Args:
        name: what the model is called; by default the last two parts of `source`, ORG/NAME.

    Raises:
        CheckpointError: naming everything in `source` that is missing, damaged, or has no rule.
    """
    config = read_config(_their_config(source), name or "/".join(source.resolve().parts[-2:]))
    files = find_shards(source)
    _check_rules(files, config)
    specs: dict[str, Tensor] = {}
    for file, names in _by_file(files).items():
        for their_name, spec in safetensors_io.read_specs(file).items():
            if their_name in names:
                specs |= {ours: _cast(part, dtype) for ours, part in to_ours(their_name, spec, config).items()}
    checkpoint.check_weights(specs, config, place=str(source))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file, names in _by_file(files).items():
            for their_name in names:
                for ours, part in to_ours(their_name, safetensors_io.read_tensor(file, their_name), config).items():
                    yield ours, _cast(part, dtype)

    out_dir.mkdir(parents=True, exist_ok=True)
    if out_dir.resolve() != source.resolve():
        for file_name in (*tokenizer.FILES, "config.json"):
            if (source / file_name).is_file():
                shutil.copy(source / file_name, out_dir / file_name)
    checkpoint.save_weights(out_dir, config, specs, tensors())
    return config


def find_shards(source: Path) -> dict[str, Path]:
    """Name of each tensor -> the safetensors file that holds it.

    Raises:
        CheckpointError: if there is no safetensors file, a shard is absent, or the index points outside the folder.
    """
    index = source / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{index} is not a safetensors index (no weight_map).") from None
        outside = sorted({file for file in weight_map.values() if Path(file).name != file})
        if outside:
            raise CheckpointError(f"{index} points outside its folder: {outside[0][:80]!r}. Do not trust this model.")
        absent = sorted({file for file in weight_map.values() if not (source / file).is_file()})
        if absent:
            raise CheckpointError(f"{index} names {len(absent)} files that are absent: {', '.join(absent[:3])}.")
        return {name: source / file for name, file in weight_map.items()}
    single = source / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{source} has no model.safetensors and no model.safetensors.index.json.")
    return dict.fromkeys(safetensors_io.read_specs(single), single)


def _their_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        reason = missing_checkpoint(source) if not source.exists() else f"{source} has no config.json."
        raise CheckpointError(reason)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}.") from None
    return content


def _check_rules(files: dict[str, Path], config: ModelConfig) -> None:
    family = find_family(config.family)
    unknown = [name for name in files if find_rule(name, family)[0] is None]
    if unknown:
        raise CheckpointError(
            f"{config.name}: {len(unknown)} tensors have no rule in FAMILIES[{config.family!r}]:\n  "
            + safetensors_io.name_some(unknown, most=len(unknown))
        )


def _by_file(files: dict[str, Path]) -> dict[Path, list[str]]:
    grouped: dict[Path, list[str]] = {}
    for name, file in files.items():
        grouped.setdefault(file, []).append(name)
    return grouped


def _cast(tensor: Tensor, dtype: Dtype) -> Tensor:
    return tensor if dtype == "keep" else tensor.to(DTYPES[dtype])
