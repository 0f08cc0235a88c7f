"""What is left when a run is over: the table at its end, the metrics, the best and the worst answers."""

import json
import math
import shlex
from pathlib import Path

import pytest

from lit_qlora.run.summary import advise, beside_published, table
from lit_qlora.settings import FinetuneConfig
from tests.conftest import load_script, run_here
from tests.run.conftest import Finetune

MEASURES = ("--eval.generate=3", "--eval.kl_text=default", "--eval.max_new_tokens=6")


def test_the_table_shows_before_after_and_best_each_in_its_own_sense() -> None:
    records = [
        {"step": 0, "val_loss": 3.0, "val_accuracy": 0.1},
        {"step": 1, "loss": 9.0},
        {"step": 2, "val_loss": 1.0, "val_accuracy": 0.9},
        {"step": 4, "val_loss": 2.0, "val_accuracy": 0.5},
    ]
    head, loss, accuracy = (line.split() for line in table(records))
    assert head == ["before", "after", "best"]
    assert loss == ["val_loss", "3.0000", "2.0000", "1.0000", "(step", "2)"]
    assert accuracy == ["val_accuracy", "0.1000", "0.5000", "0.9000", "(step", "2)"]
    assert table([{"step": 1, "loss": 9.0}]) == []


def test_a_run_measures_answers_and_distance_and_says_what_came_of_it(
    finetune: Finetune,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "p.txt").write_text("What is 1 plus 1?\n")
    assert finetune(*MEASURES, f"--eval.prompts={tmp_path / 'p.txt'}", "--eval.best=chrf") == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    val = [record for record in records if "loss" not in record]
    names = ["val_loss", "val_ppl", "val_accuracy", "exact_match", "bleu", "chrf", "rouge_l", "kl_to_base"]
    assert [list(record) for record in val] == [["step", *names]] * 3
    assert val[0]["kl_to_base"] == pytest.approx(0, abs=1e-8)
    assert val[2]["kl_to_base"] > 1e-6
    said = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in said] == [0] * 4 + [1] * 4 + [2] * 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metrics"]["chrf"] == {"before": val[0]["chrf"], "after": val[2]["chrf"]}
    printed = capsys.readouterr().out
    assert printed.count("  answer  What is 1 plus 1? -> ") == 3
    for name in names:
        assert f"\n  {name} " in printed
    assert "\n  best    chrF " in printed
    assert "\n  worst   chrF " in printed
    page = (out / "report.html").read_text()
    for record in said[-4:]:
        assert record["prompt"].splitlines()[0].replace("'", "&#x27;") in page
    assert "Answers to the prompts" in page


def test_without_questions_the_page_shows_where_the_loss_is_small_and_large(
    finetune: Finetune,
    out: Path,
) -> None:
    assert finetune() == 0
    page = (out / "report.html").read_text()
    assert "by loss of the wanted answer" in page
    assert page.count('class="answer') == 4  # of four validation samples, none twice
    assert not (out / "samples.jsonl").exists()


