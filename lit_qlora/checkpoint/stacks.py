"""Weights of experts laid end to end while they are read, as the fast path takes them.

It then finds a stack of the experts of a block and copies nothing. Besides the stacks one layer is in memory at a time.
"""

import re

from torch import Tensor, nn

from lit_qlora.model.config import ModelConfig
from lit_qlora.model.mlp import KINDS
from lit_qlora.quantize import QuantizedLinear

_LAYER = re.compile(r"(blocks\.\d+(?:\.beside)?)\.mlp\.experts\.(\d+)\.(\w+)")
_PARTS = ("packed", "absmax", "absmax_scale")
"""Buffers of a quantised layer that are stacked; the others are tables, or single numbers."""


class Stacks:
    """The stacks of the block that is being read."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.block = ""
        self.wholes: dict[tuple[str, str], Tensor] = {}

    def place(self, path: str, layer: nn.Module) -> None:
        """Move the weights of a layer, plain or quantised, to their place in a stack, if it is of an expert."""
        match = _LAYER.fullmatch(path)
        if match is None:
            return
        block, expert, name = match.groups()
        if block != self.block:
            self.block, self.wholes = block, {}
        kind = next(kind for kind in KINDS if name in kind)
        number = int(expert) * len(kind) + kind.index(name)
        if not isinstance(layer, QuantizedLinear):
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            weight.data = self._slice(kind[0], "weight", number, len(kind), weight.data)
            return
        for part in _PARTS:
            if (tensor := getattr(layer, part, None)) is not None:
                setattr(layer, part, self._slice(kind[0], part, number, len(kind), tensor))

    def _slice(self, kind: str, part: str, number: int, each: int, tensor: Tensor) -> Tensor:
        """A view of the stack that has the values of `tensor`, and its shape."""
        rows = len(tensor)
        if (kind, part) not in self.wholes:
            shape = (self.config.n_expert * each * rows, *tensor.shape[1:])
            self.wholes[kind, part] = tensor.new_empty(shape)
        return self.wholes[kind, part][number * rows : (number + 1) * rows].copy_(tensor)
