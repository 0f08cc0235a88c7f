"""Whatever stops a program that writes a model, what it leaves is whole, or says that it is not."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError
from tests.reference import hugging_face_model

TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"}


def killed_at(event: int, work: Callable[[], object], place: Path) -> bool:
    """Run `work` in a process that is killed when it touches a file at `place` for the nth time; False if it ends."""
    child = os.fork()
    if not child:
        seen = 0

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if name in TOUCHES and str(arguments[0]).startswith(str(place)):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def two_models(tmp_path: Path) -> tuple[Path, Path]:
    """Two small Llamas of equal shape and different weights, as Hugging Face writes them."""
    for name, seed in (("old", 1), ("new", 2)):
        model = hugging_face_model(tmp_path / name, "llama-tied")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "old", tmp_path / "new"


def embedding(directory: Path) -> torch.Tensor | None:
    """The first and the last tensor of a checkpoint; None where it is refused."""
    try:
        model = load_model(directory)
    except CheckpointError:
        return None
    return torch.cat([model.embed.weight.detach().flatten(), model.norm.weight.detach()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12; nothing is shared
@pytest.mark.parametrize("before", ["nothing", "a checkpoint"])
def test_a_conversion_that_is_killed_leaves_a_whole_checkpoint_or_none(
    before: str, two_models: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = two_models
    whole = []
    for source in two_models:
        convert_hf_checkpoint(source, tmp_path / f"{source.name}-whole", name="x", limit=60_000)
        whole.append(embedding(tmp_path / f"{source.name}-whole"))
    event, states = 1, {"old": 0, "new": 0, "refused": 0}
    while True:
        out = tmp_path / f"out-{event}"
        if before != "nothing":
            convert_hf_checkpoint(old, out, name="x", limit=80_000)
        killed = killed_at(event, lambda out=out: convert_hf_checkpoint(new, out, name="x", limit=60_000), out)
        found = embedding(out)
        if found is None:
            states["refused"] += 1
        else:
            is_new = torch.equal(found, whole[1])
            assert is_new or torch.equal(found, whole[0])
            states["new" if is_new else "old"] += 1
        convert_hf_checkpoint(new, out, name="x", limit=60_000)
        assert torch.equal(embedding(out), whole[1])
        assert not list(out.glob("*.tmp-*"))
        assert json.loads((out / "lit_model.safetensors.index.json").read_text())
        if not killed:
            break
        event += 1
    assert event > 20
    assert states["new"] >= 1
    assert (states["refused"] > 3) == (before == "nothing")  # else who reads the folder puts the old one back
    assert (states["old"] > 10) == (before != "nothing")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_export_that_is_killed_leaves_a_whole_folder_or_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    event = 1
    while killed_at(event, lambda: export_hf(tiny_checkpoint, tmp_path / "out", limit=100_000), tmp_path / "out"):
        if (tmp_path / "out").exists():  # killed after it got its name
            break
        event += 1
    assert event > 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what the killed ones left is gone
    convert_hf_checkpoint(tmp_path / "out", tmp_path / "back")
    assert torch.equal(load_model(tmp_path / "back").embed.weight, load_model(tiny_checkpoint).embed.weight)
