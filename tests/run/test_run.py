"""A fine-tuning run from end to end: what it leaves, what it refuses, and that it loses nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_qlora import cli
from lit_qlora.errors import ResourceError
from lit_qlora.lora.adapter import PEFT_WEIGHTS, read_adapter
from lit_qlora.settings import SCHEMES, FinetuneConfig
from lit_qlora.train.training_state import read_counters
from tests.conftest import ROOT, load_script, tiny_model, write_checkpoint, write_tokenizer
from tests.run.conftest import Finetune, files_of, log_of

STEP_KEYS = ["step", "epoch", "loss", "accuracy", "lr", "grad_norm", "tokens", "samples"]
STEP_KEYS += ["tokens_per_second", "peak_gib", "seconds"]
SUMMARY_KEYS = {"trainable_parameters", "frozen_parameters", "steps", "tokens", "samples", "seconds"}
SUMMARY_KEYS |= {"tokens_per_second", "peak_gib", "train_loss", "val_loss", "versions", "gpu", "base", "quantize"}


# What a run leaves.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_leaves_what_is_promised(finetune: Finetune, out: Path, scheme: str) -> None:
    assert finetune("--quantize", scheme) == 0
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        "best",
        "config.yaml",
        "final",
        "final.state",
        "log.jsonl",
        "loss.png",
        "report.html",
        "report.md",
        "step-000001",  # the best until the next validation
        "step-000001.state",
        "summary.json",
        "validation_losses.json",
    ]
    assert (out / "best").readlink() == Path("final")
    assert {path.name for path in (out / "final").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json", "prompt_style.json")
    }
    train, val = log_of(out)
    assert [list(record) for record in train] == [STEP_KEYS] * 2
    assert [list(record) for record in val] == [["step", "val_loss", "val_ppl", "val_accuracy"]] * 3
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["quantize"] == scheme
    assert summary["steps"] == 2
    assert summary["samples"] == sum(record["samples"] for record in train) == 16
    assert summary["tokens"] == sum(record["tokens"] for record in train)
    assert summary["val_loss"] == val[-1]["val_loss"]
    assert summary["train_accuracy"] == sum(record["accuracy"] for record in train) / 2
    manifest = read_adapter(out / "final").manifest
    assert manifest is not None
    assert manifest["quantize"] == scheme


def test_parameters_are_counted_and_printed_exactly(
    finetune: Finetune, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("--quantize=bnb.nf4", "--lora.r=4", "--lora.targets=[query,mlp]") == 0
    frozen = sum(parameter.numel() for parameter in tiny_model().parameters())
    trainable = 2 * 4 * ((64 + 64) + 3 * (64 + 128))
    printed = capsys.readouterr().out
    assert f"{frozen:,} frozen parameters" in printed
    assert f"{trainable:,} trainable" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["frozen_parameters"], summary["trainable_parameters"]) == (frozen, trainable)
    assert sum(tensor.numel() for tensor in read_adapter(out / "final").peft_tensors.values()) == trainable


def test_the_loss_falls(finetune: Finetune, out: Path) -> None:
    assert finetune("--train.max_steps=20", "--train.learning_rate=0.01", "--lora.targets=all") == 0
    train, val = log_of(out)
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    assert val[-1]["val_loss"] < 0.8 * val[0]["val_loss"]


def test_the_same_config_gives_the_same_run_bit_for_bit(finetune: Finetune, out: Path, tmp_path: Path) -> None:
    assert finetune("--train.max_steps=4", "--lora.dropout=0.3", "--quantize=bnb.nf4-dq", "--seed=5") == 0
    torch.rand(7)  # whatever was drawn before has no influence
    assert cli_with_config(out / "config.yaml", tmp_path / "again") == 0
    for first, second in zip(log_of(out), log_of(tmp_path / "again"), strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens", "val_loss"):
            assert [record.get(key) for record in first] == [record.get(key) for record in second]
    assert (out / "final" / PEFT_WEIGHTS).read_bytes() == (tmp_path / "again" / "final" / PEFT_WEIGHTS).read_bytes()


def cli_with_config(config: Path, out: Path) -> int:
    cli.run(load_script("finetune/lora.py").main, FinetuneConfig, [f"--config={config}", f"--out_dir={out}"])
    return 0


def test_another_seed_is_another_run(finetune: Finetune, out: Path, tmp_path: Path) -> None:
    assert finetune() == 0
    assert finetune("--seed=1", f"--out_dir={tmp_path / 'other'}") == 0
    assert [r["loss"] for r in log_of(out)[0]] != [r["loss"] for r in log_of(tmp_path / "other")[0]]


@pytest.mark.parametrize(
    ("every", "keep", "left"),
    [(0, 1, []), (1, 2, ["step-000003", "step-000004"]), (2, 5, ["step-000002", "step-000004"]), (5, 2, [])],
)
def test_save_every_and_keep_last_decide_what_is_kept(
    finetune: Finetune, out: Path, every: int, keep: int, left: list[str]
) -> None:
    flags = [f"--train.save_every={every}", f"--train.keep_last={keep}", "--eval.best=none"]
    assert finetune("--train.max_steps=5", *flags) == 0
    kept = sorted(f"{name}{suffix}" for name in ["final", *left] for suffix in ("", ".state"))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == kept
    for name, step in [("final", 5), *((name, int(name[-6:])) for name in left)]:
        manifest = read_adapter(out / name).manifest
        assert manifest is not None
        assert manifest["step"] == step


def test_the_data_is_held_out_only_as_far_as_something_is_left_to_learn(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"instruction": "a", "output": str(i)}) + "\n" for i in range(3)]
    for count, fraction, expected in (
        (1, 0.9, "1 train / 0 val"),
        (2, 0.9, "1 train / 1 val"),
        (3, 0.01, "2 train / 1"),
    ):
        (tmp_path / "few.jsonl").write_text("".join(rows[:count]))
        assert finetune(f"--data.path={tmp_path / 'few.jsonl'}", f"--data.val_fraction={fraction}", "--dry_run") == 0
        assert expected in capsys.readouterr().out


def test_a_run_without_validation_data_has_no_validation_loss(finetune: Finetune, out: Path) -> None:
    assert finetune("--data.val_fraction=0") == 0
    assert log_of(out)[1] == []
    assert json.loads((out / "summary.json").read_text())["val_loss"] is None


# What a run refuses, and when.


def test_dry_run_prints_the_plan_and_writes_nothing(
    finetune: Finetune, tmp_path: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert finetune("--dry_run") == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    for word in ("36 train / 4 val", "2 steps x 8 samples", "frozen parameters", "[Q: What is", "  time    about "):
        assert word in printed


def test_of_several_processes_one_does_the_dry_run(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert finetune("--dry_run") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--data.path=absent.jsonl"], 3, "data.path absent.jsonl does not exist."),
        (["--data.prompt=alpca"], 2, "data.prompt 'alpca' is not a prompt style. Did you mean alpaca?"),
        (["--data.max_length=97"], 2, "data.max_length 97 exceeds the 96 tokens of test/tiny's context."),
        (["--train.warmup=50"], 2, "train.warmup is 50 steps, but the run has only 2."),
        (["--checkpoint_dir=absent"], 4, "absent does not exist."),
        (["--precision=16-mixed"], 2, "precision 16-mixed needs a GPU"),
        (["--precision=16-true"], 2, "precision 16-true needs a GPU"),
        (["--train.fp8=true"], 2, "train.fp8 needs the fast path, which this run cannot take: "),
        (["--train.fp8=true", "--train.fast=false"], 2, "train.fp8 needs the fast path, which this run cannot"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_model_is_loaded(
    finetune: Finetune,
    out: Path,
    no_weights: None,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
    message: str,
) -> None:
    if ("GPU" in message or "which this run cannot" in message) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert finetune(*flags) == status
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not out.exists()


def test_bad_data_is_refused_before_the_model_is_loaded(
    finetune: Finetune, tmp_path: Path, out: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{\n')
    assert finetune(f"--data.path={bad}") == 3
    assert capsys.readouterr().err.startswith(f"error: {bad}:2: not valid JSON: ")
    assert not out.exists()


def test_data_that_writes_a_token_without_an_embedding_is_refused(
    finetune: Finetune, tmp_path: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    write_checkpoint(small, tiny_model(vocab_size=256))
    write_tokenizer(small)
    assert finetune(f"--checkpoint_dir={small}") == 4
    assert "; the model has 256 embeddings.\nTake that token out" in capsys.readouterr().err


def test_the_adapter_is_saved_before_the_last_validation(
    finetune: Finetune, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*args: object) -> dict:
        if (out / "log.jsonl").stat().st_size:  # it is the second time
            raise ResourceError("no memory for this")
        return {"val_loss": 1.0}

    monkeypatch.setattr("lit_qlora.evaluate.measures.Losses.__call__", measure)
    assert finetune("--train.max_steps=1") == 6
    assert read_adapter(out / "final").manifest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_a_base_with_a_number_that_is_not_finite_is_refused(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, scheme: str
) -> None:
    broken = tmp_path / "broken"
    model = tiny_model()
    model.head.weight.data[0, 0] = value
    model.blocks[1].attn.query.weight.data[:2, 3] = value
    write_checkpoint(broken, model)
    write_tokenizer(broken)
    assert finetune(f"--checkpoint_dir={broken}", f"--quantize={scheme}") == 4
    message = capsys.readouterr().err
    assert "lit_model.safetensors holds elements that are NaN or infinite" in message
    assert "blocks.1.attn.query.weight: 2" in message
    assert "head.weight: 1" in message


# A disk that fails.


@pytest.mark.parametrize("folder", ["step-000002.state", "step-000002"])
@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_a_disk_that_fills_up_during_a_save_costs_only_that_save(
    finetune: Finetune,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
    folder: str,
) -> None:
    real = getattr(os, failing)

    def fail(what: object, *rest: object, **options: object) -> object:
        place = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        if f"{folder}.tmp-" in place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(what, *rest, **options)

    monkeypatch.setattr(os, failing, fail)
    assert finetune("--train.max_steps=3", "--train.save_every=1") == 6
    message = capsys.readouterr().err
    assert f"Cannot write {out}/{folder}" in message
    assert "No space left on device" in message
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["best", "step-000001", "step-000001.state"]
    manifest = read_adapter(out / "step-000001").manifest
    assert manifest is not None
    assert manifest["step"] == 1
    assert len(log_of(out)[0]) == 2


def test_a_base_that_may_not_be_written_is_good_enough(
    finetune: Finetune, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (base / ".sha256.json").unlink(missing_ok=True)
    (base / ".sha256.json").mkdir()  # stands for a directory that refuses the file, for root too
    before = files_of(base)
    assert finetune(f"--checkpoint_dir={base}") == 0
    assert files_of(base) == before


# The real process.


@pytest.mark.slow
def test_the_command_runs_as_it_is_typed_from_anywhere(
    tiny_checkpoint: Path, examples_file: Path, tmp_path: Path
) -> None:
    flags = f"--checkpoint_dir {tiny_checkpoint} --data.path {examples_file} --data.prompt qa --quantize bnb.nf4"
    command = f"{sys.executable} {ROOT / 'finetune/lora.py'} {flags} --train.max_steps 2 --out_dir out"
    done = subprocess.run(
        command.split(),
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Traceback" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("lit_qlora ")
    assert lines[-1] == "next    python scripts/merge_lora.py --lora_path out/final"
    assert len(log_of(tmp_path / "out")[0]) == 2


def validations(out: Path) -> list[int]:
    return [record["step"] for record in log_of(out)[1]]


def test_no_step_at_all_saves_the_initial_adapter(finetune: Finetune, out: Path) -> None:
    assert finetune("--train.max_steps=0", "--train.warmup=100") == 0
    state = read_adapter(out / "final").peft_tensors
    assert all(not tensor.any() for name, tensor in state.items() if "lora_B" in name)
    assert any(tensor.any() for name, tensor in state.items() if "lora_A" in name)
    assert validations(out) == [0]


def test_max_steps_goes_on_beyond_the_epochs_and_says_so(
    finetune: Finetune, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("--train.max_steps=20", "--train.epochs=1", "--train.batch_size=32") == 0
    assert log_of(out)[0][-1]["step"] == 20
    assert "train.max_steps 20 goes on beyond the" in capsys.readouterr().out


def test_validations_can_be_counted_in_epochs(finetune: Finetune, out: Path) -> None:
    flags = ("--train.max_steps=12", "--train.batch_size=16", "--eval.before_training=false")
    assert finetune(*flags, "--eval.epochs=2") == 0
    ends = [step["step"] for step in log_of(out)[0] if step["epoch"] in (2.0, 4.0)]
    assert len(ends) == 2
    assert validations(out) == sorted({*ends, 12})


def test_a_warm_up_can_be_counted_in_epochs(finetune: Finetune, out: Path) -> None:
    flags = ("--train.max_steps=12", "--train.batch_size=16", "--train.learning_rate=1")
    assert finetune(*flags, "--train.warmup_epochs=2") == 0
    peak = next(record for record in log_of(out)[0] if record["lr"] == 1.0)
    assert peak["epoch"] == pytest.approx(2, abs=0.1)
    assert 1 < peak["step"] < 12


def test_a_path_that_is_not_utf_8_ends_as_any_other(
    finetune: Finetune, tmp_path: Path, out: Path, examples_file: Path
) -> None:
    path = shutil.copy(examples_file, tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    assert finetune(f"--data.path={path}") == 0
    assert "report.md" in {file.name for file in out.iterdir()}
    assert os.fsdecode(b"caf\xe9") in read_counters(out / "final.state")["config"]["data"]["path"][0]


def test_what_goes_wrong_with_a_report_is_a_note(
    finetune: Finetune, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such colour")

    monkeypatch.setattr("lit_qlora.run.summary.plot_losses", fail)
    assert finetune() == 0
    assert "there is no whole report (ValueError: no such colour)" in capsys.readouterr().err
    assert (out / "summary.json").exists()


def test_a_drawn_seed_is_recorded_and_another_one_each_time(finetune: Finetune, out: Path) -> None:
    def seed() -> int:
        return int(cli.parse(FinetuneConfig, ["--config", str(out / "config.yaml")]).seed)

    assert finetune("--seed=-1") == 0
    first = seed()
    assert finetune("--seed=-1", "--extend", "--train.max_steps=3") == 0  # the same run
    assert seed() == first
    assert finetune("--seed=-1") == 0  # another one
    assert seed() != first >= 0
