"""4- and 8-bit storage for frozen weights. The only file that imports bitsandbytes.

The weight is dequantised to the dtype of the input wherever it is used: in training, evaluation and merging alike; for
a few rows on a GPU in registers (lit_qlora.kernels.small_batch_linear), to the same values.
bitsandbytes' fused small-batch product is not used, because it rounds the scales differently (with bitsandbytes 0.50,
27 % of the weights differ by 0.27 %). Nor is its Linear4bit: on CPUs with AVX512-BF16 its first evaluation repacks
the weights, after which gradients through them are lost.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.device import on_default_stream
from lit_qlora.errors import UsageError
from lit_qlora.kernels import launch, small_batch_linear
from lit_qlora.kernels.experts_dequantize import Matrices
from lit_qlora.kernels.stack import BLOCK, PER_STEP, EightBit, FourBit, Stack, Unquantized, end_to_end
from lit_qlora.settings import SCHEMES, Quantization, Scheme


@dataclass(frozen=True)
class Storage:
    """The storage of a base's weights."""

    dtype: torch.dtype = torch.float32
    """Of plain weights; quantised ones are quantised from it and read back in it."""
    quantize: Scheme = "none"
    quantize_head: bool = False
    """Quantise the output head too."""
    layers: tuple[tuple[str, Scheme], ...] = ()
    """Other schemes of some layers, see settings.Quantization."""

    @classmethod
    def of_training(cls, facts: Mapping[str, Any]) -> "Storage":
        """The storage of the base that an adapter was trained on, from the facts in its manifest."""
        dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
        return cls(dtypes.get(facts.get("precision", ""), torch.float32), *Quantization.of(facts))

    @property
    def quantization(self) -> Quantization:
        """All but the dtype."""
        return Quantization(self.quantize, self.quantize_head, self.layers)

    @property
    def plain(self) -> bool:
        """True if nothing is stored in 4 or 8 bits."""
        return self.quantization.schemes == {"none"}

    def scheme(self, path: str) -> Scheme:
        """The scheme of the matrix of the layer at `path`.

        Embeddings and the routers of experts are never quantised: embeddings are looked up, and a router's few weights
        decide too much.
        """
        if path.rpartition(".")[2] in ("embed", "positions", "router"):
            return "none"
        general: Scheme = "none" if path == "head" and not self.quantize_head else self.quantize
        return next((scheme for pattern, scheme in self._patterns if pattern.match(path)), general)

    def quantizes(self, path: str) -> bool:
        """True if the matrix of the layer at `path` is stored in 4 or 8 bits."""
        return self.scheme(path) != "none"

    def check_layers(self, model: nn.Module) -> None:
        """Raise UsageError for a pattern in `layers` that decides about no linear layer of `model`."""
        paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)]
        used = {next((i for i, (pattern, _) in enumerate(self._patterns) if pattern.match(path)), -1) for path in paths}
        if unused := [pattern for i, (pattern, _) in enumerate(self.layers) if i not in used]:
            raise UsageError(f"quantize_layers: {unused[0]} decides about no layer of this model. Leave it out.")

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Scheme]]:
        return [(re.compile(rf"(.*\.)?({pattern})$"), scheme) for pattern, scheme in self.layers]


