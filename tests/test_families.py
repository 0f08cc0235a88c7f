"""Reading other people's configurations: everything is understood or refused by name."""

from typing import Any

import pytest
import torch

from lit_qlora.errors import CheckpointError
from lit_qlora.families import FAMILIES, Fused, read_config, their_module
from tests.conftest import tiny_config

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 96,
    "hidden_act": "silu",
}


def test_what_config_json_leaves_out_is_what_transformers_assumes() -> None:
    config = read_config(LLAMA, "x")
    assert (config.n_kv_head, config.head_size, config.norm_eps, config.tied_head) == (4, 16, 1e-6, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported. Known: gpt_neox, llama"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window True"),
        ({"quantization_config": {"load_in_4bit": True}}, "already quantised"),
        ({"num_hidden_layers": None}, "config.json is incomplete"),
        ({"num_attention_heads": 3}, "n_head must be a multiple|not an even size|rope_fraction"),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config({**LLAMA, "num_key_value_heads": 2, **changes}, "x")


def test_a_fused_tensor_is_split_and_joined_without_loss() -> None:
    config = tiny_config(n_kv_head=4)
    rule = Fused(("q", "k", "v"))
    fused = torch.randn(3 * 64, 5)
    assert torch.equal(rule.join(rule.split(fused, config), config), fused)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_that_can_have_an_adapter_has_a_name_in_its_family(name: str) -> None:
    mlp = ("up", "down") if name == "gpt_neox" else ("gate", "up", "down")
    layers = [f"blocks.1.attn.{part}" for part in ("query", "key", "value", "projection")]
    layers += [f"blocks.1.mlp.{part}" for part in mlp]
    modules = [their_module(layer, FAMILIES[name])[0] for layer in [*layers, "head"]]
    assert modules[-1] == "lm_head"
    assert all(".1." in module for module in modules[:-1])
    assert len(set(modules)) == (5 if name == "gpt_neox" else 8)
