"""The half of a block from its second norm to the output of its MLP: the seam between dense and other MLPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_qlora.fused.group import Group, Layers
from lit_qlora.fused.kernel_block import ACTIVATIONS, mlp_layers
from lit_qlora.fused.large_rank import through_mlp
from lit_qlora.fused.offload import OnHost
from lit_qlora.fused.passes import Backward, Pass
from lit_qlora.fused.torch_activation import activate
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import Dropout
from lit_qlora.kernels.mlp import mlp_backward
from lit_qlora.kernels.norm import Norm
from lit_qlora.model.config import ModelConfig


class Mlp(Protocol):
    """An MLP with the norm before it. A tensor in a list is taken out of it, so that its memory is free early."""

    @property
    def groups(self) -> Sequence[Layers]:
        """Its layers; each has an index in the stack of all adapters."""
        ...

    @property
    def experts(self) -> Any:
        """Its Experts; None without any."""
        ...

    def norm(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The stream x + y (T, E), the statistics of its rows, and the MLP's input."""
        ...

    def forward(
        self, normed: list[Tensor], statistics: Tensor, stream: Tensor, run: Pass, saves: bool
    ) -> tuple[Tensor, Any]:
        """The MLP's output (T, E), before a norm behind it, and what its backward pass reads.

        Args:
            normed, statistics, stream: from `norm`.
            saves: save the large activations too; without it the backward pass recomputes them.
        """
        ...

    def backward(
        self,
        d_y: list[Tensor],
        stream: list[Tensor | OnHost],
        saved: Any,
        d_out: Tensor,
        back: Backward,
        ahead: Sequence[Tensor | OnHost | None],
    ) -> Tensor:
        """The gradient of the stream (T, E), and in place those of the adapters.

        Args:
            d_y: gradient of the output.
            stream: the stream, or the pair that it is the sum of; it may be on its way from the host.
            saved: from `forward`.
            d_out: added to the result: the stream's own gradient, which does not come through the MLP.
            ahead: what is read next; the last product is to hide its copies from the host.
        """
        ...


@dataclass
class SavedMlp:
    """Activations of a DenseMlp for its backward pass; all but the first may be recomputed."""

    z_down: Tensor | None
    statistics: Tensor | None = None
    z_gate_up: Tensor | None = None
    gate_up: Tensor | None = None


class DenseMlp:
    """down(activation(gate(norm(x))) * up(norm(x))), or without a gate."""

    experts = None

    def __init__(self, mlp: Any, norm: Norm, config: ModelConfig, dtype: torch.dtype, number: int, fp8: bool) -> None:
        self.activation: Activation | nn.Module = ACTIVATIONS.get(config.ffn) or mlp.activation
        self.norm_2, self.number = norm, number
        gate_up, down = mlp_layers(mlp)
        self.gate_up, self.down = Group(gate_up, dtype, fp8), Group(down, dtype, fp8)
        self.groups = (self.gate_up, self.down)

    def norm(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See Mlp; the input has room for Z behind it."""
        return self.gate_up.normed(self.norm_2, x, y)

    def forward(
        self, normed: list[Tensor], statistics: Tensor, stream: Tensor, run: Pass, saves: bool
    ) -> tuple[Tensor, SavedMlp]:
        """See Mlp."""
        space = run.workspaces[0]
        z_gate_up, gate_up = self._gate_up(normed, run, space)[:2]
        saved = SavedMlp(None, statistics, z_gate_up, gate_up) if saves else SavedMlp(None)
        h = self.down.empty_input(gate_up.size(0))
        if self.down.a is None:
            activate(gate_up, h, self.activation)
        saved.z_down = self.down.project(gate_up, h, self._dropout(self.down, 3, run), self.activation)
        del gate_up
        return self.down.product(h, self.down.matrix(space)), saved

    def backward(
        self,
        d_y: list[Tensor],
        stream: list[Tensor | OnHost],
        saved: SavedMlp,
        d_out: Tensor,
        back: Backward,
        ahead: Sequence[Tensor | OnHost | None],
    ) -> Tensor:
        """See Mlp."""
        run, pending, space = back.forward, back.pending, back.workspaces[0]
        group, matrix = self.gate_up, None
        dh = self._down_backward(d_y.pop(), saved.z_down, back)
        here = [run.offload.get(one) for one in stream]  # not before: the product hides copies
        stream.clear()
        if saved.gate_up is None:
            matrix = self._recompute(here, saved, back)
        products, saved.gate_up = saved.gate_up, None
        assert products is not None
        assert saved.statistics is not None
        before = None if group.gains is None else products.clone()
        self._activation_backward(products, dh, saved.z_gate_up, back)
        del dh
        group.add_grad_lengths(products, before)
        del before
        for tensor in ahead:
            run.offload.fetch(tensor)
        dn = group.product_back(products, space, matrix)
        del products
        middle, z, dropout = here.pop(), saved.z_gate_up, self._dropout(group, 2, run)
        return group.normed_backward(dn, middle, self.norm_2, saved.statistics, z, d_out, dropout, pending)

    def _down_backward(self, d_y: Tensor, z: Tensor | None, back: Backward) -> Tensor:
        """[dH | dZ] of down."""
        self.down.add_grad_b(d_y, z, back.pending)
        return self.down.product_back(d_y, back.workspaces[0])

    def _recompute(self, stream: list[Tensor], saved: SavedMlp, back: Backward) -> Tensor:
        """Gate and up again, into `saved`; [W | B] as group.matrix made it. `stream` is one tensor afterwards."""
        x, y = stream[0], stream[1] if len(stream) > 1 else None
        stream.clear()
        middle, saved.statistics, normed = self.norm(x, y)
        stream.append(middle)
        del x, y
        handed = [normed]
        del normed
        saved.z_gate_up, saved.gate_up, matrix = self._gate_up(handed, back.forward, back.workspaces[0])
        return matrix

    def _activation_backward(self, products: Tensor, dh: Tensor, z: Tensor | None, back: Backward) -> None:
        """Turn gate and up into their gradients, and add those of down's A and of their own B."""
        down, gate_up = self.down, self.gate_up
        by_torch = down.by_cublas or gate_up.by_cublas or isinstance(self.activation, nn.Module)
        backward: Any = through_mlp if by_torch else mlp_backward
        of_a: Any = (down.sum_a if by_torch else down.grad_a) if down.rank else None
        of_b: Any = (gate_up.sum_b if by_torch else gate_up.grad_b) if gate_up.rank else None
        backward(
            products, dh, self.activation, down.a, of_a, z, of_b, gate_up.stack, down.scale, back.pending,
            self._dropout(down, 3, back.forward),
        )  # fmt: skip

    def _gate_up(self, handed: list[Tensor], run: Pass, space: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Z, the products of gate and up, and [W | B]."""
        group, normed = self.gate_up, handed.pop()
        z = group.project(normed, normed, self._dropout(group, 2, run))
        matrix = group.matrix(space)
        return z, group.product(normed, matrix, z), matrix

    def _dropout(self, group: Group, which: int, run: Pass) -> Dropout:
        return group.dropout(run.seed, 4 * self.number + which)
