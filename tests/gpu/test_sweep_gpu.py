"""On a GPU the trials of a sweep, which share a base on the fast path, are the runs that they would be alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lit_qlora import cli
from lit_qlora.run.finetune import finetune
from lit_qlora.settings import SweepConfig
from lit_qlora.sweep.conduct import sweep
from lit_qlora.sweep.trials import plan_trials

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4-dq", "bnb.int8"])
def test_trials_on_one_base_are_runs_of_their_own(scheme: str, tmp_path: Path) -> None:
    config = cli.parse(
        SweepConfig,
        [
            f"--quantize={scheme}",
            f"--out_dir={tmp_path / 'sweep'}",
            "--data.path=finetune/demo",
            "--train.max_steps=6",
            "--eval.every=3",
            "--deterministic=true",
            "--sweep.variants=[{lora.r: 4}, {lora.r: 16, lora.targets: all}, {lora.r: 8, lora.targets: [query, head]}]",
        ],
    )
    out = sweep(config)
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"done"}
    for trial in plan_trials(config, out):
        alone = finetune(replace(trial.config, out_dir=tmp_path / f"{trial.name}-alone"))
        weights = [(folder / "final/adapter_model.safetensors").read_bytes() for folder in (trial.folder, alone)]
        assert weights[0] == weights[1], trial.name
