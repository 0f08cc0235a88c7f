"""A context is lengthened for an adapter, as transformers does with the same parameters, and its exports know."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.to_hugging_face import export_hf, scaling_table
from lit_qlora.errors import UsageError
from lit_qlora.inference import InferenceConfig, load_for_inference, load_roster
from lit_qlora.lora.adapter import load_adapter, read_adapter
from lit_qlora.lora.adapter_switch import AdapterSwitch
from lit_qlora.lora.layer import add_lora
from lit_qlora.lora.merge import Merge, merge_checkpoint
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.rope_scaling import scaled
from lit_qlora.quantize import Storage
from lit_qlora.run.fits import longest_row
from lit_qlora.run.plan import Planner, Room
from lit_qlora.settings import LoRAConfig, TrainConfig
from tests.conftest import run_here, tiny_config, tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import save, trained
from tests.reference import hugging_face_model

KINDS: list[Any] = ["yarn", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "dynamic", "llama3"))]
LONG = torch.randint(0, 96, (1, 150), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_with_a_longer_context_is_merged_exported_and_loaded_by_transformers_and_peft(
    kind: Any, tmp_path: Path
) -> None:
    base, config = tmp_path / "base", LoRAConfig(targets=("query", "mlp"), rope_scaling=kind, rope_factor=4.0)
    plain = hugging_face_model(base, "llama-gqa")  # a context of 64
    convert_hf_checkpoint(base, base)
    ours = trained(load_model(base), config)
    assert ours.config.block_size == 256
    save(tmp_path / "adapter", ours, config, base)
    merge_checkpoint(read_adapter(tmp_path / "adapter"), base, tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = ours(LONG)
        assert (plain(LONG).logits - expected).abs().max() > 1e-2
        assert torch.equal(attached(base, tmp_path / "adapter")(LONG), expected)
        torch.testing.assert_close(load_model(tmp_path / "merged").eval()(LONG), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs(LONG).logits, expected, rtol=1e-4, atol=1e-4)
        code = (tmp_path / "adapter/README.md").read_text().split("```python\n")[1].partition("tokenizer =")[0]
        known: dict[str, Any] = {}
        exec(code.replace('"x"', repr(str(base))).replace('"."', repr(str(tmp_path / "adapter"))), known)
        torch.testing.assert_close(known["model"](LONG).logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(known["model"], peft.PeftModel)
    converted = convert_hf_checkpoint(tmp_path / "hf", tmp_path / "again")
    assert scaling_table(converted) == scaling_table(ours.config)
    assert converted.block_size == (64 if kind == "dynamic" else 256)


def attached(base: Path, folder: Path) -> Any:
    """The base with the adapter on it."""
    model = load_model(base)
    add_lora(model, read_adapter(folder).config)
    load_adapter(model, folder)
    return model.eval()


@pytest.fixture
def long(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an adapter with a longer context."""
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    config = LoRAConfig(rope_scaling="yarn", rope_factor=2.0)
    save(tmp_path / "long", trained(load_model(base), config), config, base)
    return base, tmp_path / "long"


def test_what_loads_an_adapter_gives_the_base_its_context(long: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = long
    loaded = load_for_inference(base, folder, precision="32-true")
    roster = load_roster(InferenceConfig(checkpoint_dir=base, lora_path=folder, precision="32-true"), {})
    assert loaded.model.config.block_size == roster.model.config.block_size == 192
    tokens = torch.randint(0, 300, (1, 150))
    with torch.no_grad(), roster.answering(roster.names[1]):
        torch.testing.assert_close(roster.model(tokens), loaded.model(tokens), rtol=1e-4, atol=1e-4)


def test_it_shares_no_base_with_another_context_and_is_merged_alone(long: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = long
    adapter = read_adapter(folder)
    with pytest.raises(UsageError, match="has a context of its own"):
        AdapterSwitch(load_model(base)).add("a", adapter)
    with pytest.raises(UsageError, match="can be merged alone and with weight 1 only"):
        Merge([adapter], base, weights=[0.5])


def test_a_plan_reaches_as_far() -> None:
    lora = LoRAConfig(rope_scaling="yarn", rope_factor=4.0)
    planner = Planner(tiny_config(), lora, Storage(torch.float32), TrainConfig())
    assert longest_row(planner, Room(gpu=2**40)) == 4 * 96


@pytest.mark.slow
def test_a_run_from_it_and_what_is_cut_from_it_keep_its_context(
    long: tuple[Path, Path], examples_file: Path, tmp_path: Path
) -> None:
    base, folder = long
    flags = ("--checkpoint_dir", base, "--data.path", examples_file, "--data.prompt", "qa", "--data.max_length", 150)
    refused = run_here("finetune/lora.py", *flags, "--out_dir", tmp_path / "out", "--dry_run", "true")
    assert "--lora.rope_scaling yarn --lora.rope_factor 4 makes it four times as long" in refused.stderr
    further = ("--lora.start", folder, "--train.max_steps", 2, "--out_dir", tmp_path / "out")
    assert run_here("finetune/lora.py", *flags, *further).returncode == 0
    cut = ("--lora_path", tmp_path / "out", "--checkpoint_dir", base, "--rank", 2, "--out_dir", tmp_path / "small")
    assert run_here("scripts/shrink_lora.py", *cut).returncode == 0
    for kept in (tmp_path / "out/final", tmp_path / "small"):
        assert read_adapter(kept).config.rope == ("yarn", 2.0)
        assert "| context | 192 tokens (yarn, 2 times) |" in (kept / "README.md").read_text()
        assert load_for_inference(base, kept, precision="32-true").model.config.block_size == 192


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": "learned"}, "has learned positions"),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, r"has scaled positions already \(linear, factor 2\)"),
        ({"rope_local_theta": 100.0, "sliding_window": 8}, "with a window and without one otherwise"),
        ({"query_scale_beta": 0.5}, "scales its queries"),
    ],
)
def test_positions_that_cannot_be_scaled_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        scaled(tiny_config(**changes), "yarn", 4.0)
    assert scaled(tiny_config(**changes), "none", 1.0) == ModelConfig(**vars(tiny_config(**changes)))


@pytest.mark.parametrize("wrong", [{"rope_scaling": "yarn"}, {"rope_factor": 2.0}])
def test_a_kind_needs_a_factor_and_a_factor_a_kind(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="contradict each other"):
        LoRAConfig(**wrong)
