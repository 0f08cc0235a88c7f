"""Weights published in 8 or 4 bits become the 16-bit ones that they stand for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_model, open_weights
from lit_qlora.checkpoint.packed import as_published
from lit_qlora.convert.families import read_config
from lit_qlora.convert.families.unpacking import unpack_fp8
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint, describe
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError
from lit_qlora.quantize import QuantizedLinear, Storage
from lit_qlora.settings import Scheme
from tests.convert.test_wrappers import wrapper_model
from tests.reference import hugging_face_model

functional = pytest.importorskip("bitsandbytes").functional
FP8 = torch.float8_e4m3fn


def in_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 elements, the scales of their blocks, and what they stand for in float32."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    packed, meant = torch.empty_like(weight, dtype=FP8), torch.empty_like(weight)
    for i in range(scales.size(0)):
        for j in range(scales.size(1)):
            here = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[here].abs().max() / 448
            packed[here] = (weight[here] / scales[i, j]).to(FP8)
            meant[here] = packed[here].float() * scales[i, j]
    return packed, scales, meant


def test_a_block_of_fp8_is_read_as_transformers_reads_it() -> None:
    operations = pytest.importorskip("transformers.integrations.finegrained_fp8")
    packed, scales, _ = in_fp8(torch.randn(256, 384), (128, 128))
    theirs = operations.Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16)
    assert torch.equal(unpack_fp8(packed, scales), theirs)


@pytest.mark.parametrize("block", [(128, 128), (1, 300), (200, 300), (64, 128)])
def test_fp8_weights_are_multiplied_by_the_scale_of_their_block(block: tuple[int, int]) -> None:
    packed, scales, meant = in_fp8(torch.randn(200, 300), block)
    assert torch.equal(unpack_fp8(packed, scales), meant.bfloat16())
    if scales.numel() == 1:
        assert torch.equal(unpack_fp8(packed, scales[0, 0]), meant.bfloat16())


def test_experts_in_one_tensor_have_their_own_scales() -> None:
    parts = [in_fp8(torch.randn(96, 64), (96, 64)) for _ in range(3)]
    packed, scales, meant = (torch.stack(part) for part in zip(*parts, strict=True))
    for shape in ((3,), (3, 1), (3, 1, 1)):
        assert torch.equal(unpack_fp8(packed, scales.reshape(shape)), meant.bfloat16())


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="3 scales do not belong to 128 rows or columns"):
        unpack_fp8(torch.zeros(128, 64, dtype=FP8), torch.ones(3, 1))


def say(folder: Path, table: dict[str, Any]) -> None:
    """Write a quantization_config."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": table}))


@pytest.mark.parametrize(
    ("case", "block", "endings", "table"),
    [
        ("deepseek_v3", (32, 32), ("_scale_inv", ".activation_scale"), {"quant_method": "fp8"}),
        ("llama-gqa", None, ("_scale_inv", ".activation_scale"), {"quant_method": "fp8"}),
        (
            "qwen3",
            "rows",
            ("_scale", ".input_scale"),
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
        ),
    ],
)
def test_a_model_in_fp8_is_the_model_that_it_stands_for(
    case: str, block: Any, endings: tuple[str, str], table: dict[str, Any], tmp_path: Path
) -> None:
    hugging_face_model(tmp_path / "hub", case)
    weights, meant = load_file(tmp_path / "hub/model.safetensors"), {}
    for name, weight in list(weights.items()):
        if name.endswith("_proj.weight"):
            shape = {None: tuple(weight.shape), "rows": (1, weight.size(1))}.get(block, block)
            weights[name], scales, meant[name] = in_fp8(weight, shape)
            weights[name + endings[0]] = scales if block else scales[0, 0]
            weights[name.removesuffix(".weight") + endings[1]] = torch.ones(())
    save_file(weights, tmp_path / "hub/model.safetensors")
    say(tmp_path / "hub", table)
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    assert meant
    assert all(torch.equal(back[name], weight.bfloat16()) for name, weight in meant.items())
    assert back.keys() == {name for name in weights if not name.endswith(endings)}


