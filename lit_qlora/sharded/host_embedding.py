"""An embedding in the host's memory: a look-up reads a few rows, so it need not take memory of the device."""

import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.model.config import ModelConfig
from lit_qlora.settings import LoRAConfig


class HostEmbedding(nn.Module):
    """A frozen embedding whose rows are looked up on the host and sent to the device.

    Attributes:
        table: (V, E), on the host.
        weight: (1, E), its first row on the device, for whoever asks for dtype or device.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.table, self.num_embeddings = weight.detach().cpu(), len(weight)
        self.weight = nn.Parameter(weight.detach()[:1].clone(), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., E)."""
        return F.embedding(tokens.cpu(), self.table).to(self.weight)


def lies_on_host(model: ModelConfig, lora: LoRAConfig) -> bool:
    """Tell whether the embedding of a sharded base lies on the host: nothing but look-ups reads its rows."""
    learns = lora.train_embeddings or bool(lora.train_tokens)
    return not (learns or model.tied_head or model.embedding_norm)
