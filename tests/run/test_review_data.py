"""scripts/review_data.py measures the samples of a run, and --data.exclude leaves out what it names."""

import re
from pathlib import Path

import pytest

from lit_qlora.data.exclude import read_hashes
from lit_qlora.evaluate.sample_losses import SampleLosses
from lit_qlora.report import read_records
from tests.conftest import run_here
from tests.run.conftest import Finetune, log_of


def test_what_a_review_names_is_left_out(finetune: Finetune, out: Path, examples_file: Path) -> None:
    examples_file.write_text(examples_file.read_text() + '{"instruction": "What is 1 plus 1?", "output": "3"}\n')
    flags = ("--data.val_fraction=0", "--train.max_steps=null", "--train.epochs=1")
    assert finetune(*flags, "--eval.every=2", "--eval.train_samples=5") == 0
    seen = [record["seen_loss"] for record in read_records(out / "log.jsonl") if "seen_loss" in record]
    assert len(seen) >= 3
    kept = SampleLosses.read(out, "training_losses.json")
    assert kept is not None
    last, tokens = kept.losses[max(kept.losses)], sum(kept.labelled)
    assert (len(kept.samples), sum(last) / tokens) == (5, pytest.approx(seen[-1], rel=1e-4))
    assert "5 training samples" in (out / "report.html").read_text()
    review = run_here("scripts/review_data.py", "--run", out)
    assert review.returncode == 0, review.stderr
    assert "41 training samples" in review.stdout
    assert "1 prompts with several answers" in review.stdout
    assert re.search(r"by heart +\d+ answers word for word that the base does not give, \d", review.stdout)
    page = (out / "report.html").read_text()
    assert page.count("<h2>What the data taught</h2>") == 1
    assert "41 training samples" in page
    excluded = read_hashes(out / "exclude.txt")
    assert excluded
    assert finetune(*flags, f"--out_dir={out}-2", f"--data.exclude={out / 'exclude.txt'}") == 0
    steps, _ = log_of(Path(f"{out}-2"))
    assert sum(step["samples"] for step in steps) == 41 - len(excluded)
