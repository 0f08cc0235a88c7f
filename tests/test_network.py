"""Nothing is asked for on the network that the user did not ask for."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_qlora.settings import TRACKERS
from tests.conftest import ROOT

WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        local = ("127.0.0.1", "::1", "localhost", "", None)
        if host not in local and not str(host).startswith(("/", "\\0")):
            with open(os.environ["ASKED"], "a") as asked:
                asked.write(f"{event} {host}\\n")

sys.addaudithook(watch)
"""
"""An audit hook sees every connection and look-up of Python, in child processes too."""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that holds whom commands asked; absent if nobody."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'watch'}{os.pathsep}{ROOT}")
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_MODE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "asked"


def run(*command: object) -> None:
    ended = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr


def test_the_watch_sees_whom_a_command_asks(asked: Path) -> None:
    run("-c", "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 9), 0.01)\nexcept OSError:\n    pass")
    assert "192.0.2.1" in asked.read_text()


@pytest.mark.slow
def test_a_run_with_every_tracker_asks_nobody(
    asked: Path, tiny_checkpoint: Path, examples_file: Path, tmp_path: Path
) -> None:
    data = ("--data.path", examples_file, "--data.prompt", "qa", "--out_dir", tmp_path / "out")
    known = ",".join(name for name in TRACKERS if name != "trackio" or find_spec(name))  # which CI does not install
    trackers = ("--log.to", f"[{known}]")
    run("finetune/lora.py", "--checkpoint_dir", tiny_checkpoint, *data, *trackers, "--train.max_steps", 3)
    assert not asked.exists(), asked.read_text()


@pytest.mark.slow
def test_no_other_command_asks_anybody(asked: Path, tiny_checkpoint: Path, examples_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base, data = ("--checkpoint_dir", tiny_checkpoint), ("--data.path", examples_file, "--data.prompt", "qa")
    run("finetune/lora.py", *base, *data, "--train.max_steps", 2, "--out_dir", out)
    adapter = ("--lora_path", out / "final")
    run("scripts/merge_lora.py", *adapter, *base)
    run("scripts/shrink_lora.py", *adapter, *base, "--rank", 2, "--out_dir", tmp_path / "small")
    run("scripts/generate.py", *base, *adapter, "--prompt", "Hi", "--max_new_tokens", 2)
    run("scripts/inspect_data.py", *base, *data)
    run("eval/perplexity.py", *base, "--file", ROOT / "lit_qlora/probe.txt")
    task = {"task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}"}
    task |= {"doc_to_choice": "{{c}}", "doc_to_target": "{{a}}"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny.yaml").write_text("".join(f"{key}: {json.dumps(task[key])}\n" for key in task))
    (tmp_path / "tasks/rows.jsonl").write_text(json.dumps({"q": "a", "c": ["b", "c"], "a": 0}) + "\n")
    tasks = ("--eval_tasks", "[tiny]", "--include_path", tmp_path / "tasks")
    run("eval/lm_eval_harness.py", *base, *tasks, "--save_filepath", tmp_path / "results.json")
    assert not asked.exists(), asked.read_text()
