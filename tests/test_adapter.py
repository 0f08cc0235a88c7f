"""Adapters are PEFT's folders: PEFT computes with ours what we compute, and we with PEFT's what PEFT computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_qlora.adapter import check_base, load_adapter, load_for_use, read_adapter, save_adapter
from lit_qlora.checkpoint import content_hash, load_model
from lit_qlora.convert import convert_hf_checkpoint
from lit_qlora.errors import CheckpointError
from lit_qlora.lora import add_lora, lora_state
from lit_qlora.model import GPT
from lit_qlora.settings import LoRAConfig, Target
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer
from tests.test_model import hugging_face_model

peft = pytest.importorskip("peft")
TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama-gqa", "llama-biases", "mistral", "qwen2", "gpt_neox"]
TARGETS: list[tuple[Target, ...]] = [
    ("query",),
    ("key",),
    ("value",),
    ("projection",),
    ("mlp",),
    ("head",),
    ("query", "value"),
    ("all", "head"),
]


def trained(model: GPT, config: LoRAConfig) -> GPT:
    """`model` with an adapter that does something."""
    torch.manual_seed(1)
    add_lora(model, config)
    for tensor in lora_state(model).values():
        torch.nn.init.normal_(tensor, std=0.05)
    return model.eval()


def save(folder: Path, model: GPT, config: LoRAConfig, base: Path, **facts: Any) -> None:
    save_adapter(folder, model, config, None, {"base": {"name": "x", "sha256": content_hash(base)}, **facts})


@pytest.mark.parametrize("targets", TARGETS, ids=",".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_logits_with_our_adapter(
    family: str, targets: tuple[Target, ...], tmp_path: Path
) -> None:
    theirs = hugging_face_model(tmp_path / "base", family)
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    config = LoRAConfig(r=4, alpha=12, targets=targets)
    ours = trained(load_model(tmp_path / "base"), config)
    save(tmp_path / "adapter", ours, config, tmp_path / "base")
    with torch.no_grad():
        expected = ours(TOKENS)
        base = theirs(TOKENS).logits
        actual = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(TOKENS).logits
    assert (expected - base).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_we_compute_the_same_logits_with_an_adapter_of_peft(family: str, tmp_path: Path) -> None:
    theirs = hugging_face_model(tmp_path / "base", family)
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    names = ["query_key_value", "dense_4h_to_h"] if family == "gpt_neox" else ["q_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=names))
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    add_lora(model, adapter.config)
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs.eval()(TOKENS).logits
        torch.testing.assert_close(model.eval()(TOKENS), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_comes_back_bit_equal(family: str, tmp_path: Path) -> None:
    hugging_face_model(tmp_path / "base", family)
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    config = LoRAConfig(targets=("all", "head"))
    model, other = trained(load_model(tmp_path / "base"), config), load_model(tmp_path / "base")
    save(tmp_path / "adapter", model, config, tmp_path / "base")
    add_lora(other, config)
    load_adapter(other, tmp_path / "adapter")
    before, after = lora_state(model), lora_state(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A base checkpoint and an adapter on it."""
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    model = trained(load_model(base), LoRAConfig())
    save_adapter(tmp_path / "final", model, LoRAConfig(), "qa", {"base": {"name": "x", "sha256": content_hash(base)}})
    return base, tmp_path / "final"


def test_the_prompt_style_travels_with_the_adapter(saved: tuple[Path, Path]) -> None:
    base, folder = saved
    loaded = load_for_use(base, folder, precision="32-true")
    assert loaded.style is not None
    assert loaded.style.render("why?", "") == "Q: why?\nA:"
    assert load_for_use(base, precision="32-true").style is None


def test_an_adapter_of_another_base_is_refused_with_both_named(saved: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = saved
    other = write_checkpoint(tmp_path / "other", tiny_model(seed=5))
    with pytest.raises(CheckpointError, match=r"final was trained on x(.|\n)*other holds other weights"):
        check_base(read_adapter(folder), other)


def test_an_adapter_that_does_not_fit_is_refused(saved: tuple[Path, Path]) -> None:
    base, folder = saved
    model = load_model(base)
    add_lora(model, LoRAConfig(r=4, targets=("query",)))
    with pytest.raises(CheckpointError, match=r"attn.value.lora_a has no place(.|\n)*\(8, 64\), expected \(4, 64\)"):
        load_adapter(model, folder)


def change_tensors(folder: Path, change: Any) -> None:
    """Rewrite the adapter's tensors as PEFT would, without a manifest."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    (folder / "manifest.json").unlink()


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "NaN or infinite values in"),
        (lambda tensors: {}, "is empty"),
        (lambda tensors: {**tensors, "base_model.model.vision.q_proj.lora_A.weight": torch.ones(1)}, "no layer of"),
    ],
)
def test_damaged_adapters_are_refused(change: Any, message: str, saved: tuple[Path, Path]) -> None:
    base, folder = saved
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_for_use(base, folder, precision="32-true")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("fan_in_fan_out", True),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(key: str, value: Any, saved: tuple[Path, Path]) -> None:
    _, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=str(value if key == "peft_type" else key)):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_is_found(name: str, saved: tuple[Path, Path]) -> None:
    _, folder = saved
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read_adapter(folder)


def test_a_folder_that_is_no_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        read_adapter(tmp_path)
