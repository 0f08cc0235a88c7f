"""The cheapest choices within a budget: the multiple-choice knapsack problem, solved exactly.

Dynamic programming goes from group to group with pairs of size and cost, without dominated ones (Nemhauser & Ullmann
1969). It also leaves out pairs with a Lagrangian bound above the cost of a known solution. Few remain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALVINGS = 200  # in the search for the price of a byte; a double has no more


@dataclass(frozen=True)
class Choice:
    """One way to treat a group."""

    size: int
    cost: float


def allocate(groups: Sequence[Sequence[Choice]], room: int) -> list[int] | None:
    """Choose one way for each group, such that the sizes fit into `room` and the sum of costs is the least.

    Returns:
        The numbers of the choices; None if even the smallest ones do not fit.
    """
    if sum(min(choice.size for choice in group) for group in groups) > room:
        return None
    if not groups:
        return []
    price, known = _priced(groups, room)
    best = sum(group[number].cost for group, number in zip(groups, known, strict=True))
    rounding = 1e-12 * (abs(best) + price * sum(max(choice.size for choice in group) for group in groups))
    least = [min(choice.cost + price * choice.size for choice in group) for group in groups]
    sizes = torch.zeros(1, dtype=torch.int64)
    costs = torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    for number, group in enumerate(groups):
        count = len(sizes)
        own_sizes = torch.tensor([choice.size for choice in group])
        own_costs = torch.tensor([choice.cost for choice in group], dtype=torch.float64)
        all_sizes, all_costs = (sizes + own_sizes[:, None]).flatten(), (costs + own_costs[:, None]).flatten()
        bound = all_costs + price * (all_sizes - room).double() + sum(least[number + 1 :])
        kept = ((bound <= best + rounding) & (all_sizes <= room)).nonzero().flatten()
        kept = kept[_undominated(all_sizes[kept], all_costs[kept])]
        steps.append((kept % count, kept // count))
        sizes, costs = all_sizes[kept], all_costs[kept]
    state, chosen = int(costs.argmin()), []
    for before, choice in reversed(steps):
        chosen.append(int(choice[state]))
        state = int(before[state])
    return chosen[::-1]


def _undominated(sizes: Tensor, costs: Tensor) -> Tensor:
    """The states that no smaller, or equally large, state undercuts."""
    order = costs.argsort(stable=True)
    order = order[sizes[order].argsort(stable=True)]
    lowest = costs[order].cummin(0).values
    first = torch.cat([torch.tensor([True]), costs[order][1:] < lowest[:-1]])
    return order[first]


def _priced(groups: Sequence[Sequence[Choice]], room: int) -> tuple[float, list[int]]:
    """A price of a unit of size at which each group's own best choice fits, hardly above the least such price."""

    def choices(price: float) -> list[int]:
        return [
            min(range(len(group)), key=lambda i: (group[i].cost + price * group[i].size, group[i].size))
            for group in groups
        ]

    def fits(chosen: list[int]) -> bool:
        return sum(group[number].size for group, number in zip(groups, chosen, strict=True)) <= room

    if fits(free := choices(0.0)):
        return 0.0, free
    low, high = 0.0, 1.0
    while not fits(choices(high)):
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(choices(middle)) else (middle, high)
        if low == high:
            break
    return high, choices(high)
