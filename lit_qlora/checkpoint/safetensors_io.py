"""Safetensors files a tensor at a time, so that a model never has to fit into host memory.

Reading goes through the safetensors library, one open per tensor: a file that stays mapped keeps every page it
has touched. Writing is our own, because the library wants all tensors at once. The format: 8 bytes of
little-endian header length, a JSON header of name -> dtype, shape, offsets, then the tensors.
https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_qlora.errors import CheckpointError, ResourceError
from lit_qlora.files.reading import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AT_ONCE = 2**20
"""Bytes hashed and written at a time: what was hashed is still in the processor's cache, and the kernel takes several
times as long for writes of a hundred megabytes."""


def read_specs(path: Path) -> dict[str, Tensor]:
    """Name -> an empty tensor on the meta device with the dtype and shape of the one in the file; in its order."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            specs = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}.") from None
    unknown = sorted({dtype for dtype, _ in specs.values()} - set(DTYPES))
    if unknown:
        raise CheckpointError(f"{path} holds tensors of type {', '.join(unknown)}, which cannot be read here.")
    return {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, (dtype, shape) in specs.items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of the file, on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot read {name}: {error}.") from None


class Extent(NamedTuple):
    """The bytes of a tensor in a file, from `start` on."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_extents(path: Path) -> dict[str, Extent]:
    """Name -> the extent of the tensor, after read_specs has checked the file."""
    specs = read_specs(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), str(path), unique=True)
    return {
        name: Extent(8 + size + header[name]["data_offsets"][0], tuple(spec.shape), spec.dtype)
        for name, spec in specs.items()
    }


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of a small file, such as an adapter."""
    return {name: read_tensor(path, name) for name in read_specs(path)}


def write(path: Path, specs: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Write a safetensors file, each tensor as it comes.

    Args:
        specs: name -> a tensor (a meta one will do) of the dtype and shape to be written.
        tensors: exactly those, in the order of `specs`; each is written, hashed and forgotten.

    Returns:
        The sha256 of the file, in hex.

    Raises:
        CheckpointError: if the tensors differ from `specs`. The unfinished file is removed.
        ResourceError: if the disk is full or may not be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        size = count_bytes(spec)
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:

            def put(content: bytes | memoryview) -> None:
                for start in range(0, len(content), AT_ONCE):
                    part = content[start : start + AT_ONCE]
                    digest.update(part)
                    file.write(part)

            put(len(head).to_bytes(8, "little") + head)
            expected = iter(specs.items())
            for name, tensor in tensors:
                wanted, spec = next(expected, ("nothing", tensor))
                if (name, tensor.shape, tensor.dtype) != (wanted, spec.shape, spec.dtype):
                    raise CheckpointError(
                        f"{path.name}: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                        f"expected {wanted}, {tuple(spec.shape)} {spec.dtype}."
                    )
                put(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                del tensor  # before the next one is made
            if missing := [name for name, _ in expected]:
                raise CheckpointError(f"{path.name}: {len(missing)} tensors are missing:\n  {name_some(missing)}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(f"Cannot write {path}: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def count_bytes(spec: Tensor) -> int:
    """Bytes of a tensor in a file."""
    return spec.numel() * spec.element_size()


def name_some(names: Iterable[str], most: int = 10) -> str:
    """The first few of many names, a line each, for a message."""
    ordered = sorted(names)
    more = [f"... and {len(ordered) - most} more"] if len(ordered) > most else []
    return "\n  ".join(ordered[:most] + more)
