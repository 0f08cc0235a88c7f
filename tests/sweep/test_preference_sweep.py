"""Sweeps over preferences."""

import json
from pathlib import Path

import pytest

from lit_qlora import cli
from lit_qlora.settings import PreferenceRunConfig, PreferenceSweepConfig, is_of_preferences
from lit_qlora.sweep.conduct import sweep
from lit_qlora.sweep.trials import plan_trials


@pytest.fixture
def flags(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    """Two trials of two steps on pairs."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {a} plus 1?", "chosen": f"{a + 1}", "rejected": f"It is {a + 1}."} for a in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"--checkpoint_dir={tiny_checkpoint}",
        f"--data.path={path}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--out_dir={tmp_path / 'out'}",
        "--data.prompt=qa",
        "--data.val_fraction=0.25",
        "--train.max_steps=2",
        "--train.batch_size=4",
        "--train.learning_rate=0.01",
        "--eval.every=2",
        "--sweep.grid={preference.loss: [dpo, ipo]}",
        "--sweep.metric=val_reward_accuracy",
    ]


def test_a_setting_of_preferences_makes_a_sweep_one_of_preferences(flags: list[str], tmp_path: Path) -> None:
    assert is_of_preferences(flags)
    file = tmp_path / "sweep.yaml"
    file.write_text("lora: {r: 2}\npreference: {loss: kto}\n")
    assert is_of_preferences(["--config", str(file)])
    file.write_text("lora: {r: 2}\n")
    assert not is_of_preferences([f"--config={file}", "--lora.r", "3"])
    assert not is_of_preferences(["--config", str(tmp_path / "absent.yaml")])


@pytest.mark.slow
def test_trials_learn_from_preferences_and_are_compared_by_their_metrics(flags: list[str]) -> None:
    config = cli.parse(PreferenceSweepConfig, flags)
    assert config.out_dir
    trials = plan_trials(config, config.out_dir)
    assert all(isinstance(trial.config, PreferenceRunConfig) for trial in trials)
    assert [trial.config.preference.loss for trial in trials] == ["dpo", "ipo"]  # type: ignore[attr-defined]
    assert trials[0].config.train.epochs == 1.0  # the default of finetune/preference.py
    out = sweep(config)
    facts = json.loads((out / "sweep.json").read_text())
    assert "val_reward_accuracy" in json.dumps(facts)
    assert "finetune/preference.py --config" in (out / "sweep.html").read_text()
    for number in (1, 2):
        log = (out / f"trial-{number:03}/log.jsonl").read_text()
        assert "val_reward_margin" in log
