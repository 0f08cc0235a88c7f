"""No command writes a file under its final name.

A fault, a kill or a signal at any touch of a file leaves the old or the new.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.checkpoint.identity import base_facts
from lit_qlora.lora.adapter import save_adapter
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig
from tests.conftest import run_here
from tests.disturbed import die, disturbed, fail, litter, stop
from tests.hub_server import of_folder, serve
from tests.lora.test_adapter import trained


@dataclass(frozen=True)
class Command:
    """A command that writes; {} stands for the folder that it works in."""

    script: str
    old: tuple[str, ...] | None
    """Flags that make the earlier output, None where a command never replaces one."""
    new: tuple[str, ...]
    out: str
    files: str = "*"
    """Its files in `out`, if that holds others."""
    in_steps: bool = False
    """Files among others are replaced one by one: after a kill, the next run puts the old ones back first."""
    gathers: bool = False
    """Files come one by one, each whole; the same command goes on."""

    def run(self, folder: Path, flags: tuple[str, ...]) -> int:
        """Its exit status."""
        return int(run_here(self.script, *(flag.format(folder) for flag in flags)).returncode or 0)

    def state(self, folder: Path) -> dict[str, bytes]:
        """The files of its output, by name; neither paths, times nor remembered hashes in them count."""
        out = folder / self.out
        found = [out] if out.is_file() else [path for path in out.glob(self.files) if path.is_file()]
        here = re.compile(
            rb'%s/\w+|"(date|total_evaluation_time_seconds)": .*' % re.escape(str(folder.parent).encode())
        )
        return {path.name: here.sub(b"", path.read_bytes()) for path in found if not path.name.startswith(".")}


MERGE = ("--checkpoint_dir={}/base", "--out_dir={}/merged")
CSV = ("--csv_path={}/faq.csv", "--out_dir={}/data", "--columns=q:instruction,a:output")
TASKS = ("--checkpoint_dir={}/base", "--save_filepath={}/results.json")
PROMPTS = ("--checkpoint_dir={}/base", "--prompts={}/data.jsonl", "--style=qa", "--out={}/answers.jsonl")
ANSWERS = ("--checkpoint_dir={}/base", "--data={}/data.jsonl", "--style=qa", "--out={}/said.jsonl")
OURS = "[lm]*[ol]*.[sj]*"  # lit_model.safetensors, model_config.json
COMMANDS = {
    "merge": Command(
        "scripts/merge_lora.py",
        ("--lora_path={}/a", *MERGE),
        ("--lora_path={}/b", *MERGE),
        "merged",
    ),
    "convert": Command(
        "scripts/convert_hf_checkpoint.py",
        ("--checkpoint_dir={}/theirs", "--out_dir={}/ours", "--name=x", "--dtype=bf16"),
        ("--checkpoint_dir={}/theirs", "--out_dir={}/ours", "--name=x"),
        "ours",
        in_steps=True,
    ),
    "convert in place": Command(
        "scripts/convert_hf_checkpoint.py",
        ("--checkpoint_dir={}/theirs", "--name=x", "--dtype=bf16"),
        ("--checkpoint_dir={}/theirs", "--name=x"),
        "theirs",
        files=OURS,
        in_steps=True,
    ),
    "export": Command(
        "scripts/convert_lit_checkpoint.py",
        None,
        ("--checkpoint_dir={}/base", "--out_dir={}/exported"),
        "exported",
    ),
    "gguf": Command(
        "scripts/convert_gguf.py",
        None,
        ("--checkpoint_dir={}/base", "--out_file={}/x.gguf", "--dtype=f32"),
        ".",
        files="x.*",
        in_steps=True,
    ),
    "prepare": Command(
        "scripts/prepare_csv.py",
        (*CSV, "--seed=1"),
        (*CSV, "--seed=2"),
        "data",
        in_steps=True,
    ),
    "shrink": Command(
        "scripts/shrink_lora.py",
        None,
        ("--lora_path={}/a", "--checkpoint_dir={}/base", "--rank=2", "--out_dir={}/small"),
        "small",
    ),
    "answers": Command(
        "eval/answers.py",
        (*ANSWERS, "--max_new_tokens=2"),
        (*ANSWERS, "--max_new_tokens=3"),
        "said.jsonl",
    ),
    "generate": Command(
        "scripts/generate.py",
        None,
        (*PROMPTS, "--max_new_tokens=3"),
        "answers.jsonl",
    ),
    "tasks": Command(
        "eval/lm_eval_harness.py",
        (*TASKS, "--limit=2"),
        (*TASKS, "--limit=3"),
        "results.json",
    ),
    "download": Command(
        "scripts/download.py",
        None,
        ("--repo_id=org/model", "--checkpoints_dir={}/hub"),
        "hub/org/model",
        in_steps=True,
        gathers=True,
    ),
}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """All that the commands read. Read only."""
    folder = tmp_path_factory.mktemp("workshop")
    base = shutil.copytree(tiny_checkpoint, folder / "base")
    for name, rank in (("a", 4), ("b", 8)):
        config = LoRAConfig(r=rank)
        save_adapter(folder / name, trained(load_model(base), config), config, STYLES["qa"], {"base": base_facts(base)})
    assert COMMANDS["export"].run(folder, ("--checkpoint_dir={}/base", "--out_dir={}/theirs")) == 0
    (folder / "faq.csv").write_text("q,a\n" + "".join(f"what is {i}?,{i}\n" for i in range(30)))
    (folder / "data.jsonl").write_text('{"instruction": "What is 1 plus 1?", "input": "", "output": "2"}\n' * 3)
    for file in folder.rglob("*.*"):
        file.chmod(0o444)
    return folder


@pytest.fixture
def _hub(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub that the download asks."""
    from huggingface_hub import constants

    hub = of_folder(workshop / "theirs")
    server = serve(hub)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name == "tasks" else ()) for name in COMMANDS])
