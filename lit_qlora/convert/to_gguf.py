"""A checkpoint into one GGUF file, for llama.cpp and what is built on it, a tensor at a time.

What llama.cpp computes with the file is what model.py computes; a model it would compute otherwise is refused by name.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_qlora.checkpoint import checkpoint
from lit_qlora.convert.ending import read_ending
from lit_qlora.convert.gguf_vocabulary import read_vocabulary
from lit_qlora.convert.modelfile import modelfile
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files import atomic
from lit_qlora.files.atomic import flush
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.rope import scaled_frequency

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

MODELFILE = ".Modelfile"
"""How the name of the file for Ollama ends."""
Kind = Literal["f16", "q8_0", "bf16", "f32"]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Our families -> what llama.cpp calls them. Its llama pairs neighbouring features in RoPE, its qwen2 as we do."""
UNDERSTOOD = {
    *(
        "name",
        "family",
        "n_layer",
        "n_embd",
        "n_head",
        "n_kv_head",
        "head_size",
        "ffn_size",
        "vocab_size",
        "block_size",
    ),
    *("norm_eps", "qkv_bias", "projection_bias", "mlp_bias", "sliding_window", "rope_theta", "tied_head"),
    *("rope_scaling", "rope_factor", "rope_original_block_size", "rope_low_freq_factor", "rope_high_freq_factor"),
}
"""Fields of ModelConfig that can have any value; the others must have their default."""
NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "norm_1": "attn_norm",
    "attn.query": "attn_q",
    "attn.key": "attn_k",
    "attn.value": "attn_v",
    "attn.projection": "attn_output",
    "norm_2": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def export_gguf(checkpoint_dir: Path, out_file: Path, kind: Kind = "q8_0") -> ModelConfig:
    """Write the GGUF file of a checkpoint, atomically, and a Modelfile for Ollama beside it.

    Host memory holds a tensor in float32 and as it is written.

    Args:
        kind: storage of the matrices; vectors are float32. q8_0 has blocks of 32 bytes that share a float16 scale.

    Raises:
        CheckpointError: if the checkpoint is damaged, or is none that llama.cpp computes as we do.
        UsageError: if `out_file` exists, or the gguf package is not installed.
        ResourceError: if the disk is full or may not be written.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UsageError('GGUF files need the gguf package: pip install "lit_qlora[gguf]"') from None
    beside = out_file.with_suffix(MODELFILE)
    for path in (out_file, beside):
        if path.exists():
            raise UsageError(f"{path} exists. Give --out_file a new name, or remove it.")
    config = ModelConfig.load(checkpoint_dir)
    weights = checkpoint.open_weights(checkpoint_dir)
    checkpoint.check_weights(weights.specs, config, location=str(weights.location))
    check_supported(config)
    ending = read_ending(checkpoint_dir)
    if ending is None:
        raise CheckpointError(f"{checkpoint_dir} has no tokenizer, which a GGUF file holds.")
    vocabulary = read_vocabulary(checkpoint_dir, ending, config.vocab_size)

    with atomic.writing(out_file), atomic.replacing(out_file) as staged:
        writer = GGUFWriter(staged, ARCHITECTURES[config.family])
        try:
            _write_settings(writer, config, kind)
            vocabulary.write(writer)
            factors = _rope_factors(config)
            for name, spec in weights.specs.items():
                _announce(writer, gguf_name(name), spec, _storage(spec, kind))
            if factors is not None:
                _announce(writer, "rope_freqs.weight", factors, _storage(factors, kind))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, spec in weights.specs.items():
                _write(writer, name, _ordered(name, weights.read(name), config), _storage(spec, kind))
            if factors is not None:
                _write(writer, "rope_freqs.weight", factors, _storage(factors, kind))
        finally:
            writer.close()
        context = read_context(config)
        (staged / beside.name).write_text(modelfile(out_file.name, ending, checkpoint_dir, context), encoding="utf-8")
        for path in (beside, out_file):
            flush(staged / path.name)
            (staged / path.name).rename(path)
        flush(out_file.parent)
    return config


def check_supported(config: ModelConfig) -> None:
    """Raise CheckpointError for a model that llama.cpp would compute otherwise, naming what it is."""
    if config.family not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF is written for the families {', '.join(ARCHITECTURES)}; {config.name} is a {config.family}."
        )
    other = [
        f"{field.name} {getattr(config, field.name)!r}"
        for field in fields(config)
        if field.name not in UNDERSTOOD and getattr(config, field.name) != field.default
    ]
    if config.rope_scaling not in ("none", "linear", "llama3"):
        other.append(f"rope_scaling {config.rope_scaling!r}")
    if config.sliding_window is not None and config.family == "qwen2":
        other.append("sliding_window")
    if other:
        raise CheckpointError(f"{config.name} cannot be written as GGUF: it has {', '.join(other)}.")


def read_context(config: ModelConfig) -> int:
    """Most tokens that llama.cpp can read: it gives these models no window; within it, full attention is the same."""
    return min(config.block_size, config.sliding_window or config.block_size)


def gguf_name(name: str) -> str:
    """What llama.cpp calls one of our tensors."""
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert found, name
    return f"blk.{found[1]}.{NAMES[found[2]]}.{found[3]}" if found[1] else f"{NAMES[found[2]]}.{found[3]}"


def _write_settings(writer: "GGUFWriter", config: ModelConfig, kind: Kind) -> None:
    import gguf

    files = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(config.name)
    writer.add_file_type(files[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(read_context(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def _rope_factors(config: ModelConfig) -> Tensor | None:
    """(R/2,) float32: what llama3 scaling multiplies each wavelength by, which llama.cpp reads as a tensor."""
    if config.rope_scaling != "llama3":
        return None
    exponent = torch.arange(0, config.rotated, 2).float() / config.rotated
    return 1.0 / config.rope_theta**exponent / scaled_frequency(config, exponent, torch.ones(1, 1, 1, 1))


def _ordered(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A tensor with the rows of each head in llama.cpp's order: feature i beside feature i + half."""
    heads = {"attn.query": config.n_head, "attn.key": config.n_kv_head}
    layer = ".".join(name.split(".")[2:4])
    if ARCHITECTURES[config.family] != "llama" or layer not in heads:
        return tensor
    return tensor.unflatten(0, (heads[layer], 2, -1)).transpose(1, 2).flatten(0, 2)


