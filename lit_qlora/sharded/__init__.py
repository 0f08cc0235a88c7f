"""The frozen weights of blocks over several processes, which gather a block ahead of its use."""

from lit_qlora.sharded.base import LEAST_BUFFERS, ShardedBase
from lit_qlora.sharded.host_embedding import HostEmbedding, lies_on_host
from lit_qlora.sharded.slab import Slab, slabs_of

__all__ = ["LEAST_BUFFERS", "HostEmbedding", "ShardedBase", "Slab", "lies_on_host", "slabs_of"]
