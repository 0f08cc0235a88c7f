"""The documents of a micro-batch, as blocks with a state or a short convolution read them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.fused.attention import Layout
from lit_qlora.model.delta_net import CHUNK


@dataclass(frozen=True)
class Documents:
    """Made on the device in each pass, without an answer from there: a graph replays it for other documents.

    Attributes:
        rows, length: the shape of the batch.
        firsts: (T,) int32, the first token of each token's document.
        numbers: (rows, length), the number of each token's document; None if each row is one, as what follows.
        ends: (documents + 2,) int64, the first token of each document and the end of the last; one more has no token.
        chunks: (N, 2) int64, document and number in it of each chunk of tokens; a chunk that no document needs is of
            the empty one.
    """

    rows: int
    length: int
    firsts: Tensor
    numbers: Tensor | None = None
    ends: Tensor | None = None
    chunks: Tensor | None = None

    @staticmethod
    def of(layout: Layout, device: torch.device) -> "Documents":
        """The documents of a layout."""
        tokens = torch.arange(layout.rows * layout.length, dtype=torch.int32, device=device)
        if layout.ends is None:
            return Documents(layout.rows, layout.length, tokens // layout.length * layout.length)
        numbers = torch.searchsorted(layout.ends[1:], tokens, right=True)
        ends = F.pad(layout.ends.long(), (0, 1), value=len(tokens))
        most = len(tokens) // CHUNK + len(ends) - 2  # a document has one chunk that is not full, at most
        counts = (ends.diff() + (CHUNK - 1)) // CHUNK
        first = F.pad(counts.cumsum(0), (1, 0))
        slots = torch.arange(most, device=device)
        document = torch.searchsorted(first[1:], slots, right=True).clamp_(max=len(counts) - 1)
        within = torch.where(document < len(counts) - 1, slots - first[document], 0)
        chunks = torch.stack((document, within), dim=1)
        return Documents(
            layout.rows, layout.length, layout.ends[numbers], numbers.view(layout.rows, -1), ends, chunks
        )  # fmt: skip
