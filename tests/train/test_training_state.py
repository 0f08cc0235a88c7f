"""What a run needs to go on survives the way to the disk and back, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lit_qlora.errors import CheckpointError
from lit_qlora.train.training_state import pack, read_counters, restore, state_files, unpack


def test_whatever_a_state_holds_comes_back_as_it_was() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {
        0: {"step": torch.tensor(3.0), "shared": [1, 2.5, None, True, "x"], "inner": {"a": {"b": torch.ones(2, 3)}}},
        "groups": [{"lr": 1e-300, "betas": (0.9, 0.999), "params": [0, 1], "inf": float("inf")}],
    }
    packed = json.loads(json.dumps(pack(state, tensors, "optimizer")))
    back = unpack(packed, tensors)
    assert torch.equal(back[0].pop("step"), state[0].pop("step"))
    assert torch.equal(back[0].pop("inner")["a"]["b"], state[0].pop("inner")["a"]["b"])
    assert back == state
    assert type(back["groups"][0]["betas"]) is tuple


def test_what_json_does_not_know_is_refused_with_its_place() -> None:
    with pytest.raises(TypeError, match="optimizer/0/odd: a set cannot be saved"):
        pack({0: {"odd": {1}}}, {}, "optimizer")


def saved(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    folder.mkdir()
    for name, write in state_files(Fabric(accelerator="cpu"), model, optimizer, {"step": 4}).items():
        write(folder / name)


def test_only_what_learns_is_saved(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    saved(tmp_path / "x", model, torch.optim.SGD([model.weight], lr=1))
    assert read_counters(tmp_path / "x")["step"] == 4
    other = nn.Linear(3, 2)
    other.bias.requires_grad_(False)
    bias = other.bias.clone()
    restore(Fabric(accelerator="cpu"), other, torch.optim.SGD([other.weight], lr=1), tmp_path / "x")
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, bias)


def test_the_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    saved(tmp_path / "x", model, torch.optim.SGD(model.parameters(), lr=1))
    for other in (nn.Linear(3, 3), nn.Linear(3, 2, bias=False)):
        with pytest.raises(CheckpointError, match="other parameters"):
            restore(Fabric(accelerator="cpu"), other, torch.optim.SGD(other.parameters(), lr=1), tmp_path / "x")


def test_a_folder_without_a_state_or_with_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds an adapter, but no state\.json"):
        read_counters(tmp_path)
    (tmp_path / "state.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="has format 99; this version reads 1"):
        read_counters(tmp_path)
