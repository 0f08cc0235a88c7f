"""A search learns from whole trials, and chooses the same whatever stops it."""

import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from lit_qlora.errors import UsageError, UserError
from lit_qlora.settings import FinetuneConfig, SweepPart
from lit_qlora.sweep import conduct
from lit_qlora.sweep.conduct import sweep
from lit_qlora.sweep.study import choose_draws
from lit_qlora.sweep.trials import Changes
from tests.run.forked import Child, at_save, signals
from tests.sweep.conftest import Configure

SPACE = "--sweep.random={lora.r: {integer: [1, 9]}, lora.alpha: [8, 16]}"
SEARCH = (SPACE, "--sweep.search=optuna")
Told = list[tuple[Changes, float]]


def leaves_loss(stop_at: int | None = None, fails: Sequence[int] = ()) -> Callable[..., Path]:
    """A run whose loss is its rank and seed; that of some ranks fails, and the one with a number is interrupted."""
    begun = []

    def run(config: FinetuneConfig, *given: Any) -> Path:
        assert config.out_dir is not None
        begun.append(config.out_dir)
        if len(begun) == stop_at:
            raise KeyboardInterrupt
        if config.lora.r in fails:
            raise UserError("the loss is NaN")
        config.out_dir.mkdir(parents=True)
        (config.out_dir / "log.jsonl").write_text(json.dumps({"step": 4, "val_loss": config.lora.r + config.seed}))
        (config.out_dir / "summary.json").write_text("{}")
        return config.out_dir

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, no_pages: None) -> list[Told]:
    """What each choice was told; the draw after n others has the rank n + 1."""
    calls: list[Told] = []

    def choose(part: SweepPart, told: Told, count: int) -> list[Changes]:
        calls.append(list(told))
        return [{"lora.r": 1 + len(told) + more, "lora.alpha": 8} for more in range(count)]

    monkeypatch.setattr(conduct, "choose_draws", choose)
    monkeypatch.setattr(conduct, "free_memory", lambda: None)  # which takes half of the time here
    monkeypatch.setattr(conduct, "finetune", leaves_loss(fails=[2]))
    return calls


def test_each_choice_is_told_what_the_draws_before_came_to(configure: Configure, asked: list[Told]) -> None:
    sweep(configure(*SEARCH, "--sweep.draws=4", "--sweep.seeds=[1, 3]"))
    assert [len(told) for told in asked] == [0, 1, 2, 3]
    assert asked[-1] == [({"lora.r": r, "lora.alpha": 8}, value) for r, value in ((1, 3), (2, math.inf), (3, 5))]


def test_a_draw_with_a_list_of_values_is_told_as_any_other(
    configure: Configure, asked: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = {"lora.r": 3, "lora.targets": ["query", "value"]}
    told_before: list[Told] = []

    def choose(part: SweepPart, told: Told, count: int) -> list[Changes]:
        told_before.append(list(told))
        return [{**draw, "lora.r": 3 + len(told)}]

    monkeypatch.setattr(conduct, "choose_draws", choose)
    space = "--sweep.random={lora.r: {integer: [1, 9]}, lora.targets: [all, [query, value]]}"
    sweep(configure(space, "--sweep.search=optuna", "--sweep.draws=2", "--sweep.seeds=[1]"))
    assert told_before == [[], [(draw, 3 + 1)]]


def test_draws_of_one_choice_do_not_learn_of_each_other(configure: Configure, asked: list[Told]) -> None:
    out = sweep(configure(*SEARCH, "--sweep.draws=5", "--sweep.draws_at_once=2"))
    assert [len(told) for told in asked] == [0, 2, 4]
    sweep(configure(*SEARCH, "--sweep.draws=6", "--sweep.draws_at_once=2"))
    assert [len(told) for told in asked] == [0, 2, 4, 4]
    assert [draw["lora.r"] for draw in json.loads((out / "study.json").read_text())["draws"]] == [1, 2, 3, 4, 5, 6]


def test_a_search_that_was_stopped_goes_on_with_the_same_study(
    configure: Configure, asked: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(*SEARCH, "--sweep.draws=4")
    monkeypatch.setattr(conduct, "finetune", leaves_loss(stop_at=3, fails=[2]))
    with pytest.raises(KeyboardInterrupt):
        sweep(config)
    monkeypatch.setattr(conduct, "finetune", leaves_loss(fails=[2]))
    out = sweep(config)
    assert [len(told) for told in asked] == [0, 1, 2, 3]  # the third draw is not chosen again
    assert asked[-1][:2] == asked[-2]
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["variant"], row["status"]) for row in rows] == [
        ("1", "done"),
        ("3", "done"),
        ("4", "done"),
        ("2", "failed"),
    ]


