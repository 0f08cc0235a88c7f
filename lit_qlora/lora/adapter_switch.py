"""Several adapters on one base, switched without loading; each row of a batch may use another one.

Training knows nothing of this. A layer computes what LoRALinear computes with the adapter that its row uses, and what
the base computes where there is none.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.errors import UsageError
from lit_qlora.lora.adapter import Adapter, our_tensors, weights_of
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import Router
from lit_qlora.quantize import frozen_weight
from lit_qlora.settings import LoRAConfig

BASE = None
"""The name of no adapter."""


@dataclass
class Selection:
    """The adapters of the rows of the next batch; all layers share it."""

    groups: list[tuple[str, Tensor | None]] = field(default_factory=list)
    """Names with the rows (N,) that use them; None means all rows."""


class SwitchedLinear(nn.Module):
    """A frozen linear layer with a low-rank update for each adapter that has one for it.

    Attributes:
        updates: by the adapter's name, A (r, in), B (out, r), the factor of B A, and DoRA's factor of the whole, (out,)
            or None.
        rows: by the name of an adapter that has trained rows of a head, their tokens (n,) and the rows (n, in).
    """

    def __init__(self, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base, self.selection = base, selection
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.updates: dict[str, tuple[Tensor, Tensor, float, Tensor | None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); the first dimension is the batch if rows differ."""
        y: Tensor = self.base(x)
        return self.updated(y, x)

    def updated(self, y: Tensor, x: Tensor) -> Tensor:
        """The output with the updates of the adapters that rows use, from that of the base, y."""
        for name, rows in self.selection.groups:
            if name in self.rows:
                y = self._with_rows(y, x, name, rows)
            if name not in self.updates:
                continue
            a, b, scale, gain = self.updates[name]
            some = x if rows is None else x[rows]
            update = scale * (some @ a.T.to(x.dtype) @ b.T.to(x.dtype))
            if gain is not None:
                bias: Any = self.base.bias
                plain = (y if rows is None else y[rows]) - (0 if bias is None else bias)
                update = gain * (plain + update) - plain
            y = y + update if rows is None else y.index_add(0, rows, update.to(y.dtype))
        return y

    def _with_rows(self, y: Tensor, x: Tensor, name: str, rows: Tensor | None) -> Tensor:
        """The output with the logits of an adapter's own rows in `rows` of the batch."""
        tokens, weight = self.rows[name]
        own = (x if rows is None else x[rows]) @ weight.T.to(x.dtype)
        bias: Any = self.base.bias
        own = own if bias is None else own + bias[tokens]
        some = (y if rows is None else y[rows]).index_copy(-1, tokens, own.to(y.dtype))
        return some if rows is None else y.index_copy(0, rows, some)

    @property
    def scales_rows(self) -> bool:
        """True if one of its adapters is DoRA's."""
        return any(gain is not None for *_, gain in self.updates.values())

    @property
    def beyond_low_rank(self) -> str:
        """See LoRALinear."""
        if len(self._active) > 1 or any(rows is not None for _, rows in self._active):
            return "rows that use different adapters"
        if any(name in self.rows for name, _ in self.selection.groups):
            return "rows that learn"
        return "DoRA" if any(self.updates[name][3] is not None for name, _ in self._active) else ""

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """See LoRALinear, for the adapter that all rows use; None if it does not adapt this layer."""
        assert not self.beyond_low_rank
        return self.updates[self._active[0][0]][:3] if self._active else None

    @property
    def _active(self) -> list[tuple[str, Tensor | None]]:
        return [(name, rows) for name, rows in self.selection.groups if name in self.updates]


class SwitchedEmbedding(nn.Module):
    """A frozen embedding with rows of their own for adapters that trained some.

    Attributes:
        rows: by the adapter's name, for each token the number of its row or -1, (V,), and the rows (n, E).
    """

    def __init__(self, base: nn.Embedding, selection: Selection) -> None:
        super().__init__()
        self.base, self.selection = base, selection
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        """Weight (V, E) of the frozen embedding."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        x: Tensor = self.base(tokens)
        for name, rows in self.selection.groups:
            if name not in self.rows:
                continue
            row_of, weight = self.rows[name]
            row = row_of[tokens if rows is None else tokens[rows]]
            own = F.embedding(row.clamp(min=0), weight).to(x.dtype)
            some = torch.where((row >= 0)[..., None], own, x if rows is None else x[rows])
            x = some if rows is None else x.index_copy(0, rows, some)
        return x


class SwitchedRouter(SwitchedLinear):
    """A frozen router with an update of its scores for each adapter that has one for it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """See Router."""
        weights, chosen = self.base(x, lambda read: self.updated(read.new_zeros(1), read))
        return weights, chosen


