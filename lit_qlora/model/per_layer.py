"""Small embeddings of each token for each block, beside the stream that all blocks share (Gemma 3n, Gemma 4)."""

from torch import Tensor, nn

from lit_qlora.model.config import ModelConfig
from lit_qlora.model.mlp import GATES
from lit_qlora.model.norm import make_norm


class PerLayerEmbedding(nn.Module):
    """A token's own vector for each block, and one that is made of its embedding, weighed alike."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, size = config, config.n_layer * config.per_layer_size
        self.embed = nn.Embedding(config.per_layer_vocab, size)
        self.narrow = nn.Linear(config.n_embd, size, bias=False)
        self.norm = make_norm(config, config.per_layer_size)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens (B, T) and their embeddings (B, T, E) -> (B, T, n_layer, per_layer_size)."""
        return self.joined(tokens, self.narrow(x))

    def joined(self, tokens: Tensor, narrow: Tensor) -> Tensor:
        """The same from (B, T, n_layer * per_layer_size), what `narrow` gives."""
        size = self.config.per_layer_size
        own = (self.embed(tokens) * size**0.5).unflatten(-1, (-1, size))
        made = self.norm((narrow * self.config.n_embd**-0.5).unflatten(-1, (-1, size)))
        out: Tensor = (made + own) * 2**-0.5
        return out


class PerLayerInput(nn.Module):
    """Adds a block's embedding of a token to the stream, as far as the stream lets it through."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.combine = GATES[config.ffn]
        self.gate = nn.Linear(config.n_embd, config.per_layer_size, bias=False)
        self.widen = nn.Linear(config.per_layer_size, config.n_embd, bias=False)
        self.norm = make_norm(config, config.n_embd)

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        """(B, T, E) and (B, T, per_layer_size) -> (B, T, E)."""
        out: Tensor = x + self.norm(self.widen(self.combine(self.gate(x), own)))
        return out
