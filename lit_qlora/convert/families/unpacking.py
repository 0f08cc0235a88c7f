"""Weights that files hold in 8 or 4 bits, as 16-bit ones: FP8 with scales, and bitsandbytes' 4-bit types."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from lit_qlora.checkpoint.shards import Weights
from lit_qlora.errors import CheckpointError
from lit_qlora.files.reading import parse_json
from lit_qlora.kernels.stack import BLOCK
from lit_qlora.quantize import NESTED_BLOCK

SCALES = ("_scale_inv", "_scale")
"""Endings, behind the name of a weight, of what its elements are multiplied by."""
STATE = ".quant_state.bitsandbytes__"
"""In the name, behind that of a weight, of bitsandbytes' description of it; the 4-bit type follows."""
BESIDE = (
    *SCALES,
    *("_activation_scale", "_input_scale", "_output_scale"),  # of activations, which stay as they are
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{STATE}nf4", f"{STATE}fp4"),
)
"""Endings of tensors that belong to a weight."""


def why_unreadable(packed: Any, also: Container[str]) -> str:
    """Why weights that are quantised in the way of a quantization_config cannot be read, or ''.

    Args:
        also: further values of quant_method that are undone elsewhere.
    """
    method = packed.get("quant_method") if isinstance(packed, dict) else None
    if method in also:
        return ""
    if odd := [size for size in _block_sizes(packed) if type(size) is not int or size < 1 or size & (size - 1)]:
        return f"{method} in blocks of {odd[0]}"
    if method == "fp8":
        return ""
    if method == "compressed-tensors":
        return "" if packed.get("format") == "float-quantized" else f"compressed-tensors, {packed.get('format')}"
    if method == "bitsandbytes":
        return "" if packed.get("load_in_4bit") else "bitsandbytes in 8 bits"
    return str(method or "in an unknown way")


def _block_sizes(packed: Any) -> list[Any]:
    """The sizes that a quantization_config names of blocks with a scale; unpack_fp8 reads powers of two."""
    groups = packed.get("config_groups") if isinstance(packed, dict) else None
    schemes = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    named = [scheme.get("block_structure") for scheme in schemes if isinstance(scheme, dict)]
    named += [packed.get("weight_block_size")] if isinstance(packed, dict) else []
    return [size for sizes in named if isinstance(sizes, list) for size in sizes]


def is_beside(name: str, names: Container[str]) -> bool:
    """True for a tensor that says how another, one of `names`, is to be read."""
    for ending in BESIDE:
        whole = name.removesuffix(ending)
        # Files have weight_scale beside weight, and input_scale where they mean weight_input_scale.
        if whole != name and (whole in names or f"{whole}.weight" in names):
            return True
        whole = name.removesuffix(f".{ending[1:]}")
        if whole != name and f"{whole}.weight" in names:
            return True
    return False


def read_unpacked(name: str, weights: Weights, spec: bool) -> Tensor:
    """Read a weight, in 16 bits where files hold it in fewer.

    Args:
        spec: read nothing but its shape and dtype, as a tensor on the meta device.
    """
    read = weights.specs.__getitem__ if spec else weights.read
    for ending in SCALES:
        if name + ending in weights.specs:
            return unpack_fp8(read(name), read(name + ending))
    for kind in ("nf4", "fp4"):
        if name + STATE + kind in weights.specs:
            state = read_state(weights.read(name + STATE + kind), f"{weights.location}: {name + STATE + kind}")
            return unpack_4bit(name, read, state)
    tensor = read(name)
    return tensor.bfloat16() if tensor.dtype.is_floating_point and tensor.itemsize == 1 else tensor


