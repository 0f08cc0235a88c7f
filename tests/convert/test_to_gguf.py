"""A GGUF file, read back, holds the model tensor by tensor, in the order that llama.cpp computes with."""

import dataclasses
import hashlib
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.ending import read_ending
from lit_qlora.convert.families import FAMILIES
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.gguf_architectures import ARCHITECTURES, OTHERWISE, check_supported, graph_of
from lit_qlora.convert.gguf_vocabulary import (
    BYTE,
    CASED,
    CONTROL,
    LOOSE,
    SPLITS,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    differences,
    read_vocabulary,
)
from lit_qlora.convert.to_gguf import Kind, export_gguf, plan_tensors, read_context, rope_difference
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.prompts.tokenizer import Tokenizer
from tests.conftest import ROOT, load_script, tiny_model, write_checkpoint, write_tokenizer
from tests.prompts.test_style import write_chatty_tokenizer
from tests.prompts.test_tokenizer import byte_level, metaspace, write_json
from tests.prompts.test_tokenizer_parity import CHAINS, of_chain
from tests.reference import CASES, DELTA, DELTA_EXPERTS, GEMMA4, GEMMA4_E, hugging_face_model, longrope

gguf = pytest.importorskip("gguf")
DELTA = {**DELTA, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))
WINDOWS = {"num_hidden_layers": 6, "sliding_window": 8}
AS_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2 as published": (
        "gemma2",
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            **WINDOWS,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3 as published": (
        "gemma3_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            **WINDOWS,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "olmo as published": ("olmo", {"clip_qkv": 2.0}),
    "olmo2 as published": ("olmo2", {"num_key_value_heads": 2}),
    "olmo2, tied": ("olmo2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "olmo3 without scaling": ("olmo3", {"num_key_value_heads": 2, **WINDOWS, "num_hidden_layers": 4}),
    "llama with longrope": (
        "llama",
        {
            "max_position_embeddings": 1024,
            "rope_parameters": {**longrope(8), "original_max_position_embeddings": 256, "factor": 4.0},
        },
    ),
    "phi3 with longrope": (
        "phi3",
        {
            **CASES["phi3-longrope"][1],
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                **CASES["phi3-longrope"][1]["rope_parameters"],
                "original_max_position_embeddings": 256,
                "factor": 4.0,
            },
        },
    ),
    "arcee as published": ("arcee", {"num_key_value_heads": 2}),
    "nemotron as published": ("nemotron", {"num_key_value_heads": 2}),
    "olmoe as published": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe as published": ("qwen2_moe", {**CASES["qwen2_moe"][1], "norm_topk_prob": False}),
    "dots1 as published": ("dots1", {**CASES["dots1"][1], "sliding_window": None, "num_key_value_heads": 4}),
    "exaone_moe as published": (
        "exaone_moe",
        {**CASES["exaone_moe"][1], "n_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 4},
    ),
    "gpt_oss without scaling": (
        "gpt_oss",
        {**CASES["gpt_oss"][1], "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    ),
    "gpt_oss as published": (
        "gpt_oss",
        {
            **CASES["gpt_oss"][1],
            "head_dim": 64,
            "rope_parameters": CASES["gpt_oss"][1]["rope_parameters"]
            | {"factor": 32.0, "original_max_position_embeddings": 4096},
        },
    ),
    "deepseek_v2 as published": (
        "deepseek_v2",
        {
            **CASES["deepseek_v2"][1],
            "q_lora_rank": 40,
            "attention_bias": False,
            "rope_parameters": CASES["deepseek_v2"][1]["rope_parameters"] | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v2 lite": (
        "deepseek_v2",
        {
            **CASES["deepseek_v2"][1],
            "num_hidden_layers": 27,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "glm as published": ("glm", {"num_key_value_heads": 2, "head_dim": 16}),
    "llama4 as published": (
        "llama4_text",
        {
            **CASES["llama4"][1],
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8192,
            "floor_scale": 8192,
        },
    ),
    "qwen3_5 as published": ("qwen3_5_text", {**DELTA, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "qwen3_5_moe as published": ("qwen3_5_moe_text", {**DELTA, **DELTA_EXPERTS, "num_hidden_layers": 4}),
    "qwen3_next as published": ("qwen3_next", {**DELTA, **DELTA_EXPERTS, "num_hidden_layers": 4}),
    "gemma4-E as published": ("gemma4_text", {**GEMMA4, **GEMMA4_E, "num_kv_shared_layers": 2}),
    "granitemoehybrid-experts as published": (
        "granitemoehybrid",
        {**CASES["granitemoehybrid-experts"][1], "mamba_conv_bias": True},
    ),
    "ministral3 as published": ("ministral3", {**CASES["ministral3"][1], "sliding_window": None}),
    "lfm2_moe as published": ("lfm2_moe", {**CASES["lfm2_moe"][1], "routed_scaling_factor": 1.0}),
    "minicpm3 as published": (
        "minicpm3",
        {
            **CASES["minicpm3"][1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
        },
    ),
    "youtu as published": (
        "youtu",
        {
            **CASES["youtu"][1],
            "attention_bias": False,
            "rope_parameters": CASES["youtu"][1]["rope_parameters"] | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "seed_oss as published": ("seed_oss", {"num_key_value_heads": 2, "head_dim": 32, "attention_out_bias": False}),
}
"""Cases of their own for families whose case in tests/reference.py uses what no published model has."""
WRITTEN = [*AS_PUBLISHED, *(case for case, (family, _) in CASES.items() if family in ARCHITECTURES)]
REFUSED = {
    *("qwen2_moe", "qwen2_moe-windows", "olmoe", "dots1", "exaone_moe", "ernie4_5_moe-interval", "deepseek_v2"),
    *("deepseek_v2-groups", "deepseek_v3-halves", "arcee", "nemotron", "internlm3", "granitemoehybrid-nope"),
    *("llama-dynamic-rope", "llama-yarn-settings", "llama-longrope"),
    *(
        "gpt_neox-no-bias",
        "falcon-sequential-bias",
        "qwen2-window",
        "qwen3-window-bias",
        "qwen3_moe-dense-layers",
        "phi-qk-norm",
        "phi3-longrope",
    ),
    *("gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "smollm3-window", "seed_oss", "exaone4", "cohere-qk-norm"),
    *("stablelm-parallel-qk-norm", "ernie4_5-bias"),
    *(
        "gemma4-E",
        "granitemoehybrid-experts",
        "glm",
        "llama4",
        "llama4-all-experts",
        "lfm2_moe",
        "lfm2-bias",
        "minicpm3",
        "youtu",
    ),
    *("qwen3_5", "qwen3_5-layer_types", "qwen3_5_moe", "qwen3_next", "qwen3_next-dense-layers"),
}


FACTORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Settings, tensors in float32, and how each is stored."""
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return settings, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def vocabulary_of(directory: Path, size: int) -> Vocabulary:
    """As a file of a model of this size would hold it."""
    ending = read_ending(directory)
    assert ending
    return read_vocabulary(directory, ending, size)


def with_vocabulary(directory: Path, size: int) -> None:
    """A byte-level tokenizer of at most `size` tokens, as small as a random model's embedding."""
    tokens = ["</s>", *(chr(ord("a") + i) for i in range(26))]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    added = {"id": 0, "content": "</s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added["normalized"] = False
    spec = {"version": "1.0", "added_tokens": [added], "pre_tokenizer": steps, "model": model}
    model["vocab"]["ab"] = len(tokens)
    model["merges"] = [["a", "b"]]
    assert len(model["vocab"]) <= size
    write_json(directory / "tokenizer.json", spec)
    write_json(directory / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": "{{ messages }}"})


@pytest.fixture(autouse=True)
def _more_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for case, settings in AS_PUBLISHED.items():
        monkeypatch.setitem(CASES, case, settings)


def as_llama_cpp_has_it(path: Path, config: ModelConfig) -> GPT:
    """A model of the tensors in a file, in the order and with the norms that llama.cpp computes with."""
    settings, tensors, _ = read(path)
    architecture = graph_of(config)
    assert architecture
    assert settings["general.architecture"] == architecture.name
    norm: Any = {"rms_plus_one": "rms", "layer_plus_one": "layer"}.get(config.norm, config.norm)
    model = GPT(dataclasses.replace(config, rope_interleaved=architecture.neighbours, norm=norm))
    parameters = dict(model.named_parameters())
    plan = plan_tensors(parameters, config)
    assert {tensor.name for tensor in plan} == set(tensors) - FACTORS
    with torch.no_grad():
        for tensor in plan:
            rows = [len(parameters[name]) for name in tensor.parts]
            whole = tensors[tensor.name]
            if config.kv_latent_size and whole.ndim == 3 and not tensor.stacked:  # (H, out, in), of keys (H, in, out)
                whole = (whole.transpose(1, 2) if "attn_k_b" in tensor.name else whole).flatten(0, 1)
            whole = whole[None] if "ffn_gate_inp_shexp" in tensor.name else whole
            values = [whole]
            if len(rows) > 1:
                by_head = whole.unflatten(0, (1 if tensor.stacked else tensor.heads, -1))
                shares = [size // tensor.heads for size in rows]
                values = list(whole) if tensor.stacked else [x.flatten(0, 1) for x in by_head.split(shares, dim=1)]
            for name, value in zip(tensor.parts, values, strict=True):
                parameters[name].copy_(as_it_was(name, value, config))
        for name in ("positive", "negative") if config.ffn == "xielu" else ():
            for i, value in enumerate(settings[f"xielu.alpha_{name[0]}"]):
                parameters[f"blocks.{i}.mlp.activation.{name}"].fill_(value)
    return model


def as_it_was(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """A tensor of a gated delta net or convolution, with its value heads in our order."""
    if ".conv.conv" in name:
        return value[:, None]
    if ".delta." not in name:
        return value
    if config.state_space:
        value = (-value).log() if "decay_rate" in name else value
        flat = any(f".delta.{part}" in name for part in ("decay_rate", "skip", "norm"))
        return value[:, None] if name.endswith(".conv") else value.flatten() if flat else value
    keys, values = config.delta_key_heads, config.delta_value_heads
    value = (-value).log() if "decay_rate" in name else value.T if "projection" in name else value
    fixed = 2 * keys * config.delta_key_size if name.endswith("conv") else 0
    rows = torch.arange(len(value) - fixed)
    ordered = ("value", "output_gate", "beta", "decay", "conv", "decay_rate", "decay_bias", "projection")
    if ARCHITECTURES[config.family].value_heads_tiled and any(f".delta.{part}" in name for part in ordered):
        rows = rows.unflatten(0, (values // keys, keys, -1)).transpose(0, 1).flatten()
    value = torch.cat((value[:fixed], value[fixed:][rows]))
    return value[:, None] if name.endswith("conv") else value.T if "projection" in name else value


LATE = {"glm4_moe", "glm4_moe-air", "glm4_moe_lite", "solar_open", "minimax_m2", "hunyuan_moe", "granitemoe", "helium"}
LATE |= {"iquestcoder", "ernie4_5_moe", "granitemoehybrid", "jais2", "gpt_bigcode", "gpt_oss-packed-size", "gpt_oss"}
LATE |= {f"{case} as published" for case in ("arcee", "nemotron", "olmoe", "dots1", "exaone_moe", "deepseek_v2")}
LATE |= {"deepseek_v2 lite", "gpt_oss without scaling", "gpt_bigcode-multi_head"} & set(WRITTEN)
LATE |= {"qwen2_moe", "qwen2_moe-windows", "exaone_moe", "ernie4_5_moe-interval", "deepseek_v2-groups", "olmoe"}
LATE |= {"deepseek_v3-halves", "arcee", "nemotron", "internlm3", "granitemoehybrid-nope"}
LATE |= {"glm", "llama4-all-experts", "lfm2_moe", "lfm2-bias", "minicpm3", "youtu", "qwen3_5-layer_types"}
LATE |= {"qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen3_next-dense-layers", "afmoe", "lfm2", "apertus", "ministral3"}
LATE |= {f"{case} as published" for case in ("glm", "llama4", "qwen3_5", "qwen3_5_moe", "ministral3", "lfm2_moe")}
LATE |= {"minicpm3 as published", "youtu as published", "llama4", "ministral3-window"}
LATE |= {"bamba", "granitemoehybrid-spaces", "granitemoehybrid-experts", "granitemoehybrid-experts as published"}
LATE |= {"gemma4", "gemma4_moe", "gemma4_unified", "gemma4-E", "gemma4-E as published"}
"""Cases that are much like others, so the quick tests leave them out."""


def some(cases: set[str]) -> list[Any]:
    """Cases as parameters of a test."""
    return [pytest.param(case, marks=[pytest.mark.slow] * (case in LATE)) for case in sorted(cases)]


@pytest.mark.parametrize("case", some(set(WRITTEN) - REFUSED))
def test_the_file_computes_what_the_model_computes(case: str, tmp_path: Path) -> None:
    """llama.cpp's llama turns neighbouring features; our model can too, and then its logits are the same."""
    hugging_face_model(tmp_path, case)
    convert_hf_checkpoint(tmp_path, tmp_path)
    with_vocabulary(tmp_path, 96)
    export_gguf(tmp_path, tmp_path / "model.gguf", "f32")
    model = load_model(tmp_path)
    other = as_llama_cpp_has_it(tmp_path / "model.gguf", model.config)
    tokens = TOKENS[:, : read_context(model.config)]
    with torch.no_grad():
        torch.testing.assert_close(other(tokens), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama-yarn", "llama-yarn-mscale", "phi3 with longrope"])
def test_the_file_says_how_rope_is_scaled(case: str, tmp_path: Path) -> None:
    hugging_face_model(tmp_path, case)
    config = convert_hf_checkpoint(tmp_path, tmp_path)
    with_vocabulary(tmp_path, 96)
    export_gguf(tmp_path, tmp_path / "model.gguf", "f32")
    settings, tensors, _ = read(tmp_path / "model.gguf")
    found = {name.split("rope.scaling.")[1]: value for name, value in settings.items() if "rope.scaling." in name}
    if case == "phi3 with longrope":
        assert tuple(tensors["rope_factors_short.weight"].tolist()) == pytest.approx(config.rope_short_factors)
        assert tuple(tensors["rope_factors_long.weight"].tolist()) == pytest.approx(config.rope_long_factors)
        assert read_context(config) == 256  # beyond it llama.cpp takes the long factors for short texts too
        expected = {"type": "longrope", "attn_factor": config.rope_attention_factor}
    else:
        itself = 1 + 0.1 * math.log(4.0)  # which llama.cpp multiplies by of its own accord
        expected = {"type": "yarn", "factor": 4.0, "attn_factor": config.rope_attention_factor / itself}
        expected |= {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
    expected["original_context_length"] = config.rope_original_block_size
    assert found.pop("type") == expected.pop("type")
    assert found == pytest.approx(expected)


def test_the_package_knows_all_names_and_a_graph_finds_its_settings(tmp_path: Path) -> None:
    hugging_face_model(tmp_path, "deepseek_v3")
    config = convert_hf_checkpoint(tmp_path, tmp_path)
    with_vocabulary(tmp_path, 96)
    export_gguf(tmp_path, tmp_path / "model.gguf", "q8_0")
    settings, tensors, stored = read(tmp_path / "model.gguf")
    (number,) = (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == "deepseek2")
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
    assert {re.sub(r"blk\.\d+", "blk.{bid}", name.rpartition(".")[0]) for name in tensors} <= known
    found = {name.removeprefix("deepseek2."): value for name, value in settings.items() if "deepseek2." in name}
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_shared_count": 2, "leading_dense_block_count": 1}
    choice = {
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
    }
    latent = config.kv_latent_size
    sizes = {"head_count_kv": 1, "kv_lora_rank": latent, "q_lora_rank": config.q_latent_size}
    sizes |= {"key_length": latent + config.latent_rope_size, "value_length": latent}
    sizes |= {"key_length_mla": config.head_size, "value_length_mla": config.value_size}
    expected = experts | choice | {f"attention.{name}": size for name, size in sizes.items()}
    expected["rope.dimension_count"] = config.latent_rope_size
    assert {name: found[name] for name in expected} == expected
    assert found["expert_weights_scale"] == pytest.approx(2.5)
    assert found["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert {stored[name] for name in stored if "ffn_gate_inp" in name or name.endswith("bias")} == {"F32"}


def test_how_far_rounding_yarns_ramp_moves_a_frequency_is_known() -> None:
    of_gpt_oss = {
        "rope_scaling": "yarn",
        "rope_factor": 32.0,
        "rope_original_block_size": 4096,
        "rope_theta": 150_000.0,
    }
    config = tiny_model(head_size=64).config
    config = dataclasses.replace(config, **of_gpt_oss, rope_truncate=False)
    assert rope_difference(config) == pytest.approx(0.76, abs=0.01)
    assert rope_difference(dataclasses.replace(config, rope_truncate=True)) == 0


@pytest.mark.parametrize("case", some(REFUSED))
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(case: str, tmp_path: Path) -> None:
    hugging_face_model(tmp_path, case)
    config = convert_hf_checkpoint(tmp_path, tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"cannot be written as GGUF: it has \w+(.|\n)*convert_lit_checkpoint.py writes it for transf",
    ):
        check_supported(config)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("gptj", "llama.cpp has no graph"),
        ("phimoe", "llama.cpp weighs"),
        ("flex_olmo", "the gguf package has no names"),
    ],
)
def test_other_families_are_refused_by_name(case: str, reason: str, tmp_path: Path) -> None:
    hugging_face_model(tmp_path, case)
    convert_hf_checkpoint(tmp_path, tmp_path, name="some/model")
    with pytest.raises(
        CheckpointError, match=f"some/model .*: it is a {CASES[case][0]}, and {reason}(.|\n)*writes it for transformers"
    ):
        export_gguf(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_every_family_has_a_graph_or_a_reason() -> None:
    assert not ARCHITECTURES.keys() & OTHERWISE.keys()
    assert ARCHITECTURES.keys() | OTHERWISE.keys() == FAMILIES.keys()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with a SentencePiece tokenizer and a row that is no multiple of 32."""
    directory = write_checkpoint(tmp_path / "model", tiny_model(ffn_size=120))
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("kind", ["f16", "q8_0", "bf16", "f32"])
def test_tensors_are_those_of_the_checkpoint_as_nearly_as_their_type_can(kind: Kind, checkpoint: Path) -> None:
    export_gguf(checkpoint, checkpoint.with_name("model.gguf"), kind)
    _, tensors, stored = read(checkpoint.with_name("model.gguf"))
    model = load_model(checkpoint)
    parameters = dict(model.named_parameters())
    for tensor in plan_tensors(parameters, model.config):
        (name,) = tensor.parts
        weight, actual = parameters[name].detach(), tensors[tensor.name]
        if "query" in name or "key" in name:
            heads = 4 if "query" in name else 2
            actual = actual.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        short = weight.shape[-1] % 32 != 0
        expected = "F32" if weight.ndim == 1 else "F16" if kind == "q8_0" and short else kind.upper()
        assert stored[tensor.name] == expected
        if expected == "Q8_0":
            blocks = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(*weight.shape[:-1], -1, 32)
            assert ((actual - weight).abs() <= blocks.flatten(-2) / 127 * 0.501 + weight.abs() * 2**-10).all()
        else:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[expected]
            assert torch.equal(actual, weight.to(dtype).float())


def test_settings_are_those_of_the_model(checkpoint: Path) -> None:
    export_gguf(checkpoint, checkpoint.with_name("model.gguf"), "f16")
    settings, _, _ = read(checkpoint.with_name("model.gguf"))
    expected = {
        "general.architecture": "llama",
        "general.name": "test/tiny",
        "general.file_type": 1,
        "llama.context_length": 96,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 120,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10_000.0,
        "llama.vocab_size": 320,
    }
    assert {name: settings[name] for name in expected} == expected
    assert settings["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_a_window_limits_the_context_in_which_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", tiny_model(family="mistral", sliding_window=8))
    write_tokenizer(directory)
    export_gguf(directory, tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf")[0]["llama.context_length"] == 8


def test_linear_scaling_is_a_setting_and_llama3s_a_tensor(tmp_path: Path) -> None:
    linear = write_checkpoint(tmp_path / "linear", tiny_model(rope_scaling="linear", rope_factor=4.0))
    llama3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_block_size": 32, "head_size": 64}
    write_checkpoint(tmp_path / "llama3", tiny_model(**llama3))
    for directory in (linear, tmp_path / "llama3"):
        write_tokenizer(directory)
        export_gguf(directory, directory.with_suffix(".gguf"))
    settings, _, _ = read(tmp_path / "linear.gguf")
    assert (settings["llama.rope.scaling.type"], settings["llama.rope.scaling.factor"]) == ("linear", 4.0)
    factors = read(tmp_path / "llama3.gguf")[1]["rope_freqs.weight"]
    assert factors.shape == (32,)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)
    assert (factors.diff() >= 0).all()


def test_sentencepiece_tokens_keep_their_scores_and_kinds(checkpoint: Path) -> None:
    vocabulary = vocabulary_of(checkpoint, 320)
    ours = Tokenizer(checkpoint)
    assert vocabulary.tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert vocabulary.kinds[:3] == [2, CONTROL, CONTROL]
    assert (vocabulary.tokens[3], vocabulary.kinds[3]) == ("<0x00>", BYTE)
    assert vocabulary.kinds[ours.size :] == [UNUSED] * (320 - ours.size)
    assert vocabulary.tokens[319] == "[PAD319]"
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.adds_bos, vocabulary.prefix) == (1, 2, True, True)
    assert merged_by_score(vocabulary, "▁What▁is▁1▁plus▁23?") == ours.encode("What is 1 plus 23?", bos=False)


def merged_by_score(vocabulary: Any, text: str) -> list[int]:
    """What llama.cpp does with scores: join the neighbours whose piece has the highest, leftmost first."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    parts = list(text)
    while True:
        pairs = [(-vocabulary.scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            return [ids[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_scores_stand_for_the_merges_of_a_tokenizer_json_with_blocks(tmp_path: Path) -> None:
    metaspace(tmp_path)
    vocabulary = vocabulary_of(tmp_path, 600)
    assert not vocabulary.merges
    assert vocabulary.kinds[:3] == [2, CONTROL, CONTROL]
    assert merged_by_score(vocabulary, "▁What▁is▁1▁plus▁12?") == Tokenizer(tmp_path).encode(
        "What is 1 plus 12?", bos=False
    )


def test_byte_level_tokens_keep_their_merges(tmp_path: Path) -> None:
    byte_level(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    size = len(spec["model"]["vocab"])
    extra = {"id": size, "content": "<think>", "special": False, "single_word": False, "lstrip": False}
    spec["added_tokens"].append(extra | {"rstrip": False, "normalized": False})
    write_json(tmp_path / "tokenizer.json", spec)
    vocabulary = vocabulary_of(tmp_path, size + 5)
    assert vocabulary.merges == [" ".join(pair) for pair in spec["model"]["merges"]]
    assert (vocabulary.split, vocabulary.bos_id, vocabulary.adds_bos) == ("gpt-2", None, False)
    assert vocabulary.kinds[size] == USER_DEFINED
    assert vocabulary.kinds[0] == CONTROL


def test_how_a_text_is_cut_has_a_name(tmp_path: Path) -> None:
    byte_level(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    last = {**spec["pre_tokenizer"], "use_regex": False}
    cut = {"type": "Split", "behavior": "Isolated", "invert": False}
    for (patterns, ignores), name in SPLITS.items():
        if name == "falcon":  # it cuts bytes too, and has no such steps
            continue
        cuts = [{**cut, "pattern": {"Regex": pattern}} for pattern in patterns]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, last]}
        spec["model"]["ignore_merges"] = ignores
        write_json(tmp_path / "tokenizer.json", spec)
        assert vocabulary_of(tmp_path, 600).split == name
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, {**last, "use_regex": True}]}
    spec["model"]["ignore_merges"] = False
    write_json(tmp_path / "tokenizer.json", spec)
    assert vocabulary_of(tmp_path, 600).split == "starcoder"
    spec["pre_tokenizer"]["pretokenizers"], _, name = CHAINS["Falcon"]
    write_json(tmp_path / "tokenizer.json", spec)
    assert vocabulary_of(tmp_path, 600).split == name
    for other in (last, {**last, "use_regex": True, "add_prefix_space": True}, {**digits, "individual_digits": False}):
        spec["pre_tokenizer"] = other
        write_json(tmp_path / "tokenizer.json", spec)
        with pytest.raises(CheckpointError, match=r"cuts texts: llama.cpp has none like it.\n.*convert_lit_checkpoint"):
            vocabulary_of(tmp_path, 600)


def test_texts_of_which_llama_cpp_makes_other_tokens_are_named(tmp_path: Path) -> None:
    byte_level(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert differences(tmp_path) == []
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    write_json(tmp_path / "tokenizer.json", spec)
    assert differences(tmp_path) == ["texts with decomposed accents (e + \u0301)"]
    steps, _, name = CHAINS["DeepSeek V2"]
    spec |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    write_json(tmp_path / "tokenizer.json", spec)
    assert differences(tmp_path) == [LOOSE["NFC"], LOOSE[str(name)]]


def test_a_tokenizer_that_changes_texts_first_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    write_json(tmp_path / "tokenizer.json", spec)
    with pytest.raises(CheckpointError, match=r"changes texts \(Lowercase\) before .*\n.*convert_lit_checkpoint"):
        vocabulary_of(tmp_path, 600)


def test_the_letters_of_deepseek_v2_are_those_of_its_file() -> None:
    assert hashlib.sha256(CASED.encode()).hexdigest()[:16] == "1cb93cd26ae20214"


@pytest.mark.slow
@pytest.mark.parametrize("model", CHAINS)
def test_how_a_published_tokenizer_cuts_a_text_has_a_name_or_is_refused(model: str, tmp_path: Path) -> None:
    steps, ignore_merges, name = CHAINS[model]
    of_chain(tmp_path, steps, ignore_merges)
    if name is None:
        with pytest.raises(CheckpointError, match=r"cuts texts: llama.cpp's cut for it, (tiny_aya|afmoe), parts two"):
            vocabulary_of(tmp_path, 1200)
    else:
        assert vocabulary_of(tmp_path, 1200).split == name


def test_a_byte_level_tokenizer_without_merges_gets_one_that_joins_nothing(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", tiny_model())
    write_chatty_tokenizer(directory)
    export_gguf(directory, tmp_path / "m.gguf")
    settings = read(tmp_path / "m.gguf")[0]
    assert (settings["tokenizer.ggml.model"], settings["tokenizer.ggml.merges"]) == ("gpt2", ["no merge"])


def test_a_control_token_without_an_embedding_is_left_out(checkpoint: Path) -> None:
    write_json(checkpoint / "added_tokens.json", {"<image>": 300})
    assert len(vocabulary_of(checkpoint, 300).tokens) == 300


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the tokenizer has 300 tokens, the model 299 embeddings"):
        vocabulary_of(checkpoint, 299)


def test_the_chat_template_comes_along(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    export_gguf(checkpoint, checkpoint.with_name("model.gguf"))
    assert read(checkpoint.with_name("model.gguf"))[0]["tokenizer.chat_template"] == "{{ messages }}"


def test_a_chat_template_with_half_a_character_is_refused_and_nothing_is_left(checkpoint: Path) -> None:
    write_json(checkpoint / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": "\udcff"})
    with pytest.raises(CheckpointError, match=r"it holds '.udcff', which is half a character"):
        export_gguf(checkpoint, checkpoint / "a.gguf")
    assert not list(checkpoint.glob("a.*"))


def test_of_several_chat_templates_the_default_comes_along(checkpoint: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]
    write_json(checkpoint / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": named})
    export_gguf(checkpoint, checkpoint.with_name("model.gguf"))
    assert read(checkpoint.with_name("model.gguf"))[0]["tokenizer.chat_template"] == "{{ messages }}"


def test_values_that_sixteen_bits_cannot_hold_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_model()
    model.blocks[1].mlp.up.weight.data[0, 0] = 1e5
    directory = write_checkpoint(tmp_path / "m", model)
    write_tokenizer(directory)
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.up.weight has values up to 100000, which f16 cannot hold"):
        export_gguf(directory, tmp_path / "m.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    export_gguf(directory, tmp_path / "m.gguf", "bf16")


def test_no_file_is_overwritten(checkpoint: Path) -> None:
    out = checkpoint.with_name("model.gguf")
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export_gguf(checkpoint, out)
    assert out.read_text() == "mine"


def test_a_modelfile_is_replaced_only_if_an_export_that_was_killed_left_it(checkpoint: Path) -> None:
    out = checkpoint.with_name("model.gguf")
    export_gguf(checkpoint, out, "f32")
    out.unlink()
    export_gguf(checkpoint, out, "f32")
    out.unlink()
    out.with_suffix(".Modelfile").write_text("mine")
    with pytest.raises(UsageError, match=r"model\.Modelfile exists"):
        export_gguf(checkpoint, out, "f32")
    assert out.with_suffix(".Modelfile").read_text() == "mine"


def test_a_model_without_the_package_says_what_to_install(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install \"lit_qlora\[gguf\]\""):
        export_gguf(checkpoint, checkpoint.with_name("model.gguf"))


def test_the_command_exports_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("scripts/convert_gguf.py")
    demo, out = ROOT / "checkpoints/lit-qlora/tiny-world", tmp_path / "demo-1.5B"
    script.main(script.GgufConfig(checkpoint_dir=demo, out_file=out))
    assert capsys.readouterr().out.splitlines() == [
        f"exported lit-qlora/tiny-world as q8_0, 0.00 GB: {out}",
        f"for Ollama: ollama create demo-1.5B -f {out}.Modelfile",
    ]
    settings, tensors, _ = read(out)
    assert len(tensors) == len(list(GPT(ModelConfig.load(demo)).parameters()))
    assert len(settings["tokenizer.ggml.tokens"]) == 1280