def command(request: pytest.FixtureRequest) -> Command:
    if request.param == "download":
        request.getfixturevalue("_hub")
    return COMMANDS[request.param]


def place(workshop: Path, tmp_path: Path, command: Command, name: str = "work") -> Path:
    """A folder to work in, with the earlier output if there is to be one."""
    folder = shutil.copytree(workshop, tmp_path / name)
    if command.old:
        assert command.run(folder, command.old) == 0
    return folder


# What is opened for writing

_watched: list[tuple[str, set[str]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | os.PathLike):
        folder, seen = _watched[-1]
        path, mode, flags = os.path.abspath(os.fspath(arguments[0])), arguments[1] or "", arguments[2] or 0
        if path.startswith(folder) and (set(str(mode)) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)):
            seen.add(path)


sys.addaudithook(_watch)


@contextmanager
def watched(folder: Path) -> Iterator[set[str]]:
    """The files in `folder` that are opened for writing."""
    seen: set[str] = set()
    _watched.append((str(folder), seen))
    try:
        yield seen
    finally:
        _watched.pop()


def test_no_command_opens_a_final_name_to_write_it(command: Command, workshop: Path, tmp_path: Path) -> None:
    folder = place(workshop, tmp_path, command)
    with watched(folder) as seen:
        assert command.run(folder, command.new) == 0
    assert seen, "nothing was seen"
    assert command.state(folder)
    final = {str(folder / command.out), *(str(folder / command.out / name) for name in command.state(folder))}
    assert not final & seen
    assert litter(folder) == []
    made = [path for path in map(Path, final) if path.is_file() and not (workshop / path.relative_to(folder)).exists()]
    assert [path.name for path in made if not path.stat().st_mode & 0o200] == []  # though all that it read is read-only


def test_a_run_opens_no_final_name_to_write_it_but_those_of_its_logs(
    tiny_checkpoint: Path, examples_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = [f"--checkpoint_dir={tiny_checkpoint}", f"--data.path={examples_file}", f"--out_dir={out}"]
    flags += ["--data.prompt=qa", "--data.val_fraction=0.1", "--train.max_steps=2", "--train.save_every=1"]
    with watched(out) as seen:
        assert not run_here("finetune/lora.py", *flags).returncode
    written = {str(path.relative_to(out)) for path in map(Path, seen) if path.exists()}
    assert written <= {"log.jsonl", "samples.jsonl", ".lock"}
    assert {"final", "loss.png", "report.md", "config.yaml", "summary.json"} <= {path.name for path in out.iterdir()}
    assert litter(out) == []


# Faults

STATUSES = {fail: (0, 6), die: (-9, 0), stop: (143, 0)}
"""What may come of it; 0 where it concerned nothing that matters, or came when all was done."""


def check_disturbed(command: Command, before: Path, whole: Path, disturbance: Callable[[], None], number: int) -> bool:
    """Disturb the operation of this number on files, and see what is left, then and after the next run.

    Returns:
        whether there was one.
    """
    old, new = command.state(before), command.state(whole)
    folder = shutil.copytree(before, before.with_name("work"))
    status, came = disturbed(folder, number, disturbance, lambda: command.run(folder, command.new))
    assert status in STATUSES[disturbance], number
    found, left = command.state(folder), litter(folder)
    if command.gathers:
        whole_files = {name: content for name, content in found.items() if ".tmp-" not in name}
        assert new.items() >= whole_files.items(), number
        assert status or found == new, number
    elif not (command.in_steps and disturbance is die):
        assert found in ((new,) if status == 0 else (old, new)), number
    if disturbance is stop or status == 6:  # a fault while old files are removed is none, and they go at the next run
        assert left == [], number
    again = command.run(folder, command.new)
    assert again == 0 or (found == new and not command.old), number
    assert command.state(folder) == new, number
    assert litter(folder) == [], number
    shutil.rmtree(folder)
    return came


@pytest.fixture
def both(command: Command, workshop: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The folder before the command, and after it."""
    before = place(workshop, tmp_path, command, "before")
    whole = shutil.copytree(before, tmp_path / "whole")
    assert command.run(whole, command.new) == 0
    return before, whole


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("disturbance", [fail, die, stop])
def test_a_fault_at_any_touch_of_a_file_leaves_the_old_or_the_new(
    command: Command, disturbance: Callable[[], None], both: tuple[Path, Path]
) -> None:
    number = 1
    while check_disturbed(command, *both, disturbance, number):
        number += 1
    assert number > 5


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("command", ["export", "prepare", "merge"], indirect=True)
def test_a_signal_leaves_the_old_or_the_new_at_once(command: Command, both: tuple[Path, Path]) -> None:
    assert check_disturbed(command, *both, stop, 9)
