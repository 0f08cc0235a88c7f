"""The gated delta rule by the kernels of flash-linear-attention, where the extra `delta` is installed.

They keep the states of chunks in registers, and need no matrices of whole chunks in memory. Yang et al. 2024.
"""

import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from lit_qlora.fused.attention import Layout

HOPPER = 9
"""Major compute capability."""
WRONG_FROM, RIGHT_FROM = (3, 4, 0), (3, 7, 1)
"""Versions of Triton."""


@cache
def has_kernels(device: torch.device) -> bool:
    """Tell whether the kernels are installed, and run on a device."""
    return device.type == "cuda" and not why_no_kernels(torch.cuda.get_device_capability(device))


def why_no_kernels(capability: tuple[int, int]) -> str:
    """Why the kernels do not run on GPUs of a compute capability, or ''.

    Triton 3.4 to 3.7.0 compiles one of their backward passes wrongly for a Hopper, where they refuse to run without
    tilelang. Source: flash-linear-attention's issue 640.
    """
    if find_spec("fla") is None:
        return 'pip install "lit_qlora[delta]"'
    triton = version("triton")
    found = tuple(int(part) for part in re.findall(r"\d+", triton)[:3])
    if capability[0] == HOPPER and WRONG_FROM <= found < RIGHT_FROM and find_spec("tilelang") is None:
        return f"fla-core's kernels are wrong on a Hopper with Triton {triton}: pip install tilelang"
    return ""


def by_kernels(layout: Layout, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Make a function of the inputs of model.delta_net.delta_rule, for the documents of a layout: to (B, T, H, Dv).

    Args:
        dtype: of queries, keys and values on the way in; sums and states are float32.
    """

    def rule(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, beta: Tensor) -> Tensor:
        with warnings.catch_warnings(action="ignore"):  # about libraries that it does without
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        ends = None if layout.ends is None else layout.ends.long()
        inputs = [x.to(dtype) for x in (q, k, v)] + [kept, beta]
        if ends is not None:  # rows are joined: the kernels take documents that lie end to end
            inputs = [x.flatten(0, 1)[None] for x in inputs]
        q, k, v, kept, beta = (x.contiguous() for x in inputs)
        y: Tensor = chunk_gated_delta_rule(q, k, v, g=kept, beta=beta, scale=1.0, cu_seqlens=ends)[0]
        return y.view(layout.rows, layout.length, *y.shape[2:])

    return rule
