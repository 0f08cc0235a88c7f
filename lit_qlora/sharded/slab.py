"""The weights of a block's linear layers end to end as bytes, which are cut evenly into shares.

Layers that share an input lie one behind the other, and so do the same layers of all experts. So the fast path finds
its stacks in a slab, as views. Biases, norms and routers are not in it, nor tables and single numbers of a layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from lit_qlora.kernels.stack import BLOCK
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage, part_specs, ragged

PARTS = ("packed", "absmax", "absmax_scale")
"""Buffers of a QuantizedLinear that lie in a slab."""
ALIGNED = 256
"""Bytes: parts of one kind begin at a multiple, and so does each share."""
STACK_ALIGNED = 16
"""Bytes: a stack begins at a multiple."""
STACKS = (
    ("query.down", "query", "latent", "query.up", "key", "value", "query_gate", "output_gate"),
    ("beta", "decay"),
    ("into",),
    ("projection",),
    ("gate", "up"),
    ("down",),
)
"""Names of layers, in the order of a slab; those of a stack may share an input."""
_PLACES = {name: (stack, i) for stack, names in enumerate(STACKS) for i, name in enumerate(names)}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)")


@dataclass(frozen=True)
class Span:
    """The bytes of a buffer of a layer in the slab of its block."""

    layer: str
    """Path of the layer in the block."""
    part: str
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def view(self, slab: Tensor) -> Tensor:
        """The buffer, as a view of the bytes of the slab."""
        return slab[self.start : self.start + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Slab:
    """The layout of a block's weights; it is the same in every process.

    Attributes:
        decoded: layers whose scales are stored without double quantisation; see quantize.stack_weights.
        size: bytes, padding included; a multiple of the number of processes.
    """

    spans: tuple[Span, ...]
    decoded: frozenset[str]
    size: int
    processes: int

    @property
    def share(self) -> int:
        """Bytes that each process holds."""
        return self.size // self.processes

    @cached_property
    def layers(self) -> dict[str, list[Span]]:
        """Path of each layer in the block -> its spans."""
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.layer, []).append(span)
        return found

    @classmethod
    def of(cls, block: nn.Module, number: int, storage: Storage, processes: int) -> "Slab":
        """The slab of a block of a model on the meta device, whose layers are not quantised yet."""
        found = [(path, module) for path, module in block.named_modules() if type(module) is nn.Linear]
        keys = {path: _key(path) for path, _ in found}
        layers = dict(sorted(found, key=lambda pair: keys[pair[0]]))
        schemes = {path: storage.scheme(f"blocks.{number}.{path}") for path in layers}
        decoded = _decoded({path: layer for path, layer in layers.items() if schemes[path].endswith("-dq")})
        specs = {
            path: part_specs(schemes[path], (m.out_features, m.in_features), storage.dtype, path in decoded)
            for path, m in layers.items()
        }
        spans, end = [], 0
        for part in PARTS:
            end, before = _up(end, ALIGNED), None
            for path, tensors in specs.items():
                if (spec := tensors.get(part)) is None:
                    continue
                start = _up(end, spec.itemsize if keys[path][:2] == before else STACK_ALIGNED)
                spans.append(Span(path, part, start, spec.shape, spec.dtype))
                end, before = start + spec.nbytes, keys[path][:2]
        return cls(tuple(spans), frozenset(decoded), _up(end, ALIGNED * processes), processes)


def slabs_of(model: GPT, storage: Storage, processes: int) -> list[Slab]:
    """The slabs of all blocks of a model on the meta device."""
    return [Slab.of(block, i, storage, processes) for i, block in enumerate(model.blocks)]


def _key(path: str) -> tuple[str, int, int, int, str]:
    """The order of layers: by module, stack, expert, and place in the stack."""
    parts = path.split(".")
    for length in (2, 1):
        module, name = ".".join(parts[:-length]), ".".join(parts[-length:])
        if name in _PLACES:
            stack, i = _PLACES[name]
            expert = _EXPERT.fullmatch(module)
            return (expert[1], stack, int(expert[2]), i, path) if expert else (module, stack, 0, i, path)
    return path, len(STACKS), 0, 0, path


def _decoded(layers: Mapping[str, nn.Linear]) -> set[str]:
    """The layers of stacks whose scales cannot stay doubly quantised when they lie end to end.

    Layers of experts can, see kernels.experts_dequantize.
    """
    found: set[str] = set()
    dense = [path for path in layers if ".experts." not in path]
    for _, group in groupby(dense, key=lambda path: _key(path)[:2]):
        some = list(group)
        if ragged([-(-layers[path].weight.numel() // BLOCK) for path in some]):
            found.update(some)
    return found


def _up(size: int, multiple: int) -> int:
    """The least multiple that is no smaller."""
    return -(-size // multiple) * multiple
