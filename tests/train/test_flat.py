"""Parameters in one tensor learn, and are saved, as they would each by themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_qlora.settings import OptimizerConfig, TrainConfig
from lit_qlora.train.optim import make_optimizer
from tests.train.test_optim import through_files

SHAPES = {"x.lora_a": (2, 5), "x.lora_b": (4, 2), "norm": (3,), "y.lora_a": (2, 3), "y.lora_b": (1, 2)}


class Adapters:
    """Parameters, those of A and those of B in one tensor each.

    Args:
        times: rows of a parameter, as a multiple of those of SHAPES.
    """

    def __init__(self, times: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.wholes = [nn.Parameter(torch.zeros(16 * times)), nn.Parameter(torch.zeros(10 * times))]
        self.named: list[tuple[str, nn.Parameter]] = []
        first = [0, 0]
        for name, (rows, *columns) in SHAPES.items():
            shape = (rows * times, *columns)
            value = torch.randn(shape, generator=generator)
            if "lora" in name:
                side, end = int(name.endswith("b")), 0
                end = first[side] + value.numel()
                home = self.wholes[side].data[first[side] : end].view(shape)
                first[side] = end
                value = home.copy_(value)
            self.named.append((name, nn.Parameter(value)))

    def step(self, optimizer: torch.optim.Optimizer, seed: int, flat: bool) -> None:
        """One update with random gradients."""
        generator = torch.Generator().manual_seed(seed)
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in self.named}
        for name, parameter in self.named:
            parameter.grad = gradients[name]
        for whole, letter in zip(self.wholes, "ab", strict=True):
            own = [gradients[name].flatten() for name in gradients if name.endswith(f"lora_{letter}")]
            whole.grad = torch.cat(own) if flat else None
        optimizer.step()


def optimizer_of(adapters: Adapters, flat: bool, **settings: Any) -> torch.optim.Optimizer:
    flatten: Any = (lambda group_of: adapters.wholes) if flat else None
    config, train = OptimizerConfig(**settings), TrainConfig(weight_decay=0.1)
    return make_optimizer(adapters.named, config, train, flatten=flatten)


SETTINGS = [{"name": "adamw"}, {"name": "adamw", "lora_plus": 4.0}, {"name": "sgd"}, {"name": "adamw8bit"}]


def adapters_for(settings: dict[str, Any]) -> Adapters:
    """Parameters large enough for state in 8 bits."""
    return Adapters(2048 if "8bit" in settings["name"] else 1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_and_saved_states_are_those_of_the_parameters_themselves(settings: dict[str, Any]) -> None:
    one, other = adapters_for(settings), adapters_for(settings)
    optimizers = optimizer_of(one, True, **settings), optimizer_of(other, False, **settings)
    assert sum(len(group["params"]) for group in optimizers[0].param_groups) == 3
    for seed in range(3):
        one.step(optimizers[0], seed, True)
        other.step(optimizers[1], seed, False)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.named, other.named, strict=True))
    flat, each = (optimizer.state_dict() for optimizer in optimizers)
    assert flat["param_groups"] == each["param_groups"]
    torch.testing.assert_close(flat["state"], each["state"], rtol=0, atol=0)


@pytest.mark.parametrize(("saved", "read"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_goes_on_from_a_state_of_either_kind(
    settings: dict[str, Any], saved: bool, read: bool, tmp_path: Path
) -> None:
    whole, first, second = (adapters_for(settings) for _ in range(3))
    optimizer = optimizer_of(whole, True, **settings)
    for seed in range(4):
        whole.step(optimizer, seed, True)
    optimizer = optimizer_of(first, saved, **settings)
    for seed in range(2):
        first.step(optimizer, seed, saved)
    for (_, to), (_, source) in zip(second.named, first.named, strict=True):
        to.data.copy_(source)
    state = through_files(optimizer.state_dict(), tmp_path)
    optimizer = optimizer_of(second, read, **settings)
    optimizer.load_state_dict(state)
    for seed in range(2, 4):
        second.step(optimizer, seed, read)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.named, second.named, strict=True))


def test_optimizers_whose_elements_depend_on_each_other_take_the_parameters() -> None:
    adapters = Adapters()
    optimizer = optimizer_of(adapters, True, name="torch.optim.Adafactor")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(SHAPES)


def test_state_in_8_bits_of_parameters_that_end_within_a_block_takes_the_parameters() -> None:
    optimizer = optimizer_of(Adapters(), True, name="adamw8bit")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(SHAPES)


@pytest.mark.parametrize(
    ("name", "option"), [("bitsandbytes.optim.AdamW", {"optim_bits": 8}), ("adamw8bit", {"min_8bit_size": 64})]
)
def test_options_under_which_parameters_differ_take_the_parameters(name: str, option: dict[str, int]) -> None:
    optimizer = optimizer_of(Adapters(2048), True, name=name, options=option)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(SHAPES)
