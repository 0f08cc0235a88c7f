"""Adapters that are switched compute what each computes alone, row by row."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.errors import UsageError
from lit_qlora.lora.adapter import load_adapter, read_adapter
from lit_qlora.lora.adapter_switch import AdapterSwitch
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import Scheme
from tests.conftest import tiny_model, write_checkpoint
from tests.scripts.test_chat import write_adapter


def alone(checkpoint: Path, folder: Path | None, scheme: Scheme) -> GPT:
    model = load_model(checkpoint, quantize=scheme)
    if folder:
        add_lora(model, read_adapter(folder).config)
        load_adapter(model, folder)
    return model.eval()


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_each_row_is_answered_by_its_own_adapter(scheme: Scheme, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folders = {
        "a": write_adapter(tmp_path / "a", tiny_checkpoint, 1),
        "b": write_adapter(tmp_path / "b", tiny_checkpoint, 2, targets=("head", "projection")),
    }
    model = load_model(tiny_checkpoint, quantize=scheme).eval()
    switch = AdapterSwitch(model)
    for name, folder in folders.items():
        switch.add(name, read_adapter(folder))
    rows = ["b", None, "a", "b"]
    tokens = torch.randint(0, 320, (4, 7))
    with torch.no_grad():
        switch.select(rows)
        mixed = model(tokens)
        for i, name in enumerate(rows):
            expected = alone(tiny_checkpoint, folders.get(str(name)), scheme)(tokens[i : i + 1])
            torch.testing.assert_close(mixed[i : i + 1], expected, rtol=1e-5, atol=1e-5)
            switch.select([name])
            assert torch.equal(model(tokens[i : i + 1]), expected)
            switch.select(rows)
    with switch.using("a"):
        pass
    assert torch.equal(model(tokens), alone(tiny_checkpoint, None, scheme)(tokens))


def test_rows_of_a_mixture_of_experts_cannot_differ(tmp_path: Path) -> None:
    experts = tiny_model(family="mixtral", n_expert=4, n_expert_per_token=2, expert_size=32)
    checkpoint = write_checkpoint(tmp_path / "experts", experts)
    switch = AdapterSwitch(load_model(checkpoint))
    switch.add("attention", read_adapter(write_adapter(tmp_path / "a", checkpoint, targets=("query",))))
    switch.select(["attention", None])
    switch.add("mlp", read_adapter(write_adapter(tmp_path / "b", checkpoint, targets=("mlp",))))
    with pytest.raises(UsageError, match="mixture of experts"):
        switch.select(["mlp", None])
    switch.select(["mlp", "mlp"])


def test_routers_switch_with_all_rows(tmp_path: Path) -> None:
    experts = tiny_model(family="mixtral", n_expert=4, n_expert_per_token=2, expert_size=32)
    checkpoint = write_checkpoint(tmp_path / "experts", experts)
    folder = write_adapter(tmp_path / "router", checkpoint, targets=("router", "query"))
    switch = AdapterSwitch(load_model(checkpoint).eval())
    switch.add("router", read_adapter(folder))
    tokens = torch.randint(0, 320, (2, 7))
    with torch.no_grad(), switch.using("router"):
        torch.testing.assert_close(switch.model(tokens), alone(checkpoint, folder, "none")(tokens))
    with pytest.raises(UsageError, match="mixture of experts"):
        switch.select(["router", None])


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_variants_are_switched_too(scheme: Scheme, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(qkv_bias=True))
    settings = {
        "dora": {"dora": True, "targets": ("query", "mlp")},
        "ranks": {"rank_pattern": {"value": 2}, "rslora": True, "last_layers": 1},
    }
    for name, changes in settings.items():
        write_adapter(tmp_path / name, base, **changes)
    switch = AdapterSwitch(load_model(base, quantize=scheme).eval())
    for name in settings:
        switch.add(name, read_adapter(tmp_path / name))
    tokens = torch.randint(0, 320, (3, 7))
    with torch.no_grad():
        switch.select(["dora", None, "ranks"])
        mixed = switch.model(tokens)
        for i, name in enumerate(["dora", None, "ranks"]):
            expected = alone(base, tmp_path / name if name else None, scheme)(tokens[i : i + 1])
            torch.testing.assert_close(mixed[i : i + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_switch_with_their_adapter(tied: bool, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(tied_head=tied, head_bias=True))
    settings: dict[str, Any] = {
        "tokens": {"train_tokens": (3, 300), "train_head_rows": True},
        "whole": {"train_embeddings": True},
        "plain": {"targets": ("query",) if tied else ("query", "head")},
    }
    for name, changes in settings.items():
        write_adapter(tmp_path / name, base, **changes)
    switch = AdapterSwitch(load_model(base).eval())
    for name in settings:
        switch.add(name, read_adapter(tmp_path / name))
    tokens = torch.tensor([[3, 300, 5, 3]] * 4)
    with torch.no_grad():
        switch.select(["plain", "tokens", None, "whole"])
        mixed = switch.model(tokens)
        for i, name in enumerate(["plain", "tokens", None, "whole"]):
            expected = alone(base, tmp_path / name if name else None, "none")(tokens[i : i + 1])
            torch.testing.assert_close(mixed[i : i + 1], expected, rtol=1e-4, atol=1e-4)
            with switch.using(name):
                torch.testing.assert_close(switch.model(tokens[:1]), expected, rtol=1e-4, atol=1e-4)