def test_ministral_3_is_read_as_it_is_published(tmp_path: Path) -> None:
    wrapper_model(tmp_path / "hub", "mistral3-ministral3")
    weights = load_file(tmp_path / "hub/model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    weights[name], scale, meant = in_fp8(weights[name], tuple(weights[name].shape))
    save_file(weights | {f"{name}_scale_inv": scale[0, 0]}, tmp_path / "hub/model.safetensors")
    say(tmp_path / "hub", {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None})
    config = convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours", name="org/model")
    told = describe(config, tmp_path / "ours")
    assert re.fullmatch(r"converted org/model \(ministral3 inside mistral3, .* published in fp8 and now in .*", told)
    up = load_model(tmp_path / "ours").get_parameter("blocks.1.mlp.up.weight")
    assert torch.equal(up, meant.bfloat16().float())


def published_in_4_bits(folder: Path, nested: bool) -> dict[str, Tensor]:
    """Write a model as bitsandbytes' users publish it; what its layers compute with."""
    hugging_face_model(folder, "llama-gqa")
    weights, meant = load_file(folder / "model.safetensors"), {}
    for name, weight in list(weights.items()):
        weights[name] = weight.bfloat16()
        if name.endswith("_proj.weight") and weight.size(1) % 64 == 0:  # bitsandbytes 0.50 mixes up others on a CPU
            packed, state = functional.quantize_4bit(weights[name], quant_type="nf4", compress_statistics=nested)
            weights |= {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
            meant[name] = functional.dequantize_4bit(packed, state)
    save_file(weights, folder / "model.safetensors")
    say(folder, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    return meant


@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_weights_stay_as_they_were_published(
    nested: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme: Scheme = "bnb.nf4-dq" if nested else "bnb.nf4"
    meant = published_in_4_bits(tmp_path / "hub", nested)
    config = convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    assert f"kept so: --quantize {scheme} takes it as it is" in describe(config, tmp_path / "ours")
    kept = load_model(tmp_path / "ours", quantize=scheme, dtype=torch.bfloat16).blocks[1].mlp.up
    assert isinstance(kept, QuantizedLinear)
    theirs, name = load_file(tmp_path / "hub/model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(kept.packed, theirs[name])
    assert torch.equal(kept.absmax, theirs[f"{name}.absmax"])
    assert torch.equal(kept.dequantize(), meant[name])
    assert "16-bit" not in "".join(capsys.readouterr())
    export_hf(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[name], weight) for name, weight in meant.items())
    load_model(tmp_path / "ours", dtype=torch.bfloat16)
    assert f"in {scheme}. They become 16-bit ones.\n--quantize {scheme} takes" in "".join(capsys.readouterr())


def test_a_merge_onto_them_finds_them_as_the_training_did(tmp_path: Path) -> None:
    meant = published_in_4_bits(tmp_path / "hub", nested=True)["model.layers.0.self_attn.k_proj.weight"]
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    weights, key = open_weights(tmp_path / "ours"), "blocks.0.attn.key"
    found = as_published(weights, key, Storage(torch.bfloat16, "bnb.nf4-dq"))
    assert found is not None
    assert torch.equal(found.dequantize(), meant)
    assert as_published(weights, key, Storage(torch.bfloat16, "bnb.nf4")) is None


def test_a_damaged_part_of_a_packed_weight_is_named(tmp_path: Path) -> None:
    published_in_4_bits(tmp_path / "hub", nested=False)
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    path = tmp_path / "ours/lit_model.safetensors"
    weights = load_file(path)
    weights.pop("blocks.0.attn.key.absmax")
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.key\.absmax is missing. Convert the model again"):
        open_weights(tmp_path / "ours")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq\). Take the 16-bit original, org/model; it"),
        ({"quant_method": "awq"}, r"\(awq\)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"compressed-tensors, pack-quantized\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes in 8 bits"),
        ({"bits": 1}, r"in an unknown way"),
        ({"quant_method": "fp8", "weight_block_size": [96, 128]}, r"fp8 in blocks of 96\)"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"block_structure": [128, 96]}}}},
            r"compressed-tensors in blocks of 96\)",
        ),
    ],
)
def test_other_kinds_are_refused_with_the_name_of_the_original(table: dict[str, Any], message: str) -> None:
    theirs = {"model_type": "llama", "_name_or_path": "org/model", "quantization_config": table}
    with pytest.raises(CheckpointError, match=message):
        read_config(theirs, "someone/model-4bit")
