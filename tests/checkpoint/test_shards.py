"""Weights in several files are the weights in one, and an index is not believed."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_qlora.checkpoint import shards
from lit_qlora.checkpoint.checkpoint import check_weights, content_hash, load_model, save_weights
from lit_qlora.errors import CheckpointError, ResourceError
from lit_qlora.model.gpt import GPT
from tests.conftest import tiny_model, write_checkpoint

TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))


def save(directory: Path, model: GPT, limit: int) -> str:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return save_weights(directory, model.config, weights, weights.items(), limit)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in four files."""
    save(tmp_path / "sharded", tiny_model(), limit=150_000)
    return tmp_path / "sharded"


def test_weights_that_fit_are_one_file_and_others_are_numbered_with_an_index(tmp_path: Path, sharded: Path) -> None:
    save(tmp_path / "one", tiny_model(), limit=10**9)
    assert {path.name for path in (tmp_path / "one").glob("lit_model*")} == {"lit_model.safetensors"}
    names = [f"lit_model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(path.name for path in sharded.glob("lit_model*")) == [*names, "lit_model.safetensors.index.json"]
    for name in names:
        tensors = load_file(sharded / name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 150_000


def test_a_sharded_checkpoint_is_the_same_model(sharded: Path) -> None:
    with torch.no_grad():
        assert torch.equal(load_model(sharded)(TOKENS), tiny_model()(TOKENS))


def test_the_hash_of_a_sharded_checkpoint_is_that_of_its_sums(sharded: Path) -> None:
    files = sorted(sharded.glob("lit_model-*"))
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    expected = hashlib.sha256(sums.encode()).hexdigest()
    assert content_hash(sharded) == expected
    (sharded / ".sha256.json").unlink()
    assert content_hash(sharded) == expected
    assert save(sharded, tiny_model(), limit=150_000) == expected


def test_the_hash_follows_a_change_in_any_file(sharded: Path) -> None:
    before = content_hash(sharded)
    path = sorted(sharded.glob("lit_model-*"))[2]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert content_hash(sharded) != before


def test_saving_again_leaves_nothing_of_the_model_before(sharded: Path) -> None:
    save(sharded, tiny_model(seed=1), limit=10**9)
    assert [path.name for path in sharded.glob("lit_model*")] == ["lit_model.safetensors"]
    with torch.no_grad():
        assert torch.equal(load_model(sharded)(TOKENS), tiny_model(seed=1)(TOKENS))


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match=r"needs 0.0 GB for lit_model.safetensors; 0.0 GB are free"):
        save(tmp_path / "full", tiny_model(), limit=10**9)
    assert not (tmp_path / "full").exists()


def test_what_killed_programs_left_is_removed(sharded: Path) -> None:
    (sharded / "weights.tmp-1").mkdir()
    save(sharded, tiny_model(), limit=10**9)
    assert not list(sharded.glob("*.tmp-*"))


@pytest.mark.parametrize("kind", ["going", "old"])
def test_a_checkpoint_whose_replacement_was_killed_is_put_back_when_it_is_read(sharded: Path, kind: str) -> None:
    aside = sharded / f"model_config.json.{kind}-1"
    aside.mkdir()
    for path in [sharded / "model_config.json", *(sharded.glob("lit_model*") if kind == "old" else ())]:
        path.rename(aside / path.name)
    if kind == "old":
        (sharded / "lit_model.safetensors").write_text("half of the new one")
    with torch.no_grad():
        assert torch.equal(load_model(sharded)(TOKENS), tiny_model()(TOKENS))
    assert not list(sharded.glob("model_config.json.*"))
    assert not (sharded / "lit_model.safetensors").exists()


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    return str(caught.value)


def change_index(directory: Path, change: Any) -> Path:
    path = directory / "lit_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return path


def test_an_absent_file_is_named(sharded: Path) -> None:
    (sharded / "lit_model-00003-of-00004.safetensors").unlink()
    assert "names 1 files that are absent: lit_model-00003-of-00004.safetensors" in refusal(sharded)


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "x" * 10_000_000])
def test_an_index_cannot_point_outside_its_folder(sharded: Path, target: str) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"norm.weight": target}))
    message = refusal(sharded)
    assert "points outside its folder" in message
    assert len(message) < 500


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    files = sorted(sharded.glob("lit_model-*"))
    save_file({**load_file(files[1]), **load_file(files[0])}, files[1])
    message = refusal(sharded)
    assert f"{files[1]}: these tensors are in another file too:" in message
    assert "  embed.weight" in message


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    index = change_index(
        sharded, lambda index: index["weight_map"].update({"embed.weight": index["weight_map"]["norm.weight"]})
    )
    assert f"{index} names tensors that are not where it says:\n  embed.weight" in refusal(sharded)