def read_packed(name: str, weights: Weights, spec: bool) -> tuple[str, dict[str, Tensor]] | None:
    """The 4-bit type of a weight, nf4 or fp4, and its parts as a QuantizedLinear has them; None where it has others.

    Args:
        spec: as for read_unpacked.
    """
    kind = next((kind for kind in ("nf4", "fp4") if name + STATE + kind in weights.specs), None)
    if kind is None:
        return None
    state = read_state(weights.read(name + STATE + kind), f"{weights.location}: {name + STATE + kind}")
    nested = state.get("nested_blocksize", NESTED_BLOCK)
    shape = state["shape"]
    if (state["blocksize"], nested, len(shape), shape[-1] % BLOCK) != (BLOCK, NESTED_BLOCK, 2, 0):
        return None
    read = weights.specs.__getitem__ if spec else weights.read
    if read(name).numel() * 2 != shape[0] * shape[1]:
        return None
    parts = {"packed": read(name).reshape(shape[0], shape[1] // 2), "absmax": read(f"{name}.absmax")}
    parts["code"] = read(f"{name}.quant_map")
    if "nested_blocksize" in state:
        parts |= {"absmax_code": read(f"{name}.nested_quant_map"), "absmax_scale": read(f"{name}.nested_absmax")}
        parts["absmax_offset"] = torch.tensor(float(state["nested_offset"]), device="meta" if spec else "cpu")
    return f"bnb.{kind}{'-dq' if 'nested_blocksize' in state else ''}", parts


def read_state(packed: Tensor, location: str) -> dict[str, Any]:
    """Read bitsandbytes' description of a 4-bit weight, which is JSON in a tensor of bytes.

    Raises:
        CheckpointError: if it is another tensor, or describes no weight.
    """
    if packed.dtype != torch.uint8:
        raise CheckpointError(f"{location} is {packed.dtype}, not bytes of JSON.")
    state: dict[str, Any] = parse_json(bytes(packed.flatten().tolist()), location, strict=True)
    shape, nested = state.get("shape"), "nested_blocksize" in state
    sizes = [state.get("blocksize"), *(shape if isinstance(shape, list) else [None])]
    sizes += [state["nested_blocksize"]] if nested else []
    if not all(type(size) is int and 0 < size < 2**40 for size in sizes):
        raise CheckpointError(f"{location}: a size in it is no whole number above 0.")
    if state.get("dtype") not in ("float16", "bfloat16", "float32"):
        raise CheckpointError(f"{location}: its dtype is none of float16, bfloat16 and float32.")
    if nested and not isinstance(state.get("nested_offset"), float | int):
        raise CheckpointError(f"{location}: it has no nested_offset.")
    return state


def unpack_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply FP8 elements by the scale of their block.

    Args:
        weight: (out, in) float8, or (experts, out, in).
        scale: a scale for all, for each row (out, 1), or for each block, (out / b, in / b) for b a power of two; with
            one more dimension in front for experts. The last blocks may be cut.

    Returns:
        bfloat16, of the shape of `weight`.

    Source: DeepSeek-AI 2024, "DeepSeek-V3", sec. 3.3.2.
    """
    if weight.is_meta:
        return torch.empty_like(weight, dtype=torch.bfloat16)
    if weight.ndim == 3:
        each = scale.reshape(-1) if scale.numel() in (1, len(weight)) else scale
        return torch.stack([unpack_fp8(w, each[e % len(each)]) for e, w in enumerate(weight)])
    grid = scale.float().reshape(scale.shape if scale.ndim == 2 else (-1, 1))
    rows, columns = (_block(size, count) for size, count in zip(weight.shape, grid.shape, strict=True))
    wide = grid.repeat_interleave(columns, dim=1)[:, : weight.size(1)]
    out = torch.empty_like(weight, dtype=torch.bfloat16)
    at_once = max(1, 256 // rows)  # blocks: in float32 all of them would take much room
    for first in range(0, len(wide), at_once):
        band = slice(first * rows, (first + at_once) * rows)
        part = weight[band].float()
        out[band] = part * wide[first : first + at_once].repeat_interleave(rows, dim=0)[: len(part)]
    return out


def _block(size: int, count: int) -> int:
    """The size of `count` blocks, each of them but the last a power of two, that make up `size`."""
    block = 1
    while -(-size // block) > count:
        block *= 2
    if -(-size // block) != count:
        raise CheckpointError(f"{count} scales do not belong to {size} rows or columns of an FP8 weight.")
    return size if count == 1 else block


def unpack_4bit(name: str, read: Callable[[str], Tensor], state: dict[str, Any]) -> Tensor:
    """The elements that bitsandbytes' 4-bit codes stand for.

    Args:
        name: of the weight, two codes a byte, the upper four bits first.
        state: bitsandbytes' description: shape, dtype, block sizes.

    Source: Dettmers et al. 2023, "QLoRA", sec. 3.
    """
    codes, dtype = read(name), getattr(torch, str(state["dtype"]))
    if codes.is_meta:
        return torch.empty(state["shape"], dtype=dtype, device="meta")
    largest = read(f"{name}.absmax")
    if "nested_blocksize" in state:  # the scales are quantised themselves
        inner = read(f"{name}.nested_absmax").repeat_interleave(state["nested_blocksize"])[: len(largest)]
        largest = read(f"{name}.nested_quant_map")[largest.int()] * inner + state["nested_offset"]
    values, flat = read(f"{name}.quant_map"), codes.flatten()
    out = torch.empty(2 * len(flat), dtype=dtype)
    at_once = 2**22 * state["blocksize"]
    for start in range(0, len(out), at_once):
        part = flat[start // 2 : (start + at_once) // 2]
        pairs = torch.stack((part >> 4, part & 15), dim=1).flatten().int()
        first = start // state["blocksize"]
        scales = largest[first : first + -(-len(pairs) // state["blocksize"])].float()
        out[start : start + len(pairs)] = values[pairs] * scales.repeat_interleave(state["blocksize"])[: len(pairs)]
    return out[: torch.Size(state["shape"]).numel()].reshape(state["shape"])
