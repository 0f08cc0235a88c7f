"""The fast training path: GPT.loss as one autograd function, equal to model/ and several times as fast.

fuse(model) takes over GPT.loss where the model, its dtype and the device allow it, and leaves everything else as it is:
adapters stay the parameters they were, so optimizers, checkpoints and merging do not notice.
"""

from collections.abc import Callable

from torch import Tensor

from lit_qlora.fused.graphs import Graphs
from lit_qlora.fused.path import Fused
from lit_qlora.fused.support import why_not
from lit_qlora.model.gpt import GPT

__all__ = ["Fused", "fuse", "reader", "why_not"]


def fuse(
    model: GPT,
    graph_tokens: int = 0,
    fp8: bool = False,
    cached_blocks: int = 0,
    ahead: bool = True,
    copies_at_once: bool = False,
) -> Fused:
    """Let the fast path take over model.loss; call it after the adapters are added and before the optimizer is made.

    why_not(model) must be ''.

    Args:
        graph_tokens: micro-batches of up to so many tokens get CUDA graphs on a GPU; see lit_qlora.fused.graphs.
        fp8: multiply with the frozen weights of the blocks in FP8; see lit_qlora.fused.fp8. The head stays in 16 bit.
        cached_blocks: blocks whose quantised weights are also kept dequantised for the whole run.
        ahead: dequantise the weights of experts ahead, on a second stream; see lit_qlora.fused.ahead.
        copies_at_once: copy even large adapters to 16 bit at once, not block by block; see memory.COPY_BY_BLOCK.
    """
    fused = Fused(model, fp8, cached_blocks, ahead, copies_at_once)
    model.fast = fused
    # Noise is scaled by the length of a row, which must not be padded.
    if graph_tokens and fused.device.type == "cuda" and not model.embed._forward_hooks:
        fused.graphs = Graphs(fused, graph_tokens)
    return fused


def reader(model: GPT) -> Callable[..., Tensor]:
    """The fastest function for model.hidden, where nothing learns and no cache is read.

    On a GPU it is the fast path's, if that can take the model and does not train it; else the plain model's.
    """
    takes = model.embed.weight.is_cuda and model.fast is None and not why_not(model)
    return Fused(model).hidden if takes else model.hidden