def test_a_measure_that_fails_costs_only_its_metrics(
    finetune: Finetune,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*given: object, **more: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr("lit_qlora.evaluate.measures.generate", fail)
    assert finetune(*MEASURES, "--eval.best=chrf") == 0
    assert capsys.readouterr().err.count("the answers after step") == 3
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    val = [record for record in records if "loss" not in record]
    assert [list(record) for record in val] == [["step", "val_loss", "val_ppl", "val_accuracy", "kl_to_base"]] * 3
    assert not (out / "best").exists()


def test_measuring_changes_nothing_that_is_trained(
    finetune: Finetune,
    out: Path,
) -> None:
    assert finetune("--lora.dropout=0.3", "--eval.every=1", *MEASURES) == 0
    assert finetune("--lora.dropout=0.3", "--eval.every=1", "--out_dir", f"{out}-plain") == 0
    one, two = ((folder / "final/adapter_model.safetensors").read_bytes() for folder in (out, Path(f"{out}-plain")))
    assert one == two


def test_what_to_type_next_can_be_typed_whatever_the_folder_is_called(
    finetune: Finetune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "my run"
    assert finetune(f"--out_dir={folder}") == 0
    assert str(folder / "final") in shlex.split(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("losses", "linked", "warned", "following"),
    [
        ((4.0, 3.0), True, "", ["merge_lora.py --lora_path out/final", "chat.py --lora_path out/final"]),
        (
            (4.0, 3.0, 4.0),
            True,
            "",
            [
                "merge_lora.py --lora_path out/final",
                "merge_lora.py --lora_path out/best    # step 2: val_loss 3.0000",
                "chat.py --lora_path out/final",
            ],
        ),
        ((4.0, 3.0, 3.5), False, "", ["merge_lora.py --lora_path out/final", "chat.py --lora_path out/final"]),
        (
            (4.0, 3.0, 6.0),
            True,
            "4.0000 -> 6.0000: worse than the base, do not merge.",
            ["merge_lora.py --lora_path out/best", "chat.py --lora_path out/final"],
        ),
        (
            (4.0, 5.0, 6.0),
            True,
            "do not merge. No step was better: lower --train.learning_rate.",
            ["chat.py --lora_path out/final"],
        ),
        ((4.0, 3.0, math.nan), False, "do not merge. No better step was kept.", ["chat.py --lora_path out/final"]),
        ((), False, "", ["merge_lora.py --lora_path out/final", "chat.py --lora_path out/final"]),
    ],
)
def test_a_run_that_ended_worse_than_it_began_is_not_to_be_merged(
    losses: tuple[float, ...],
    linked: bool,
    warned: str,
    following: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    if linked:
        Path("out/best").symlink_to("step-000002")
    records = [{"step": 2 * number, "val_loss": loss} for number, loss in enumerate(losses)]
    warning, commands = advise(FinetuneConfig(out_dir="out"), records)  # type: ignore[arg-type]
    assert warning.endswith(warned)
    assert bool(warning) == bool(warned)
    assert [line.removeprefix("python scripts/") for line in commands.splitlines()] == following


def test_a_merge_measures_on_the_validation_samples_of_its_run(
    finetune: Finetune, out: Path, examples_file: Path
) -> None:
    assert finetune("--quantize=bnb.nf4") == 0
    done = run_here("scripts/merge_lora.py", "--lora_path", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "recommended: --base" in done.stdout
    report = json.loads((out / "merged/merge_report.json").read_text())
    assert report["verified_on"] == "validation samples of the run"
    val = [record for record in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "val_loss" in record]
    assert report["verified"]["original"]["val_loss_trained"] == pytest.approx(val[-1]["val_loss"], rel=1e-5)
    with examples_file.open("a") as file:
        file.write('{"instruction": "Hi", "output": "Hi"}\n')
    again = run_here("scripts/merge_lora.py", "--lora_path", out)
    assert again.returncode == 0, again.stderr
    assert "not measured: the data of the run has changed since.\n  --verify FILE measures" in again.stdout
    assert "verified" not in json.loads((out / "merged/merge_report.json").read_text())
    assert "measured" not in run_here("scripts/merge_lora.py", "--lora_path", out, "--verify", "none").stdout


def test_a_run_ends_well_whatever_somebody_made_of_its_log(
    finetune: Finetune, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("--train.save_every=1") == 0
    step = json.loads((out / "log.jsonl").read_text().splitlines()[1])
    for lines in ([], [{"step": 0, "val_loss": float("nan")}, step | {"loss": "x"}, step | {"seconds": 0}]):
        (out / "summary.json").unlink()
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / "samples.jsonl").write_text('{"step": 0, "prompt": 5}\n{"step": 0, "wanted": "x"}\n')
        assert finetune("--train.save_every=1") == 0, capsys.readouterr().err
        assert json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)["steps"] == bool(lines)
    assert "no whole report" not in capsys.readouterr().err


def test_quiet_prints_nothing(
    finetune: Finetune,
    out: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert finetune("--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert (out / "summary.json").exists()


def test_tensorboard_gets_the_run(
    finetune: Finetune,
    out: Path,
) -> None:
    pytest.importorskip("tensorboard")
    from tests.run.test_trackers import read_tensorboard

    assert finetune("--log.to=tensorboard") == 0
    found = read_tensorboard(out)
    assert list(found["train/loss"]) == [1, 2]
    assert list(found["val/loss"]) == [0, 1, 2]


@pytest.mark.slow
def test_tasks_of_lm_eval_are_asked_during_training(
    finetune: Finetune,
    out: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("eval/lm_eval_tasks.py", "eval/lm_eval_harness.py", "eval/lm_eval_model.py", "finetune/ask_tasks.py"):
        load_script(name)
    flags = ("--eval.tasks=tiny_world_qa", "--eval.tasks_limit=8", "--eval.tasks_every=2")
    assert finetune(*flags, "--eval.best=tiny_world_qa/acc") == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {
        record["step"]: record["tiny_world_qa/acc"] * 8 % 1 for record in records if "tiny_world_qa/acc" in record
    } == {
        0: 0.0,
        2: 0.0,
    }
    assert "it/s" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_refused_before_the_model_is_loaded(
    finetune: Finetune,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("eval/lm_eval_tasks.py", "eval/lm_eval_harness.py", "finetune/ask_tasks.py"):
        load_script(name)
    assert finetune("--eval.tasks=tiny_world_q") == 2
    assert "tiny_world_q" in capsys.readouterr().err


def test_a_task_without_its_data_is_refused_before_the_model_is_loaded(
    finetune: Finetune, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: absent.jsonl}}\ntest_split: test\n"
    (tmp_path / "mine.yaml").write_text(task + 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: a\n')
    for name in ("eval/lm_eval_tasks.py", "eval/lm_eval_harness.py", "finetune/ask_tasks.py"):
        load_script(name)
    assert finetune("--eval.tasks=mine", f"--eval.tasks_include_path={tmp_path}") == 3
    assert "error: mine cannot be loaded" in capsys.readouterr().err
    assert not (out / "log.jsonl").exists()


def test_only_metrics_of_the_asked_tasks_are_taken() -> None:
    """A group has its own metrics; a tag has none, so its tasks' metrics are taken."""
    metrics = load_script("finetune/ask_tasks.py").metrics
    part = {"alias": "part", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25}
    whole = {"alias": "whole", "acc,none": 0.75, "acc_stderr,none": "N/A"}
    assert metrics({"results": {"whole": whole, "part": part}}, ["whole"]) == {"whole/acc": 0.75}
    assert metrics({"results": {"part": part}}, ["tag"]) == {"part/acc": 0.5, "part/exact_match,strict": 0.25}


def test_what_was_published_stands_beside_what_was_measured() -> None:
    summary = {"seconds": 70.0, "peak_gib": 1.0, "trainable_parameters": 4096, "val_loss": None}
    known = {"seconds": 3600, "peak_gb": 2.5, "trainable_parameters": 4096, "val_loss": 1.25}
    assert beside_published(known, summary) == [
        "known   published: seconds 1 h 00 min, here 1 min 10 s   peak gb 2.50, here 1.07   "
        "trainable parameters 4,096, here 4,096   val loss 1.2500, here none"
    ]
    assert beside_published({}, summary) == []
