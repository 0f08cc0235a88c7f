"""A table of effects advises the storage with the least effect within a budget, on the base that it was measured on."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_stored
from lit_qlora.checkpoint.quantization_table import FILE, choose, read_table, within_budget, write_table
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.evaluate.quantization import Effects, groups_of, quantized, rows_of
from lit_qlora.quantize import QuantizedLinear, Storage, storage_bytes
from lit_qlora.settings import Budget, FinetuneConfig, Quantization
from tests.conftest import ROOT, run_here, tiny_model, write_checkpoint

ROWS = rows_of(list(range(3, 99)), 32)
CUSTOM = Quantization("bnb.nf4", False, (("head", "bnb.int8"), (r"blocks\.0\..*", "bnb.int8"), ("mlp.down", "none")))


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose effects are measured."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("measured") / "base")
    flags = ("--checkpoint_dir", folder, "--length", 16, "--tokens", 64)
    assert run_here("scripts/plan_quantization.py", *flags).returncode == 0
    return folder


def test_an_effect_is_the_divergence_of_the_distributions_in_double_precision() -> None:
    model = tiny_model()
    effects = Effects(model, ROWS)
    with torch.no_grad():
        before = model(ROWS).double().log_softmax(-1)
        with quantized(model, {"blocks.0.mlp.down": "bnb.nf4", "head": "bnb.int8"}):
            after = model(ROWS).double().log_softmax(-1)
    expected = float((before.exp() * (before - after)).sum() / ROWS.numel())
    assert effects.kl({"blocks.0.mlp.down": "bnb.nf4", "head": "bnb.int8"}) == pytest.approx(expected, rel=1e-3)
    assert effects.kl({}) == 0  # the model is as it was


def test_groups_hold_each_layer_once_and_all_experts_of_a_block_together() -> None:
    model = tiny_model(n_expert=4, n_expert_per_token=2, expert_size=64, router_normalized=True)
    groups = groups_of(model)
    names = [[path.removeprefix("blocks.0.") for path in group] for group in groups if group[0].startswith("blocks.0.")]
    assert names[:2] == [["attn.query", "attn.key", "attn.value"], ["attn.projection"]]
    experts = [path for path, _ in model.named_modules() if path.endswith((".gate", ".up")) and "blocks.0." in path]
    assert experts in groups
    linears = [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert sorted(path for group in groups for path in group) == sorted(linears)
    assert ["head"] not in groups_of(tiny_model(tied_head=True))  # it would take memory, beside the embedding


def test_a_storage_within_a_budget_takes_no_more_and_a_larger_budget_has_no_larger_effect(base: Path) -> None:
    table, effects = read_table(base), []
    assert table is not None
    for bits in (4.2, 5.0, 7.5, 12.0, 32.0):
        storage = choose(base, f"{bits}bits", torch.float32)
        model = load_stored(base, Storage(torch.float32, *storage), torch.device("cpu"))
        size, found = table.sizes(storage, model.config, torch.float32)
        assert found <= bits
        tables = sum(t.nbytes for n, t in model.named_buffers() if n.endswith(("code", "_offset", "absmax_code")))
        rows = sum(m.out_features * 4 for m in model.modules() if getattr(m, "scheme", "") == "bnb.int8")
        assert sum(storage_bytes(model).values()) - tables - rows == pytest.approx(size, rel=2e-3)
        effects.append(table.predicted(storage))
    assert effects == sorted(effects, reverse=True)
    assert effects[-1] == 0


def test_a_budget_in_bytes_counts_all_weights(base: Path) -> None:
    table, config = read_table(base), load_stored(base, Storage(), torch.device("cpu")).config
    assert table is not None
    least, _ = table.sizes(table.within(Budget(4.2, bits=True), config, torch.float32), config, torch.float32)
    assert table.within(Budget(least, bits=False), config, torch.float32)
    with pytest.raises(UsageError, match=r"its weights take at least 0\.\d+GB, and 4\.\d+bits a weight"):
        table.within(Budget(least / 2, bits=False), config, torch.float32)


def test_a_run_with_a_budget_becomes_one_that_names_its_layers(base: Path) -> None:
    config = FinetuneConfig(checkpoint_dir=base, quantize="auto", quantize_budget="6bits")
    settled = within_budget(config, torch.float32)
    assert settled.quantization == choose(base, "6bits", torch.float32)
    assert settled.quantization.layers
    assert within_budget(settled, torch.float32) is settled


def test_effects_that_could_not_be_kept_are_not_measured(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    (folder / "quantization.json").mkdir()
    done = run_here("scripts/plan_quantization.py", "--checkpoint_dir", folder)
    assert done.returncode == 6
    assert "quantization.json cannot be written" in done.stderr
    assert "groups of layers" not in done.stdout + done.stderr


@pytest.mark.parametrize(("free", "measured_in"), [(10**9, torch.float32), (10**5, torch.bfloat16)])
def test_a_gpu_measures_in_float32_where_that_fits(
    free: int, measured_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runpy.run_path(str(ROOT / "scripts/plan_quantization.py"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    config = tiny_model().config
    assert script["dtype_of_measurement"](config, torch.bfloat16, torch.device("cuda")) == measured_in
    assert script["dtype_of_measurement"](config, torch.float16, torch.device("cpu")) == torch.float16


def test_a_table_says_if_it_is_of_another_text(base: Path) -> None:
    of = ("scripts/plan_quantization.py", "--checkpoint_dir", base, "--tokens", "64")
    assert "of these weights and this text" in run_here(*of, "--length", 16).stdout
    assert "of these weights and another text" in run_here(*of[:-1], 32).stdout


def test_nothing_is_chosen_from_a_table_of_other_weights_or_a_damaged_one(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = write_checkpoint(tmp_path / "other", tiny_model(n_layer=1))
    with pytest.raises(CheckpointError, match=r"not measured\.\nMeasure them once: .*plan_quantization.*other"):
        choose(other, "5bits", torch.float32)
    table = read_table(base)
    assert table is not None
    write_table(other, table)
    assert read_table(other) is None
    content = json.loads((base / FILE).read_text())
    content["groups"][0]["kl"] = {"bnb.nf4": "much"}
    (other / FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"quantization\.json is damaged"):
        read_table(other)


def test_layers_have_the_storage_of_the_first_pattern_that_matches() -> None:
    of = Storage(torch.float32, *CUSTOM).scheme
    found = [of(path) for path in ("head", "blocks.0.mlp.down", "blocks.1.mlp.down", "blocks.1.mlp.up", "embed")]
    assert found == ["bnb.int8", "bnb.int8", "none", "bnb.nf4", "none"]


def test_a_mixed_base_is_loaded_as_its_layers_say(base: Path) -> None:
    model = load_stored(base, Storage(torch.float32, *CUSTOM), torch.device("cpu"))
    schemes = {path: module.scheme for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert schemes["head"] == schemes["blocks.0.attn.query"] == "bnb.int8"
    assert schemes["blocks.1.attn.query"] == "bnb.nf4"
    assert "blocks.1.mlp.down" not in schemes
    with pytest.raises(UsageError, match="quantize_layers: heads decides about no layer"):
        load_stored(base, Storage(torch.float32, "none", False, (("heads", "bnb.int8"),)), torch.device("cpu"))