NESTED_BLOCK = 256  # scales that share a scale with double quantisation, as bitsandbytes has it


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is stored in 4 or 8 bits.

    Gradients flow to the input; the weight is dequantised once in the forward and once in the backward pass and
    not saved in between.

    Args:
        weight: (out, in) in the dtype that it should be read back in, on the device that should quantise it.
        bias: (out,), not quantised.
        scheme: any of SCHEMES but none.

    A layer made by `of` may have the scheme none: its weight is not quantised, but other memory's to hold, as that of
    quantised ones; see lit_qlora.sharded.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    absmax_code: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor
    PARTS = ("packed", "absmax", "code", "absmax_code", "absmax_scale", "absmax_offset")
    """Names of the buffers; which of them there are depends on the scheme."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        quantize = _int8 if scheme == "bnb.int8" else _four_bit
        self._hold(quantize(weight, scheme), tuple(weight.shape), bias, scheme, weight.dtype)

    @classmethod
    def of(
        cls, parts: dict[str, Tensor], shape: tuple[int, ...], bias: Tensor | None, scheme: Scheme, dtype: torch.dtype
    ) -> "QuantizedLinear":
        """The layer (out, in) whose buffers, under their names in PARTS, are these already."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(parts, shape, bias, scheme, dtype)
        return layer

    def _hold(
        self, parts: dict[str, Tensor], shape: tuple[int, ...], bias: Tensor | None, scheme: Scheme, dtype: torch.dtype
    ) -> None:
        self.out_features, self.in_features = shape
        self.scheme, self.dtype = scheme, dtype
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def decode_scales(self) -> None:
        """Undo double quantisation: hold the scales, as bitsandbytes decodes them, instead of their codes."""
        outer = self.absmax_scale.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        scales = self.absmax_code[self.absmax.flatten().long()] * outer
        self.absmax = scales + self.absmax_offset
        del self.absmax_code, self.absmax_scale, self.absmax_offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in) as the model sees it, in the dtype it was quantised from or in `dtype`."""
        dtype = dtype or self.dtype
        if self.scheme == "none":
            return self.packed.to(dtype)
        if self.scheme == "bnb.int8":
            return (self.packed.float() * self.absmax[:, None] * PER_STEP).to(dtype)
        weight: Tensor = bitsandbytes().functional.dequantize_4bit(self.packed, self._state(dtype))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = self._few_rows(x) if self._takes_few(x) else _FrozenLinear.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _takes_few(self, x: Tensor) -> bool:
        """True if the kernel for a few rows, which dequantises in registers, is faster for x; as in generation."""
        return (
            x.is_cuda
            and self.scheme != "none"
            and x.dtype in small_batch_linear.DTYPES
            and 0 < x.numel() <= small_batch_linear.MOST_ROWS * self.in_features
            and not (x.requires_grad and torch.is_grad_enabled())
            and not launch.why_no_kernels(x.device, x.dtype)
            and (self.scheme == "bnb.int8" or self.in_features % BLOCK == 0)
        )

    def _few_rows(self, x: Tensor) -> Tensor:
        weight = stack_weights([self])
        assert isinstance(weight, FourBit | EightBit)
        stack = Stack((self.out_features,), (-1,), 0)
        y = small_batch_linear.product(x.reshape(-1, self.in_features).contiguous(), weight, stack, None)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and scheme, for print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}"

    def _state(self, dtype: torch.dtype) -> Any:
        functional = bitsandbytes().functional
        outer = None
        if hasattr(self, "absmax_scale"):
            outer = functional.QuantState(
                absmax=self.absmax_scale, blocksize=NESTED_BLOCK, code=self.absmax_code, dtype=torch.float32
            )
        return functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK,
            quant_type=_quant_type(self.scheme),
            dtype=dtype,
            offset=getattr(self, "absmax_offset", None),
            state2=outer,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Follow a move to another device, but not a change of dtype: scales rounded to 16 bit are other scales."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class _FrozenLinear(torch.autograd.Function):
    """x W^T for a frozen, quantised W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor, None]:
        (d_y,) = d_out
        return d_y @ ctx.layer.dequantize(d_y.dtype), None


def quantize_linears(
    model: nn.Module, scheme: Scheme, head: bool = False, layers: Mapping[str, Scheme] = MappingProxyType({})
) -> None:
    """Replace every nn.Linear below `model` by a QuantizedLinear, in place.

    Call it after the weights are loaded (they must hold real values) and before add_lora (adapters must stay
    trainable). load_model does it tensor by tensor for models that do not fit in 16 bit.

    Args:
        head: quantise the output head too. By default it stays in 16 bit, as in Dettmers et al. 2023.
        layers: other schemes of some layers, see Storage.

    Raises:
        UsageError: for a scheme that does not exist, or a pattern that decides about no layer.
    """
    for name in (scheme, *layers.values()):
        if name not in SCHEMES:
            raise UsageError(f"quantize {name!r} is not known. Known: {', '.join(SCHEMES)}.")
    storage = Storage(torch.float32, scheme, head, tuple(layers.items()))
    storage.check_layers(model)
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and storage.quantizes(path):
            bias = None if linear.bias is None else linear.bias.data
            model.set_submodule(path, QuantizedLinear(linear.weight.data, bias, storage.scheme(path)))


def frozen_weight(base: nn.Module) -> Tensor:
    """Return the weight (out, in) of a plain or quantised linear layer."""
    read: Any = getattr(base, "dequantize", None)
    weight: Any = read() if read else base.weight
    return weight.detach()


def stacks(layers: Sequence[QuantizedLinear]) -> bool:
    """True if layers can be stacked: of one scheme, and with 4 bits rows that fill blocks."""
    first = layers[0]
    if any((layer.scheme, layer.in_features) != (first.scheme, first.in_features) for layer in layers):
        return False
    return first.scheme in ("none", "bnb.int8") or not first.in_features % BLOCK


def ragged(scales: Sequence[int]) -> bool:
    """True if layers with so many scales, doubly quantised and end to end, would share a block of codes."""
    return any(count % NESTED_BLOCK for count in scales[:-1])


