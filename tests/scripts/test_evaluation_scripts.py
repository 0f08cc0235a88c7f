"""Perplexity of a text, and answers to a data file, as commands."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.errors import UsageError
from lit_qlora.evaluate.metrics import text_metrics
from lit_qlora.generation import generate
from lit_qlora.prompts.tokenizer import Tokenizer
from tests.conftest import load_script, run_here
from tests.scripts.test_generate import with_template


def run(script: str, *flags: object) -> "subprocess.CompletedProcess[str]":
    return run_here(f"eval/{script}.py", *flags)


def figures(output: str) -> dict[str, float]:
    return {line[:15].strip(): float(line[16:].split()[0]) for line in output.splitlines()}


@pytest.mark.parametrize("stride", [None, 20])
def test_perplexity_is_the_mean_of_what_each_token_costs(tiny_checkpoint, tmp_path, stride):
    text = "".join(f"Q: What is {a} plus 17?\nA: {a + 17}\n" for a in range(30))
    (tmp_path / "text.txt").write_text(text)
    flags = ("--checkpoint_dir", tiny_checkpoint, "--file", tmp_path / "text.txt", "--max_length", 50)
    done = run("perplexity", *flags, *(("--stride", stride) if stride else ()))
    assert done.returncode == 0, done.stderr
    tokenizer, model = Tokenizer(tiny_checkpoint), load_model(tiny_checkpoint)
    ids = [tokenizer.bos_id, *tokenizer.encode(text, bos=False)]
    nats, step = 0.0, stride or 50
    with torch.no_grad():
        for start in range(1, len(ids), step):
            end = min(start + step, len(ids))
            begin = max(0, end - 51)
            scores = model(torch.tensor([ids[begin : end - 1]]))[0].double().log_softmax(-1)
            nats -= sum(float(scores[place - 1 - begin, ids[place]]) for place in range(start, end))
    found = figures(done.stdout)
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert found["bits per byte"] == pytest.approx(nats / len(text.encode()) / math.log(2), abs=1e-4)


def test_a_text_that_cannot_be_measured_is_named(tiny_checkpoint, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for file, status, why in (("empty.txt", 3, "is empty"), ("latin.txt", 3, "is not UTF-8"), ("x.txt", 2, "no")):
        done = run("perplexity", "--checkpoint_dir", tiny_checkpoint, "--file", tmp_path / file)
        assert done.returncode == status
        assert why in done.stderr
    (tmp_path / "a.txt").write_text("a")
    flags = ("--checkpoint_dir", tiny_checkpoint, "--file", tmp_path / "a.txt")
    assert run("perplexity", *flags, "--stride", 200).returncode == 2
    assert run("perplexity", *flags).returncode == 0


def test_answers_are_compared_written_and_shown(tiny_checkpoint, examples_file, tmp_path):
    out = tmp_path / "predictions.jsonl"
    flags = ("--checkpoint_dir", tiny_checkpoint, "--data", examples_file, "--style", "qa", "--out", out)
    done = run("answers", *flags, "--max_samples", 9, "--max_new_tokens", 8, "--batch_size", 4)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [json.loads(line) for line in examples_file.read_text().splitlines()][:9]
    assert [row["reference"] for row in rows] == [row["output"] for row in wanted]
    assert [row["prompt"] for row in rows] == [row["instruction"] for row in wanted]
    scores = text_metrics([row["prediction"] for row in rows], [row["reference"] for row in rows])
    shown = dict(zip(*([cell.strip() for cell in done.stdout.splitlines()[i].split("|")] for i in (0, 2)), strict=True))
    assert float(shown["chrF"]) == pytest.approx(scores["chrf"], abs=1e-4)
    assert float(shown["exact match"]) == pytest.approx(scores["exact_match"], abs=1e-4)
    assert done.stdout.count("\nbest, chrF") == done.stdout.count("\nworst, chrF") == 3


def test_the_answers_are_those_of_generate(tiny_checkpoint, examples_file, tmp_path):
    flags = ("--checkpoint_dir", tiny_checkpoint, "--style", "qa", "--max_new_tokens", 8)
    out = tmp_path / "predictions.jsonl"
    assert run("answers", *flags, "--data", examples_file, "--max_samples", 3, "--out", out).returncode == 0
    for line in out.read_text().splitlines():
        row = json.loads(line)
        assert row["prediction"] == run_here("scripts/generate.py", *flags, "--prompt", row["prompt"]).stdout.strip()


def test_answers_and_references_are_compared_without_their_thoughts(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    script = load_script("eval/answers.py")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}<think></think>{% endif %}"
    checkpoint = with_template(tiny_checkpoint, tmp_path / "own", template)
    tokenizer = Tokenizer(checkpoint)
    said = ["<think>Hm.</think> 2", "<think>Hm, and"]
    made = [tokenizer.encode(text, bos=False) for text in said]
    monkeypatch.setattr("lit_qlora.generation.generate", lambda *_: made)
    records = [{"instruction": "Is it?", "output": f"{thought}2"} for thought in ("<think>Yes.</think>", "")]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    out = tmp_path / "out.jsonl"
    script.main(script.Config(checkpoint_dir=checkpoint, data=str(tmp_path / "a.jsonl"), out=out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prediction"] for row in rows] == said
    assert [(row["compared"], row["chrf"]) for row in rows] == [("2", 1.0), ("", 0.0)]
    shown = capsys.readouterr()
    assert "| 2 | 0.5000 |" in shown.out
    assert "2 of 2 answers are compared without their thought. 1 of them end within it" in shown.err


def test_answers_that_were_stopped_go_on_where_they_were(tiny_checkpoint, examples_file, tmp_path, monkeypatch, capsys):
    script = load_script("eval/answers.py")
    made: list[int] = []

    def stopped_at(batch: int) -> None:
        made.clear()

        def counted(model, prompts, *arguments):
            if len(made) == batch:
                raise KeyboardInterrupt
            made.append(len(prompts))
            return generate(model, prompts, *arguments)

        monkeypatch.setattr("lit_qlora.generation.generate", counted)

    def config(out, **more):
        settings = {"max_samples": 9, "batch_size": 4, "max_new_tokens": 5, "do_sample": True, "style": "qa"} | more
        return script.Config(
            checkpoint_dir=tiny_checkpoint, data=str(examples_file), out=tmp_path / out / "answers.jsonl", **settings
        )

    stopped_at(9)
    script.main(config("whole"))
    assert made == [4, 4, 1]
    stopped_at(1)
    with pytest.raises(KeyboardInterrupt):
        script.main(config("out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.jsonl.part"]
    with pytest.raises(UsageError, match="holds the answers of another command"):
        script.main(config("out", max_samples=8))
    whole = capsys.readouterr().out
    stopped_at(9)
    script.main(config("out"))
    assert made == [4, 1]
    assert capsys.readouterr().out == whole
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.jsonl"]
    results = [(tmp_path / name / "answers.jsonl").read_text() for name in ("out", "whole")]
    assert results[0] == results[1]


def test_predictions_replace_predictions_only(tmp_path):
    answers = load_script("eval/answers.py")
    answers.check_replaceable(tmp_path / "new.jsonl")
    (tmp_path / "old.jsonl").write_text('{"prediction": "x"}\n')
    answers.check_replaceable(tmp_path / "old.jsonl")
    for content in ("years of work", "[1]\n", ""):
        (tmp_path / "thesis").write_text(content)
        with pytest.raises(UsageError, match="holds no predictions"):
            answers.check_replaceable(tmp_path / "thesis")


def test_best_and_worst_answers_never_overlap():
    answers = load_script("eval/answers.py")
    scores = dict.fromkeys(("exact_match", "bleu", "chrf", "rouge_l"), 0.5)
    for count in (1, 2, 5, 20):
        rows = [
            {"prompt": "p", "input": f"p{i}", "prediction": "x" * 500, "reference": "a\nb", "chrf": i / 20}
            for i in range(count)
        ]
        text = answers.report(scores, rows)
        asked = [line.rpartition(" ")[2] for line in text.splitlines() if "chrF 0." in line]
        assert len(asked) == len(set(asked)) == min(count, 6)
        assert asked[0] == f"p{count - 1}"
        assert "wanted a b" in text
        assert max(map(len, text.splitlines())) < 220


def test_the_default_place_is_the_folder_of_the_run(tmp_path: Path):
    answers = load_script("eval/answers.py")
    config = answers.Config(data="x", lora_path=Path("out/x/final"))
    assert answers.default_out(config) == Path("out/x/predictions.jsonl")
    config = answers.Config(data="x", checkpoint_dir=Path("checkpoints/a/b"))
    assert answers.default_out(config) == Path("out/eval/b/predictions.jsonl")
