"""Make models of published shapes with random weights; neither speed nor memory depends on the weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import ROOT

if TYPE_CHECKING:
    from torch import Tensor

    from lit_qlora.model.config import ModelConfig
    from lit_qlora.model.gpt import GPT
    from lit_qlora.settings import Scheme

TOKENIZER = ROOT / "checkpoints/lit-qlora/tiny-world/tokenizer.model"
LLAMA: dict[str, Any] = {"norm_eps": 1e-5, "block_size": 8192, "vocab_size": 32000}


def _llama(layers: int, width: int, heads: int, ffn: int, kv_heads: int = 0, **more: Any) -> dict[str, Any]:
    """Fields of ModelConfig of a llama; without `kv_heads` each head has keys of its own."""
    heads_of = {"n_head": heads, "n_kv_head": kv_heads or heads, "head_size": width // heads}
    return LLAMA | {"n_layer": layers, "n_embd": width, "ffn_size": ffn} | heads_of | more


LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500_000.0}
QWEN3_MOE = {
    "n_layer": 6,
    "n_embd": 2048,
    "n_head": 32,
    "n_kv_head": 4,
    "head_size": 128,
    "ffn_size": 6144,
    "vocab_size": 151936,
    "block_size": 8192,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qk_norm": "head",
    "n_expert": 128,
    "n_expert_per_token": 8,
    "expert_size": 768,
    "router_normalized": True,
}
GPT_OSS = {
    "n_layer": 4,
    "n_embd": 2880,
    "n_head": 64,
    "n_kv_head": 8,
    "head_size": 64,
    "ffn_size": 2880,
    "vocab_size": 201088,
    "block_size": 8192,
    "qkv_bias": True,
    "projection_bias": True,
    "mlp_bias": True,
    "attention_sinks": True,
    "sliding_window": 128,
    "full_attention_layers": (1, 3),
    "rope_theta": 150_000.0,
    "rope_scaling": "yarn",
    "rope_factor": 32.0,
    "rope_original_block_size": 4096,
    "rope_truncate": False,
    "rope_attention_factor": 1.3465735902799727,
    "ffn": "swiglu_clamped",
    "n_expert": 32,
    "n_expert_per_token": 4,
    "expert_size": 2880,
    "router": "softmax_chosen",
    "router_bias": True,
}
MIXTRAL = {"n_expert": 8, "n_expert_per_token": 2, "expert_size": 14336, "router_normalized": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(32, 4096, 32, 11008),
    "llama-2-13b": _llama(40, 5120, 40, 13824),
    "llama-1-33b": _llama(60, 6656, 52, 17920),
    "llama-1-65b": _llama(80, 8192, 64, 22016),
    "llama-2-70b": _llama(80, 8192, 64, 28672, kv_heads=8),
    "llama-3-8b": _llama(32, 4096, 32, 14336, kv_heads=8, **LLAMA_3),
    "llama-3.2-1b": _llama(16, 2048, 32, 8192, kv_heads=8, tied_head=True, **LLAMA_3),
    "tinyllama-1b": _llama(22, 2048, 32, 5632, kv_heads=4),
    "qwen3-30b-a3b": QWEN3_MOE | {"n_layer": 48},
    "qwen3-30b-a3b-6-blocks": QWEN3_MOE,
    "gpt-oss-20b-4-blocks": GPT_OSS,
    "mixtral-8x7b-4-blocks": _llama(4, 4096, 32, 14336, kv_heads=8, rope_theta=1e6, **MIXTRAL),
    # As its peers publish it: microsoft/phi-4 has one matrix for queries, keys and values, of which they train nothing.
    "phi-4-6-blocks": _llama(6, 5120, 40, 17_920, kv_heads=10, vocab_size=100_352, rope_theta=250_000.0),
    "llama-100m": _llama(12, 768, 12, 2048),
    "tiny": _llama(2, 128, 4, 256, kv_heads=2, vocab_size=2048),
}
"""All take rows of 8,192 tokens, which is more than some of the published models were trained with; where a name
says so, some of the blocks stand for all."""


DELTA_NETS = {
    "head_dim": 256,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": 262_144,
}


def language_models() -> dict[str, dict[str, Any]]:
    """config.json of the language models of published wrappers, beside published_shapes: sizes of their model cards."""
    from lit_qlora.convert import published_shapes as published

    return {
        "Qwen/Qwen3.5-4B": published.config_json("qwen3_5_text", 32, 2560, 16, 4, 9216, 248_320, **DELTA_NETS),
        "google/gemma-4-26B-A4B": published.SHAPES["google/gemma-4-26B-A4B-it"],
        "google/gemma-4-31B": published.SHAPES["google/gemma-4-31B-it"],
    }


def published_config(shape: str) -> dict[str, Any]:
    """The config.json of a published model: "Qwen/Qwen3-8B", or "Qwen/Qwen3-8B@12" for as much as its first 12 blocks.

    Raises:
        KeyError: if no such model is known.
    """
    from lit_qlora.convert import published_shapes

    name, _, blocks = shape.partition("@")
    content = (published_shapes.SHAPES | language_models())[name]
    return content | {"num_hidden_layers": int(blocks)} if blocks else content


def model_config(shape: str) -> "ModelConfig":
    """The configuration of a name of SHAPES, or of a published model (see published_config)."""
    from lit_qlora.convert.families import read_config
    from lit_qlora.model.config import ModelConfig

    name = f"random/{shape}"
    return ModelConfig(name=name, **SHAPES[shape]) if shape in SHAPES else read_config(published_config(shape), name)


def random_model(shape: str, scheme: "Scheme", length: int = 0) -> "GPT":
    """Make a bf16 model of `shape` on the GPU if there is one, quantised layer by layer except for its head.

    Args:
        length: tokens that it must be able to read, which may be more than the published model can.
    """
    from dataclasses import replace

    import torch

    from lit_qlora.checkpoint import checkpoint
    from lit_qlora.device import pick_device
    from lit_qlora.quantize import Storage

    config, storage = model_config(shape), Storage(torch.bfloat16, scheme)
    config = replace(config, block_size=max(config.block_size, length))
    return checkpoint.random_model(config, storage, pick_device()).requires_grad_(False)


def make_checkpoint(shape: str, directory: Path) -> None:
    """Write a random bf16 checkpoint of `shape`, a tensor at a time, unless it is there already."""
    import torch

    from lit_qlora.checkpoint.checkpoint import save_weights
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.model.gpt import GPT

    if (directory / "model_config.json").is_file():
        return
    config = ModelConfig(name=f"random/{shape}", **SHAPES[shape])
    specs = {name: p.to(torch.bfloat16) for name, p in GPT.skeleton(config).named_parameters()}

    def tensors() -> Iterator[tuple[str, "Tensor"]]:
        for name, spec in specs.items():
            yield name, _random(spec)

    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER, directory / "tokenizer.model")
    save_weights(directory, config, specs, tensors())


def make_hf_checkpoint(shape: str, folder: Path) -> None:
    """Write the same as a Hugging Face folder, with a tokenizer of single characters, unless it is there already."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lit_qlora.checkpoint import shards
    from lit_qlora.convert.families import their_tensors
    from lit_qlora.convert.to_hugging_face import their_config
    from lit_qlora.model.gpt import GPT

    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.part")  # a folder that has its own name is complete
    part.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    ours = {name: p.to(torch.bfloat16) for name, p in GPT.skeleton(config).named_parameters()}
    specs = {theirs.name: theirs.join(ours, config) for theirs in their_tensors(ours, config)}
    shards.write(part, "model.safetensors", specs, ((name, _random(spec)) for name, spec in specs.items()))
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(part / "tokenizer.json"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    (part / "tokenizer_config.json").write_text(json.dumps(kind | named, indent=2))
    if shape not in SHAPES:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

        content = published_config(shape)
        (part / "config.json").write_text(json.dumps(content | {"architectures": [CLASSES[content["model_type"]]]}))
    content = their_config(part, config, ours) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    (part / "config.json").write_text(json.dumps(content, indent=2))
    part.rename(folder)


def _random(spec: "Tensor") -> "Tensor":
    """Make a bf16 tensor of this shape: ones for a norm, else small random values."""
    import torch

    from lit_qlora.device import pick_device

    made = torch.ones(spec.shape) if spec.ndim == 1 else 0.02 * torch.randn(spec.shape, device=pick_device())
    return made.to(torch.bfloat16)
