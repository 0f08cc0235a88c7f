"""Every family: read or refused by name, the same weights both ways, and everything that training needs of it."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.checkpoint import safetensors_io
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.families import (
    FAMILIES,
    VERIFIED_WITH,
    Fused,
    is_kept,
    join_all,
    read_config,
    their_module,
    to_ours,
)
from lit_qlora.convert.families.read import UnsupportedError
from lit_qlora.convert.families.rules import Stacked, Transposed
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.errors import CheckpointError
from lit_qlora.lora.layer import LoRALinear, add_lora, lora_state
from lit_qlora.lora.merge import merge
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import Router
from lit_qlora.quantize import QuantizedLinear, quantize_linears
from lit_qlora.settings import LoRAConfig
from tests.conftest import tiny_config
from tests.reference import CASES, EVERY_CASE, SMALL, hugging_face_model

transformers = pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 96,
    "hidden_act": "silu",
}
GRANITE = {"model_type": "granitemoehybrid", "num_local_experts": 0, "mamba_n_heads": 8}
LORA = LoRAConfig(r=4, dropout=0.0, targets="all")
HARMLESS = {
    # what is not the function: words, ids, and how transformers runs or initialises it
    *("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path", "use_cache"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "eod_token_id",
        "sep_token_id",
        "initializer_range",
        "embedding_initializer_range",
        "return_dict",
        "is_decoder",
    ),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "pretraining_tp"),
    *("num_logits_to_keep", "z_loss_coefficient"),  # of generation, and of the loss of its pre-training
    *("output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef"),
    # GPT-2's heads for other tasks, and a more exact softmax
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("reorder_and_upcast_attn", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    # of layers that predict further tokens, which are left out
    *("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types"),
    "mamba_chunk_size",  # of tokens that are computed together
    "enable_moe_fp32_combine",  # of the sum of two halves of a product
    # noise of the pre-training; fine-tuning has its own
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *(
        "residual_dropout",
        "embedding_dropout",
        "embed_dropout",
        "resid_dropout",
        "router_jitter_noise",
        "input_jitter_noise",
    ),
}
"""Keys of transformers' configurations that do not change what a model computes."""
SWITCHES: list[dict[str, Any]] = [
    {"use_sliding_window": True},
    {"new_decoder_architecture": True},
    {"enable_moe_block": True},
    {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    {"layer_types": ["attention"] * 2},
    {"num_shared_experts": 1, "shared_expert_combination_strategy": "sum"},
]
"""Settings that make a row look at others."""


def test_what_config_json_leaves_out_is_what_transformers_assumes() -> None:
    config = read_config(LLAMA, "x")
    assert (config.n_kv_head, config.head_size, config.norm_eps, config.tied_head) == (4, 16, 1e-6, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_a_family_are_those_of_transformers(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family)
    sizes = {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"}
    sizes |= {
        "n_layer",
        "n_embd",
        "n_head",
        "num_layers",
        "num_heads",
        *(["num_experts_per_tok"] if family == "deepseek_v2" else []),
    }
    full = json.loads(theirs.to_json_string(use_diff=False))
    if family == "hunyuan_v1_dense":
        full["head_dim"] = None  # cannot be left out in transformers 5.23, so it has no default
    if family == "deepseek_v2":
        full["num_experts_per_tok"] = 6  # the same
    # Of these the class's own sizes make no model that we have, or none at all.
    required = {
        "glm4_moe": {"head_dim": 128},
        "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    }.get(family, {})
    full, sizes = full | required, sizes | set(required)
    short = {"model_type": family, **{key: full[key] for key in sizes if key in full}}
    assert read_config(short, "x") == read_config(full, "x")


@pytest.mark.parametrize("case", CASES)
def test_a_config_json_from_before_transformers_5_means_the_same(case: str) -> None:
    family, changes = CASES[case]
    if family.startswith("gemma4"):
        pytest.skip("came after it")
    config = transformers.AutoConfig.for_model(family, **SMALL | changes)
    new = json.loads(config.to_json_string(use_diff=False))
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "time_step_limit")}
    tables = new.get("rope_parameters") or {}
    rope = dict(tables.get("full_attention", tables))
    if "sliding_attention" in tables:
        old["rope_local_base_freq"] = tables["sliding_attention"]["rope_theta"]
    theta, fraction = (
        ("rotary_emb_base", "rotary_pct") if family == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    )
    for key, name in (("rope_theta", theta), ("partial_rotary_factor", fraction)):
        if key in rope:
            old[name] = rope.pop(key)
    if rope.get("rope_type", "default") != "default" or len(rope) > 1:
        key = "rope_type" if "full_attention" in tables else "type"
        old["rope_scaling"] = {key: rope.pop("rope_type"), **rope}
    elif family in ("ministral3", "gpt_oss"):
        old["rope_scaling"] = rope  # without a table they assume yarn
    assert read_config(old, "x") == read_config(new, "x")
    again = transformers.AutoConfig.for_model(
        family, **{key: value for key, value in old.items() if key != "model_type"}
    )
    assert read_config(json.loads(again.to_json_string(use_diff=False)), "x") == read_config(new, "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_transformers_is_read_or_refused_or_harmless(family: str) -> None:
    config_class = type(transformers.AutoConfig.for_model(family))
    known = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
    unread = known - set(keys_read(family)) - set(FAMILIES[family].refuse) - HARMLESS
    if "kv_latent_size" in FAMILIES[family].fields:
        unread -= {"head_dim", "num_key_value_heads"}  # follow from the other sizes
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    assert not unread - (base - {"tie_word_embeddings"})


def keys_read(family: str) -> Iterator[str]:
    """The keys of config.json that the row looks at, whatever the others say."""
    yield from ("rope_parameters", "rope_scaling", "original_max_position_embeddings", "alpha")
    for reader in FAMILIES[family].fields.values():
        if isinstance(reader, str):
            yield reader
            continue
        for switches in ({}, *SWITCHES):
            recorder = Recorder(SMALL | dict(FAMILIES[family].defaults) | {"n_embd": 64, "n_head": 4} | switches)
            with suppress(UnsupportedError):
                reader(recorder)
            yield from recorder.seen


class Recorder(dict[str, Any]):
    """A dictionary that remembers which keys were asked for."""

    def __init__(self, *content: Any) -> None:
        super().__init__(*content)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Remember `key`."""
        self.seen.add(key)
        return super().get(key, default)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported.*Known: afmoe, apertus, arcee, "),
        ({"model_type": "quen3"}, "model_type 'quen3' is not supported. Did you mean qwen3?"),
        ({"model_type": "bitnet"}, "model_type 'bitnet' is not supported: its weights are ternary"),
        ({"model_type": "falcon_h1"}, "'falcon_h1' is not supported: its blocks have attention and a state space"),
        ({"model_type": "nemotron_h"}, "'nemotron_h' is not supported: its blocks have a mixer or an MLP alone"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"model_type": "phi", "hidden_act": "silu"}, "hidden_act 'silu', which is not supported for phi"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "RoPE scaling 'mrope'"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 50.0}}, "alpha 50.0"),
        ({"rope_scaling": {"type": "yarn"}, "max_position_embeddings": None}, "config.json is incomplete"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "incomplete: 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, which is not supported for llama"),
        ({"model_type": "falcon", "alibi": True}, "alibi True, which is not supported for falcon, only False"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        (
            {
                "model_type": "granite_swa",
                "layer_rope_theta": [1e6, 1e3],
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "'linear' beside several bases in layer_rope_theta",
        ),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"model_type": "gpt_oss", "swiglu_limit": 9.0}, "swiglu_limit 9.0"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked"] * 2}, "layer_types"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "n_expert_per_token must be from 1 to it"),
        ({"model_type": "qwen3_5_text", "attn_output_gate": False}, "attn_output_gate False"),
        ({"model_type": "qwen3_5_text", "mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype 'bfloat16'"),
        ({"model_type": "qwen3_next", "layer_types": ["mamba"] * 2}, "layer_types"),
        ({**GRANITE, "layer_types": ["mamba2"] * 2}, "layer_types"),
        ({**GRANITE, "mamba_d_head": 5}, "mamba_d_head 5 in 8 heads"),
        ({**GRANITE, "time_step_limit": [0.0, 0.5]}, r"time_step_limit \[0.0, 0.5\]"),
        ({"model_type": "qwen3_next", "linear_num_value_heads": 24}, "those of values a multiple of those of keys"),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
        ({"model_type": "gemma4_text", "per_layer_config": {"0": {"head_dim": 64}}}, "per_layer_config"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 1}, "no other one whose keys and values it could use"),
        ({"quantization_config": {"load_in_4bit": True}}, "already quantised"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "already quantised"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "awq"}}, "already quantised"),
        ({"num_hidden_layers": None}, "config.json is incomplete"),
        ({"num_attention_heads": None}, "config.json is incomplete: 'num_attention_heads'"),
        ({"num_attention_heads": 3}, "n_head must be a multiple|not an even size|rope_fraction"),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config({**LLAMA, "num_key_value_heads": 2, **changes}, "x")
    assert re.search("[Tt]ake ", str(caught.value)), "it says what to do instead"


@pytest.mark.parametrize("case", CASES)
def test_any_damage_to_a_config_json_is_read_or_refused_in_words(case: str) -> None:
    family, changes = CASES[case]
    config = transformers.AutoConfig.for_model(family, **SMALL | changes)
    theirs = json.loads(config.to_json_string(use_diff=False))
    tables = [theirs, *(value for value in theirs.values() if isinstance(value, dict))]
    for table in tables:
        for key, value in list(table.items()):
            for other in (None, 0, -1, 1000, 0.5, "x", [], ["x"], {}, {"x": 1}):
                table[key] = other
                with suppress(CheckpointError):
                    read_config(theirs, "x")
            table[key] = value


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("layout", ["heads", "blocks"])
def test_a_fused_tensor_is_split_and_joined_without_loss(n_kv_head: int, layout: Any) -> None:
    config = tiny_config(n_kv_head=n_kv_head)
    rule = Fused(("query.weight", "key.weight", "value.weight"), layout)
    fused = torch.randn((4 + 2 * n_kv_head) * 16, 5)
    parts = rule.split(fused, config)
    assert [len(part) for part in parts.values()] == [64, 16 * n_kv_head, 16 * n_kv_head]
    assert torch.equal(rule.join(parts, config), fused)


def test_experts_that_are_stacked_transposed_and_alternating_are_split_and_joined_without_loss() -> None:
    config = tiny_config()
    rule = Stacked(Transposed(Fused(("{e}.gate", "{e}.up"), "alternating")))
    stack = torch.randn(3, 5, 8)
    parts = rule.split(stack, config)
    assert torch.equal(parts["2.up"], stack[2, :, 1::2].T)
    assert torch.equal(rule.join(parts, config), stack)


@pytest.fixture(scope="module", params=EVERY_CASE)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Hugging Face model and, in ours/, its checkpoint."""
    directory: Path = tmp_path_factory.mktemp("family")
    hugging_face_model(directory, request.param)
    convert_hf_checkpoint(directory, directory / "ours")
    return directory


def test_weights_come_back_bit_for_bit_under_the_names_they_had(converted: Path) -> None:
    config = ModelConfig.load(converted / "ours")
    theirs = safetensors_io.read_all(converted / "model.safetensors")
    theirs = {name: tensor for name, tensor in theirs.items() if not is_kept(name, config)}
    ours = dict(load_model(converted / "ours").named_parameters())
    back = dict(join_all(ours, config))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_a_fresh_adapter_changes_nothing_and_a_merged_one_computes_the_same(converted: Path) -> None:
    model = load_model(converted / "ours").eval()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = torch.randint(0, 96, (2, 19))
    with torch.no_grad():
        plain = model(tokens)
        add_lora(model, LORA)
        assert torch.equal(model(tokens), plain)
        randomize(model)
        adapted = model(tokens)
        assert not torch.allclose(adapted, plain, rtol=1e-2)
        merged = GPT(model.config).eval()
        merged.load_state_dict(merge(weights, lora_state(model), LORA.alpha / LORA.r), strict=False)
        torch.testing.assert_close(merged(tokens), adapted, rtol=1e-4, atol=1e-4 * float(adapted.abs().max()))


def test_every_adapter_on_the_quantised_model_learns(converted: Path) -> None:
    torch.manual_seed(0)
    model = load_model(converted / "ours")
    quantize_linears(model, "bnb.nf4")
    assert not any(type(module) is torch.nn.Linear for module in model.blocks.modules())
    add_lora(model, LORA)
    assert all(type(module.base) is QuantizedLinear for module in model.modules() if isinstance(module, LoRALinear))
    assert not any(isinstance(module, LoRALinear) for r in routers(model) for module in r.modules())
    randomize(model)  # B is zero in a fresh adapter, which leaves A without a gradient
    tokens = torch.randint(0, 96, (4, 24))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        still = [name for name, p in model.named_parameters() if p.requires_grad and not has_gradient(p)]
        assert not still
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def randomize(model: GPT) -> None:
    """Give the adapters of `model` something to say."""
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            torch.nn.init.normal_(parameter, std=0.1)


def has_gradient(parameter: Tensor) -> bool:
    """Whether something pulls at it."""
    return parameter.grad is not None and bool(parameter.grad.any())


def routers(model: GPT) -> list[Router]:
    """What chooses experts."""
    return [module for module in model.modules() if isinstance(module, Router)]


def test_every_family_has_a_case() -> None:
    # transformers 5.23 has Mistral 4 inside Mistral 3 alone: tests/convert/test_wrappers.py.
    assert {family for family, _ in CASES.values()} == set(FAMILIES) - {"mistral4"}


def test_the_table_says_which_transformers_it_was_held_against() -> None:
    installed = ".".join(transformers.__version__.split(".")[:2])
    assert installed in VERIFIED_WITH, "when everything here passes, say so in lit_qlora/convert/families/table.py"


def test_the_table_can_be_printed() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "lit_qlora.convert.families"], capture_output=True, text=True, check=True
    )
    assert all(family in run.stdout for family in FAMILIES)
    assert f"transformers {' and '.join(VERIFIED_WITH)}" in run.stdout


def test_weights_without_a_rule_are_all_named_in_one_error(tmp_path: Path) -> None:
    hugging_face_model(tmp_path, "qwen3")
    weights = safetensors_io.read_all(tmp_path / "model.safetensors")
    for i in range(2):
        weights[f"model.layers.{i}.self_attn.sink_norm.weight"] = weights.pop(
            f"model.layers.{i}.self_attn.q_norm.weight"
        )
    safetensors_io.write(tmp_path / "model.safetensors", weights, weights.items())
    with pytest.raises(CheckpointError, match="2 tensors have no rule") as caught:
        convert_hf_checkpoint(tmp_path, tmp_path / "ours")
    assert all(f"model.layers.{i}.self_attn.sink_norm.weight" in str(caught.value) for i in range(2))


@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_layer_that_can_have_an_adapter_is_a_module_of_theirs(case: str) -> None:
    family, changes = CASES[case]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family, **SMALL | changes)
        )
        config = read_config(json.loads(theirs.config.to_json_string(use_diff=False)), "x")
    model = GPT.skeleton(config)
    add_lora(model, LORA)
    modules = {name for name, _ in theirs.named_modules()}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and ".experts." not in path:  # transformers 5 holds them in one parameter
            assert their_module(path, FAMILIES[family])[0] in modules


