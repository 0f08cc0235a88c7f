"""Optimizers of many parameters that lie in a few tensors, whose elements are updated each by itself.

The adapters of experts are thousands of parameters: to hand them over one by one costs the host more time than the step
takes on a GPU. Their state is saved and read parameter by parameter, as if there were no such tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]


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

    def of(self, value: Any, size: int) -> Any:
        """Its part of a state of the whole, of `size` elements; a state that is no such tensor is that of all."""
        if not isinstance(value, Tensor) or value.numel() != size:
            return value
        return value.flatten()[self.first : self.first + self.shape.numel()].view(self.shape)

    def put(self, value: Tensor, whole: Tensor) -> None:
        """Copy a state of its own into that of the whole."""
        whole[self.first : self.first + self.shape.numel()] = value.flatten()


def parts_of(parameters: Sequence[nn.Parameter], flat: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[Part]]:
    """The tensors that hold the parameters, in the order of their first ones, and where each parameter lies in them."""
    wholes: list[nn.Parameter] = []
    parts = []
    for parameter in parameters:
        whole = next((one for one in flat if _holds(one, parameter)), parameter)
        if all(whole is not one for one in wholes):
            wholes.append(whole)
        number = next(i for i, one in enumerate(wholes) if one is whole)
        first = (parameter.data_ptr() - whole.data_ptr()) // parameter.element_size()
        parts.append(Part(number, first, parameter.shape))
    return wholes, parts


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
                found[count] = {name: part.of(value, elements[part.whole]) for name, value in own.items()}
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
                whole = found.setdefault(count + part.whole, {})
                if not isinstance(value, Tensor) or value.shape != part.shape:
                    whole.setdefault(name, value)
                    continue
                if name not in whole:
                    whole[name] = value.new_zeros(elements[part.whole])
                part.put(value, whole[name])
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
