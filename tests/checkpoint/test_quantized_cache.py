"""The cache of quantised weights gives back the model that was quantised, and never a damaged one."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint import quantized_cache
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.checkpoint.streaming import stream
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage
from lit_qlora.settings import SCHEMES, Scheme
from tests.conftest import tiny_model, write_checkpoint

MIXED = (("head", "bnb.int8"), ("blocks.0.*", "bnb.nf4"), ("down", "none"))


def load(base: Path, cache: Path, scheme: Scheme = "bnb.nf4-dq", head: bool = False, layers: Any = ()) -> GPT:
    return quantized_cache.load(base, Storage(torch.bfloat16, scheme, head, layers), torch.device("cpu"), str(cache))


def assert_same(one: GPT, other: GPT) -> None:
    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    assert tensors.keys() == (dict(one.named_parameters()) | dict(one.named_buffers())).keys()
    for name, tensor in (*one.named_parameters(), *one.named_buffers()):
        assert tensor.dtype == tensors[name].dtype
        assert tensor.requires_grad == tensors[name].requires_grad
        assert torch.equal(tensor, tensors[name]), name
    text = torch.arange(9)[None]
    assert torch.equal(one(text), other(text))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", tiny_model(qkv_bias=True))


def never(*_: Any) -> None:
    raise AssertionError("the 16-bit weights were read")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
def test_the_second_load_is_the_first_without_its_weights(
    scheme: Scheme, tied: bool, head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(tied_head=tied))
    expected = load_model(base, torch.bfloat16, "cpu", scheme, head)
    assert_same(load(base, tmp_path / "cache", scheme, head), expected)
    monkeypatch.setattr(quantized_cache, "load_stored", never)
    again = load(base, tmp_path / "cache", scheme, head)
    assert_same(again, expected)
    if not head:
        assert (again.head.weight is again.embed.weight) == tied


def test_another_base_or_setting_is_another_entry(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for scheme, head in (("bnb.nf4", False), ("bnb.nf4", True), ("bnb.fp4", False)):
        load(base, cache, scheme, head)  # type: ignore[arg-type]
    load(write_checkpoint(tmp_path / "other", tiny_model(seed=1, qkv_bias=True)), cache, "bnb.nf4")
    mixed = load(base, cache, "bnb.nf4", layers=MIXED)
    assert len(list(cache.iterdir())) == 5
    assert_same(load(base, cache, "bnb.nf4", layers=MIXED), mixed)


@pytest.mark.parametrize("damage", ["flip", "swap", "cut", "no manifest", "manifest"])
def test_a_damaged_entry_is_made_again(damage: str, base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = load(base, cache)
    (entry,) = cache.iterdir()
    weights, manifest = entry / "weights.safetensors", entry / "manifest.json"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    if damage == "swap":
        data[-16:-8], data[-8:] = data[-8:], data[-16:-8]
    weights.write_bytes(data[:-9] if damage == "cut" else data)
    if damage == "no manifest":
        manifest.unlink()
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    assert_same(load(base, cache), expected)
    assert_same(load(base, cache), expected)


def test_a_program_that_is_killed_while_it_keeps_leaves_no_entry(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    child = os.fork()
    if child == 0:
        quantized_cache.publish = lambda *_: os.kill(os.getpid(), 9)
        load(base, cache)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    assert [path.name.split(".")[1][:3] for path in cache.iterdir()] == ["tmp"]
    load(base, cache)
    assert [path.suffix for path in cache.iterdir()] == [""]  # what was left is gone


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(base: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert_same(load(base, tmp_path / "cache"), load_model(base, torch.bfloat16, "cpu", "bnb.nf4-dq"))


def test_nothing_is_kept_of_weights_in_16_bit_or_when_it_is_off(base: Path, tmp_path: Path) -> None:
    load(base, tmp_path / "cache", "none")
    quantized_cache.load(base, Storage(torch.bfloat16, "bnb.nf4"), torch.device("cpu"), "none")
    assert not (tmp_path / "cache").exists()


def test_an_entry_may_be_deleted(base: Path, tmp_path: Path) -> None:
    expected = load(base, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert_same(load(base, tmp_path / "cache"), expected)


def test_an_entry_that_nobody_uses_goes_when_another_is_made(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load(base, cache)
    (first,) = cache.iterdir()
    os.utime(first, (0, 0))
    load(base, cache, "bnb.fp4")
    assert not first.exists()
    (second,) = cache.iterdir()
    os.utime(second, (0, 0))
    load(base, cache, "bnb.fp4")  # it is used
    load(base, cache)
    assert len(list(cache.iterdir())) == 2


def test_streamed_tensors_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.checkpoint.streaming.PIECE", 1000)
    from lit_qlora.checkpoint.safetensors_io import write

    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(37, 29),
        "b": torch.randn(700).bfloat16(),
        "c": torch.tensor(3.0),
        "d": torch.zeros(0, 4),
        "e": torch.arange(5, dtype=torch.uint8),
    }
    write(tmp_path / "x.safetensors", tensors, tensors.items())
    order = ["e", "a", "c", "d", "b", "a"]
    got = list(stream(((tmp_path / "x.safetensors", name) for name in order), torch.device("cpu")))
    for name, tensor in zip(order, got, strict=True):
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype
