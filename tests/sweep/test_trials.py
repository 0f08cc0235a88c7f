"""The trials of a sweep have the settings that finetune/lora.py would read, and keep their folders."""

import json
from pathlib import Path

import pytest

from lit_qlora.errors import UsageError
from lit_qlora.settings import LoRAConfig
from lit_qlora.sweep.trials import draw, plan_trials, write_names
from tests.sweep.conftest import Configure

GRID = "--sweep.grid={lora.r: [2, 4]}"


def test_each_variant_meets_each_point_of_the_grid_and_each_seed(configure: Configure, tmp_path: Path) -> None:
    variants = "--sweep.variants={adam: {}, sgd: {optimizer.name: sgd, train.learning_rate: 0.1}}"
    trials = plan_trials(configure(GRID, variants, "--sweep.seeds=[1, 2]"), tmp_path)
    found = [(t.variant, t.config.optimizer.name, t.config.lora.r, t.config.seed) for t in trials]
    assert found == [(v, n, r, s) for v, n in (("adam", "adamw"), ("sgd", "sgd")) for r in (2, 4) for s in (1, 2)]
    assert [t.name for t in trials] == [f"trial-00{number}" for number in range(1, 9)]
    assert {t.config.data.split_seed for t in trials} == {1337}
    assert len({t.group for t in trials}) == 4


def test_any_kind_of_setting_is_swept(configure: Configure, tmp_path: Path) -> None:
    grid = {
        "lora.targets": [["query", "mlp"], "all"],
        "lora.rank_pattern": [{"mlp.down": 3}],
        "train.max_steps": [None],
        "data.packing": [True],
        "data.system": ["a, b: c"],
    }
    first, second = (t.config for t in plan_trials(configure(f"--sweep.grid={json.dumps(grid)}"), tmp_path))
    assert first.lora == LoRAConfig(targets=("query", "mlp"), rank_pattern={"mlp.down": 3})
    assert second.lora.targets == ("all",)
    assert (first.train.max_steps, first.data.packing, first.data.system) == (None, True, "a, b: c")


def test_a_larger_number_of_draws_keeps_the_earlier_ones(configure: Configure) -> None:
    spaces = (
        "--sweep.random={lora.r: [2, 4, 8], train.learning_rate: {log: [1e-5, 1e-2]}, lora.alpha: {integer: [1, 9]}}"
    )
    sweep = configure(spaces, "--sweep.draws=40").sweep
    drawn = [draw(sweep, number) for number in range(40)]
    assert drawn[:3] == [draw(configure(spaces, "--sweep.draws=3").sweep, number) for number in range(3)]
    assert {one["lora.r"] for one in drawn} == {2, 4, 8}
    assert {one["lora.alpha"] for one in drawn} == set(range(1, 10))
    rates = sorted(one["train.learning_rate"] for one in drawn)
    assert 1e-5 <= rates[0] < 1e-4 < 1e-3 < rates[-1] <= 1e-2


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seed=1", "no trials"),
        ("--sweep.grid={lora.rr: [1]}", "trial with lora.rr 1: lora.rr is not a setting.*Did you mean --lora.r"),
        ("--sweep.grid={lora: [{r: 1}]}", "lora is a section. Name its settings, such as lora.r"),
        ("--sweep.grid={lorra.r: [1]}", "lorra.* is not a setting"),
        ("--sweep.grid={seed.r: [1]}", "seed.r is not a setting"),
        ("--sweep.grid={lora.r: [0]}", "lora.r must be at least 1, got 0"),
        ("--sweep.grid={out_dir: [a]}", "out_dir is a setting of the whole sweep"),
        ("--sweep.grid={lora.r: []}", "has no values"),
        ("--sweep.variants=[{lora.r: 1}, {lora.alpha: 3}]@--sweep.grid={lora.r: [2]}", "lora.r is named twice"),
        ("--sweep.random={lora.r: {log: [0, 3]}}@--sweep.draws=1", "must be a list of values"),
        ("--sweep.random={lora.r: [1]}", "Give both"),
        ("--sweep.random={lora.r: {integer: [2.5, 8]}}@--sweep.draws=1", "lora.r: the ends of .* must be whole, got"),
        ("--sweep.grid={lora.r: [1]}@--sweep.search=optuna", "no effect without sweep.draws"),
        ("--sweep.random={lora.r: [1]}@--sweep.draws=1@--sweep.draws_at_once=2", "no effect without sweep.search"),
        (
            "--sweep.random={lora.r: [1]}@--sweep.draws=1@--sweep.search=optuna@--sweep.halving=2",
            "sweep.halving has no part",
        ),
        ("--sweep.rungs=[0.5]", "without sweep.halving"),
        ("--sweep.seeds=[1, 1]", "must be different"),
        ("--sweep.seeds=[1]@--seed=-1", "must be a number"),
        ("--devices=2", "devices has no effect on a sweep"),
        ("--extend", "extend has no effect on a sweep"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(
    configure: Configure, tmp_path: Path, flag: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        plan_trials(configure(*flag.split("@")), tmp_path)


def test_a_sweep_that_grows_keeps_the_folders_of_its_trials(configure: Configure, tmp_path: Path) -> None:
    before = configure("--sweep.grid={lora.r: [4]}")
    write_names(tmp_path, before.run, plan_trials(before, tmp_path))
    trials = plan_trials(configure("--sweep.grid={lora.r: [2, 4]}"), tmp_path)
    assert {trial.config.lora.r: trial.name for trial in trials} == {4: "trial-001", 2: "trial-002"}


def test_trials_with_other_common_settings_are_never_mixed(configure: Configure, tmp_path: Path) -> None:
    before = configure(GRID)
    write_names(tmp_path, before.run, plan_trials(before, tmp_path))
    with pytest.raises(UsageError, match=r"train.max_steps  4 -> 5\nTake another --out_dir"):
        plan_trials(configure(GRID, "--train.max_steps=5"), tmp_path)
    assert len(plan_trials(configure(GRID, "--log.to=[tensorboard]"), tmp_path)) == 2
