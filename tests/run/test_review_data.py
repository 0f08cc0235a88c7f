"""scripts/review_data.py measures the samples of a run, and --data.exclude leaves out what it names."""

import re
from pathlib import Path

from lit_qlora.data.exclude import read_hashes
from tests.conftest import run_here
from tests.run.conftest import Finetune, log_of


def test_what_a_review_names_is_left_out(finetune: Finetune, out: Path, examples_file: Path) -> None:
    examples_file.write_text(examples_file.read_text() + '{"instruction": "What is 1 plus 1?", "output": "3"}\n')
    flags = ("--data.val_fraction=0", "--train.max_steps=null", "--train.epochs=1")
    assert finetune(*flags) == 0
    review = run_here("scripts/review_data.py", "--run", out)
    assert review.returncode == 0, review.stderr
    assert "41 training samples" in review.stdout
    assert "1 prompts with several answers" in review.stdout
    assert re.search(r"by heart +\d+ answers word for word that the base does not give, \d", review.stdout)
    excluded = read_hashes(out / "exclude.txt")
    assert excluded
    assert finetune(*flags, f"--out_dir={out}-2", f"--data.exclude={out / 'exclude.txt'}") == 0
    steps, _ = log_of(Path(f"{out}-2"))
    assert sum(step["samples"] for step in steps) == 41 - len(excluded)
