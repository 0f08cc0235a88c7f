"""Quantised models on disk, so that the next run on the same base neither reads nor quantises its 16-bit weights.

An entry is a folder with all weights as they lie on the device and a manifest with a checksum of each. The checksum is
computed again on the device. The name of an entry is a hash of everything that decides its content. Entries are atomic
and may be deleted at any time; lit_qlora.files.cache_folder deletes the unused ones.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_qlora.checkpoint import safetensors_io
from lit_qlora.checkpoint.checkpoint import content_hash, load_stored, published_scheme
from lit_qlora.checkpoint.streaming import stream
from lit_qlora.errors import CheckpointError, ResourceError
from lit_qlora.files import cache_folder
from lit_qlora.files.atomic import flush, publish, temporary_directory
from lit_qlora.files.manifest import MANIFEST
from lit_qlora.files.reading import read_json
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import QuantizedLinear, Storage
from lit_qlora.report import tell

WEIGHTS = "weights.safetensors"
AT_ONCE = 2**22  # 8-byte words that are multiplied at a time for a checksum


def load(checkpoint_dir: Path, storage: Storage, device: torch.device, setting: str = "auto") -> GPT:
    """checkpoint.load_stored through the cache: read from an entry, or written to one.

    Args:
        setting: of the cache, see cache_folder.directory.
    """
    folder = cache_folder.directory(setting, "quantized")
    if (
        storage.quantization.schemes <= {"none", published_scheme(checkpoint_dir)}
        or folder is None
        or (setting == "auto" and device.type != "cuda")
    ):
        return load_stored(checkpoint_dir, storage, device)
    config = ModelConfig.load(checkpoint_dir)
    entry = folder / key(checkpoint_dir, config, storage)
    cache_folder.use(entry)
    try:
        if model := read(entry, config, storage.dtype, device):
            return model
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        tell(f"{entry} is damaged and will be made again ({error}).")
    model = load_stored(checkpoint_dir, storage, device)
    with suppress(OSError, ResourceError):  # a full or read-only disk is no reason not to train
        size = sum(safetensors_io.count_bytes(tensor) for tensor in contents(model).values())
        folder.mkdir(parents=True, exist_ok=True)
        if setting != "auto" or size < cache_folder.SHARE_OF_DISK * shutil.disk_usage(folder).free:
            write(entry, model)
            cache_folder.prune(folder, entry, MANIFEST)
            tell(f"The quantised weights are cached in {entry} ({size / 1e9:.1f} GB), which may be deleted.")
    return model


def key(checkpoint_dir: Path, config: ModelConfig, storage: Storage) -> str:
    """The name of an entry: a hash of all that its bytes depend on."""
    facts = {
        "format": 1,
        "base": content_hash(checkpoint_dir),
        "config": asdict(config),
        "dtype": str(storage.dtype),
        "quantize": [storage.quantize, storage.quantize_head, *storage.layers],
        "bitsandbytes": version("bitsandbytes"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def contents(model: GPT) -> dict[str, Tensor]:
    """All tensors of a model, a tied head's only once."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write(entry: Path, model: GPT) -> None:
    """Write the entry of a model that load_stored has just returned."""
    tensors = contents(model)
    layers = {path: module.scheme for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    sums = checksums(iter(tensors.values()))
    with temporary_directory(entry) as folder:
        safetensors_io.write(folder / WEIGHTS, tensors, tensors.items())
        manifest = {"quantized": layers, "sums": dict(zip(tensors, sums.tolist(), strict=True))}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        flush(folder / MANIFEST)
        publish(folder, entry)


def read(entry: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> GPT | None:
    """The model in an entry, or None if there is none.

    Raises:
        CheckpointError: if the entry is not as it was written.
    """
    if not (entry / MANIFEST).is_file():
        return None
    manifest = read_json(entry / MANIFEST)
    model = GPT.skeleton(config)
    names = list(manifest["sums"])
    tensors = dict(zip(names, stream(((entry / WEIGHTS, name) for name in names), device), strict=True))
    expected = torch.tensor(list(manifest["sums"].values()))
    if not torch.equal(checksums(iter(tensors.values())).cpu(), expected):
        raise CheckpointError("its checksums differ")
    for path, scheme in manifest["quantized"].items():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        parts = {name: tensors.pop(f"{path}.{name}") for name in QuantizedLinear.PARTS if f"{path}.{name}" in tensors}
        shape = (module.out_features, module.in_features)
        model.set_submodule(path, QuantizedLinear.of(parts, shape, tensors.pop(f"{path}.bias", None), scheme, dtype))
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(tensor))
    if config.tied_head and isinstance(model.head, nn.Linear):
        model.head.weight = model.embed.weight
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError("it lacks weights")
    return model


def checksums(tensors: Iterator[Tensor]) -> Tensor:
    """A sum over each tensor's bytes that depends on their order, (N,) int64, made on the device they lie on."""
    return torch.stack([_checksum(tensor) for tensor in tensors])


def _checksum(tensor: Tensor) -> Tensor:
    data = tensor.contiguous().flatten().view(torch.uint8)
    data = data.clone() if data.storage_offset() % 8 else data  # a slice of a stack may begin anywhere
    words, rest = data[: len(data) // 8 * 8].view(torch.int64), data[len(data) // 8 * 8 :].long()
    odd = 2 * torch.arange(max(8, min(len(words), AT_ONCE)), device=data.device) + 1
    total = (rest * odd[: len(rest)]).sum()
    for part in words.split(AT_ONCE):
        total = 31 * total + (part * odd[: len(part)]).sum()
    return total
