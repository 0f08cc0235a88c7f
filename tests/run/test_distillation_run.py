"""A run with a teacher, from end to end."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint import score
from lit_qlora.data import taught
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.lora.adapter import read_adapter
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.model.scoring import Scoring
from lit_qlora.run import distillation
from lit_qlora.run.distillation import find_teacher
from lit_qlora.run.finetune import finetune
from lit_qlora.settings import DataConfig, DistillConfig, EvalConfig, FinetuneConfig, LoRAConfig, TrainConfig
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer
from tests.run.conftest import log_of


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than the student, with its tokenizer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("teacher"), tiny_model(7, n_layer=1))
    write_tokenizer(directory)
    return directory


def config(checkpoint: Path, examples: Path, out: Path, distill: DistillConfig, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        checkpoint_dir=checkpoint,
        out_dir=out,
        data=DataConfig(
            path=str(examples), prompt="qa", cache_dir=str(examples.parent / "cache"), val_fraction=0.1, packing=True
        ),
        train=TrainConfig(batch_size=8, micro_batch_size=2, max_steps=4, save_every=2, learning_rate=0.01, keep_last=9),
        eval=EvalConfig(every=2),
        lora=LoRAConfig(targets="all", dropout=0.2),
        distill=distill,
        quiet=True,
        **changes,
    )


def adapter(out: Path) -> bytes:
    return (out / "final/adapter_model.safetensors").read_bytes()


def test_a_student_comes_nearer_to_its_teacher_and_says_so(
    teacher: Path, tiny_checkpoint: Path, examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.run.summary.write_pages", lambda *given: None)  # half of the time
    how = DistillConfig(teacher=teacher, weight=0.9, top_k=20, temperature=2.0)
    train, val = log_of(finetune(config(tiny_checkpoint, examples_file, tmp_path / "out", how)))
    assert {"accuracy", "cross_entropy", "teacher_kl"} <= set(train[0])
    one = train[0]
    assert one["loss"] == pytest.approx(0.1 * one["cross_entropy"] + 0.9 * 4 * one["teacher_kl"], rel=1e-5)
    last = val[-1]
    assert last["val_loss"] == pytest.approx(0.1 * last["val_cross_entropy"] + 0.9 * 4 * last["val_teacher_kl"])
    assert last["val_teacher_kl"] < val[0]["val_teacher_kl"]


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_reads_the_teacher_once(
    teacher: Path, tiny_checkpoint: Path, examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taught, "PART", 20)
    how = DistillConfig(teacher=teacher)
    start = config(tiny_checkpoint, examples_file, tmp_path / "out", how)
    out = finetune(start)
    (entry,) = {path.parent for path in (tmp_path / "cache").glob("*/00002.bin")}
    calls, compute = list[int](), distillation.compute
    monkeypatch.setattr(distillation, "compute", lambda *args: calls.append(1) or compute(*args))
    (entry / "00001.bin").write_bytes((entry / "00001.bin").read_bytes()[:-40])  # torn
    (entry / "00002.bin").unlink()  # never computed
    again = finetune(replace(start, out_dir=tmp_path / "again", resume=str(out / "step-000002")))
    assert adapter(again) == adapter(out)
    assert len(calls) == 2
    uncached = replace(start, out_dir=tmp_path / "none", data=replace(start.data, cache_dir="none"))
    assert adapter(finetune(uncached)) == adapter(out)
    other = write_checkpoint(tmp_path / "other", tiny_model(8, n_layer=1))
    write_tokenizer(other)
    moved = replace(
        start, distill=DistillConfig(teacher=other), out_dir=tmp_path / "x", resume=str(out / "step-000002")
    )
    with pytest.raises(UsageError, match="teacher"):
        finetune(moved)


@pytest.mark.slow
def test_a_student_of_a_merged_adapter_comes_nearer_to_it_than_one_of_the_data_alone(
    tiny_checkpoint: Path, examples_file: Path, tmp_path: Path
) -> None:
    others = tmp_path / "others.jsonl"
    others.write_text(examples_file.read_text().replace('"output": "', '"output": "It is 1'))
    out = finetune(config(tiny_checkpoint, others, tmp_path / "teacher", DistillConfig()))
    merge_checkpoint(read_adapter(out / "final"), tiny_checkpoint, tmp_path / "merged")

    def distance(weight: float) -> float:
        how = DistillConfig(teacher=tmp_path / "merged", weight=weight)
        _, val = log_of(finetune(config(tiny_checkpoint, examples_file, tmp_path / f"{weight}", how)))
        return float(val[-1]["val_teacher_kl"])

    assert distance(1.0) < distance(1e-9)  # the data alone
    page = (tmp_path / "1.0/report.html").read_text()
    assert "Divergence from the teacher" in page
    assert "merged as teacher, weight 1, temperature 1, 64 tokens" in page


def test_a_teacher_of_other_tokens_or_of_fewer_is_refused_by_name(
    teacher: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def found(directory: Path, longest: int = 20) -> object:
        how = DistillConfig(teacher=directory)
        return find_teacher(FinetuneConfig(checkpoint_dir=tiny_checkpoint, distill=how), longest)

    assert find_teacher(FinetuneConfig(checkpoint_dir=tiny_checkpoint), 20) is None
    assert found(Path("base"))
    with pytest.raises(UsageError, match="max_length 96"):
        found(teacher, 97)
    with pytest.raises(CheckpointError, match="no folder"):
        found(tmp_path / "absent")
    merged = shutil.copytree(tiny_checkpoint, tmp_path / "merged")
    score.write(merged, torch.zeros(2, 32), Scoring("classify", ("a", "b")))
    with pytest.raises(UsageError, match="has a head that reads labels"):
        found(merged)
    other = write_checkpoint(tmp_path / "other", tiny_model())
    (other / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UsageError, match="another tokenizer"):
        found(other)


def test_settings_without_a_teacher_are_refused_by_name() -> None:
    for setting in ({"top_k": 3}, {"temperature": 2.0}, {"weight": 1.0}, {"quantize": "bnb.nf4"}):
        with pytest.raises(UsageError, match=f"{next(iter(setting))}"):
            DistillConfig(**setting)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="token_dropout"):
        FinetuneConfig(data=DataConfig(token_dropout=0.1), distill=DistillConfig(teacher=Path("base")))


def test_a_teacher_that_knows_more_tokens_than_the_model_is_read_without_them(tiny_checkpoint: Path) -> None:
    how = FinetuneConfig(checkpoint_dir=tiny_checkpoint, distill=DistillConfig(teacher=Path("base"), top_k=9999))
    teacher = find_teacher(how, 20)
    assert teacher
    assert teacher.top_k == teacher.vocab == 320
    ids, log_probs = distillation.likely(torch.randn(2, 330)[:, :320], teacher)
    assert sorted(ids[0].tolist()) == list(range(320))
    assert bool((log_probs[:, -1] == -torch.inf).all())