def test_experts_packed_in_mxfp4_are_unpacked_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = hugging_face_model(tmp_path, "gpt_oss-packed-size")
    weights = safetensors_io.read_all(tmp_path / "model.safetensors")
    for name, parameter in theirs.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inside, rows = parameter.shape
            blocks = torch.randint(0, 256, (experts, rows, inside // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 128, (experts, rows, inside // 32), dtype=torch.uint8)
            parameter.data = convert_moe_packed_tensors(blocks, scales).float()
            del weights[name]
            weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    safetensors_io.write(tmp_path / "model.safetensors", weights, weights.items())
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert_hf_checkpoint(tmp_path, tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    back = dict(join_all(dict(ours.named_parameters()), ours.config))
    assert back.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(back[name], parameter) for name, parameter in theirs.named_parameters())


def test_the_first_files_of_gpt2_need_no_prefix() -> None:
    config = read_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 4, "vocab_size": 96}, "x")
    parts = to_ours("h.0.attn.c_attn.weight", torch.randn(64, 192), config)
    assert list(parts) == [f"blocks.0.attn.{part}.weight" for part in ("query", "key", "value")]
    assert to_ours("h.0.attn.bias", torch.ones(1, 1, 8, 8), config) == {}


def test_a_constant_of_another_value_is_refused(tmp_path: Path) -> None:
    hugging_face_model(tmp_path, "apertus")
    weights = safetensors_io.read_all(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.act_fn.beta"] = torch.tensor(0.6)
    safetensors_io.write(tmp_path / "model.safetensors", weights, weights.items())
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.act_fn.beta is 0.6.*; only 0.5 is supported"):
        convert_hf_checkpoint(tmp_path, tmp_path / "ours")
