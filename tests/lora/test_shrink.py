"""A smaller adapter is the nearest one of its rank, PEFT loads it, and the command says what each rank loses."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.errors import UsageError
from lit_qlora.lora.adapter import our_tensors, read_adapter, save_adapter
from lit_qlora.lora.layer import lora_state
from lit_qlora.lora.shrink import candidates, cut, loss_at, smallest_rank, spectra
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig
from tests.conftest import run_here, tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import TOKENS, save, trained
from tests.model.test_gpt import hugging_face_model

CONFIG = LoRAConfig(r=8, alpha=24, targets=("all",))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Of an adapter whose directions matter unequally."""
    state = lora_state(trained(tiny_model(), CONFIG))
    falling = 2.0 ** -torch.arange(8)
    return {name: tensor * falling if name.endswith(".lora_b") else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "config", [CONFIG, LoRAConfig(r=8, alpha=24, targets=("all",), rslora=True)], ids=["", "rslora"]
)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_cut_update_is_the_nearest_one_of_its_rank(state, config, rank):
    found = spectra(state, config)
    smaller, settings = cut(state, found, config, rank)
    left_out, whole = 0.0, 0.0
    for layer in found:
        a, b = (state[f"{layer}.lora_{matrix}"].double() for matrix in "ab")
        full = config.scale(layer) * b @ a
        u, s, v = torch.linalg.svd(full, full_matrices=False)
        nearest = u[:, :rank] * s[:rank] @ v[:rank]
        a, b = (smaller[f"{layer}.lora_{matrix}"].double() for matrix in "ab")
        assert a.size(0) == b.size(1) == rank
        torch.testing.assert_close(settings.scale(layer) * b @ a, nearest, rtol=1e-5, atol=1e-6 * float(s[0]))
        left_out, whole = left_out + float(s[rank:].square().sum()), whole + float(s.square().sum())
    assert loss_at(found, rank)[0] == pytest.approx((left_out / whole) ** 0.5, abs=1e-6)
    assert settings.scale("") == pytest.approx(config.scale(""))


def test_layers_of_other_ranks_and_scales_are_cut_alike(state):
    config = LoRAConfig(r=8, alpha=24, targets=("all",), rank_pattern={"mlp.down": 2}, alpha_pattern={"query": 5.0})
    mixed = {
        name: (tensor[:2] if name.endswith("a") else tensor[:, :2]) if "mlp.down" in name else tensor
        for name, tensor in state.items()
    }
    smaller, settings = cut(mixed, spectra(mixed, config), config, 4)
    assert settings.rank_pattern == settings.alpha_pattern == {}
    for layer in ("blocks.0.mlp.down", "blocks.1.attn.value"):
        exact = config.scale(layer) * mixed[f"{layer}.lora_b"] @ mixed[f"{layer}.lora_a"]
        actual = settings.scale(layer) * smaller[f"{layer}.lora_b"] @ smaller[f"{layer}.lora_a"]
        if "mlp" in layer:  # it has no more than two directions
            torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
        assert actual.shape == exact.shape


def test_losses_fall_with_the_rank_and_the_worst_layer_loses_most(state):
    found = spectra(state, CONFIG)
    assert candidates(found) == [1, 2, 4, 8]
    losses = [loss_at(found, rank) for rank in range(1, 9)]
    assert [whole for whole, _ in losses] == sorted((whole for whole, _ in losses), reverse=True)
    assert all(worst >= whole for whole, worst in losses)
    assert losses[-1] == (0.0, 0.0)
    rank = smallest_rank(found, 0.1)
    assert loss_at(found, rank)[0] <= 0.1 < loss_at(found, rank - 1)[0]
    with pytest.raises(UsageError, match="every rank below 8 loses more"):
        smallest_rank(found, 0.0)


def test_a_layer_that_was_never_trained_loses_nothing():
    zero = {"x.lora_a": torch.randn(2, 4), "x.lora_b": torch.zeros(3, 2)}
    assert loss_at(spectra(zero, LoRAConfig(r=2)), 1) == (0.0, 0.0)


run = partial(run_here, "scripts/shrink_lora.py")


def test_peft_loads_what_the_command_writes(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hugging_face_model(tmp_path / "base", "llama-gqa")
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    model = trained(load_model(tmp_path / "base"), CONFIG)
    save(tmp_path / "final", model, CONFIG, tmp_path / "base")
    done = run("--lora_path", tmp_path / "final", "--checkpoint_dir", tmp_path / "base", "--rank", 3)
    assert done.returncode == 0, done.stderr
    assert "| 3 < |" in done.stdout
    smaller = read_adapter(tmp_path / "final-r3")
    assert smaller.config.r == 3
    assert smaller.manifest
    assert smaller.manifest["shrunk_from"]["r"] == 8
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "final-r3")
    for name, tensor in our_tensors(smaller, model.config).items():
        lora_state(model)[name].zero_()[tuple(slice(size) for size in tensor.shape)] = tensor
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TOKENS).logits, model(TOKENS), rtol=1e-3, atol=1e-3)


def test_the_command_measures_each_rank_and_refuses_what_cannot_be(tmp_path: Path, examples_file: Path):
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    model = load_model(base, quantize="bnb.nf4")
    facts = {"base": {"name": "x", "sha256": content_hash(base)}, "quantize": "bnb.nf4"}
    save_adapter(tmp_path / "final", trained(model, CONFIG), CONFIG, STYLES["qa"], facts)
    flags = ("--lora_path", tmp_path / "final", "--checkpoint_dir", base)
    done = run(*flags, "--verify", examples_file, "--verify_samples", 5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("| val loss |")
    assert len(done.stdout.splitlines()) == 2 + 4
    assert not list(tmp_path.glob("final-*"))
    for refused, why in (
        (("--rank", 8), "has 8 already"),
        (("--rank", 2, "--max_loss", 0.5), "Leave one out"),
        (("--rank", 2, "--out_dir", base), "exists"),
        (("--max_loss", 0.9, "--verify", tmp_path / "absent", "--out_dir", base), "exists"),
    ):
        done = run(*flags, *refused)
        assert done.returncode == UsageError.status
        assert why in done.stderr
    manifest = json.loads((tmp_path / "final/manifest.json").read_text())
    manifest["base"]["sha256"] = "0" * 64
    (tmp_path / "final/manifest.json").write_text(json.dumps(manifest))
    assert run(*flags, "--rank", 2).returncode == 4