def test_a_tensor_that_the_index_names_twice_is_refused(sharded: Path) -> None:
    path = sharded / "lit_model.safetensors.index.json"
    path.write_text(path.read_text().replace('"norm.weight":', '"norm.weight": "x", "norm.weight":'))
    assert "the same key twice" in refusal(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    path = sharded / "lit_model.safetensors.index.json"
    path.write_text(content)
    assert refusal(sharded).startswith(str(path))


def test_weights_that_do_not_fit_are_named_in_a_sharded_checkpoint_too(sharded: Path) -> None:
    weights = shards.open_weights(sharded / "lit_model.safetensors.index.json")
    specs = {name: spec for name, spec in weights.specs.items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"norm.weight is missing"):
        check_weights(specs, tiny_model().config, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: list(reversed(tensors)), r"b is \(2,\) torch.float32, expected a, \(3,\) torch.float32"),
        (lambda tensors: tensors[:1], r"1 tensors are missing:\n  b"),
        (lambda tensors: [*tensors, ("c", torch.zeros(1))], r"c is .* expected nothing"),
        (lambda tensors: [("a", torch.zeros(3).half()), tensors[1]], r"a is \(3,\) torch.float16"),
    ],
)
@pytest.mark.parametrize("limit", [1, 10**9])
def test_only_what_was_announced_is_written(change: Any, message: str, limit: int, tmp_path: Path) -> None:
    tensors = [("a", torch.zeros(3)), ("b", torch.zeros(2))]
    with pytest.raises(CheckpointError, match=message):
        shards.write(tmp_path, "x.safetensors", dict(tensors), change(tensors), limit)
    assert not list(tmp_path.glob("*.tmp-*"))
    assert not (tmp_path / "x.safetensors.index.json").exists()


def test_a_file_of_pytorch_is_read_a_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(4, 3).T}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    weights = shards.open_weights(tmp_path / "pytorch_model.bin")
    assert {name: (spec.shape, spec.dtype) for name, spec in weights.specs.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor)
        assert weights.read(name).is_contiguous()


class Trap:
    """A pickle that touches a file when it is opened as pickle.load would."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_crafted_pickle_is_refused_and_runs_nothing(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    if zipped:
        torch.save({"a": torch.zeros(1), "b": Trap(tmp_path / "marker")}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin (holds more than tensors|is not a complete)"):
        shards.open_weights(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"a": 5}, {"state_dict": {"a": torch.zeros(1)}}], ids=["list", "number", "nested"]
)
def test_a_file_of_pytorch_that_is_no_model_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a dictionary of tensors"):
        shards.open_weights(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_truncated_file_of_pytorch_is_named(size: int, tmp_path: Path) -> None:
    torch.save({"a": torch.randn(100)}, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is not a complete"):
        shards.open_weights(tmp_path / "pytorch_model.bin")


def test_a_whole_checkpoint_has_its_old_configuration_until_the_weights_are_complete(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tiny_model())
    weights = {name: parameter.detach() for name, parameter in tiny_model(seed=1).named_parameters()}

    def failing() -> Any:
        for i, item in enumerate(weights.items()):
            if i == 5:
                raise RuntimeError("power failure")
            yield item

    with pytest.raises(RuntimeError, match="power failure"):
        save_weights(directory, tiny_model().config, weights, failing())
    with torch.no_grad():
        assert torch.equal(load_model(directory)(TOKENS), tiny_model()(TOKENS))


def test_an_index_beside_a_single_file_of_other_weights_is_refused_with_both_names(sharded: Path) -> None:
    (sharded / "lit_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"two sets of weights: lit_model\.saf.*, and the files that lit_.*index"):
        shards.find(sharded, "lit_model.safetensors")
    only = {"weight_map": {"norm.weight": "lit_model.safetensors"}}
    (sharded / "lit_model.safetensors.index.json").write_text(json.dumps(only))
    assert shards.find(sharded, "lit_model.safetensors") == sharded / "lit_model.safetensors.index.json"
