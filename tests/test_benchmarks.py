"""The programs in benchmarks/: what they make of measurements, and that they run, on a toy and without a GPU."""

import argparse
import csv
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lit_qlora.convert.known_models import MODELS
from lit_qlora.fused.memory import COST
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.config import ModelConfig
from lit_qlora.quantize import Storage
from lit_qlora.run.fits import gpu_called
from lit_qlora.run.plan import BY_KERNELS, MicroBatches, Room, make_plan
from lit_qlora.settings import LoRAConfig, Recompute, TrainConfig
from tests.conftest import ROOT

ADAPTERS = LoRAConfig(r=16, alpha=32, targets=("all",), dropout=0.0)
needs_triton = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a program of benchmarks/ by its name."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)

    def load(name: str) -> ModuleType:
        known = sys.modules.get(name)
        if known and known.__file__ and Path(known.__file__).parent != folder:
            monkeypatch.delitem(sys.modules, name)  # a script of the same name, of which another test has taken parts
        return importlib.import_module(name)

    return load


@pytest.fixture
def tables(program: Any) -> ModuleType:
    return program("tables")


def test_the_figures_in_readme_are_those_that_were_measured(tables: ModuleType) -> None:
    text, rows = (ROOT / "docs/measured.md").read_text(encoding="utf-8"), tables.read_rows(tables.TABLE)
    assert tables.renew(text, rows) == text, "run python benchmarks/tables.py"
    assert tables.renew(text.replace("| offload | 1", "| offload | 2"), rows) == text
    for table in (tables.training, tables.beside, tables.answers):
        assert table(rows)[1], "a table is empty"


def step(**changes: str) -> dict[str, str]:
    """A row of step.py."""
    columns = {
        "program": "step.py",
        "shape": "llama-2-7b",
        "micro_batch": "2",
        "tokens": "2048",
        "gpu": "NVIDIA H100 80GB HBM3",
        "flags": "bnb.nf4-dq r16 all dropout 0 recompute none",
        "tokens_per_second": "20000",
        "slowest": "1",
        "fastest": "2",
        "peak_gib": "16.04",
        "commit": "new",
        "date": "2030-01-01",
        "torch": "9.0",
        "bitsandbytes": "",
    }
    return columns | changes


def test_of_each_setting_the_newest_row_counts(tables: ModuleType) -> None:
    old = step(tokens_per_second="1000", commit="old")
    of_another_gpu = step(tokens_per_second="30000", gpu="another")
    other = step(tokens_per_second="5000", flags="bnb.nf4-dq r16 all dropout 0 recompute none graphs")
    made = tables.make([old, step(), other, of_another_gpu])
    assert "| Llama-2-7B | none | 20,000 | 1.0 - 2.0 | 16.0 |" in made
    assert "commits\nnew." in made
    assert all(figure not in made for figure in ("1,000", "30,000", "5,000", "old"))


def test_a_peer_stands_beside_ours_of_the_same_run(tables: ModuleType) -> None:
    begin = "fixed nf4-dq r16 all dropout 0"

    def pair(peer: str, version: str, ours: str, theirs: str, kept: str = "") -> list[dict[str, str]]:
        told = f"{begin} ours recompute none{kept}, beside {peer}"
        return [
            step(program="peers.py", flags=told, tokens_per_second=ours),
            step(program="peers.py", flags=f"{begin} {peer} {version}", tokens_per_second=theirs),
        ]

    made, _ = tables.beside(
        [
            *pair("peft", "0.2", "8000", "2000"),
            *pair("peft", "0.3", "9000", "6000"),
            *pair("litgpt", "1", "2000", "4000"),
            *pair("litgpt", "1", "3000", "4000", " dequantized 32"),
        ]
    )
    rows = [line.removeprefix("| 2 x 2048, r 16 on all linears").split(" | ") for line in made[2:]]
    assert rows == [
        ["", "9,000", "16.0", "peft 0.3", "6,000", "16.0", "1.500 |"],
        ["", "2,000", "16.0", "litgpt 1", "4,000", "16.0", "0.500 |"],
        [", weights kept dequantised", "3,000", "16.0", "litgpt 1", "4,000", "16.0", "0.750 |"],
    ]


