"""Checkpoints on disk: a directory with model_config.json, lit_model.safetensors and a tokenizer."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora import safetensors_io
from lit_qlora.config import FILE_NAME as CONFIG
from lit_qlora.config import ModelConfig, missing_checkpoint
from lit_qlora.errors import CheckpointError, ResourceError
from lit_qlora.model import GPT
from lit_qlora.quantize import QuantizedLinear, is_quantized
from lit_qlora.settings import Scheme

WEIGHTS = "lit_model.safetensors"
MANIFEST = "manifest.json"
_HASHES = ".sha256.json"


def load_model(
    checkpoint_dir: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Scheme = "none",
    quantize_head: bool = False,
) -> GPT:
    """The model in `checkpoint_dir`, on `device`.

    Weights come off the disk one layer at a time, and are quantised on `device`, so host memory never holds more than
    one of them and the device never more than the quantised model and one layer.

    Args:
        dtype: of the weights, and what quantised weights are quantised from and read back in.

    Raises:
        CheckpointError: listing the tensors that are missing, unexpected, or of the wrong shape.
    """
    directory = Path(checkpoint_dir)
    config = ModelConfig.load(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        raise CheckpointError(missing_weights(directory))
    check_weights(safetensors_io.read_specs(path), config, place=str(path))
    with torch.device("meta"):
        model = GPT(config)

    def read(name: str) -> Tensor:
        return safetensors_io.read_tensor(path, name).to(device=device, dtype=dtype)

    for module_path, module in list(model.named_modules()):
        names = [f"{module_path}.{key}" for key, _ in module.named_parameters(recurse=False)]
        if module is model.head and config.tied_head:
            names = []
            model.head.weight = model.embed.weight  # loaded before: the embedding is the first module
        if type(module) is nn.Linear and is_quantized(module_path, quantize, quantize_head):
            weight = model.embed.weight.data if not names else read(names[0])
            bias = read(f"{module_path}.bias") if module.bias is not None else None
            model.set_submodule(module_path, QuantizedLinear(weight, bias, quantize))
        else:
            for name in names:
                setattr(module, name.rpartition(".")[2], nn.Parameter(read(name)))
    return model


def missing_weights(directory: Path) -> str:
    """Why there are no weights in `directory`, and what to do about it."""
    if not (directory / CONFIG).is_file():
        return missing_checkpoint(directory)
    return f"{directory} has no {WEIGHTS}. Convert it again: scripts/convert_hf_checkpoint.py writes it."


def check_weights(specs: Mapping[str, Tensor], config: ModelConfig, place: str) -> None:
    """Raise CheckpointError unless `specs` are exactly the tensors of this model, naming all that are not."""
    with torch.device("meta"):
        expected = dict(GPT(config).named_parameters())
    complaints = [
        f"{name} is missing" for name in expected if name not in specs
    ] + [
        f"{name} is not part of this model" for name in specs if name not in expected
    ] + [
        f"{name} has shape {tuple(specs[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in specs and specs[name].shape != expected[name].shape
    ] + [
        f"{name} is of type {specs[name].dtype}, which is no weight"
        for name in expected
        if name in specs and not specs[name].dtype.is_floating_point
    ]  # fmt: skip
    if complaints:
        raise CheckpointError(
            f"{place} does not hold the weights that its configuration describes:\n  "
            + safetensors_io.name_some(complaints)
        )


def save_weights(
    directory: Path, config: ModelConfig, specs: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]
) -> str:
    """Write the weights as they come and then the configuration; returns the sha256 of the weights."""
    digest = safetensors_io.write(directory / WEIGHTS, specs, tensors)
    config.save(directory)
    _remember_hash(directory / WEIGHTS, digest)
    return digest


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied head counted once; known without loading anything."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def content_hash(checkpoint_dir: Path) -> str:
    """sha256 of the weights: what an adapter remembers of its base.

    Hashing runs at about 2 GB/s, so the result is kept beside the weights for as long as their size and time stand.
    """
    path = checkpoint_dir / WEIGHTS
    if not path.is_file():
        raise CheckpointError(missing_weights(checkpoint_dir))
    stat = path.stat()
    kept = checkpoint_dir / _HASHES
    try:
        known = json.loads(kept.read_text())
        if (known["bytes"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        known = None  # not kept yet, or unreadable: hash again
    digest = hash_file(path)
    _remember_hash(path, digest)
    return digest


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember_hash(path: Path, digest: str) -> None:
    stat = path.stat()
    record = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
    try:
        (path.parent / _HASHES).write_text(json.dumps(record) + "\n")
    except OSError:
        return  # a read-only checkpoint is hashed each time


def save_directory(final: Path, write: Mapping[str, Callable[[Path], Any]], facts: Mapping[str, Any]) -> None:
    """Write a directory that is either complete or absent, whatever stops the program.

    Files go to a temporary directory beside `final`, each is flushed to the disk, manifest.json (bytes and sha256 of
    each, and `facts`) comes last, and then the directory gets its name.

    Args:
        write: file name -> a function that writes it to the path it is given.

    Raises:
        ResourceError: if the disk is full or may not be written; `final` is then as it was.
    """
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for name, write_to in write.items():
            path = temporary / name
            write_to(path)
            _flush(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({"format": 1, "files": files, **facts}, indent=2) + "\n")
        _flush(manifest)
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(final.parent)
    except OSError as error:
        raise ResourceError(
            f"Cannot save {final}: {error.strerror or error}.\nWhat was saved before is untouched."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """What save_directory wrote, after checking every file against it; None where there is no manifest.

    Raises:
        CheckpointError: naming the first file that is absent or differs.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        files = manifest["files"].items()
    except (ValueError, KeyError, AttributeError):
        raise CheckpointError(f"{path} is damaged.") from None
    for name, known in files:
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{directory} is incomplete: {name} is absent.")
        if file.stat().st_size != known["bytes"] or hash_file(file) != known["sha256"]:
            raise CheckpointError(f"{file} is damaged: it is not the file that was saved (sha256 differs).")
    return manifest


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
