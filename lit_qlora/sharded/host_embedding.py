"""An embedding in the host's memory: a look-up reads a few rows, so it need not take memory of the device."""

import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.device import pinned_memory, seen_by_gpu
from lit_qlora.model.config import ModelConfig
from lit_qlora.settings import LoRAConfig


class HostEmbedding(nn.Module):
    """A frozen embedding whose rows lie on the host.

    A GPU reads them itself where the host has pinned memory for them. Else the host looks them up, which has to wait
    for all that the GPU was told before.

    Attributes:
        table: (V, E), on the host; as a tensor of the GPU where this reads it.
        weight: (1, E), its first row on the device, for whoever asks for dtype or device.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings = len(weight)
        self.weight = nn.Parameter(weight.detach()[:1].clone(), requires_grad=False)
        self._memory = pinned_memory(weight.numel(), weight.dtype) if weight.is_cuda else None
        if self._memory is None:
            self.table = weight.detach().cpu()
        else:
            self.table = seen_by_gpu(self._memory.view_as(weight).copy_(weight.detach()))

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., E)."""
        return F.embedding(tokens.to(self.table.device), self.table).to(self.weight)


def lies_on_host(model: ModelConfig, lora: LoRAConfig) -> bool:
    """Tell whether the embedding of a sharded base lies on the host: nothing but look-ups reads its rows."""
    learns = lora.train_embeddings or bool(lora.train_tokens)
    return not (learns or model.tied_head or model.embedding_norm)
