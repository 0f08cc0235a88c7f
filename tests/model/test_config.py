"""model_config.json: what it must hold, and what is said when it does not."""

import json
from pathlib import Path

import pytest

from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import FILE_NAME, ModelConfig
from tests.conftest import ROOT, tiny_config


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.load(directory)
    return str(caught.value)


def write(directory: Path, **changes: object) -> Path:
    """A model_config.json with some fields changed."""
    tiny_config().save(directory)
    values = json.loads((directory / FILE_NAME).read_text()) | changes
    (directory / FILE_NAME).write_text(json.dumps(values))
    return directory


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    config = tiny_config(sliding_window=7, rope_scaling="linear", rope_factor=2.0, tied_head=True, ffn="gelu")
    config.save(tmp_path)
    assert ModelConfig.load(tmp_path) == config


def test_the_demo_model_and_what_was_converted_before_a_switch_existed_mean_the_same() -> None:
    demo = ModelConfig.load(ROOT / "checkpoints/lit-qlora/tiny-world")
    written = json.loads((ROOT / "checkpoints/lit-qlora/tiny-world" / FILE_NAME).read_text())
    assert all(getattr(demo, name) == value for name, value in written.items())
    assert not any(demo.windowed(i) or demo.has_experts(i) for i in range(demo.n_layer))
    assert all(demo.rotates(i) for i in range(demo.n_layer))
    since = {"norm_position": "before", "qk_norm": "none", "logit_multiplier": 1.0, "head_bias": False}
    assert all(getattr(demo, name) == value for name, value in since.items() if name not in written)


def test_lists_come_back_as_they_were(tmp_path: Path) -> None:
    config = tiny_config(sliding_window=7, full_attention_layers=(1,), no_rope_layers=(0, 1))
    config.save(tmp_path)
    assert ModelConfig.load(tmp_path) == config


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("n_layer", 0, "at least 1"),
        ("n_embd", -4, "at least 1"),
        ("n_head", "4", "must be int"),
        ("n_head", 4.0, "must be int"),
        ("vocab_size", None, "must be int"),
        ("block_size", True, "must be int"),
        ("name", 5, "must be str"),
        ("norm", "batch", "must be rms or rms_plus_one or rms_no_weight"),
        ("ffn", "relu", "must be swiglu or geglu"),
        ("rope_scaling", "ntk", "must be none or linear or dynamic or llama3"),
        ("rope_theta", "10000", "must be float"),
        ("norm_eps", None, "must be float"),
        ("tied_head", "no", "must be bool"),
        ("sliding_window", "all", "must be int or NoneType"),
        ("n_kv_head", 3, "n_head must be a multiple of n_kv_head, got 4 and 3"),
        ("rope_fraction", 1.5, "not an even size"),
        ("head_size", 15, "not an even size"),
        ("no_rope_layers", [2], "names blocks [2], the model has 2"),
        ("no_rope_layers", ["1"], "must be int"),
        ("shared_norm", True, "needs parallel_residual"),
        ("kv_latent_size", 8, "latent_rope_size must be from 1"),
        ("n_layer", 10**6, "n_layer must be at most 4,096"),
        ("vocab_size", 10**9, "vocab_size must be at most"),
        ("sliding_window", -5, "sliding_window must be above 0"),
        ("attention_softcap", -1e30, "attention_softcap must be above 0"),
    ],
)
def test_a_field_with_an_impossible_value_is_named(tmp_path: Path, field: str, value: object, expected: str) -> None:
    message = refusal(write(tmp_path, **{field: value}))
    assert expected in message
    assert field in message


def test_whole_numbers_are_numbers_too(tmp_path: Path) -> None:
    assert ModelConfig.load(write(tmp_path, rope_theta=500_000)).rope_theta == 500_000


def test_unknown_and_missing_fields_are_named(tmp_path: Path) -> None:
    assert "unknown fields ['experts']" in refusal(write(tmp_path, experts=8))
    (tmp_path / FILE_NAME).write_text('{"name": "x"}')
    assert "n_layer" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "[{}]", "5", "null"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / FILE_NAME}: ")
