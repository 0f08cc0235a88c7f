"""Weights of blocks cut into shares while they are read, so that no process ever holds all of them.

Each matrix has an owner, which alone reads and quantises it. In the end of a block the owners' bytes come together in a
buffer of the base, and each process keeps its share. So a process reads about its share of the file, and holds its
share and one matrix.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from lit_qlora.errors import UserError
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import QuantizedLinear, Storage, table_specs
from lit_qlora.sharded import ShardedBase, slabs_of

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Cut:
    """The shares of the blocks of a model whose modules are filled one after the other.

    Args:
        model: on the meta device.
        embedding_on_host: the embedding shall lie in the host's memory.
        buffers: see ShardedBase.

    Attributes:
        base: what holds the shares.
    """

    def __init__(
        self, model: GPT, storage: Storage, device: torch.device, embedding_on_host: bool, buffers: int
    ) -> None:
        self.model, self.storage, self.embedding_on_host = model, storage, embedding_on_host
        self.base = ShardedBase(slabs_of(model, storage, distributed.get_world_size()), device, buffers)
        self.owners = self._share_out()
        self.block: int | None = None
        self.biases: dict[str, Tensor | None] = {}
        self.tables: dict[str, Tensor] = {}
        self.all_tables = torch.empty(0)

    def skips(self, path: str) -> bool:
        """True if another process reads the matrix of the layer at `path`."""
        return self.owners.get(path, self.base.rank) != self.base.rank

    def takes(self, path: str) -> bool:
        """True if the layer at `path` lies in a slab."""
        return path in self.owners

    def place(self, path: str, layer: QuantizedLinear | None, bias: Tensor | None) -> None:
        """Take a layer, without its bias, and its bias; None for one that another process has read."""
        number, name = self._split(path)
        self._begin(number)
        self.biases[name] = bias
        if layer is None:
            return
        if name in self.base.slabs[number].decoded:
            layer.decode_scales()
        for span in self.base.slabs[number].layers[name]:
            span.view(self._whole).copy_(getattr(layer, span.part))
        for part, table in self._tables_of(name).items():
            table.copy_(getattr(layer, part))

    def finish(self) -> None:
        """Complete the last block."""
        self._end()
        self.model.gathers = self.base

    def together(self, check: Callable[[], None]) -> None:
        """Check something in each process; where one of them finds an error, all raise it.

        Raises:
            UserError: what `check` raises.
        """
        problem: UserError | None = None
        try:
            check()
        except UserError as error:
            problem = error
        problems: list[UserError | None] = [None] * self.base.processes
        distributed.all_gather_object(problems, problem)
        if first := next(filter(None, problems), None):
            raise first

    def _begin(self, number: int) -> None:
        if number == self.block:
            return
        self._end()
        self.block, self.biases = number, {}
        self._whole.zero_()
        sizes = [self._table_size(name) for name in self.base.slabs[number].layers]
        self.all_tables = torch.zeros(sum(sizes), device=self.base.device)
        self.tables = dict(zip(self.base.slabs[number].layers, self.all_tables.split(sizes), strict=True))

    @property
    def _whole(self) -> Tensor:
        """The bytes of the block that is read; the layers of each process have their values, the others are zero."""
        assert self.block is not None
        return self.base.buffers[0][: self.base.slabs[self.block].size]

    def _end(self) -> None:
        """Let each process keep its share of a block, and give the model the layers that read it."""
        if self.block is None:
            return
        number, base, slab = self.block, self.base, self.base.slabs[self.block]
        for rank, part in enumerate(self._whole.split(slab.share)):
            distributed.reduce(part, dst=rank)  # bytes plus zeros
        base.shares[number].copy_(self._whole.split(slab.share)[base.rank])
        if len(self.all_tables):
            distributed.all_reduce(self.all_tables.view(torch.int32))  # keeps the sign of a zero
        for name, spans in slab.layers.items():
            parts = {span.part: span.view(base.memory(number)) for span in spans} | self._tables_of(name)
            path = f"blocks.{number}.{name}"
            linear = self.model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            shape, scheme = (linear.out_features, linear.in_features), self.storage.scheme(path)
            layer = QuantizedLinear.of(parts, shape, self.biases[name], scheme, self.storage.dtype)
            self.model.set_submodule(path, layer)
        self.block = None

    def _share_out(self) -> dict[str, int]:
        """The owner of each layer in a slab: the largest first, each to the process with the least so far."""
        loads, owners = [0] * self.base.processes, {}
        for number, slab in enumerate(self.base.slabs):
            sizes = {name: sum(span.size for span in spans) for name, spans in slab.layers.items()}
            for name in sorted(sizes, key=lambda name: -sizes[name]):
                owner = loads.index(min(loads))
                owners[f"blocks.{number}.{name}"] = owner
                loads[owner] += sizes[name]
        return owners

    def _table_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        assert self.block is not None
        slab, path = self.base.slabs[self.block], f"blocks.{self.block}.{name}"
        return table_specs(self.storage.scheme(path), name in slab.decoded)

    def _table_size(self, name: str) -> int:
        return sum(torch.Size(shape).numel() for shape in self._table_shapes(name).values())

    def _tables_of(self, name: str) -> dict[str, Tensor]:
        """The small buffers of a layer, as views of its table."""
        shapes = self._table_shapes(name)
        parts = self.tables[name].split([torch.Size(shape).numel() for shape in shapes.values()]) if shapes else ()
        return {part: flat.view(shape) for (part, shape), flat in zip(shapes.items(), parts, strict=True)}

    @staticmethod
    def _split(path: str) -> tuple[int, str]:
        match = _BLOCK.fullmatch(path)
        assert match
        return int(match[1]), match[2]
