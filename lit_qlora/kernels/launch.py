"""Triton, where there is any, and the sizes of its blocks."""

import os
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton on this platform: there is no fast path
    triton = None
    tl = None

__all__ = ["AVAILABLE", "INTERPRETED", "VARYING", "cdiv", "power_of_2", "stages", "tiled", "tl", "triton"]

AVAILABLE = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, slowly, where there are no instructions of a GPU."""
VARYING = ["T", "place"]
"""Arguments that differ between steps and blocks. Triton would compile a kernel anew for those that 16 divides, which
takes as long as many steps, in the middle of a run."""


def power_of_2(n: int, least: int = 16) -> int:
    """The power of two that a block needs to hold n; the matrix units take no less than 16."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(n: int, each: int) -> int:
    """How many programs it takes, if one does `each` of n. Triton's own function takes 1.6 us, a tenth of a launch."""
    return -(-n // each)


def stages(elements: int, itemsize: int, most: int) -> int:
    """How many iterations of a loop that loads `elements` numbers may be in flight, for the shared memory they take."""
    return max(1, min(most, 160 * 2**10 // (elements * itemsize)))


def tiled(x: Any, *block: int) -> Any:
    """A tensor as a kernel loads blocks of it by their first indices, with zeros for what lies outside of it.

    Hopper and later GPUs have an engine for that (TMA); rows must be multiples of 16 bytes apart.
    """
    return TensorDescriptor.from_tensor(x, list(block))
