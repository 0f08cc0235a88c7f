"""Weights that were published in bitsandbytes' 4-bit types, as they were published.

Such a layer has no weight in the files of a checkpoint but the buffers of a QuantizedLinear, under their names there.
Whoever asks for its weight gets the elements that they stand for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.checkpoint.shards import Weights
from lit_qlora.errors import CheckpointError
from lit_qlora.kernels.stack import BLOCK
from lit_qlora.quantize import NESTED_BLOCK, QuantizedLinear, Storage
from lit_qlora.settings import Scheme

PACKED = ".packed"
_NF4_LEAST = -1.0
"""The least value of a code of NF4; that of FP4 is 0 and its sign is a bit."""


@dataclass(frozen=True, kw_only=True)
class PackedWeights(Weights):
    """Weights, some of them packed.

    Attributes:
        scheme: of all that are packed.
        stored: what the files hold.
    """

    scheme: Scheme
    stored: Weights

    @classmethod
    def of(cls, stored: Weights) -> Weights:
        """The weights in files: `stored` itself where none of them is packed.

        Raises:
            CheckpointError: if parts of a packed weight are absent, or do not fit each other.
        """
        specs = weight_specs(stored.specs, str(stored.location))
        if specs.keys() == stored.specs.keys():
            return stored
        files = stored.files | {
            name: stored.files[_layer(name) + PACKED] for name in specs.keys() - stored.files.keys()
        }
        layer = next(_layer(name) for name in specs if name not in stored.specs)
        kind = "nf4" if stored.read(f"{layer}.code")[0] == _NF4_LEAST else "fp4"
        scheme: Scheme = f"bnb.{kind}-dq" if f"{layer}.absmax_scale" in stored.specs else f"bnb.{kind}"  # type: ignore[assignment]
        return cls(location=stored.location, specs=specs, files=files, scheme=scheme, stored=stored)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU: a weight of the model, or a part of one."""
        if name in self.stored.specs:
            return self.stored.read(name)
        return self.layer(_layer(name), self.specs[name].dtype).dequantize()

    def keeps(self, layer: str) -> bool:
        """True if this layer is packed."""
        return layer + PACKED in self.stored.specs

    def unpacks(self, names: Iterable[str]) -> bool:
        """True if one of these is a weight that has to be unpacked."""
        return any(name not in self.stored.specs for name in names)

    def parts(self, layer: str) -> list[str]:
        """Names of the tensors in files that a packed layer is made of."""
        return [f"{layer}.{part}" for part in QuantizedLinear.PARTS if f"{layer}.{part}" in self.stored.specs]

    def layer(self, layer: str, dtype: torch.dtype) -> QuantizedLinear:
        """A packed layer without its bias; its weight is read back in `dtype`."""
        return self.make({name: self.stored.read(name) for name in self.parts(layer)}, None, dtype)

    def make(self, parts: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
        """A packed layer of its tensors, by their names in files."""
        own = {name.rpartition(".")[2]: tensor for name, tensor in parts.items()}
        rows, half = own["packed"].shape
        own["packed"] = own["packed"].reshape(-1, 1)  # as bitsandbytes has it
        return QuantizedLinear.of(own, (rows, 2 * half), bias, self.scheme, dtype)


def as_published(weights: Weights, layer: str, storage: Storage) -> QuantizedLinear | None:
    """A layer without its bias as it was published, where a model in this storage has it so."""
    if not isinstance(weights, PackedWeights) or weights.scheme != storage.scheme(layer):
        return None
    return weights.layer(layer, storage.dtype) if weights.keeps(layer) else None


def weight_specs(stored: Mapping[str, Tensor], location: str) -> dict[str, Tensor]:
    """The specs of a checkpoint's weights from those of its tensors, some of them parts of packed weights.

    Raises:
        CheckpointError: see PackedWeights.of.
    """
    layers = [name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)]
    if not layers:
        return dict(stored)
    embed = stored.get("embed.weight")
    dtype = torch.bfloat16 if embed is None else embed.dtype
    nested = any(name.endswith(".absmax_scale") for name in stored)
    parts: set[str] = set()
    shapes = {}
    for layer in layers:
        expected = _parts_of(layer, stored[layer + PACKED], nested)
        for name, spec in expected.items():
            found = stored.get(name)
            if found is None or (found.shape, found.dtype) != (spec.shape, spec.dtype):
                raise CheckpointError(
                    f"{location}: {name} is {'missing' if found is None else 'no part of a packed weight'}. "
                    "Convert the model again."
                )
        parts |= expected.keys()
        rows, half = stored[layer + PACKED].shape
        shapes[layer] = torch.empty(rows, 2 * half, dtype=dtype, device="meta")
    specs = {}
    for name, spec in stored.items():
        if name.endswith(PACKED):
            specs[f"{name.removesuffix(PACKED)}.weight"] = shapes[name.removesuffix(PACKED)]
        elif name not in parts:
            specs[name] = spec
    return specs


def _parts_of(layer: str, packed: Tensor, nested: bool) -> dict[str, Tensor]:
    """Specs of the tensors of a packed layer, from that of its codes."""
    shape = packed.shape if packed.ndim == 2 else torch.Size((0, 0))
    blocks = 2 * shape.numel() // BLOCK
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": (shape, torch.uint8),
        "absmax": ((blocks,), torch.uint8 if nested else torch.float32),
        "code": ((16,), torch.float32),
    }
    if nested:
        sizes["absmax_code"] = ((256,), torch.float32)
        sizes["absmax_scale"] = ((-(-blocks // NESTED_BLOCK),), torch.float32)
        sizes["absmax_offset"] = ((), torch.float32)
    return {f"{layer}.{part}": torch.empty(size, dtype=dtype, device="meta") for part, (size, dtype) in sizes.items()}


def _layer(name: str) -> str:
    return name.removesuffix(".weight")
