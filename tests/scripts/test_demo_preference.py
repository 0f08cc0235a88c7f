"""The demo of preferences teaches the toy model to prefer short answers, and no answer is forgotten."""

import re
from pathlib import Path

import pytest

from tests.conftest import run_here


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_makes_answers_short_and_keeps_them_right(tmp_path: Path) -> None:
    done = run_here("scripts/demo_preference.py", "--out_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    shares = {
        name.strip(): (int(a), int(b)) for name, a, b in re.findall(r"^  (.+?) +(\d+)% +(\d+)%$", done.stdout, re.M)
    }
    before, after = shares["answers of one word"]
    assert before < 70 < 95 < after
    before, after = shares["right answers, of any length"]
    assert min(before, after) > 85
    assert after > before - 5
    assert shares["pairs whose word has the larger reward"] == (0, 100)