def _storage(spec: Tensor, kind: Kind) -> "GGMLQuantizationType":
    """How a tensor is stored: vectors in float32, rows that are no multiple of q8_0's blocks in float16."""
    from gguf import GGMLQuantizationType

    if spec.ndim == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and spec.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind.upper()]


def _announce(writer: "GGUFWriter", name: str, spec: Tensor, storage: "GGMLQuantizationType") -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    block, size = GGML_QUANT_SIZES[storage]
    plain: dict[Any, Any] = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    shape = tuple(spec.shape) if storage in plain else quant_shape_to_byte_shape(tuple(spec.shape), storage)
    dtype = np.dtype(plain.get(storage, np.uint8))
    writer.add_tensor_info(name, shape, dtype, spec.numel() // block * size, raw_dtype=storage)


def _write(writer: "GGUFWriter", name: str, tensor: Tensor, storage: "GGMLQuantizationType") -> None:
    from gguf.quants import quantize

    array = tensor.float().contiguous().numpy()
    largest = float(tensor.abs().max())
    if storage.name in ("F16", "Q8_0") and not largest < 65_504 * (127 if storage.name == "Q8_0" else 1):
        raise CheckpointError(
            f"{name} has values up to {largest:g}, which {storage.name.lower()} cannot hold. Use bf16."
        )
    writer.write_tensor_data(quantize(array, storage))
