"""`lit-qlora` and `python -m lit_qlora`: the commands, in a checkout and in a wheel."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lit_qlora import __main__, commands
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON = (sys.executable, "-c", "import sys, lit_qlora.__main__ as m; m.main(); assert 'torch' not in sys.modules")


def test_every_script_that_is_a_command_has_a_name() -> None:
    paths = [path for folder in ("finetune", "scripts", "eval") for path in (ROOT / folder).glob("*.py")]
    runnable = {str(path.relative_to(ROOT)) for path in paths if "cli.run(" in path.read_text()}
    assert set(commands.COMMANDS.values()) == runnable - {"scripts/make_demo.py"}  # which made the demo, once
    assert len(commands.COMMANDS) == sum(map(len, commands.GROUPS.values()))


def test_alone_it_names_all_commands_in_ten_lines_without_torch() -> None:
    said = subprocess.run(PYTHON, capture_output=True, text=True, check=True).stdout
    assert len(said.splitlines()) <= 10
    assert all(name in said for name in commands.COMMANDS)


def test_an_unknown_command_is_answered_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-qlora", "finetine"])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert capsys.readouterr().err == "error: finetine is no command. Did you mean finetune? lit-qlora lists them.\n"


def test_a_command_becomes_its_script_with_the_same_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, argv: started.append(argv))
    monkeypatch.setattr("sys.argv", ["lit-qlora", "merge", "--lora_path", "a b"])
    monkeypatch.setenv("PYTHONPATH", "x")
    __main__.main()
    assert started == [[sys.executable, str(ROOT / "scripts/merge_lora.py"), "--lora_path", "a b"]]


def test_hints_are_spelled_for_a_checkout_or_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands.spell("scripts/chat.py") == "python scripts/chat.py"
    assert commands.find("finetune/demo") == Path("finetune/demo")
    monkeypatch.setattr(commands, "INSTALLED", tmp_path)
    assert commands.spell("scripts/chat.py") == "lit-qlora chat"
    assert commands.find("finetune/demo") == tmp_path / "finetune/demo"


def test_a_wheel_has_every_package() -> None:
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lit_qlora").rglob("*.py")}
    mapped = set(PROJECT["tool"]["setuptools"]["package-dir"]) - {"lit_qlora"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | mapped


def test_an_image_gets_what_a_wheel_is_made_of() -> None:
    copied, let_in = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text()
    for folder in PROJECT["tool"]["setuptools"]["package-dir"].values():
        assert f"\nCOPY {folder}" in copied
        assert f"\n!{folder}" in let_in


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_wheel_trains_merges_and_evaluates_the_demo_in_any_folder(tmp_path: Path) -> None:
    for name in ("lit_qlora", "finetune", "scripts", "eval", "checkpoints"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tmp_path / "source")]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(wheel, check=True, env=clean)
    (built,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(built)], check=True, env=clean)
    (tmp_path / "elsewhere").mkdir()

    def run(*words: str) -> str:
        environment = clean | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "lit_qlora", *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path / "elsewhere",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"next    lit-qlora merge --lora_path out/lora/tiny-world{os.sep}final" in run(
        "finetune", "--train.max_steps=1", "--eval.max_samples=4"
    )
    run("merge", "--lora_path", "out/lora/tiny-world")
    assert "tiny_world_qa" in run("eval", "--limit", "4")
    for name in ("chat", "answers"):
        assert "--help" in run(name, "--help")