@pytest.mark.parametrize(
    ("recompute", "known"),
    [("full", (5.52, 6.31, 7.89)), ("offload", (5.05, 5.37, 6.01)), ("none", (11.0, 17.3, 29.9))],
)
def test_floors_of_memory_are_those_that_were_worked_out_by_hand(
    recompute: Recompute, known: tuple[float, ...], program: Any
) -> None:
    """GB of Llama-2-7B at 2,048, 4,096 and 8,192 tokens."""
    model = ModelConfig(name="x", **program("shapes").SHAPES["llama-2-7b"])
    for tokens, expected in zip((2048, 4096, 8192), known, strict=True):
        found = program("floors").memory_floor(model, ADAPTERS, "bnb.nf4-dq", recompute, tokens)
        assert found / 1e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "gigabytes", "published"),
    [
        ("llama-2-7b", 3.87, "meta-llama/Llama-2-7b-hf"),
        ("llama-2-13b", 7.20, "meta-llama/Llama-2-13b-hf"),
        ("llama-1-33b", 17.4, "huggyllama/llama-30b"),
        ("llama-1-65b", 34.5, "huggyllama/llama-65b"),
        ("llama-2-70b", 36.4, "meta-llama/Llama-2-70b-hf"),
        ("llama-3-8b", 5.70, "meta-llama/Meta-Llama-3-8B"),
    ],
)
def test_a_shape_has_the_size_of_the_published_model(
    shape: str, gigabytes: float, published: str, program: Any
) -> None:
    model = ModelConfig(name="x", **program("shapes").SHAPES[shape])
    plan = make_plan(model, ADAPTERS, Storage(torch.bfloat16, "bnb.nf4-dq"), MicroBatches(1), TrainConfig(), Room())
    assert plan.weights / 1e9 == pytest.approx(gigabytes, rel=2e-3)
    billions = next(family[published] for family in MODELS.values() if published in family)
    assert plan.frozen / 1e9 == pytest.approx(billions, rel=6e-3)


@needs_triton
def test_measured_peaks_are_near_their_floors_and_what_the_plan_said(program: Any) -> None:
    """Every peak of Llama-2-7B on the fast path that was measured last: at most 1.10 of the floor, 8 % off the plan."""
    results = program("results")
    measured = {
        (row["micro_batch"], row["tokens"], row["flags"]): row
        for row in results.read_rows(results.TABLE)
        if row["program"] == "step.py" and row["shape"] == "llama-2-7b" and row["flags"].split()[-1] in COST
    }
    assert len(measured) >= 8
    for peak, plan, floor in map(program("floors").sizes, measured.values()):
        assert peak < 1.10 * floor
        assert peak == pytest.approx(plan, rel=0.08)


@pytest.mark.slow
@needs_triton
def test_measured_peaks_of_five_models_in_six_settings_are_what_the_plan_says(program: Any, tmp_path: Path) -> None:
    results, predictions, shapes, missed = program("results"), program("predictions"), program("shapes"), []
    gpu, settings = gpu_called("H200"), {setting.name: setting for setting in predictions.SETTINGS}
    rows = [row for row in results.read_rows(results.TABLE) if row["program"] == "predictions.py"]
    assert len(rows) >= 30
    for row in rows:
        setting, model = settings[row["flags"].split(" as ")[0]], shapes.model_config(row["shape"])
        model.save(tmp_path)
        planner = predictions.planner_of(setting, model, predictions.config_of(setting, tmp_path))
        batches = MicroBatches(setting.rows * setting.length, setting.rows, packed=setting.packed)
        planned, peak = planner.plan(batches, gpu.room(2.0**37)).total / 2**30, float(row["peak_gib"])
        missed += [(row["shape"], setting.name, planned, peak)] if abs(peak / planned - 1) > 0.05 else []
    assert not missed


