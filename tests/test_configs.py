"""The recipes of finetune/configs/: each is an experiment that was published, with its number of parameters."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from lit_qlora import cli
from lit_qlora.convert.families import read_config
from lit_qlora.errors import UsageError
from lit_qlora.model.config import ModelConfig
from lit_qlora.quantize import Storage
from lit_qlora.run.banner import check_trainable
from lit_qlora.run.plan import MicroBatches, Room, make_plan
from lit_qlora.settings import FinetuneConfig, SweepConfig
from lit_qlora.sweep.trials import plan_trials
from tests.conftest import ROOT, load_script

CONFIGS = ROOT / "finetune/configs"
DEMO = ROOT / "checkpoints/lit-qlora/tiny-world"
PUBLISHED = {
    "alpaca-7b-all-layers": 20_277_248,
    "alpaca-7b-default": 4_194_304,
    "alpaca-7b-fp4": 4_194_304,
    "alpaca-7b-nf4": 4_194_304,
    "alpaca-7b-r16": 40_554_496,
    "alpaca-7b-r16-alpha32": 40_554_496,
    "alpaca-7b-r256-alpha512": 648_871_936,
    "alpaca-7b-schedule": 4_194_304,
    "alpaca-7b-sgd": 4_194_304,
    "alpaca-7b-two-epochs": 4_194_304,
    "guanaco-7b": 159_907_840,
    "guanaco-13b": 64 * 40 * (8 * 5120 + 3 * (5120 + 13824)),
    "guanaco-33b": 64 * 60 * (8 * 6656 + 3 * (6656 + 17920)),
    "guanaco-65b": 64 * 80 * (8 * 8192 + 3 * (8192 + 22016)),
    "h2o-line-1.7b-r4": 884_736,
    "h2o-line-1.7b-r8": 1_769_472,
    "h2o-line-1.7b-r16": 3_538_944,
    "openllama-3b-r8": 2_662_400,
    "openllama-3b-r16": 5_324_800,
    "openllama-3b-r8-all": 12_994_560,
    "openllama-3b-r8-all-int8": 12_994_560,
}
"""Trainable parameters, as published; of the larger Guanacos, which were not, r (in + out) of each layer."""
NAMES = sorted(PUBLISHED)


def llama(width: int, layers: int, heads: int, ffn: int) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


SHAPES = {
    "meta-llama/Llama-2-7b-hf": llama(4096, 32, 32, 11008),
    "huggyllama/llama-7b": llama(4096, 32, 32, 11008),
    "huggyllama/llama-13b": llama(5120, 40, 40, 13824),
    "huggyllama/llama-30b": llama(6656, 60, 52, 17920),
    "huggyllama/llama-65b": llama(8192, 80, 64, 22016),
    "openlm-research/open_llama_3b_v2": llama(3200, 26, 32, 8640),
    "line-corporation/japanese-large-lm-1.7b-instruction-sft": {
        "model_type": "gpt2",
        "vocab_size": 51200,
        "n_embd": 2304,
        "n_layer": 24,
        "n_head": 24,
        "n_positions": 2048,
    },
}
"""What their config.json says of their shapes."""


@cache
def recipe(name: str, *flags: str) -> FinetuneConfig:
    """The settings of a recipe. Read only."""
    return cli.parse(FinetuneConfig, [f"--config={CONFIGS / f'{name}.yaml'}", *flags])


def trainable(config: FinetuneConfig, base: ModelConfig) -> int:
    storage = Storage(torch.bfloat16, *config.quantization)
    plan = make_plan(base, config.lora, storage, MicroBatches(512), config.train, Room())
    return plan.trainable


def test_every_recipe_is_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize(("name", "others"), [("alpaca-7b", 6), ("openllama-3b", 0)])
def test_the_variants_of_a_sweep_are_the_recipes(name: str, others: int, tmp_path: Path) -> None:
    """Others than recipes are repetitions, and controls that differ from a recipe in alpha."""
    file = CONFIGS / f"sweeps/{name}.yaml"
    trials = {trial.variant: trial for trial in plan_trials(cli.parse(SweepConfig, [f"--config={file}"]), tmp_path)}
    recipes = [stem for stem in NAMES if stem.startswith(f"{name}-")]
    assert len(trials) == len(recipes) + others
    for stem in recipes:
        own = trials[stem.removeprefix(f"{name}-")].config
        alone = recipe(stem)
        data = replace(alone.data, split_seed=own.data.split_seed)
        assert own == replace(alone, out_dir=own.out_dir, data=data, published={})
        assert own.data.split_seed in (None, own.seed)
    for trial in trials.values():
        assert trainable(trial.config, read_config(SHAPES["/".join(own.checkpoint_dir.parts[-2:])], "a/b")) == next(
            iter(trial.config.expect_trainable.values())
        )


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").iterdir()), ids=lambda path: path.stem)
def test_a_sweep_says_how_to_run_it(path: Path) -> None:
    assert f"# python finetune/sweep.py --config finetune/configs/sweeps/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_as_many_parameters_as_were_published(name: str) -> None:
    config = recipe(name)
    base = "/".join(config.checkpoint_dir.parts[-2:])
    assert base in config.expect_trainable
    for known, count in config.expect_trainable.items():
        assert count == PUBLISHED[name]
        assert trainable(config, read_config(SHAPES[known], known)) == count
        check_trainable(config.expect_trainable, known, count)
        with pytest.raises(
            UsageError, match=f"wants {count:,} trainable .* {known}, and these settings give {count + 1:,}"
        ):
            check_trainable(config.expect_trainable, known, count + 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_does_not_contradict_what_it_says_was_published(name: str) -> None:
    config = recipe(name)
    counts = {base: values["trainable_parameters"] for base, values in config.published.items()}
    assert counts in ({}, config.expect_trainable)


def test_llama_2_has_as_many_frozen_parameters_as_was_published() -> None:
    config, base = recipe("alpaca-7b-nf4"), read_config(SHAPES["meta-llama/Llama-2-7b-hf"], "a/b")
    plan = make_plan(base, config.lora, Storage(torch.bfloat16), MicroBatches(512), config.train, Room())
    assert plan.frozen == 6_738_415_616


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_to_run_it(name: str) -> None:
    assert f"# python finetune/lora.py --config finetune/configs/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def run(name: str, out: Path, *flags: str) -> int:
    try:
        cli.run(
            load_script("finetune/lora.py").main,
            FinetuneConfig,
            [f"--config={CONFIGS / f'{name}.yaml'}", f"--out_dir={out}", "--data.max_length=96", *flags],
        )
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_recipe_is_refused_where_it_would_train_something_else(
    tiny_checkpoint: Path, examples_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--checkpoint_dir={tiny_checkpoint}", f"--data.path={examples_file}", "--data.prompt=qa"]
    assert run("alpaca-7b-default", tmp_path / "out", *flags, "--expect_trainable={test/tiny: 7}", "--dry_run") == 2
    assert "expect_trainable wants 7 trainable parameters for test/tiny" in capsys.readouterr().err


QUICK = {"alpaca-7b-nf4", "guanaco-7b", "openllama-3b-r8-all-int8"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES]
)
def test_a_recipe_can_be_planned_on_the_demo(name: str, tmp_path: Path) -> None:
    flags = [f"--checkpoint_dir={DEMO}", f"--data.path={ROOT / 'finetune/demo'}", f"--data.cache_dir={tmp_path}"]
    assert run(name, tmp_path / "out", *flags, "--dry_run") == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "alpaca-7b-sgd" else []) for name in NAMES]
)
def test_a_recipe_trains_the_demo(name: str, tmp_path: Path) -> None:
    flags = [f"--checkpoint_dir={DEMO}", f"--data.path={ROOT / 'finetune/demo'}", f"--data.cache_dir={tmp_path}"]
    few = ["--train.max_steps=2", "--train.batch_size=4", "--eval.max_samples=4"]
    assert run(name, tmp_path / "out", *flags, *few) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["trainable_parameters"] == trainable(recipe(name), ModelConfig.load(DEMO))
