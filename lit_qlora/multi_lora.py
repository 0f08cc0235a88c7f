"""Several adapters on one base, switched without loading anything again; each row of a batch may use another one.

Training knows nothing of this. A layer computes what LoRALinear computes with the adapter that its row uses, and what
the base computes where there is none.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_qlora.adapter import Adapter, our_tensors
from lit_qlora.errors import UsageError
from lit_qlora.model import GPT

BASE = None
"""The name of no adapter."""


@dataclass
class Selection:
    """Which rows of the next batch use which adapter; shared by all layers."""

    groups: list[tuple[str, Tensor | None]] = field(default_factory=list)
    """Names with the rows (N,) that use them; None stands for all rows."""


class SwitchedLinear(nn.Module):
    """A frozen linear layer with a low-rank update for each adapter that has one for it.

    Attributes:
        updates: A (r, in), B (out, r) and alpha / r, by the adapter's name.
    """

    def __init__(self, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base, self.selection = base, selection
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.updates: dict[str, tuple[Tensor, Tensor, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); the first dimension is that of the batch where rows differ."""
        y: Tensor = self.base(x)
        for name, rows in self.selection.groups:
            if name not in self.updates:
                continue
            a, b, scale = self.updates[name]
            some = x if rows is None else x[rows]
            update = scale * (some @ a.T.to(x.dtype) @ b.T.to(x.dtype))
            y = y + update if rows is None else y.index_add(0, rows, update.to(y.dtype))
        return y


class AdapterSwitch:
    """The adapters of a model. At first no row uses one.

    Attributes:
        names: those of the adapters, in the order in which they were added.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.names: list[str] = []
        self.by_row = True
        self._selection = Selection()

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter beside the others.

        Raises:
            CheckpointError: if it does not fit the model.
        """
        tensors = our_tensors(adapter, self.model.config)
        layers = [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]
        device, dtype = self.model.embed.weight.device, self.model.embed.weight.dtype
        for path in layers:
            layer = self.model.get_submodule(path)
            if not isinstance(layer, SwitchedLinear):
                layer = SwitchedLinear(layer, self._selection)
                self.model.set_submodule(path, layer)
            a, b = (tensors[f"{path}.{part}"].to(device, dtype) for part in ("lora_a", "lora_b"))
            layer.updates[name] = (a, b, adapter.config.alpha / adapter.config.r)
            # Experts see tokens of all rows in an order of their own, so rows cannot be told apart there.
            self.by_row = self.by_row and ".mlp.experts." not in path and ".mlp.shared." not in path
        self.names.append(name)

    def select(self, rows: Sequence[str | None]) -> None:
        """From now on row i of a batch uses the adapter rows[i], or none.

        Raises:
            UsageError: if rows differ, and an adapter is one of experts.
        """
        used = dict.fromkeys(rows)
        if len(used) == 1:
            (name,) = used
            self._selection.groups = [] if name is None else [(name, None)]
            return
        if not self.by_row:
            raise UsageError("An adapter of a mixture of experts can only be used by all rows of a batch.")
        device = self.model.embed.weight.device
        self._selection.groups = [
            (name, torch.tensor([i for i, other in enumerate(rows) if other == name], device=device))
            for name in used
            if name is not None
        ]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """All rows use this adapter, or none, inside; no row uses one afterwards."""
        self.select([name])
        try:
            yield
        finally:
            self.select([BASE])
