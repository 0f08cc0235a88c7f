"""Downloads, against a hub on this machine: what is cut goes on, what is wrong is refused, no token is left behind."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.hub import RemoteFile, choose_files, download, list_models
from lit_qlora.convert.known_models import MODELS
from lit_qlora.errors import CheckpointError, ResourceError, UsageError, UserError
from tests.conftest import ROOT, load_script, write_tokenizer
from tests.hub_server import COMMIT, Hub, of_folder, serve
from tests.reference import hugging_face_model

CANARY = "hf_canary0123456789"


@pytest.fixture(scope="session")
def their_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in shards with its tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    hugging_face_model(folder, "llama-gqa", shards="100KB")
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("do as you like\n")
    (folder / "README.md").write_text("x" * 1000)
    return folder


@pytest.fixture
def start() -> Iterator[Callable[[Hub], Hub]]:
    """Serves hubs until the test ends."""
    servers = []

    def begin(hub: Hub) -> Hub:
        servers.append(serve(hub))
        return hub

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting, and use no token of whoever runs the tests."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


def test_a_model_is_downloaded_and_converted(start: Any, their_folder: Path, tmp_path: Path) -> None:
    hub = start(of_folder(their_folder))
    folder = download("org/model", tmp_path, endpoint=hub.endpoint)
    assert folder == tmp_path / "org/model"
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {path.name for path in their_folder.iterdir()} - {"README.md"} | {"source.json"}
    for name in names - {"source.json"}:
        assert (folder / name).read_bytes() == (their_folder / name).read_bytes()
    convert_hf_checkpoint(folder, folder)
    convert_hf_checkpoint(their_folder, tmp_path / "local")
    tokens = torch.randint(0, 96, (1, 9))
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), load_model(tmp_path / "local")(tokens))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "org/model is already quantised"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"model.x.weight": "model.safetensors"}},
            "1 tensors have no rule",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_before_its_weights_are_fetched(
    name: str, change: dict[str, Any], message: str, start: Any, their_folder: Path, tmp_path: Path
) -> None:
    hub = of_folder(their_folder)
    hub.files[name] = json.dumps(json.loads(hub.files[name]) | change).encode()
    start(hub)
    assert message in str(refusal(hub, tmp_path))
    assert {"config.json"} <= hub.served.keys() <= {"config.json", "model.safetensors.index.json"}
    download("org/model", tmp_path, endpoint=hub.endpoint, convertible=False)
    assert hub.served.keys() > {"config.json", "model.safetensors.index.json"}


def test_the_commit_and_the_sums_are_written_down_and_travel(start: Any, their_folder: Path, tmp_path: Path) -> None:
    hub = start(of_folder(their_folder))
    folder = download("org/model", tmp_path, endpoint=hub.endpoint)
    source = json.loads((folder / "source.json").read_text())
    assert (source["repo_id"], source["revision"], source["commit"]) == ("org/model", "main", COMMIT)
    assert source["files"]["config.json"]["bytes"] == (their_folder / "config.json").stat().st_size
    assert all(file["sha256"] or file["git_sha1"] for file in source["files"].values())
    convert_hf_checkpoint(folder, tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere/source.json").read_text()) == source


def test_a_cut_connection_is_taken_up_where_it_was_cut(
    start: Any, their_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1)  # in life it is 10 MB, and what is short of that is lost
    name = sorted(path.name for path in their_folder.glob("model-*"))[0]
    size = (their_folder / name).stat().st_size
    hub = start(of_folder(their_folder, cut={name: size // 2}))
    download("org/model", tmp_path, endpoint=hub.endpoint)
    assert hub.served[name] == [(0, size // 2), (size // 2, size - size // 2)]
    assert (tmp_path / "org/model" / name).read_bytes() == (their_folder / name).read_bytes()


def test_what_is_complete_is_not_fetched_again(start: Any, their_folder: Path, tmp_path: Path) -> None:
    hub = start(of_folder(their_folder))
    folder = download("org/model", tmp_path, endpoint=hub.endpoint)
    first, *others = sorted(path.name for path in folder.glob("model-*"))
    (folder / first).unlink()
    hub.served.clear()
    download("org/model", tmp_path, endpoint=hub.endpoint)
    assert set(hub.served) == {first}
    assert others


def test_bin_files_are_taken_only_where_there_are_no_safetensors(
    start: Any, their_folder: Path, tmp_path: Path
) -> None:
    weights = {}
    for path in their_folder.glob("model-*"):
        weights |= load_file(path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    both = of_folder(their_folder)
    both.files["pytorch_model.bin"] = content
    download("org/model", tmp_path / "both", endpoint=start(both).endpoint)
    assert not list(tmp_path.glob("both/org/model/*.bin"))
    files = {name: data for name, data in both.files.items() if "safetensors" not in name}
    folder = download("org/model", tmp_path / "bin", endpoint=start(Hub(files)).endpoint)
    convert_hf_checkpoint(folder, folder)
    load_model(folder)


def test_a_new_commit_leaves_nothing_of_the_old_one(start: Any, their_folder: Path, tmp_path: Path) -> None:
    hub = start(of_folder(their_folder))
    folder = download("org/model", tmp_path, endpoint=hub.endpoint)
    hugging_face_model(tmp_path / "new", "llama-gqa")
    hub.files = of_folder(tmp_path / "new").files
    hub.commit = COMMIT[::-1]
    download("org/model", tmp_path, endpoint=hub.endpoint)
    assert [path.name for path in folder.glob("model*safetensors*")] == ["model.safetensors"]
    assert json.loads((folder / "source.json").read_text())["commit"] == COMMIT[::-1]


def refusal(hub: Hub, place: Path, repo_id: str = "org/model", **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        download(repo_id, place, endpoint=hub.endpoint, **options)
    assert CANARY not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    return caught.value


@pytest.mark.parametrize("token", [None, CANARY])
def test_a_gated_model_says_where_its_licence_is_accepted(
    token: str | None, start: Any, their_folder: Path, tmp_path: Path
) -> None:
    error = refusal(start(of_folder(their_folder, gated_for="another")), tmp_path, token=token)
    assert error.status == 4
    assert "accepted its licence: https://huggingface.co/org/model" in str(error)
    assert "--access_token" in str(error)
    assert not (tmp_path / "org").exists()


def test_a_gated_model_comes_with_the_right_token(start: Any, their_folder: Path, tmp_path: Path) -> None:
    hub = start(of_folder(their_folder, gated_for=CANARY))
    folder = download("org/model", tmp_path, token=CANARY, endpoint=hub.endpoint)
    assert hub.tokens == {CANARY}
    assert not [p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"token": "expired"}, "The hub answers 401 for org/model. The token is not valid."),
        ({"forbidden": True}, {"token": CANARY}, "The hub answers 403 for org/model. The token may not read"),
        ({}, {"revision": "v9"}, "org/model has no revision 'v9'. https://huggingface.co/org/model/commits lists them"),
        ({}, {"repo_id": "org/modle"}, "The hub has no model org/modle, or does not show it without a token."),
        ({}, {"repo_id": "Qwen/Qwen2.5-05B", "token": CANARY}, "Did you mean Qwen/Qwen2.5-0.5B?"),
    ],
    ids=["bad token", "forbidden", "revision", "spelling", "near a known name"],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(
    options: Any, arguments: Any, message: str, start: Any, their_folder: Path, tmp_path: Path
) -> None:
    error = refusal(start(of_folder(their_folder, **options)), tmp_path, **arguments)
    assert message in str(error)
    assert isinstance(error, CheckpointError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
@pytest.mark.parametrize("how", ["flipped", "shorter"])
def test_a_file_that_is_not_what_the_hub_describes_is_refused_and_removed(
    how: str, name: str, start: Any, their_folder: Path, tmp_path: Path
) -> None:
    content = bytearray((their_folder / name).read_bytes())
    content[5] ^= 1
    hub = start(of_folder(their_folder, spoiled={name: bytes(content if how == "flipped" else content[:-1])}))
    error = refusal(hub, tmp_path)
    assert re.search(r"is not the file that the hub describes|Consistency check failed", str(error))
    assert "Run the command again." in str(error)
    assert not (tmp_path / "org/model/source.json").exists()
    assert not (tmp_path / "org/model" / name).exists()
    hub.spoiled.clear()
    download("org/model", tmp_path, endpoint=hub.endpoint)


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil", "/etc/evil", "..\\evil"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, start: Any, their_folder: Path, tmp_path: Path) -> None:
    error = refusal(start(of_folder(their_folder, extra=[name])), tmp_path)
    assert "which leaves its folder. Do not trust it." in str(error)
    assert not (tmp_path / "org").exists()


@pytest.mark.parametrize(
    "repo_id", ["model", "org/model/more", "../model", "org/..", "https://huggingface.co/org/model", "", "a b/c"]
)
def test_what_cannot_be_a_model_is_refused_without_asking(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not ORG/NAME as the hub writes it"):
        download(repo_id, tmp_path)


@pytest.mark.parametrize("token", [f"{CANARY}\n", f"{CANARY} x", f"{CANARY}é", ""])
def test_a_token_that_cannot_be_one_is_not_repeated(token: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        download("org/model", tmp_path, token=token)
    assert CANARY not in str(caught.value)


def test_a_hub_that_is_not_there_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="The hub cannot be reached"):
        download("org/model", tmp_path, endpoint="http://127.0.0.1:9")


def test_too_little_room_is_said_before_the_download(
    start: Any, their_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_qlora.convert import hub as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    served = start(of_folder(their_folder))
    error = refusal(served, tmp_path)
    assert error.status == 6
    assert "org/model needs 0.0 GB" in str(error)
    assert not served.served


@pytest.mark.parametrize(
    ("names", "message"),
    [(["config.json"], "no model.safetensors and no pytorch_model.bin"), (["model.safetensors"], "no config.json")],
)
def test_a_repository_without_a_model_is_refused(names: list[str], message: str) -> None:
    files = [RemoteFile(name=name, bytes=1, sha256=None, git_sha1=None) for name in names]
    with pytest.raises(CheckpointError, match=message):
        choose_files(files, "org/model")


def test_other_formats_of_the_same_weights_are_left_out() -> None:
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    left = [
        "consolidated.00.pth",
        "consolidated.safetensors",
        "model.gguf",
        "tf_model.h5",
        "original/model.safetensors",
    ]
    files = [RemoteFile(name=name, bytes=1, sha256=None, git_sha1=None) for name in [*wanted, *left]]
    assert sorted(file.name for file in choose_files(files, "org/model")) == sorted(wanted)


def test_known_models_are_found_by_words() -> None:
    listed = list_models("llama 8B instruct")
    assert "meta-llama/Llama-3.1-8B-Instruct" in listed
    assert "70B" not in listed
    assert list_models("no such model") == ""
    names = [name for models in MODELS.values() for name in models]
    assert len(names) == len(set(names)) > 250
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in names)
    assert len(list_models().splitlines()) == len(names) + len(MODELS)


@pytest.mark.slow
def test_the_command_downloads_and_converts_and_shows_no_token(start: Any, their_folder: Path, tmp_path: Path) -> None:
    hub = start(of_folder(their_folder, gated_for=CANARY))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    script = [sys.executable, str(ROOT / "scripts/download.py"), "--repo_id", "org/model"]
    script += ["--checkpoints_dir", str(tmp_path / "checkpoints")]
    refused = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert refused.returncode == 4
    assert refused.stderr.startswith("error: org/model is given only to those who accepted its licence")
    for given, extra in ((script, {"HF_TOKEN": CANARY}), ([*script, "--access_token", CANARY], {})):
        done = subprocess.run(given, env=environment | extra, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert CANARY not in done.stdout + done.stderr
        assert "converted org/model (llama, 80,192 parameters)" in done.stdout
        assert done.stderr == ""
    left = [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert not left
    assert load_model(tmp_path / "checkpoints/org/model").config.name == "org/model"


def test_the_command_lists_without_asking_anybody(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("scripts/download.py")
    script.main(script.DownloadConfig(list="pythia 70m"))
    shown = capsys.readouterr().out.split()
    assert shown == ["Pythia", "EleutherAI/pythia-70m", "0.07", "B", "EleutherAI/pythia-70m-deduped", "0.07", "B"]
    with pytest.raises(UsageError, match="--list WORDS"):
        script.main(script.DownloadConfig())
