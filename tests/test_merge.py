"""The merged checkpoint computes what the adapter computed, for each target and each family."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_qlora.adapter import read_adapter
from lit_qlora.checkpoint import load_model
from lit_qlora.config import ModelConfig
from lit_qlora.convert import convert_hf_checkpoint
from lit_qlora.errors import CheckpointError
from lit_qlora.lora import add_lora, lora_state
from lit_qlora.merge import merge, merge_checkpoint
from lit_qlora.model import GPT
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import SCHEMES, LoRAConfig, Scheme, Target
from tests.conftest import load_script, tiny_model, write_checkpoint, write_tokenizer
from tests.test_adapter import FAMILIES, TARGETS, TOKENS, save, trained
from tests.test_model import hugging_face_model


@pytest.mark.parametrize("targets", TARGETS, ids=",".join)
def test_merging_is_adding_the_scaled_product(targets: tuple[Target, ...]) -> None:
    model = tiny_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = trained(model, LoRAConfig(r=4, alpha=32, targets=targets))
    plain = GPT(model.config).eval()
    plain.load_state_dict(merge(base, lora_state(adapted), scale=32 / 4), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS), adapted(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", TARGETS, ids=",".join)
@pytest.mark.parametrize("family", [*FAMILIES, "llama-tied"])
def test_the_merged_checkpoint_computes_what_the_adapter_computed(
    family: str, targets: tuple[Target, ...], tmp_path: Path
) -> None:
    hugging_face_model(tmp_path / "base", family)
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    config = LoRAConfig(r=4, alpha=12, targets=targets)
    model = trained(load_model(tmp_path / "base"), config)
    save(tmp_path / "final", model, config, tmp_path / "base")
    merge_checkpoint(read_adapter(tmp_path / "final"), tmp_path / "base", tmp_path / "merged")
    with torch.no_grad():
        expected, before = model(TOKENS), load_model(tmp_path / "base")(TOKENS)
        actual = load_model(tmp_path / "merged").eval()(TOKENS)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_adapter_on_a_tied_head_gives_the_merged_model_a_head_of_its_own(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(tied_head=True))
    config = LoRAConfig(targets=("head",))
    save(tmp_path / "final", trained(load_model(base), config), config, base)
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged")
    assert not ModelConfig.load(tmp_path / "merged").tied_head
    merged = load_model(tmp_path / "merged")
    assert torch.equal(merged.embed.weight, load_model(base).embed.weight)
    assert not torch.equal(merged.head.weight, merged.embed.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merging_onto_the_quantised_base_is_exactly_what_was_trained(scheme: Scheme, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    config = LoRAConfig(targets=("all",))
    model = load_model(base, quantize=scheme)
    trained(model, config)
    save(tmp_path / "final", model, config, base, quantize=scheme, precision="32-true")
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged", base="quantized")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "merged").eval()(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_small_updates_are_added_in_float32() -> None:
    """Rounded to bf16 first, each of these updates would be another number."""
    weight = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    a, b = torch.full((1, 4), 0.0101), torch.full((4, 1), 0.5)
    merged = merge({"l.weight": weight}, {"l.lora_a": a, "l.lora_b": b}, scale=1.0)["l.weight"]
    assert torch.equal(merged, (weight.float() + b @ a).bfloat16())


def test_an_adapter_for_another_model_is_refused() -> None:
    adapter = {"blocks.9.attn.query.lora_a": torch.ones(1, 4), "blocks.9.attn.query.lora_b": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match=r"base model has no blocks.9.attn.query.weight"):
        merge({}, adapter, 1.0)
    with pytest.raises(CheckpointError, match=r"fits a weight of shape \(4, 4\), the base has \(2, 2\)"):
        merge({"blocks.9.attn.query.weight": torch.ones(2, 2)}, adapter, 1.0)


def test_a_fresh_adapter_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    model = load_model(base)
    add_lora(model, LoRAConfig())
    save(tmp_path / "final", model, LoRAConfig(), base)
    with pytest.raises(CheckpointError, match="learnt nothing"):
        merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged")


def test_the_command_needs_no_bitsandbytes(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    model = load_model(base)
    quantize_linears(model, "bnb.nf4")
    save(tmp_path / "final", trained(model, LoRAConfig()), LoRAConfig(), base, quantize="bnb.nf4")
    script = load_script("scripts/merge_lora.py").__file__
    program = (
        "import sys, runpy; sys.modules['bitsandbytes'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = ["--lora_path", str(tmp_path / "final"), "--checkpoint_dir", str(base)]
    done = subprocess.run([sys.executable, "-c", program, str(script), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert len(report["layers"]) == 4
    assert all(0 < row["update"] < 10 for row in report["layers"].values())
    assert (tmp_path / "merged/tokenizer.model").is_file()
    load_model(tmp_path / "merged")
