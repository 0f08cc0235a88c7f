"""Adapters and models are uploaded, to a hub on this machine: private, and without anything of whoever trained them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.checkpoint.identity import base_facts
from lit_qlora.convert.hub import upload
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files.manifest import MANIFEST
from lit_qlora.lora.adapter import read_adapter, save_adapter
from lit_qlora.lora.push import stage_adapter, without_paths
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig
from tests.conftest import run_here
from tests.hub_server import Hub, serve
from tests.lora.test_adapter import trained

TOKEN = "hf_canary0123456789"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning",  # huggingface_hub 2.4 of httpx
)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hub]]:
    """Serves hubs that take what TOKEN brings, until the test ends."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the hub here does not speak
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    servers = []

    def begin(**options: Any) -> Hub:
        hub = Hub({}, writers=(TOKEN,), **options)
        servers.append(serve(hub))
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        return hub

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """An adapter with the state of its training beside it."""
    config = LoRAConfig(targets=("query",))
    facts = {"base": base_facts(tiny_checkpoint), "data": {"/home/me/secret/train.jsonl": "abc"}, "step": 3}
    also = {"train_state.safetensors": lambda path: path.write_bytes(b"x" * 99)}
    save_adapter(tmp_path / "final", trained(load_model(tiny_checkpoint), config), config, STYLES["qa"], facts, also)
    return tmp_path / "final"


def test_an_adapter_is_uploaded_private_and_reads_back(start: Any, adapter: Path, tmp_path: Path) -> None:
    hub = start()
    done = run_here("scripts/push.py", "--lora_path", adapter, "--repo_id", "org/model", "--access_token", TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to org/model, private: {hub.endpoint}/org/model" in done.stdout
    assert hub.private
    assert TOKEN not in done.stdout + done.stderr
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "prompt_style.json", MANIFEST}
    assert hub.files.keys() == names
    assert b"/home" not in b"".join(hub.files.values())
    (tmp_path / "back").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "back" / name).write_bytes(content)
    back, own = read_adapter(tmp_path / "back"), read_adapter(adapter)
    assert back.config == own.config
    assert all((tensor == own.peft_tensors[name]).all() for name, tensor in back.peft_tensors.items())


def test_a_checkpoint_is_uploaded_as_a_hugging_face_folder(start: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    hub, model = start(), shutil.copytree(tiny_checkpoint, tmp_path / "model")
    flags = ("--repo_id", "org/model", "--access_token", TOKEN, "--private", "false")
    done = run_here("scripts/push.py", "--checkpoint_dir", model, *flags)
    assert done.returncode == 0, done.stderr
    assert not hub.private
    assert {"config.json", "model.safetensors", "tokenizer.model", "README.md"} <= hub.files.keys()
    assert "lit_model.safetensors" not in hub.files
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dry_run_names_the_files_and_asks_nobody(adapter: Path) -> None:
    done = run_here("scripts/push.py", "--lora_path", adapter, "--repo_id", "org/model", "--dry_run", "true")
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout
    assert "train_state" not in done.stdout
    assert "these files go to org/model, private" in done.stdout


def test_a_public_repository_takes_nothing_that_was_to_be_private(start: Any, adapter: Path) -> None:
    hub = start(private=False)
    with pytest.raises(UsageError, match="org/model is there already and everybody sees it"):
        upload(adapter, "org/model", True, TOKEN, hub.endpoint)
    assert not hub.files


@pytest.mark.parametrize("token", [None, "hf_readonly"])
def test_a_token_that_may_not_write_is_told_what_to_do(start: Any, adapter: Path, token: str | None) -> None:
    hub = start()
    with pytest.raises(CheckpointError, match=r"answers 40\d for org/model. It needs a token that may write to org"):
        upload(adapter, "org/model", True, token, hub.endpoint)


def test_a_damaged_adapter_is_not_uploaded(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        stage_adapter(adapter, tmp_path)


def test_facts_lose_their_paths_and_nothing_else() -> None:
    facts = {"base": {"path": "out/x", "name": "org/m"}, "data": {"/a/b.jsonl": "1", "hf:org/set": "2"}}
    assert without_paths(facts) == {"base": {"name": "org/m"}, "data": {"b.jsonl": "1", "hf:org/set": "2"}}
    assert without_paths([1, None, "C:\\x\\y"]) == [1, None, "y"]


def test_a_name_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    done = run_here("scripts/push.py", "--lora_path", tmp_path, "--repo_id", "a b", "--dry_run", "true")
    assert done.returncode == 2
    assert "--repo_id 'a b' is not ORG/NAME" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--lora_path", "a", "--checkpoint_dir", "b")])
def test_one_thing_is_uploaded_at_a_time(flags: tuple[str, ...]) -> None:
    done = run_here("scripts/push.py", "--repo_id", "org/model", *flags)
    assert done.returncode == 2
    assert "one of them" in done.stderr


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run_here("scripts/push.py", "--repo_id", "org/model", "--checkpoint_dir", tmp_path / "no" / "merged")
    assert done.returncode == 4
    assert f"{tmp_path}/no/merged does not exist" in done.stderr