@needs_triton
def test_the_plan_of_gated_delta_nets_holds_what_they_took_with_and_without_their_kernels(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions, model = program("predictions"), program("shapes").model_config("Qwen/Qwen3.5-4B@8")
    setting = next(one for one in predictions.SETTINGS if one.quantize == "bnb.nf4-dq")
    model.save(tmp_path)
    planner = predictions.planner_of(setting, model, predictions.config_of(setting, tmp_path))
    batches, room = MicroBatches(2 * 2048, 2), gpu_called("H200").room(2.0**37)
    assert 7.12 < planner.plan(batches, room).total / 1e9 < 1.1 * 7.12  # in plain torch, LOG.md
    monkeypatch.setattr("lit_qlora.run.plan._delta_rule", lambda *_: BY_KERNELS)
    assert 5.91 < planner.plan(batches, room).total / 1e9 < 1.1 * 5.91  # LOG.md


@needs_triton
def test_the_measured_peaks_of_long_rows_are_what_the_plan_says(program: Any) -> None:
    results = program("results")
    rows = [row for row in results.read_rows(results.TABLE) if row["flags"].endswith("recompute full-offload")]
    assert rows
    for row in rows:
        peak, plan, _ = program("floors").sizes(row)
        assert peak == pytest.approx(plan, rel=0.05)


@needs_triton
def test_a_session_measures_each_step_that_readme_shows_with_flags_that_its_programs_know(
    program: Any, tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ParsedError(Exception):
        """Instead of what comes after reading the flags."""

    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser) -> None:
        raise ParsedError(parse(parser))

    commands = [shlex.split(command) for _, command in program("session").COMMANDS]
    assert len(set(map(tuple, commands))) == len(commands)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    measured = set()
    for name, *flags in commands:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        module = program(Path(name).stem)
        with pytest.raises(ParsedError) as parsed:
            module.main()
        if name == "step.py":
            (asked,) = parsed.value.args
            shape = (asked.shape, str(asked.rows), str(asked.length))
            measured |= {(*shape, module.describe(asked, setting)) for setting in asked.recompute}
    for shown in tables.TRAINING:
        known = (shown.shape, shown.micro_batch, shown.tokens, shown.flags) in measured
        assert known or shown.program != "step.py", shown


STUBS = {
    "good.py": "import os, sys; open(os.environ['RESULTS'], 'a').write(os.environ['COMMIT'] + ' '.join(sys.argv[1:]))",
    "bad.py": "import sys; sys.exit(3)",
    "slow.py": "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]])",
    "child.py": "import pathlib, time; time.sleep(2.5); pathlib.Path(__file__).with_name('survived').touch()",
}


@pytest.mark.slow
def test_a_session_goes_on_after_what_fails_and_repeats_nothing_that_is_done(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = program("session")
    monkeypatch.setattr(session, "HERE", tmp_path / "nothing")
    monkeypatch.setattr(session, "ATTEMPTS", 1)
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
    slow = f"slow.py {tmp_path / 'child.py'}"
    commands = ((60, "bad.py"), (1, slow), (1000, "good.py too long"), (60, "good.py --flag 'two words'"))
    arguments = argparse.Namespace(minutes=2, out=tmp_path / "out", commit="abc ")

    def outcomes(gpu: str) -> list[tuple[str, str]]:
        (tmp_path / "out" / "sessions.csv").unlink(missing_ok=gpu == "first")
        session.session(commands, arguments, gpu, tmp_path)
        with (tmp_path / "out" / "sessions.csv").open() as file:
            return [(row["command"], row["outcome"]) for row in csv.DictReader(file)]

    first = [("bad.py", "status 3"), (slow, "stopped after 1 s"), ("good.py --flag 'two words'", "done")]
    assert outcomes("first") == first
    assert (tmp_path / "out" / "results.csv").read_text() == "abc --flag two words"
    assert "no time for good.py too long" in capsys.readouterr().out

    session.session(((60, "good.py new"), *commands), arguments, "first", tmp_path)
    with (tmp_path / "out" / "sessions.csv").open() as file:
        again = [(row["command"], row["outcome"]) for row in csv.DictReader(file)][3:]
    assert again == [("good.py new", "done"), *first[:2]], "new ones first, then what failed"
    assert len(outcomes("another GPU")) == 3
    time.sleep(2.5)
    assert not (tmp_path / "survived").exists(), "what a command started has outlived it"


def test_a_session_needs_a_gpu(tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/session.py"), *flags],
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "There is no GPU here that nvidia-smi can see.\n"


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("workload", ["fixed", "packed"])
def test_peers_take_turns_and_one_that_is_absent_is_said_to_be(workload: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    flags = f"--shape tiny --bf16 --workload {workload} --rows 1 --length 24 --r 4 --steps 1 --rounds 2"
    places = ["--work_dir", str(tmp_path), "--results", str(tmp_path / "rows.csv"), "--peers", "unsloth", "peft"]
    if workload == "packed":  # of which no checkpoint can be written
        (tmp_path / "llama-100m-hf.part").write_text("")
        places += ["--also", '{"shape": "llama-100m"}']
    (tmp_path / "unsloth.py").write_text("raise ModuleNotFoundError(\"No module named 'unsloth'\")")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/peers.py"), *flags.split(), *places],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "unsloth: missing. ModuleNotFoundError: No module named 'unsloth'\n" in done.stdout
    assert ("llama-100m: missing. No checkpoint" in done.stdout) == (workload == "packed")
    assert "ours / peft:" in done.stdout
    ours, theirs = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert "ours" in ours["flags"]
    assert "peft" in theirs["flags"]
    assert all(int(row["tokens_per_second"]) > 0 for row in (ours, theirs))


def test_contestants_of_equal_tasks_are_processes_of_their_own(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, work = program("peers"), program("contestants.task")
    made: list[Any] = []

    class Process:
        def __init__(self, task: Any, log: Path, patience: float) -> None:
            self.turns, self.ended = 0, False
            self.facts = dict.fromkeys(("gpu", "torch", "version", "ready", "trainable"), 0) | {"flash_4": True}
            made.append(self)

        def round(self, *wanted: Any) -> dict[str, float]:
            assert not self.ended
            self.turns += 1
            return {"tokens": 8, "examples": 1, "milliseconds": 1.0, "peak_gib": 1.0}

        def end(self) -> None:
            assert not self.ended
            self.ended = True

    monkeypatch.setattr(peers, "Contestant", Process)
    sizes = {"rows": 1, "length": 8, "r": 4, "targets": "all", "quantize": True, "dropout": 0.0}
    task = work.Task(name="ours", shape="tiny", dir="", workload="fixed", **sizes)
    asked = argparse.Namespace(work_dir=tmp_path, patience=1.0, ours="", rounds=2, steps=1, seconds=0.0)
    asked.no_graphs, asked.commit = False, ""
    wanted = [(task, ["ours-quantized", "unsloth"]), (task, ["unsloth"])]
    with ThreadPoolExecutor(2) as pool:
        start = peers.starter(wanted, asked, pool)
        rows = [row for task, names in wanted for row in peers.compare(task, names, start, asked)]
    assert len(rows) == 2 * 3
    assert ["FlashAttention 4" in row["flags"] for row in rows] == [True, False] * 3  # it tells of ours
    assert sorted(one.turns for one in made) == [2, 2, 2, 2, 4]
    assert all(one.ended for one in made)


def test_a_contestants_peak_is_that_of_the_timed_steps(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contestant, work, done = program("contestant"), program("contestants.task"), Counter[str]()
    model = torch.nn.Linear(1, 1)

    def loss(micro: Any) -> torch.Tensor:
        done["steps"] += 1
        return model(torch.ones(1)).sum()

    ones = SimpleNamespace(build=lambda task: work.Built(model, loss))
    monkeypatch.setitem(sys.modules, "contestants.ones", ones)
    monkeypatch.setitem(contestant.CONTESTANTS, "ones", ("ones", {}, "pytest"))
    monkeypatch.setattr(sys, "stdin", ['{"steps": 1, "seconds": 0, "recompute": "none"}'])
    monkeypatch.setattr("lit_qlora.device.reset_peak", lambda device: done.update(warm_up=done["steps"]))
    monkeypatch.setattr("lit_qlora.device.peak_gib", lambda device: 7.25)
    sizes = {"rows": 1, "length": 8, "r": 4, "targets": "all", "quantize": False, "dropout": 0.0}
    contestant.compete(work.Task(name="ones", shape="tiny", dir=str(tmp_path), workload="fixed", **sizes))
    answer = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(answer.removeprefix("RESULT "))["peak_gib"] == 7.25
    assert done["warm_up"] == 2 + contestant.WARM_UP == done["steps"] - 2


def test_a_contestant_whose_loss_is_no_number_has_no_speed(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contestant, work = program("contestant"), program("contestants.task")
    model = torch.nn.Linear(1, 1)
    ones = SimpleNamespace(build=lambda task: work.Built(model, lambda micro: model(torch.ones(1)).sum() * math.nan))
    monkeypatch.setitem(sys.modules, "contestants.ones", ones)
    monkeypatch.setitem(contestant.CONTESTANTS, "ones", ("ones", {}, "pytest"))
    monkeypatch.setattr(sys, "stdin", ['{"steps": 1, "seconds": 0, "recompute": "none"}'])
    sizes = {"rows": 1, "length": 8, "r": 4, "targets": "all", "quantize": False, "dropout": 0.0}
    contestant.compete(work.Task(name="ones", shape="tiny", dir=str(tmp_path), workload="fixed", **sizes))
    assert "the loss of ones is no finite number" in capsys.readouterr().out


def test_a_folder_in_the_making_is_named_after_the_whole_name(program: Any, tmp_path: Path) -> None:
    (tmp_path / "Llama-3.1-8B").with_suffix(".part").mkdir()  # that of Llama-3.2-1B, written by another process
    program("shapes").make_hf_checkpoint("tiny", tmp_path / "Llama-3.1-8B")
    assert {path.name for path in tmp_path.iterdir()} == {"Llama-3.1-8B", "Llama-3.part"}
    assert not list((tmp_path / "Llama-3.part").iterdir())


@pytest.mark.slow
def test_a_peer_sees_no_other_document_of_a_packed_row(program: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    work = program("contestants.task")
    task = work.Task(
        name="peft",
        shape="tiny",
        dir=str(tmp_path / "hf"),
        workload="packed",
        rows=1,
        length=60,
        r=4,
        targets="all",
        quantize=False,
        dropout=0.0,
    )
    program("shapes").make_hf_checkpoint("tiny", Path(task.dir))
    built = program("contestants.peft").build(task)
    ids, lengths = torch.randint(3, 2000, (1, 60)), [20, 15, 25]
    with torch.no_grad():
        packed = built.loss(work.Micro(ids, lengths))
        alone = [(len(one[0]) - 1, built.loss(work.Micro(one))) for one in ids.split(lengths, dim=1)]
        unpacked = built.loss(work.Micro(ids))
    expected = sum(weight * loss for weight, loss in alone) / sum(weight for weight, _ in alone)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=0)
    assert not torch.allclose(packed, unpacked, rtol=1e-4)


@pytest.fixture
def cards(program: Any) -> ModuleType:
    return program("cards")


def case(**changes: Any) -> argparse.Namespace:
    """The flags of cards.py."""
    flags = {"shape": "llama-2-7b", "gb": 24, "quantize": "bnb.nf4-dq", "r": 16, "targets": ["all"], "host": 64}
    return argparse.Namespace(**flags | {"rows": 2, "length": 2048, "steps": 1, "seconds": 0, "limit": 1} | changes)


@needs_triton
def test_a_smaller_card_gets_fewer_rows_then_shorter_ones_then_none(cards: ModuleType, tmp_path: Path) -> None:
    planner = cards.planner_of(cards.settings(case(shape="llama-3.2-1b"), tmp_path), 24)

    def largest(gb: float) -> tuple[int, int] | None:
        return cards.largest_case(planner, Room(gb * 2**30), 4, 2048)

    assert [largest(gb) for gb in (2.5, 1.98, 1.5, 1.47, 1.2)] == [(4, 2048), (2, 2048), (1, 2048), (1, 1024), None]


@pytest.mark.slow
@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a sigmoid, in Triton's interpreter
def test_a_case_is_planned_for_the_smaller_card_and_trained(cards: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "WARM_UPS_OF_GRAPHS", 1)
    facts = cards.try_case(case(shape="tiny", rows=2, length=24, r=4, quantize="none"))
    assert facts["setting"] == "recompute none:2 graphs"
    assert facts["room_gib"] == pytest.approx(0.97 * 24 - 0.6)
    assert (facts["fewer_rows"], facts["released"], facts["steps"]) == (None, False, 3)
    assert facts["tokens_per_second"] > 0


@pytest.mark.slow
@needs_triton
def test_predictions_stand_beside_what_was_measured(program: Any) -> None:
    predictions = program("predictions")
    small = [replace(setting, rows=1, length=24, r=4) for setting in predictions.SETTINGS]
    flags = {"shapes": ["tiny"], "settings": small, "steps": 1, "seconds": 0, "minutes": 9}
    found = list(predictions.cases(argparse.Namespace(**flags)))
    assert {facts["outcome"] for facts in found} == {"done"}, found
    assert all(facts["planned_gib"] > 0 and facts["tokens_per_second"] > 0 for facts in found)
    assert len({facts["setting"] for facts in found}) == len(small)
    assert len({facts["planned_gib"] for facts in found}) > 1
    late = list(predictions.cases(argparse.Namespace(**flags | {"minutes": 0})))
    assert {facts["outcome"] for facts in late} == {"no time"}
    assert set(predictions.as_row(found[0], "x")) <= set(program("results").COLUMNS)


def test_a_prediction_counts_if_it_is_as_near_as_it_should_be(program: Any) -> None:
    facts = {"shape": "a", "setting": "b", "rows": 1, "length": 9, "outcome": "done", "planned_gib": 10.0}
    near = facts | {"peak_gib": 9.6, "predicted_tokens_per_second": 109, "tokens_per_second": 100}
    far = facts | {"peak_gib": 9.4, "predicted_tokens_per_second": None, "tokens_per_second": 100}
    failed = facts | {"outcome": "out of memory"}
    *_, memory, speed = program("predictions").table([near, far, failed]).splitlines()
    assert (memory, speed) == (
        "memory: 1 of 2 within 5% of what was measured",
        "time: 1 of 1 within 10% of what was measured",
    )


def test_a_case_that_fails_or_takes_too_long_ends_no_other(
    cards: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "stub.py"
    monkeypatch.setattr(cards, "__file__", str(stub))
    outcomes = []
    for text in (
        "import time; time.sleep(60)",
        "raise SystemExit('out of memory')",
        "print('log'); print('{\"a\": 1}')",
    ):
        stub.write_text(text)
        outcomes.append(cards.run_case(case(limit=0.3 if "sleep" in text else 60), "tiny", 8, 1, 64))
    assert outcomes == [{"outcome": "stopped after 0.3 s"}, {"outcome": "out of memory"}, {"outcome": "done", "a": 1}]


@pytest.mark.slow
def test_requests_are_scored_alike_and_what_that_took_is_said(tmp_path: Path) -> None:
    flags = "--shape tiny --questions 8 --repeats 1 --hf_batch_size 8"
    places = ["--work_dir", str(tmp_path), "--out", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/evaluation.py"), *flags.split(), *places],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"choices", "letters", "pairs", "windows"}
    for row in figures.values():
        assert row["largest_difference"] < 1e-3
        assert row["ours"]["tokens_read"] <= row["hf"]["tokens_read"]
        assert row["ours"]["spent"].keys() == {"hidden", "_look_up", "the rest"}


@pytest.mark.slow
def test_several_processes_are_timed_with_copies_and_shares_of_a_base_and_parts_of_rows(
    tmp_path: Path,
) -> None:
    flags = f"--cases tiny --processes 1 2 --results {tmp_path / 'rows.csv'}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/several.py"), *shlex.split(flags)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    kinds = ["ddp x 1", "ddp x 2", "sharded x 2", "ddp x 1", "ddp x 2"]
    assert [row["flags"].split(",")[0] for row in rows] == kinds
    losses = re.findall(r"losses (\[.*?\])", done.stdout)
    assert losses[1] == losses[2]
    assert json.loads(losses[3]) == pytest.approx(json.loads(losses[4]), abs=1e-5)


@pytest.mark.slow
def test_storages_of_a_model_that_was_trained_here_are_compared_at_equal_bytes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))))
    tokenizer = ROOT / "checkpoints/lit-qlora/tiny-world/tokenizer.model"
    flags = [
        "--shape",
        "tiny",
        "--seconds",
        "2",
        "--rows",
        "4",
        "--length",
        "32",
        "--calibration",
        "256",
        "--test",
        "512",
    ]
    command = [
        sys.executable,
        "benchmarks/budget.py",
        "--text",
        text,
        "--tokenizer",
        tokenizer,
        *flags,
        "--out",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    storages = {one["name"]: one for one in json.loads((tmp_path / "budget.json").read_text())["storages"]}
    assert len(storages) == 15
    uniform, budget = storages["nf4, head too"], storages["budget of 5 bits"]
    assert uniform["bits"] == 4.5
    assert budget["bits"] <= 5
    assert budget["best_kl"] == budget["kl"]
    assert storages["int8, head too"]["kl"] < uniform["kl"]
