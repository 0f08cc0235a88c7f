"""The model that a command loads is the one that an adapter was trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.checkpoint.identity import base_facts
from lit_qlora.errors import CheckpointError
from lit_qlora.inference import InferenceConfig, RosterConfig, adapter_folder, load_for_inference, load_roster
from lit_qlora.lora.adapter import save_adapter
from lit_qlora.model.config import ModelConfig
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import DEMO_CHECKPOINT, LoRAConfig
from tests.conftest import run_here
from tests.lora.test_adapter import TOKENS, trained


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained on 4-bit weights, with its final adapter."""
    folder = tmp_path_factory.mktemp("runs") / "sums"
    config = LoRAConfig(targets=("all",))
    facts = {"base": base_facts(tiny_checkpoint), "quantize": "bnb.nf4", "quantize_head": True}
    model = trained(load_model(tiny_checkpoint, quantize="bnb.nf4", quantize_head=True), config)
    save_adapter(folder / "final", model, config, STYLES["qa"], facts)
    return folder


def changed(run: Path, folder: Path, **facts: object) -> Path:
    """A copy of the adapter whose manifest says something else."""
    shutil.copytree(run / "final", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | facts))
    return folder


def test_an_adapter_alone_is_the_model_that_was_trained(run: Path, tiny_checkpoint: Path) -> None:
    config = InferenceConfig(lora_path=run, precision="32-true")
    assert (config.base, config.adapter, config.storage) == (tiny_checkpoint, run / "final", ("bnb.nf4", True, ()))
    loaded = config.load()
    known = {"quantize": "bnb.nf4", "quantize_head": True, "precision": "32-true"}
    same = load_for_inference(tiny_checkpoint, run / "final", **known)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(loaded.model(TOKENS), same.model(TOKENS))
        plain = load_for_inference(tiny_checkpoint, run / "final", precision="32-true")
        assert not torch.allclose(loaded.model(TOKENS), plain.model(TOKENS))
    assert loaded.style == STYLES["qa"]


def test_one_line_says_how_the_base_is_loaded_unless_all_of_it_was_given(run: Path, tiny_checkpoint: Path) -> None:
    said = [f"The base is {tiny_checkpoint} with --quantize bnb.nf4, on which {run / 'final'} was trained."]
    assert InferenceConfig(lora_path=run).notes() == said
    assert InferenceConfig(lora_path=run, checkpoint_dir=tiny_checkpoint, quantize="none").notes() == []
    assert InferenceConfig().notes() == []


def test_what_is_given_wins_over_the_manifest(run: Path, tiny_checkpoint: Path) -> None:
    config = InferenceConfig(lora_path=run, quantize="none", checkpoint_dir=Path("elsewhere"))
    assert (config.base, config.storage) == (Path("elsewhere"), ("none", False, ()))


def test_layers_have_the_storage_of_the_training(run: Path, tmp_path: Path) -> None:
    mixed = changed(run, tmp_path / "mixed", quantize_head=False, quantize_layers={"head": "bnb.int8", "up": "none"})
    config = InferenceConfig(lora_path=mixed, precision="32-true")
    assert config.storage == ("bnb.nf4", False, (("head", "bnb.int8"), ("up", "none")))
    model = config.load().model
    assert model.head.scheme == "bnb.int8"
    assert isinstance(model.blocks[0].mlp.up.base, torch.nn.Linear)  # type: ignore[union-attr]
    damaged = changed(run, tmp_path / "damaged", quantize_layers={"head": "int3"})
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        _ = InferenceConfig(lora_path=damaged).storage


def test_without_an_adapter_nothing_is_quantised() -> None:
    assert (InferenceConfig().base, InferenceConfig().storage) == (DEMO_CHECKPOINT, ("none", False, ()))


def test_the_first_of_several_adapters_names_the_base(run: Path, tiny_checkpoint: Path) -> None:
    config = RosterConfig(adapters={"sums": run}, precision="32-true")
    assert (config.base, config.storage) == (tiny_checkpoint, ("bnb.nf4", True, ()))
    assert load_roster(config, config.adapters).names == ["tiny", "sums"]


def test_a_base_that_is_unknown_or_was_moved_must_be_given(run: Path, tmp_path: Path) -> None:
    unnamed = changed(run, tmp_path / "unnamed", base={"name": "x", "sha256": "y"})
    with pytest.raises(CheckpointError, match="does not say which base it was trained on"):
        _ = InferenceConfig(lora_path=unnamed).base
    moved = changed(run, tmp_path / "moved", base={"name": "x", "sha256": "y", "path": "/gone/base"})
    with pytest.raises(CheckpointError, match="trained on /gone/base, which does not exist here"):
        _ = InferenceConfig(lora_path=moved).base


@pytest.mark.parametrize("facts", [{"quantize": "bnb.nf5"}, {"quantize": ["none"]}, {"base": "x"}], ids=str)
def test_a_manifest_that_is_damaged_is_named(facts: dict[str, object], run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        InferenceConfig(lora_path=changed(run, tmp_path / "final", **facts)).notes()


def test_a_folder_without_an_adapter_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        _ = InferenceConfig(lora_path=tmp_path).base


def test_a_run_that_goes_on_names_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    for step in ("step-000002", "step-000010"):
        shutil.copytree(run / "final", tmp_path / step)
    with pytest.raises(CheckpointError, match=r"has not ended.*\n.*--lora_path \S*step-000010"):
        adapter_folder(tmp_path)
    assert adapter_folder(tmp_path / "step-000002") == tmp_path / "step-000002"


def test_an_adapters_file_stands_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out/lora/Mistral/final").mkdir(parents=True)
    final = Path("out/lora/Mistral/final")
    assert adapter_folder(final / "adapter_model.safetensors") == adapter_folder(final) == final
    assert adapter_folder(Path("out/lora/Mistral/lit_model_lora_finetuned.pth")) == final
    assert adapter_folder(Path("out/lora/alpaca/Mistral/lit_model_lora_finetuned.pth")) == final
    assert adapter_folder(Path("absent/lit_model_lora_finetuned.pth")) == Path("absent")  # named as it was given


def test_an_adapter_that_is_given_as_a_checkpoint_is_named_as_one(run: Path) -> None:
    for folder in (run, run / "final"):
        with pytest.raises(
            CheckpointError, match=rf"an adapter, not a checkpoint(?s:.*)merge_lora.py --lora_path {folder}"
        ):
            ModelConfig.load(folder)


def test_perplexity_of_an_adapter_is_that_of_the_trained_model(
    run: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Q: What is 1 plus 2?\nA: 3\n" * 9)
    flags = ("--lora_path", run, "--file", tmp_path / "text.txt")
    whole = ("--checkpoint_dir", tiny_checkpoint, "--quantize", "bnb.nf4", "--quantize_head", "true")
    alone, told, plain = (
        run_here("eval/perplexity.py", *flags, *more).stdout for more in ((), whole, ("--quantize", "none"))
    )
    assert alone == told != plain
    assert "loss" in alone