def test_a_draw_that_no_trial_can_have_is_told_as_failed(
    configure: Configure, asked: list[Told], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = conduct.choose_draws

    def impossible(part: SweepPart, told: Told, count: int) -> list[Changes]:
        (draw,) = choose(part, told, count)
        return [draw if len(told) != 1 else {"lora.r": 0, "lora.alpha": 8}]

    monkeypatch.setattr(conduct, "choose_draws", impossible)
    sweep(configure(*SEARCH, "--sweep.draws=3"))
    assert asked[-1] == [({"lora.r": 1, "lora.alpha": 8}, 1 + 1337), ({"lora.r": 0, "lora.alpha": 8}, math.inf)]
    assert (
        "failed  draw 2: sweep, trial with lora.r 0  lora.alpha 8: lora.r must be at least 1" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sweep.draws=2", "--sweep.metric=bleu"], "no metric bleu to search by, only val_loss"),
        (["--sweep.draws=2", "--sweep.draw_seed=1"], "draws from another sweep.random or sweep.draw_seed"),
    ],
)
def test_a_search_that_could_learn_nothing_ends(
    configure: Configure, asked: list[Told], more: list[str], said: str
) -> None:
    sweep(configure(*SEARCH, "--sweep.draws=1"))
    with pytest.raises(UsageError, match=said):
        sweep(configure(*SEARCH, *more))


def test_a_wrong_name_leaves_no_study(configure: Configure, asked: list[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct, "choose_draws", lambda *given: [{"lora.rr": 2}])
    config = configure("--sweep.random={lora.rr: [2]}", "--sweep.draws=1", "--sweep.search=optuna")
    with pytest.raises(UsageError, match=r"Did you mean --lora.r\?"):
        sweep(config)
    assert config.out_dir is not None
    assert not (config.out_dir / "study.json").exists()


def test_the_missing_extra_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r'optuna is not installed. pip install "lit_qlora\[optuna\]"'):
        sweep(configure(*SEARCH, "--sweep.draws=1"))


def by_optuna(part: SweepPart, count: int, told: Told | None = None) -> Told:
    """Draws that Optuna chooses for a loss that is least at r 20, a rate of 1e-3 and the second targets."""
    told = list(told or [])
    while len(told) < count:
        (changes,) = choose_draws(part, told, 1)
        r, rate = changes["lora.r"], changes["train.learning_rate"]
        loss = (r - 20) ** 2 / 100 + math.log(rate / 1e-3) ** 2 + (changes["lora.targets"] == "all")
        told.append((changes, loss if r != 7 else math.inf))
    return told


def test_a_draw_is_repeated_only_once_all_have_been(configure: Configure) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    part = configure(
        "--sweep.random={lora.r: [2, 3], lora.alpha: [8, 16]}", "--sweep.draws=4", "--sweep.search=optuna"
    ).sweep
    told: Told = []
    for number in range(4):
        (draw,) = choose_draws(part, told, 1)
        told.append((draw, math.inf if number == 1 else 1.0))
    assert len({tuple(draw.values()) for draw, _ in told}) == 4
    assert len({tuple(draw.values()) for draw in choose_draws(part, [], 4)}) == 4
    assert len(choose_draws(part, told, 1)) == 1


def test_optuna_chooses_the_same_after_a_stop_and_comes_nearer(configure: Configure) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    space = {
        "lora.r": {"integer": [2, 64]},
        "lora.targets": ["all", ["query", "value"]],
        "train.learning_rate": {"log": [1e-5, 0.1]},
    }
    part = configure(f"--sweep.random={json.dumps(space)}", "--sweep.draws=40", "--sweep.search=optuna").sweep
    whole = by_optuna(part, 40)
    assert by_optuna(part, 40, [(json.loads(json.dumps(changes)), loss) for changes, loss in whole[:23]]) == whole
    assert by_optuna(replace(part, draw_seed=1), 3) != whole[:3]
    assert median([loss for _, loss in whole[20:]]) < median([loss for _, loss in whole[:10]]) / 3
    assert len({json.dumps(changes) for changes in choose_draws(part, whole, 4)}) > 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_search_ends_with_the_trials_of_a_whole_one(
    configure: Configure, flags: list[str], tmp_path: Path, no_pages: None
) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    space = "--sweep.random={lora.r: {integer: [2, 8]}, train.learning_rate: {log: [0.001, 0.03]}}"
    more = [space, "--sweep.search=optuna", "--sweep.draws=12", "--train.max_steps=2", "--train.save_every=1"]
    whole = configure(*more, f"--out_dir={tmp_path / 'whole'}")
    assert whole.out_dir is not None
    sweep(whole)
    said, statuses = tmp_path / "said", []
    for death in range(6):
        at_death = at_save(1 + death % 2, signals(signal.SIGKILL))
        statuses.append(Child([*flags, *more], said, at_death, "finetune/sweep.py").wait())
    assert statuses == [-signal.SIGKILL] * 6, said.read_text()
    out = sweep(configure(*more))
    for name in ("study.json", "trials.json"):
        assert without_paths(out / name) == without_paths(whole.out_dir / name)
    rows = [json.loads((folder / "sweep.json").read_text())["rows"] for folder in (out, whole.out_dir)]
    assert [(row["trials"], row["metrics"]["val_loss"]) for row in rows[0]] == [
        (row["trials"], row["metrics"]["val_loss"]) for row in rows[1]
    ]


def without_paths(path: Path) -> Any:
    facts = json.loads(path.read_text())
    return facts.get("trials", facts)
