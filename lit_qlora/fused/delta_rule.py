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
from torch.utils.checkpoint import checkpoint

from lit_qlora.fused.documents import Documents
from lit_qlora.kernels.launch import power_of_2
from lit_qlora.model import delta_net as model

HOPPER = 9
"""Major compute capability."""
WRONG_FROM, RIGHT_FROM = (3, 4, 0), (3, 7, 1)
"""Versions of Triton."""
WRONG_TILE = 64
"""Features of a key that the backward pass takes at a time where Triton compiles it wrongly."""


@cache
def has_kernels(device: torch.device, key_size: int) -> bool:
    """Tell whether the kernels are installed, and run on a device for keys of a size."""
    return device.type == "cuda" and not why_no_kernels(torch.cuda.get_device_capability(device), key_size)


def why_no_kernels(capability: tuple[int, int], key_size: int) -> str:
    """Why the kernels do not run on GPUs of a compute capability for keys of a size, or ''.

    Triton 3.4 to 3.7.0 compiles their gradient of keys wrongly for a Hopper, in tiles of 64 features. A Hopper has
    tiles of 128 for larger keys, as published models have them. Source: flash-linear-attention's issue 640.
    """
    if find_spec("fla") is None:
        return 'pip install "lit_qlora[delta]"'
    if power_of_2(key_size) == WRONG_TILE and are_refused(capability):
        return f"fla-core's kernels are wrong for keys of {key_size} on a Hopper with Triton {version('triton')}"
    return ""


@cache
def are_refused(capability: tuple[int, int]) -> bool:
    """Tell whether fla-core 0.6 refuses keys of every size on GPUs of a compute capability, since some are wrong.

    With tilelang it has another backward pass.
    """
    triton = tuple(int(part) for part in re.findall(r"\d+", version("triton"))[:3])
    return capability[0] == HOPPER and WRONG_FROM <= triton < RIGHT_FROM and find_spec("tilelang") is None


def delta_rule(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, beta: Tensor, documents: Documents, fast: bool) -> Tensor:
    """The rule of model.delta_net, by the kernels if `fast`, else in plain torch, which computes it in float32.

    Args:
        q, k: (T, K, D), of length one; each is that of H / K heads of values.
        v: (T, H, Dv).
        kept, beta: (T, H) float32, see model.delta_net.delta_rule.

    Returns:
        (T, H Dv), in the dtype of v.
    """
    q, k, v, kept, beta = (x.unflatten(0, (documents.rows, documents.length)) for x in (q, k, v, kept, beta))
    if fast:
        return by_kernels(q, k, v, kept, beta, documents).flatten(0, 1).flatten(1)
    # The matrices of the chunks are larger than all that they are made of.
    y: Tensor = checkpoint(_by_torch, q, k, v, kept, beta, documents, use_reentrant=False, preserve_rng_state=False)
    return y.flatten(0, 1).flatten(1)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, beta: Tensor, documents: Documents) -> Tensor:
    q, k = (x.float().repeat_interleave(v.size(2) // x.size(2), dim=2) for x in (q, k))
    return model.delta_rule(q, k, v.float(), kept, beta, documents.numbers)[0].to(v.dtype)


def by_kernels(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, beta: Tensor, documents: Documents) -> Tensor:
    """The rule of (B, T, ...) by the kernels; see delta_rule."""
    shape = v.shape
    if documents.ends is not None:  # rows are joined: the kernels take documents that lie end to end
        q, k, v, kept, beta = (x.flatten(0, 1)[None] for x in (q, k, v, kept, beta))
    y: Tensor = library_on(q.device)(
        q, k, v, g=kept, beta=beta, scale=1.0, cu_seqlens=documents.ends, chunk_indices=documents.chunks
    )[0]
    return y.view(shape)


@cache
def library_on(device: torch.device) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of fla-core, which refuses nothing on this device."""
    with warnings.catch_warnings(action="ignore"):  # about libraries that it does without
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if device.type == "cuda" and are_refused(torch.cuda.get_device_capability(device)):
        lift_refusal()
    rule: Callable[..., tuple[Tensor, Tensor | None]] = chunk_gated_delta_rule
    return rule


def lift_refusal() -> None:
    """Let fla-core 0.6 differentiate on a Hopper with a Triton that it refuses, in this process.

    Its only question there is this constant. The keys that it is right to refuse never come here: why_no_kernels.
    """
    from fla.ops.common import chunk_o

    chunk_o.TRITON_ABOVE_3_7_1 = True
