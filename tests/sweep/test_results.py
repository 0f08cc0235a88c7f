"""The tables and pictures of a sweep show its trials as their folders have them."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import split

import pytest

from lit_qlora import cli
from lit_qlora.evaluate.sample_losses import SampleLosses
from lit_qlora.settings import FinetuneConfig
from lit_qlora.sweep.pages import places, write_results
from lit_qlora.sweep.results import Result, Results, read_results
from lit_qlora.sweep.state import State, write_state
from lit_qlora.sweep.trials import Trial, plan_trials
from tests.sweep.conftest import Configure

SAMPLES = [f"s{number}" for number in range(20)]


def left(trial: Trial, losses: Sequence[float], over: bool = True, samples: Sequence[str] = SAMPLES) -> None:
    """Write what a run of four steps leaves, with these losses of samples of two tokens."""
    trial.folder.mkdir(parents=True)
    step = {"step": 4, "loss": 1.0, "peak_gib": 0.5, "seconds": 3.0}
    step |= dict.fromkeys(("epoch", "lr", "grad_norm", "tokens", "samples", "tokens_per_second"), 1)
    value = {"step": 4, "val_loss": sum(losses) / 2 / len(losses), "val_ppl": 3.0}
    before = {"step": 0, "val_loss": 9.0, "val_ppl": 3.0}
    (trial.folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (before, step, value)))
    kept = SampleLosses(samples=tuple(samples), labelled=(2,) * len(samples), losses={4: tuple(losses)})
    kept.write(trial.folder)
    if over:
        (trial.folder / "summary.json").write_text('{"trainable_parameters": 1234}')


@pytest.fixture
def results(configure: Configure, tmp_path: Path) -> Results:
    """A setting that is best, one that noise may have made worse, one that is worse, one paused, one failed."""
    grid = "--sweep.grid={lora.r: [2, 4, 6, 8, 10], lora.alpha: [16.0]}"
    trials = plan_trials(configure(grid), tmp_path)
    hard = [2.0 + (7 * number) % 5 for number in range(20)]
    left(trials[0], hard)
    left(trials[1], [loss + 0.5 for loss in hard])
    left(trials[2], [loss + (0.4 if number % 2 else -0.3) for number, loss in enumerate(hard)])
    left(trials[3], hard, over=False)
    write_state(trials[3], State(reached=0.25, total=16))
    write_state(trials[4], State(error="Out of memory.\nmore", status=6))
    return read_results(trials, "val_loss")


def test_rows_are_sorted_best_first_and_marked_beyond_noise(results: Results) -> None:
    assert [row.name for row in results.rows] == ["trial-001", "trial-003", "trial-002", "trial-004", "trial-005"]
    assert [row.against_best and row.against_best.differs_from_zero for row in results.rows[:3]] == [None, False, True]
    assert results.settings == ["lora.r"]
    assert results.header() == [
        *("trial", "lora.r", "val_loss", "against best", "trainable", "peak GiB", "time", "status")
    ]
    assert results.cells(results.rows[2]) == [
        *("trial-002", "4", "2.2500", "+0.2500 ± 0.0000 *", "1,234", "0.50", "3 s", "done")
    ]
    assert [results.cells(row)[-1] for row in results.rows[3:]] == ["paused at 4 of 16", "failed: Out of memory."]


def test_the_commands_of_a_row_are_read_by_finetune(results: Results) -> None:
    runs = [run for row in results.facts()["rows"] for run in row["runs"]]
    done, paused, failed = runs[0], runs[3], runs[4]
    (Path(done["lengthen"].split()[3])).write_text(cli.to_yaml(results.rows[0].first.trial.config))
    longer = cli.parse(FinetuneConfig, split(done["lengthen"])[2:])
    assert (longer.extend, longer.train.max_steps, longer.lora.r) == (True, 8, 2)
    again = cli.parse(FinetuneConfig, split(done["reproduce"])[2:])
    assert again == replace(results.rows[0].first.trial.config, out_dir=again.out_dir)
    assert "go_on" in paused
    assert failed["error"] == "Out of memory.\nmore"


def test_rows_on_other_samples_are_not_compared_sample_by_sample(configure: Configure, tmp_path: Path) -> None:
    trials = plan_trials(configure("--sweep.grid={data.prompt: [qa, plain]}"), tmp_path)
    left(trials[0], [1.0] * 20)
    left(trials[1], [2.0] * 20, samples=SAMPLES[::-1])
    assert [row.against_best for row in read_results(trials, "val_loss").rows] == [None, None]


def test_repetitions_are_one_row_with_an_interval(configure: Configure, tmp_path: Path) -> None:
    trials = plan_trials(configure("--sweep.grid={lora.r: [2, 4]}", "--sweep.seeds=[1, 2, 3]"), tmp_path)
    for number, trial in enumerate(trials):
        left(trial, [float(number)] * 20)
    first, second = read_results(trials, "val_loss").rows
    assert [row.name for row in (first, second)] == ["trial-001, 002, 003", "trial-004, 005, 006"]
    assert first.values["val_loss"].value == pytest.approx(0.5)
    assert first.values["val_loss"].half == pytest.approx(4.303 * 0.5 / math.sqrt(3))
    assert second.against_best
    assert second.against_best.value == pytest.approx(1.5)
    assert not second.against_best.differs_from_zero  # seeds differ by more


def test_pages_have_each_row_and_two_pictures(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path)
    text, html = ((tmp_path / name).read_text() for name in ("sweep.md", "sweep.html"))
    for row in results.rows:
        assert f"| {' | '.join(results.cells(row))} |" in text
        assert all(f"<td>{cell}</td>" in html for cell in results.cells(row))
    assert html.count("<svg") == 2
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert (tmp_path / "settings.png").stat().st_size > 5000
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"][0]["trials"] == ["trial-001"]


def test_axes_sort_numbers_by_size_and_texts_behind_them() -> None:
    assert places([16, "auto", 8]) == ([0.5, 1.0, 0.0], [(0.0, "8"), (0.5, "16"), (1.0, "auto")])
    heights, marks = places([1.0, 3.0], numbers=True)
    assert (heights, [text for _, text in marks]) == ([0.0, 1.0], ["1", "2", "3"])


def test_a_trial_that_has_not_begun_is_a_row(configure: Configure, tmp_path: Path) -> None:
    rows = read_results(plan_trials(configure("--sweep.grid={lora.r: [2]}"), tmp_path), "val_loss").rows
    result: Result = rows[0].first
    assert (result.status, result.step, result.values) == ("waiting", 0, {})
