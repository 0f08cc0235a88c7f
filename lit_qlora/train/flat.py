"""Optimizers of many parameters that lie in a few tensors, whose elements are updated each by itself.

The adapters of experts are thousands of parameters: to hand them over one by one costs the host more time than the step
takes on a GPU. Their state is saved and read parameter by parameter, as if there were no such tensors.

bitsandbytes keeps 8-bit state in blocks of 256 elements, each with a scale in absmax1 and absmax2. So parameters of
whole blocks have scales of their own in a tensor of several, too.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]
BLOCK = 256
"""Elements with one scale in bitsandbytes' 8-bit state."""


@dataclass(frozen=True)
class Part:
    """A parameter in a tensor of several.

    Attributes:
        whole: number of the tensor in its group of the optimizer.
        first: its first element there.
    """

    whole: int
    first: int
    shape: torch.Size

    def of(self, name: str, value: Any, size: int) -> Any:
        """Its part of a state of the whole, of `size` elements; a state that is no such tensor is that of all."""
        if isinstance(value, dict):  # bitsandbytes keeps 8-bit state in one
            return {key: self.of(key, inner, size) for key, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        if _is_of_blocks(name):
            return value[self.first // BLOCK : (self.first + self.shape.numel()) // BLOCK]
        if value.numel() != size:
            return value
        return value.flatten()[self.first : self.first + self.shape.numel()].view(self.shape)

    def put(self, name: str, value: Any, whole: State, size: int) -> None:
        """Copy a state of its own into those of the whole, of `size` elements."""
        if isinstance(value, dict):
            for key, inner in value.items():
                self.put(key, inner, whole.setdefault(name, {}), size)
            return
        each = BLOCK if _is_of_blocks(name) else 1
        if not isinstance(value, Tensor) or (each == 1 and value.shape != self.shape):
            whole.setdefault(name, value)
            return
        if name not in whole:
            whole[name] = value.new_zeros(size // each)
        whole[name][self.first // each : (self.first + self.shape.numel()) // each] = value.flatten()


def _is_of_blocks(name: str) -> bool:
    """Tell whether a state has a number for each block of elements."""
    return name.startswith("absmax")


def parts_of(parameters: Sequence[nn.Parameter], flat: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[Part]]:
    """The tensors that hold the parameters, in the order of their first ones, and where each parameter lies in them."""
    by_address = sorted(flat, key=Tensor.data_ptr)
    addresses = [one.data_ptr() for one in by_address]
    wholes: dict[int, nn.Parameter] = {}
    numbers: dict[int, int] = {}
    parts = []
    for parameter in parameters:
        below = bisect_right(addresses, parameter.data_ptr()) - 1
        whole = by_address[below] if below >= 0 and _holds(by_address[below], parameter) else parameter
        wholes[id(whole)] = whole
        number = numbers.setdefault(id(whole), len(numbers))
        first = (parameter.data_ptr() - whole.data_ptr()) // parameter.element_size()
        parts.append(Part(number, first, parameter.shape))
    return list(wholes.values()), parts


def _holds(whole: Tensor, part: Tensor) -> bool:
    first, size = part.data_ptr() - whole.data_ptr(), part.element_size()
    return part.is_contiguous() and 0 <= first <= (whole.numel() - part.numel()) * size


def divide(state: State, groups: Sequence[Sequence[Part]], sizes: Sequence[Sequence[int]]) -> State:
    """The state of an optimizer of tensors as one of their parts.

    Args:
        state: as Optimizer.state_dict returns it.
        groups: the parts in each group; sizes: elements of the tensors in each.
    """
    found, numbers, count = {}, [], 0
    for group, parts, elements in zip(state["param_groups"], groups, sizes, strict=True):
        numbers.append(list(range(count, count + len(parts))))
        for part in parts:
            own = state["state"].get(group["params"][part.whole], {})
            if own:
                found[count] = {name: part.of(name, value, elements[part.whole]) for name, value in own.items()}
            count += 1
    described = zip(state["param_groups"], numbers, strict=True)
    return {"state": found, "param_groups": [{**group, "params": own} for group, own in described]}


def join(state: State, groups: Sequence[Sequence[Part]], sizes: Sequence[Sequence[int]]) -> State:
    """The inverse of `divide`."""
    found: dict[int, State] = {}
    numbers, count = [], 0
    for group, parts, elements in zip(state["param_groups"], groups, sizes, strict=True):
        numbers.append(list(range(count, count + len(elements))))
        for number, part in zip(group["params"], parts, strict=True):
            for name, value in state["state"].get(number, {}).items():
                part.put(name, value, found.setdefault(count + part.whole, {}), elements[part.whole])
        count += len(elements)
    described = zip(state["param_groups"], numbers, strict=True)
    return {"state": found, "param_groups": [{**group, "params": own} for group, own in described]}


def flattened(
    kind: Any, groups: Sequence[State], flat: Sequence[nn.Parameter], **arguments: Any
) -> torch.optim.Optimizer:
    """An optimizer of the class `kind` that updates the tensors in `flat` instead of the parameters in them.

    Args:
        groups: of parameters, as a class of optimizers takes them.
        flat: each of contiguous parameters of one group.
    """
    both = [parts_of(group["params"], flat) for group in groups]
    layout = [parts for _, parts in both], [[whole.numel() for whole in wholes] for wholes, _ in both]

    class Flattened(kind):
        """Has the state of the parameters, not of the tensors that hold them."""

        def state_dict(self) -> State:
            """See Optimizer."""
            return divide(super().state_dict(), *layout)

        def load_state_dict(self, state_dict: State) -> None:
            """See Optimizer."""
            super().load_state_dict(join(state_dict, *layout))

    own = [{**group, "params": wholes} for group, (wholes, _) in zip(groups, both, strict=True)]
    made: torch.optim.Optimizer = Flattened(own, **arguments)
    return made
