"""A model over several processes: weights of blocks, gathered ahead of their use, and tokens of rows."""

from lit_qlora.sharded.base import LEAST_BUFFERS, ShardedBase
from lit_qlora.sharded.host_embedding import HostEmbedding, lies_on_host
from lit_qlora.sharded.rows import RowParts, why_whole
from lit_qlora.sharded.slab import Slab, slabs_of

__all__ = ["LEAST_BUFFERS", "HostEmbedding", "RowParts", "ShardedBase", "Slab", "lies_on_host", "slabs_of", "why_whole"]
