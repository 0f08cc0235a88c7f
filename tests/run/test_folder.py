"""The folder of a run is one run's at a time, and an earlier run in it is moved aside whole."""

import fcntl
import shutil
from pathlib import Path

import pytest

from lit_qlora import cli
from lit_qlora.lora.adapter import read_adapter
from lit_qlora.settings import FinetuneConfig
from tests.run.conftest import Finetune, files_of, log_of


def test_the_default_folder_is_named_after_the_checkpoint(
    finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert finetune("--out_dir=null") == 0
    assert Path("out/lora/tiny/final").is_dir()


def test_a_second_run_moves_the_first_aside_and_loses_nothing(finetune: Finetune, out: Path) -> None:
    for number in (1, 2, 3):
        assert finetune(f"--seed={number}") == 0
    kept = {
        path.name: cli.parse(FinetuneConfig, [f"--config={path}/config.yaml"]).seed for path in out.parent.glob("out*")
    }
    assert kept == {"out": 3, "out.1": 1, "out.2": 2}
    for name in kept:
        assert len(log_of(out.parent / name)[0]) == 2
        assert read_adapter(out.parent / name / "final").manifest


def test_a_run_that_the_disk_has_no_room_for_moves_nothing(
    finetune: Finetune, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune() == 0
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1_000))
    assert finetune("--resume=never") == 6
    assert [path.name for path in out.parent.glob("out*")] == ["out"]


@pytest.mark.parametrize("name", [".lock", "config.yaml", "final", "final.state"])
def test_no_link_in_a_folder_of_a_stranger_has_the_run_write_elsewhere(
    finetune: Finetune, out: Path, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("precious\n")
    target = mine if name.startswith("final") else mine / "letter.txt"
    out.mkdir()
    (out / name).symlink_to(target)
    status = finetune("--train.save_every=1")
    assert status == (6 if name == ".lock" else 0)
    assert files_of(mine) == {"letter.txt": b"precious\n"}


def test_a_file_where_a_run_saves_a_folder_is_set_aside(finetune: Finetune, out: Path) -> None:
    out.mkdir()
    for name in ("final", "step-000001.state"):
        (out / name).write_text("precious\n")
    assert finetune("--train.save_every=1") == 0
    assert [(out / f"aside-{name}.1").read_text() for name in ("final", "step-000001.state")] == ["precious\n"] * 2
    assert read_adapter(out / "final").manifest


def test_a_folder_may_be_a_link(finetune: Finetune, out: Path) -> None:
    link = out.with_name("link")
    link.symlink_to("out")
    out.mkdir()
    for seed in (1, 2):
        assert finetune(f"--out_dir={link}", f"--seed={seed}") == 0
    assert link.readlink() == Path("out")
    assert [
        cli.parse(FinetuneConfig, [f"--config={path}/config.yaml"]).seed for path in (out.with_name("out.1"), link)
    ] == [
        1,
        2,
    ]


def test_an_earlier_run_stays_where_it_is_if_it_holds_what_the_next_one_needs(
    finetune: Finetune,
    out: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune() == 0
    shutil.copytree(tiny_checkpoint, out / "merged")
    before = files_of(out)
    flags = [f"--lora.start={out}/final", f"--checkpoint_dir={out}/merged"]
    for name, flag in zip(("lora.start", "checkpoint_dir"), flags, strict=True):
        assert finetune(flag) == 2
        said = capsys.readouterr().err
        assert f"{name} {flag.partition('=')[2]}" in said
        assert "Take another --out_dir." in said
    monkeypatch.chdir(out)
    assert finetune("--out_dir=.") == 2
    assert "the current directory" in capsys.readouterr().err
    assert files_of(out) == before
    assert not out.with_name("out.1").exists()


def test_a_folder_that_a_run_is_using_is_refused(
    finetune: Finetune, out: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(4711, file=lock, flush=True)
        assert finetune() == 6
    message = capsys.readouterr().err
    assert f"out_dir {out} is in use by the run with process id 4711." in message
    assert "--out_dir" in message
    assert sorted(path.name for path in out.iterdir()) == [".lock"]


@pytest.mark.parametrize("place", ["out", "out/below/it"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    finetune: Finetune, tmp_path: Path, no_weights: None, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "out").write_text("a file")
    assert finetune(f"--out_dir={tmp_path / place}") == 6
    assert f"error: out_dir {tmp_path / place} cannot be written: " in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file"