class AdapterSwitch:
    """The adapters of a model; at first no row uses one.

    Attributes:
        names: names of the adapters in the order of their addition.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.names: list[str] = []
        self.by_row = True
        self._selection = Selection()

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter.

        Raises:
            CheckpointError: if it does not fit the model.
            UsageError: if it has a context of its own, which cannot switch.
        """
        config, wanted = self.model.config, adapter.config
        if wanted.rope_scaling != "none" and wanted.rope != (config.rope_scaling, config.rope_factor):
            raise UsageError(
                f"{adapter.path} has a context of its own (rope_scaling {wanted.rope_scaling}), so it cannot share "
                "a base with others that have not.\nServe it alone, or merge it (scripts/merge_lora.py)."
            )
        tensors = our_tensors(adapter, self.model.config, weights_of(self.model))
        layers = [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]
        device, dtype = self.model.embed.weight.device, self.model.embed.weight.dtype
        self._add_rows(name, adapter.config, tensors)
        for path in layers:
            layer = self._switched(path)
            own = torch.float32 if isinstance(layer, SwitchedRouter) else dtype
            a, b = (tensors[f"{path}.{part}"].to(device, own) for part in ("lora_a", "lora_b"))
            scale, gain = adapter.config.scale(path), None
            if f"{path}.magnitude" in tensors:
                weight = frozen_weight(layer.base).float()
                whole = weight + scale * (tensors[f"{path}.lora_b"] @ tensors[f"{path}.lora_a"]).to(weight.device)
                gain = (tensors[f"{path}.magnitude"].to(weight.device) / whole.norm(dim=1)).to(dtype)
            layer.updates[name] = (a, b, scale, gain)
            # Experts see the tokens of all rows in another order, so rows are not known there, nor by their router.
            self.by_row = self.by_row and not any(f".mlp.{part}" in path for part in ("experts.", "shared.", "router"))
        self.names.append(name)

    def _switched(self, path: str) -> SwitchedLinear:
        """The layer at `path`, which can switch from now on."""
        layer = self.model.get_submodule(path)
        if not isinstance(layer, SwitchedLinear):
            kind = SwitchedRouter if isinstance(layer, Router) else SwitchedLinear
            layer = kind(layer, self._selection)
            self.model.set_submodule(path, layer)
        return layer

    def _add_rows(self, name: str, config: LoRAConfig, tensors: Mapping[str, Tensor]) -> None:
        """Add the trained rows of embedding and head, if the adapter has some."""
        if "embed.rows" not in tensors:
            return
        if not isinstance(self.model.embed, SwitchedEmbedding):
            self.model.embed = SwitchedEmbedding(self.model.embed, self._selection)  # type: ignore[assignment]
        embed: Any = self.model.embed
        like, size = embed.weight, embed.base.num_embeddings
        tokens = torch.tensor(config.train_tokens or range(size), device=like.device)
        row_of = torch.full((size,), -1, device=like.device)
        row_of[tokens] = torch.arange(len(tokens), device=like.device)
        embed.rows[name] = row_of, tensors["embed.rows"].to(like)
        of_head = tensors["embed.rows"] if self.model.config.tied_head else tensors.get("head.rows")
        if of_head is not None:
            self._switched("head").rows[name] = tokens, of_head.to(like)

    def select(self, rows: Sequence[str | None]) -> None:
        """Let row i of each batch use the adapter rows[i], or none.

        Raises:
            UsageError: if rows differ, and an adapter adapts experts.
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
        """Let all rows use this adapter, or none, inside; afterwards no row uses one."""
        self.select([name])
        try:
            yield
        finally:
            self.select([BASE])
