"""Checkpoints on disk: a directory with model_config.json, lit_model.safetensors and a tokenizer.

Weights of more than shards.SHARD_BYTES lie in several files with an index. model_config.json is what makes a
directory a checkpoint: it is written when everything else is complete.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from zlib import crc32

import torch
from torch import Tensor, nn

from lit_qlora.checkpoint import safetensors_io, shards
from lit_qlora.checkpoint.cut import Cut
from lit_qlora.checkpoint.packed import PackedWeights
from lit_qlora.checkpoint.stacks import Stacks
from lit_qlora.checkpoint.streaming import stream
from lit_qlora.errors import CheckpointError
from lit_qlora.files import hashing
from lit_qlora.files.atomic import replace_files, temporary_directory, writing
from lit_qlora.model.config import FILE_NAME as CONFIG
from lit_qlora.model.config import WEIGHT_FILES, ModelConfig, missing_checkpoint
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import CORRECTION
from lit_qlora.quantize import QuantizedLinear, Storage
from lit_qlora.report import tell
from lit_qlora.settings import Scheme
from lit_qlora.sharded import LEAST_BUFFERS, HostEmbedding

WEIGHTS = "lit_model.safetensors"
KEPT = "lit_model.kept.safetensors"
"""Tensors of the published model that ours has no use for, such as encoders of images; an export gives them back."""


def load_model(
    checkpoint_dir: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Scheme = "none",
    quantize_head: bool = False,
    quantize_layers: Mapping[str, Scheme] = MappingProxyType({}),
) -> GPT:
    """The model in `checkpoint_dir`, on `device`.

    Weights come off the disk one layer at a time, and are quantised on `device`. So the host never holds more than one
    layer, and the device never more than the quantised model and one layer.

    Args:
        dtype, quantize, quantize_head, quantize_layers: see Storage.

    Raises:
        CheckpointError: listing the tensors that are missing, unexpected, of the wrong shape, or not finite.
    """
    storage = Storage(dtype, quantize, quantize_head, tuple(quantize_layers.items()))
    return load_stored(Path(checkpoint_dir), storage, torch.device(device))


def load_stored(
    directory: Path,
    storage: Storage,
    device: torch.device,
    sharded: bool = False,
    embedding_on_host: bool = False,
    buffers: int = LEAST_BUFFERS,
) -> GPT:
    """load_model, whose settings for the weights are one value.

    Args:
        sharded: each process holds a share of the blocks' weights, see lit_qlora.sharded; all call this together.
        embedding_on_host: with `sharded`, the embedding lies in the host's memory.
        buffers: with `sharded`, blocks that are in memory at a time.
    """
    config = ModelConfig.load(directory)
    weights = open_weights(directory)
    check_weights(weights.specs, config, location=str(weights.location))
    model = GPT.skeleton(config)
    storage.check_layers(model)
    sums: dict[str, Tensor] = {}

    def summed(name: str, tensor: Tensor) -> Tensor:
        # Read in the end: on a GPU each read waits. Another dtype would copy the tensor.
        sums[name] = tensor.sum(dtype=torch.float32)
        return tensor

    kept = isinstance(weights, PackedWeights) and weights.scheme in storage.quantization.schemes
    packed = weights if isinstance(weights, PackedWeights) and kept else None
    if isinstance(weights, PackedWeights) and packed is None:
        anew = "" if storage.plain else f", and quantised anew as {storage.quantization.describe()}"
        tell(
            f"{directory} holds weights as they were published, in {weights.scheme}. They become 16-bit ones{anew}.\n"
            f"--quantize {weights.scheme} takes them as they are."
        )
    cut = Cut(model, storage, device, embedding_on_host, buffers) if sharded else None
    names = _names(model, packed, storage, cut)
    tensors = _stream(weights, names, device)
    _fill(model, map(summed, names, tensors), storage, packed, cut)
    next(tensors, None)  # lets it end
    if cut is None:
        _check_finite(sums, weights)
    else:
        cut.together(lambda: _check_finite(sums, weights))
    return model


def random_model(
    config: ModelConfig,
    storage: Storage,
    device: torch.device,
    sharded: bool = False,
    embedding_on_host: bool = False,
    buffers: int = LEAST_BUFFERS,
) -> GPT:
    """A model like one of load_stored, with random weights, which are as fast and as large as any.

    They depend on their names alone, so that several processes that share them make those of one.
    """
    model = GPT.skeleton(config)
    cut = Cut(model, storage, device, embedding_on_host, buffers) if sharded else None
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    generator = torch.Generator(device)

    def tensor(name: str) -> Tensor:
        made = torch.empty(shapes[name], dtype=storage.dtype, device=device)
        if made.ndim == 1:  # a norm, not a matrix
            return made.fill_(1)
        return made.normal_(std=0.02, generator=generator.manual_seed(crc32(name.encode())))

    _fill(model, map(tensor, _names(model, cut=cut)), storage, cut=cut)
    return model


def _fill(
    model: GPT,
    tensors: Iterator[Tensor],
    storage: Storage,
    packed: PackedWeights | None = None,
    cut: Cut | None = None,
) -> None:
    """Give a model on the meta device its weights, which come in the order of _names(model, packed, storage, cut)."""
    stacks = Stacks(model.config)
    for path, module in list(model.named_modules()):
        own = {}
        if cut is not None and cut.takes(path):
            cut.place(path, *_cut_layer(path, module, tensors, storage, packed, cut))
            continue
        if _is_kept(path, packed, storage):
            assert packed is not None
            parts = {name: next(tensors) for name in packed.parts(path)}
            bias = next(tensors).to(storage.dtype) if isinstance(module.bias, nn.Parameter) else None
            kept = packed.make(parts, bias, storage.dtype)
            del parts
            stacks.place(path, kept)
            model.set_submodule(path, kept)
            continue
        for name in _own_names(path, module, model):
            key = name.rpartition(".")[2]
            own[key] = next(tensors).to(torch.float32 if name.endswith(CORRECTION) else storage.dtype)
        tied = module is model.head and model.config.tied_head
        if type(module) is nn.Linear and storage.quantizes(path):
            weight = model.embed.weight.data if tied else own.pop("weight")
            layer = QuantizedLinear(weight, own.get("bias"), storage.scheme(path))
            del weight
            stacks.place(path, layer)
            model.set_submodule(path, layer)
            continue
        if module is model.embed and cut is not None and cut.embedding_on_host:
            model.embed = HostEmbedding(own.pop("weight"))  # type: ignore[assignment]
            continue
        for key, tensor in own.items():
            setattr(module, key, nn.Parameter(tensor))
        if type(module) is nn.Linear:
            stacks.place(path, module)
        if tied:
            model.head.weight = model.embed.weight  # filled before: the embedding is the first module
    if cut is not None:
        cut.finish()


def _cut_layer(
    path: str,
    module: nn.Module,
    tensors: Iterator[Tensor],
    storage: Storage,
    packed: PackedWeights | None,
    cut: Cut,
) -> tuple[QuantizedLinear | None, Tensor | None]:
    """A layer whose weight lies in a slab, None if another process reads it; and its bias."""
    assert isinstance(module, nn.Linear)
    layer: QuantizedLinear | None = None
    if not cut.skips(path):
        if _is_kept(path, packed, storage):
            assert packed is not None
            layer = packed.make({name: next(tensors) for name in packed.parts(path)}, None, storage.dtype)
        else:
            weight = next(tensors).to(storage.dtype)
            scheme = storage.scheme(path)
            shape = (module.out_features, module.in_features)
            layer = (
                QuantizedLinear.of({"packed": weight}, shape, None, scheme, storage.dtype)
                if scheme == "none"
                else QuantizedLinear(weight, None, scheme)
            )
    return layer, None if module.bias is None else next(tensors).to(storage.dtype)


def _check_finite(sums: Mapping[str, Tensor], weights: shards.Weights) -> None:
    """Raise CheckpointError, with the tensors and how many of their elements are meant, if a sum is NaN or infinite."""
    finite = torch.stack(list(sums.values())).isfinite().tolist()
    suspects = [name for name, good in zip(sums, finite, strict=True) if not good]
    found = {name: int((~weights.read(name).isfinite()).sum()) for name in suspects}  # a sum can overflow by itself
    if counts := [f"{name}: {count:,}" for name, count in found.items() if count]:
        raise CheckpointError(
            f"{weights.location} holds elements that are NaN or infinite:\n  {safetensors_io.name_some(counts)}\n"
            "Get the checkpoint again; a training on it would only spread them."
        )


def _names(
    model: GPT, packed: PackedWeights | None = None, storage: Storage | None = None, cut: Cut | None = None
) -> list[str]:
    """The tensors of a checkpoint in the order of the model's modules, of a packed layer its parts.

    With `cut`, only what this process reads.
    """
    names = []
    for path, module in model.named_modules():
        own = _own_names(path, module, model)
        if cut is not None and cut.skips(path):
            own = [name for name in own if not name.endswith(".weight")]
        elif storage is not None and _is_kept(path, packed, storage):
            assert packed is not None
            own = packed.parts(path) + [name for name in own if not name.endswith(".weight")]
        names += own
    return names


def _is_kept(path: str, packed: PackedWeights | None, storage: Storage) -> bool:
    """True if the layer at `path` is packed in the files, and taken as it is."""
    return packed is not None and packed.keeps(path) and storage.scheme(path) == packed.scheme


def _own_names(path: str, module: nn.Module, model: GPT) -> list[str]:
    """The tensors that a module has of its own, in a checkpoint."""
    tied = module is model.head and model.config.tied_head
    return [f"{path}.{key}" for key, _ in module.named_parameters(recurse=False) if not (tied and key == "weight")]


def _stream(weights: shards.Weights, names: list[str], device: torch.device) -> Iterator[Tensor]:
    """The tensors in this order, on `device`."""
    if device.type == "cuda" and not (isinstance(weights, PackedWeights) and weights.unpacks(names)):
        return stream(((weights.files[name], name) for name in names), device)
    return (weights.read(name).to(device) for name in names)


def open_weights(directory: Path) -> shards.Weights:
    """The weights of a checkpoint, in one file or several; only the headers are read.

    Raises:
        CheckpointError: if there are none, or they are damaged.
    """
    location = shards.find(directory, WEIGHTS)
    if not location:
        raise CheckpointError(missing_weights(directory))
    return PackedWeights.of(shards.open_weights(location))


def published_scheme(directory: Path) -> Scheme:
    """The storage that a checkpoint holds weights in as they were published, "none" for 16 bits."""
    weights = open_weights(directory)
    return weights.scheme if isinstance(weights, PackedWeights) else "none"


def missing_weights(directory: Path) -> str:
    """A message: why there are no weights in `directory`, and the remedy."""
    if not (directory / CONFIG).is_file():
        return missing_checkpoint(directory)
    return f"{directory} has no {WEIGHTS}. Convert it again: scripts/convert_hf_checkpoint.py writes it."


def check_weights(specs: Mapping[str, Tensor], config: ModelConfig, location: str) -> None:
    """Raise CheckpointError unless `specs` are exactly the tensors of this model, naming all that are not."""
    expected = dict(GPT.skeleton(config).named_parameters())
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
            f"{location} does not hold the weights that its configuration describes:\n  "
            + safetensors_io.name_some(complaints)
        )


def save_weights(
    directory: Path,
    config: ModelConfig,
    specs: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    limit: int = shards.SHARD_BYTES,
    also: Iterable[Path] = (),
    kept: tuple[Mapping[str, Tensor], Iterable[tuple[str, Tensor]]] = ({}, ()),
) -> str:
    """Make `directory` the checkpoint of these weights, whole or not at all, whatever stops the program.

    The weights are written to a temporary directory inside it. When they are complete, the configuration of an earlier
    checkpoint is removed first and the new one comes last. So old and new files are never mixed.

    Args:
        tensors: the tensors of `specs`, in their order.
        limit: most bytes of weights in a file.
        also: other files that the checkpoint gets a copy of.
        kept: specs and tensors of the file KEPT.

    Returns:
        content_hash of the weights.

    Raises:
        ResourceError: if the disk is full or may not be written.
    """
    with writing(directory), temporary_directory(directory / "weights") as staged:
        hashes = shards.write(staged, WEIGHTS, specs, tensors, limit)
        if kept[0]:
            shards.write(staged, KEPT, *kept, limit=sys.maxsize)
        for path in also:
            shutil.copyfile(path, staged / path.name)
        config.save(staged)
        replace_files(staged, directory, CONFIG, WEIGHT_FILES)
        hashing.remember(directory, hashes)
    return hashing.combine(hashes)


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied head counted once; known without loading anything."""
    return sum(p.numel() for p in GPT.skeleton(config).parameters())


def content_hash(checkpoint_dir: Path) -> str:
    """sha256 of the weights.

    For one file its own hash, for several the output of `sha256sum lit_model-*.safetensors | sha256sum`.
    It is remembered beside the weights, see lit_qlora.files.hashing.

    Raises:
        CheckpointError: if there are no weights, or a file of theirs is absent.
    """
    return hashing.combine(hashing.hash_files(open_weights(checkpoint_dir).paths))
