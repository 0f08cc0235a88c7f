"""Triton, where there is any, and the sizes of blocks for which a card has the shared memory."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton on this platform: there is no fast path
    triton = None
    tl = None

__all__ = ["AVAILABLE", "INTERPRETED", "VARYING", "Card", "cdiv", "fitting", "is_hopper", "power_of_2", "stages"]
__all__ += ["shared_memory", "tiled", "tl", "triton", "why_no_kernels"]

AVAILABLE = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True where kernels run on the CPU, slowly, without instructions of a GPU."""
VARYING = ["T", "offset"]
"""Arguments that differ between steps and blocks. Triton would compile a kernel anew for multiples of 16, which takes
as long as many steps, in the middle of a run."""
HOPPER = 227 * 2**10
"""Bytes of shared memory that a program may take on a Hopper, for which the sizes were chosen."""
WITHOUT_CARD = HOPPER
"""Without a card, kernels have the sizes for this one."""
CAPABILITY_WITHOUT_CARD = (9, 0)
"""Its compute capability."""
LEAST = 64 * 2**10
"""Enough for every kernel, as tests/kernels/test_every_card.py shows."""
LEAST_CAPABILITY = (7, 5)
"""Of NVIDIA GPUs that Triton compiles for: Turing."""
PIPELINE = 160 * 2**10
"""Bytes of HOPPER for iterations in flight; the rest is for what Triton exchanges between threads."""


def power_of_2(n: int, least: int = 16) -> int:
    """The power of two that a block needs to hold n; the matrix units take no less than 16."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(n: int, each: int) -> int:
    """Number of programs for n, `each` by one. Triton's own function takes 1.6 us, a tenth of a launch."""
    return -(-n // each)


@dataclass(frozen=True)
class Card:
    """A GPU of NVIDIA's, as far as kernels depend on it; it need not be in this machine."""

    capability: tuple[int, int]
    """Compute capability, such as (8, 6)."""
    shared_memory: int
    """Bytes that a program may take."""

    def why_no_kernels(self, dtype: torch.dtype) -> str:
        """Why kernels do not run on it with weights of this dtype, or ''."""
        words = f"the GPU is of compute capability {self.capability[0]}.{self.capability[1]}"
        if self.capability < LEAST_CAPABILITY:
            return f"{words}, kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        if dtype == torch.bfloat16 and self.capability < (8, 0):
            return f"{words}, bfloat16 needs 8.0"
        short = self.shared_memory < LEAST
        return f"the GPU has {self.shared_memory:,} bytes of shared memory, kernels need {LEAST:,}" if short else ""


@cache
def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels do not run on a device with weights of this dtype, or ''; nothing is asked without a card."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return ""
    if torch.version.cuda is None:
        return "the GPU is not NVIDIA's"
    return Card(torch.cuda.get_device_capability(device), _of_card(device.index or 0)).why_no_kernels(dtype)


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may take where x is; there are 64 KiB (Turing) to 227 KiB (Hopper)."""
    return _of_card(x.device.index) if x.is_cuda else WITHOUT_CARD


@cache
def _of_card(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)  # torch's stubs lack the field
    return int(properties.shared_memory_per_block_optin)


def is_hopper(x: Tensor) -> bool:
    """Tell whether x is on a Hopper; without a card, whether kernels are made for one."""
    return (_capability(x.device.index) if x.is_cuda else CAPABILITY_WITHOUT_CARD)[0] == 9


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def fitting(block: int, size: int, room: int, least: int = 1) -> int:
    """The largest of block, block / 2, ... for which `room` holds twice what is loaded at a time; not below `least`.

    One iteration of a loop is in use and the next on its way. On Turing Triton does not load ahead and has no matrix
    units. There the operands of a product lie in shared memory in float32 instead of 16 bit, which is twice as much.

    Args:
        size: bytes loaded for each of the `block`.
        room: of shared memory, in bytes.
    """
    while block > least and 2 * block * size > room:
        block //= 2
    return block


def stages(size: int, most: int, room: int) -> int:
    """Iterations of a loop that may be in flight, if each loads `size` bytes and `room` bytes are there for them."""
    return max(1, min(most, room // size))


def tiled(x: Any, *block: int) -> Any:
    """A tensor as a kernel loads blocks of it by their first indices, with zeros for what lies outside of it.

    Hopper and later GPUs have an engine for that (TMA); rows must be multiples of 16 bytes apart.
    """
    return TensorDescriptor.from_tensor(x, list(block))