def part_specs(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, decoded: bool = False) -> dict[str, Tensor]:
    """The large buffers of a QuantizedLinear (out, in), by their names in PARTS, on the meta device.

    Args:
        dtype: of a weight that is not quantised.
        decoded: see QuantizedLinear.decode_scales.
    """
    count = shape[0] * shape[1]
    blocks = -(-count // BLOCK)
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    if scheme in ("none", "bnb.int8"):
        specs = {"packed": (shape, dtype if scheme == "none" else torch.int8)}
        specs |= {"absmax": (shape[:1], torch.float32)} if scheme == "bnb.int8" else {}
    else:
        nested = scheme.endswith("-dq") and not decoded
        specs = {"packed": ((-(-count // 2), 1), torch.uint8)}
        specs["absmax"] = ((blocks,), torch.uint8 if nested else torch.float32)
        specs |= {"absmax_scale": ((-(-blocks // NESTED_BLOCK),), torch.float32)} if nested else {}
    return {name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in specs.items()}


def table_specs(scheme: Scheme, decoded: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of the other buffers, which are small and float32."""
    if scheme in ("none", "bnb.int8"):
        return {}
    nested = scheme.endswith("-dq") and not decoded
    return {"code": (16,)} | ({"absmax_code": (256,), "absmax_offset": ()} if nested else {})


def stack_weights(layers: Sequence[QuantizedLinear]) -> FourBit | EightBit | Unquantized | None:
    """The weights of layers that share an input, stacked along their rows; the layers keep views of them.

    With double quantisation the scales are decoded where a layer's do not fill whole blocks of codes.

    Returns:
        None where they cannot be stacked, see stacks.
    """
    first = layers[0]
    if not stacks(layers):
        return None
    if hasattr(first, "absmax_scale") and ragged([layer.absmax.numel() for layer in layers]):
        for layer in layers:
            layer.decode_scales()
    nested = hasattr(first, "absmax_scale")

    def joined(name: str) -> Tensor:
        """The layers' buffers end to end; each layer keeps a view into them, so nothing exists twice."""
        parts = [getattr(layer, name) for layer in layers]
        if len(parts) == 1:
            return parts[0] if first.scheme in ("none", "bnb.int8") else parts[0].flatten()
        whole = end_to_end([part.view(-1, *part.shape[1:]) for part in parts])
        for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
            setattr(layer, name, part)
        return whole

    if first.scheme == "none":
        return Unquantized(joined("packed"))
    if first.scheme == "bnb.int8":
        return EightBit(joined("packed"), joined("absmax"))
    packed, absmax = joined("packed").flatten(), joined("absmax")
    if not nested:
        return FourBit(packed, absmax, first.code, None)
    offsets = torch.stack([layer.absmax_offset for layer in layers]).flatten().float()
    return FourBit(packed, absmax, first.code, (first.absmax_code, joined("absmax_scale"), offsets))


def stack_matrices(layers: Sequence[QuantizedLinear]) -> Matrices:
    """The weights of layers of one shape and scheme, each quantised by itself, end to end; the layers keep views."""
    first = layers[0]

    def joined(name: str) -> Tensor:
        parts = [getattr(layer, name) for layer in layers]
        whole = end_to_end([part.view(-1, *part.shape[1:]) for part in parts])
        for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
            setattr(layer, name, part)
        return whole

    shape = (len(layers), first.out_features, first.in_features)
    if first.scheme == "bnb.int8":
        return Matrices(EightBit(joined("packed"), joined("absmax")), shape)
    nested = None
    if first.scheme.endswith("-dq"):
        offsets = torch.stack([layer.absmax_offset for layer in layers]).flatten().float()
        nested = (first.absmax_code, joined("absmax_scale"), offsets)
    return Matrices(FourBit(joined("packed").flatten(), joined("absmax"), first.code, nested), shape)


def storage_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that the weights occupy, by dtype; packed 4-bit weights count as uint8. A shared tensor counts once."""
    sizes: dict[str, int] = {}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    return sizes


def bits_per_weight(scheme: Scheme, dtype: torch.dtype) -> float:
    """Storage of one weight in bits, scales included. Dettmers et al. 2023, sec. 3: double quantisation costs 0.127."""
    if scheme == "none":
        return torch.finfo(dtype).bits
    if scheme == "bnb.int8":
        return 8.0
    return 4 + (8 / BLOCK + 32 / (BLOCK * 256) if scheme.endswith("-dq") else 32 / BLOCK)


def _quant_type(scheme: Scheme) -> str:
    return scheme.removeprefix("bnb.").removesuffix("-dq")


def _four_bit(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    with on_default_stream():
        packed, state = bitsandbytes().functional.quantize_4bit(
            weight.contiguous(),
            blocksize=BLOCK,
            compress_statistics=scheme.endswith("-dq"),
            quant_type=_quant_type(scheme),
        )
    parts = {"packed": packed, "absmax": state.absmax, "code": state.code}
    if state.nested:
        parts |= {
            "absmax_offset": state.offset,
            "absmax_code": state.state2.code,
            "absmax_scale": state.state2.absmax,
        }
    return parts


def _int8(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Rows scaled so that their largest magnitude is 127. Dettmers et al. 2022, without the outlier part."""
    absmax = weight.float().abs().amax(dim=1)
    packed = torch.round(weight.float() * (127 / absmax.clamp(min=1e-30))[:, None]).to(torch.int8)
    return {"packed": packed, "absmax": absmax}


@cache  # setting a level clears the caches of all loggers, 0.25 ms each time
def bitsandbytes() -> ModuleType:
    """bitsandbytes, imported on first use (it takes seconds) and told to keep quiet."""
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    # On import it offers to fetch a CPU kernel from a hub, for a path that this file does not take.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes
    import bitsandbytes.functional
    import bitsandbytes.optim

    return bitsandbytes
