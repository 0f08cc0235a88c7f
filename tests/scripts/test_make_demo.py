"""scripts/make_demo.py makes the files that are committed, and other models of other worlds beside them."""

from functools import partial
from pathlib import Path

import pytest

from lit_qlora.checkpoint.checkpoint import load_model
from tests.conftest import ROOT, run_here

make = partial(run_here, "scripts/make_demo.py")


@pytest.mark.parametrize("part", ["data", "task", "tokenizer"])
def test_the_files_of_the_demo_are_made_again_byte_for_byte(part: str, tmp_path: Path) -> None:
    assert make("--only", part, "--out_dir", tmp_path).returncode == 0
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert made
    for path in made:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes()


def test_another_model_learns_another_world(tmp_path: Path) -> None:
    done = make("--model", "tiny-neox", "--seed", 11, "--steps", 2, "--out_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "checkpoints/lit-qlora/tiny-neox")
    assert model.config.family == "gpt_neox"
    assert model.config.parallel_residual
    for name in ("finetune/demo/train.jsonl", "eval/demo/test.jsonl"):
        assert (tmp_path / name).read_bytes() != (ROOT / name).read_bytes()
    assert (tmp_path / "eval/demo/tiny_world_qa.yaml").is_file()


@pytest.mark.parametrize("flags", [("--seed", 2), ("--model", "tiny-neox")])
def test_another_world_does_not_overwrite_the_demo(flags: tuple[object, ...]) -> None:
    done = make(*flags)
    assert done.returncode == 2
    assert "out_dir of its own" in done.stderr
