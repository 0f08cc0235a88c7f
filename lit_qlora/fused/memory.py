"""Memory of the fast path's activations, and the choice of the blocks that save it by recomputing."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lit_qlora.fused.qkv_transforms import in_one_kernel, norms_heads
from lit_qlora.kernels.experts import CHUNK
from lit_qlora.lora.embeddings import TrainedEmbedding
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.delta_net import CHUNK as DELTA_CHUNK
from lit_qlora.model.gpt import GPT, LOGITS_AT_ONCE
from lit_qlora.settings import Recompute

COST: dict[Recompute, float] = {
    "none": 0.0,
    "mlp": 1.16,
    "attn": 2.0,
    "offload": 1.8,
    "full": 2.4,
    "full-offload": 2.5,
}
"""Milliseconds added to a block of Llama-2-7B, 4,096 tokens on an H100; only order and ratio matter."""
ON_HOST = ("offload", "full-offload")
"""Policies that send activations to the host."""
FULL = ("full", "full-offload")
"""Policies that save the input of a block alone."""
SLICE = 2**14
"""Tokens from which on a slice of them goes through an MLP at a time, where its activations are recomputed; the
products of so many fill any GPU."""
COPY_BY_BLOCK = 2**26
"""From this many adapter parameters on, the 16-bit copies are made block by block, twice a micro-batch, not at once.
For Llama-65B at r 64 this saves 1.6 GB and costs, by their bytes, 3 of 550 ms. Where a plan keeps the weights of all
blocks in 16 bit and has memory left they are made at once all the same."""
FOR_A_BYTE = 1e4
"""Operations of a forward pass that hide the copy of a byte to the host: 550 TFLOP/s beside 55 GB/s, as on H100 and
H200."""
CHOICE = 24
"""Bytes that a choice of an expert takes: weight, expert, token and where it lies, some of them twice."""


def within_chunks(config: ModelConfig) -> int:
    """Numbers a token that exist in the backward pass of the rule of a gated delta net, with what it computes again.

    They are matrices of chunks, states of chunks, and inputs with their gradients, counted as they live in plain torch:
    5 % fewer or as many for keys and values of 32 to 256 features. The kernels of fla-core need less.
    """
    c = config
    features, state = c.delta_key_size + c.delta_value_size, c.delta_key_size * c.delta_value_size
    each = 5 * DELTA_CHUNK + 9 * features + 3 * state // DELTA_CHUNK
    return c.delta_value_heads * each if c.delta_layers else 0


def by_kernels_within_chunks(config: ModelConfig) -> int:
    """Numbers a token and head in 16 bit that exist in the backward pass of fla-core's rule of a gated delta net.

    They are states of chunks with their gradients, two copies of values, and gradients of what the kernels read.
    """
    c = config
    state = c.delta_key_size * c.delta_value_size
    return 2 * state // DELTA_CHUNK + 5 * (c.delta_key_size + c.delta_value_size)


def adapters_met(block: nn.Module, config: ModelConfig) -> float:
    """Adapters of a block that a token goes through."""
    share = config.n_expert_per_token / config.n_expert if config.n_expert else 0.0
    layers = [path for path, module in block.named_modules() if isinstance(module, LoRALinear)]
    return sum(share if ".experts." in path else 1.0 for path in layers)


def lowest_learning(model: GPT) -> int:
    """The number of the first block with a backward pass: nothing below it learns."""
    adapted = (i for i, block in enumerate(model.blocks) if any(isinstance(m, LoRALinear) for m in block.modules()))
    narrow = None if model.per_layer is None else model.per_layer.narrow
    before = isinstance(model.embed, TrainedEmbedding) or isinstance(narrow, LoRALinear)
    return 0 if before else next(adapted, len(model.blocks))


def rope_rows(model: ModelConfig, length: int) -> int:
    """Positions in tables of RoPE that need `length`: some more, so that they need not grow with each longer row."""
    return max(length, min(-(-length // 1024) * 1024, model.block_size))


def head_tokens(vocab: int) -> int:
    """Tokens whose logits exist at the same time; large vocabularies may have twice as many, for 1,024 tokens."""
    at_once = max(LOGITS_AT_ONCE // vocab, min(1024, 2 * LOGITS_AT_ONCE // vocab))
    return max(256, at_once // 128 * 128)


def slice_tokens(tokens: int) -> int:
    """Tokens of a slice: about as many in each, a multiple of 64."""
    slices = -(-tokens // SLICE)
    return -(-tokens // (64 * slices)) * 64 if slices > 1 else tokens


@dataclass(frozen=True)
class FastSizes:
    """Memory of the fast path's activations, which are in 16 bit."""

    model: ModelConfig
    rank: int
    """r of each adapter."""
    adapted: float
    """Adapters in a block that a token goes through, see adapters_met."""
    quantized: bool
    quantized_head: bool = False
    fp8: bool = False
    """Products with frozen weights are in FP8."""
    ahead: bool = True
    """The weights of experts are dequantised ahead, into buffers of their own; see lit_qlora.fused.ahead."""
    parts: int = 1
    """Devices that share each row."""
    lowest: int = 0
    """The number of the first block that learns; those below it save nothing."""
    carried: tuple[float, ...] = ()
    """Bytes of each block's quantised weights in 16 bit with the adapters' B beside them, but for those of experts,
    which are not carried over."""
    drops: bool = False
    """The model itself drops elements in training."""
    delta_kernels: bool = False
    """The rule of gated delta nets is computed by fla-core."""
    dora: bool = False
    """Adapters learn the lengths of the rows too: weights are scaled in a workspace, and products are kept for that."""

    def saved(self, policy: Recompute, tokens: int, holds_state: bool = True, reuses: bool = False) -> float:
        """Bytes on the device that one block saves for its backward pass.

        Args:
            holds_state: it has a gated delta net or a short convolution, if the model has any.
            reuses: it uses the keys and values of another one.
        """
        c = self.model
        attended, z, log_sums = self._attended, self.rank * self.adapted, 4 * c.n_head
        middle, raw = self._middle, self._raw
        qkv = self._qkv_of_attention - (2 * self._keys if reuses else 0)
        if holds_state and self._of_state:
            qkv, attended = self._of_state, 0
        if policy in FULL and not (c.n_expert or self._by_torch):
            z, log_sums = min(z, self.rank), 0  # that of the MLP's last layer alone
        elements = {
            "none": c.n_embd + middle + 2 * raw + qkv + attended + self._branches_of(reuses) + z,
            "mlp": c.n_embd + middle + 2 * raw + qkv + attended + z,
            "attn": c.n_embd + middle + 2 * raw + attended + z,
            "offload": z,
            "full": c.n_embd + raw + z,
            "full-offload": z,
        }[policy]
        elements += c.n_embd if c.shared_expert_gate else 0  # what that expert gives
        elements += 2 * c.n_embd if c.experts_beside else 0  # what the norms behind both read
        return tokens * (2.0 * elements + log_sums + 8 + CHOICE * c.n_expert_per_token)

    def on_host(self, policies: Sequence[Recompute], tokens: int) -> float:
        """Bytes in pinned memory of the host; what the last block's backward pass reads first stays on the device."""
        c, last = self.model, len(policies) - 1
        qkv, elements = 0 if self._by_torch else self._qkv_of_attention, 0
        for i, policy in list(enumerate(policies))[self.lowest :]:
            if policy == "offload":
                elements += self._raw + (self._attended if i < last else max(self._attended, qkv))  # see keeps_mlp
                elements += c.n_embd if i < last or not c.parallel_residual else 0
            if policy in ON_HOST and i < last:
                elements += self._raw + (self._middle if policy == "offload" else c.n_embd)
                elements += qkv if policy == "offload" and self.sends_qkv(i) else 0
        return 2.0 * tokens * elements

    def sends_qkv(self, block: int) -> bool:
        """Tell whether a block that offloads also offloads its qkv, instead of recomputing it.

        As many do as the products of a forward pass hide, evenly spread. The last one is one of them: its qkv stays on
        the device, or leaves while the head is computed.
        """
        above = self.model.n_layer - 1 - block
        return not above or math.floor(self._sent_share * above) > math.floor(self._sent_share * (above - 1))

    def keeps_mlp(self, tokens: int) -> bool:
        """Tell whether the last block, if it offloads, keeps gate and up, instead of recomputing them.

        Until its backward pass comes the head is computed. Beside gate and up and two tensors as wide as the stream, it
        may take what a backward pass has beside them: the gradient of down's input, qkv, and one more such tensor.
        """
        c = self.model
        others = c.n_expert or c.delta_layers or c.conv_layers or self._by_torch
        if others or c.parallel_residual or self._raw or slice_tokens(tokens) < tokens:
            return False
        head = min(tokens, head_tokens(c.vocab_size)) * c.vocab_size + tokens * 2 * c.n_embd
        inner = self._branches // (2 if "glu" in c.ffn else 1)
        return head <= tokens * (inner + self._qkv_of_attention + c.n_embd)

    @cached_property
    def _sent_share(self) -> float:
        """The share of blocks whose qkv the products of a forward pass hide, beside what all blocks send."""
        c = self.model
        qkv = self._qkv_of_attention
        operations = 2 * c.n_embd * (qkv + self._queries + self._branches * (1.5 if "glu" in c.ffn else 2))
        sent = 2 * (c.n_embd + self._middle + self._queries + 2 * self._raw)
        return min(1.0, max(0.0, operations / FOR_A_BYTE - sent) / (2 * qkv))

    def peak(self, policies: Sequence[Recompute], tokens: int, first: int = 0) -> float:
        """Bytes that a micro-batch needs at its peak, without the backward passes of the blocks below the first."""
        return max(self._moments(policies, tokens)[first:]) + self._workspaces(policies)

    def carries(self, policies: Sequence[Recompute], tokens: int, cached: int = 0) -> list[bool]:
        """The blocks whose weights can be carried over from a backward pass to the next forward pass.

        The weights take the memory of activations that were freed, and are freed before the next micro-batch needs it:
        the peak is the same.

        Args:
            cached: number of the last blocks whose weights are cached.
        """
        *moments, _ = self._moments(policies, tokens)
        most = self.peak(policies, tokens) - self._workspaces(policies)
        carries, taken = [False] * len(policies), 0.0
        for i in reversed(range(min(len(policies) - cached, len(self.carried)))):
            carries[i] = i >= self.lowest and 0 < self.carried[i] <= most - moments[i] - taken
            taken += carries[i] * self.carried[i]
        return carries

    def _moments(self, policies: Sequence[Recompute], tokens: int) -> list[float]:
        """Bytes of activations in the backward pass of each block, and then those while the head is computed.

        The last block's backward pass comes first, and frees what it saved before the one below begins.
        """
        c, shared, moments = self.model, tokens * self._shared, []
        kept, blocks = shared, range(len(policies))
        kinds = [(policies[i], tokens, c.is_delta(i) or c.is_conv(i), c.reuses(i)) for i in blocks]
        saved = {kind: self.saved(*kind) for kind in set(kinds)}
        beside = {policy: self._block(policy, tokens) for policy in set(policies)}
        for i, kind in enumerate(kinds):
            kept += saved[kind] if i >= self.lowest else 0.0
            moments.append(kept + beside[kind[0]])
        slices = min(tokens, head_tokens(c.vocab_size)) * 2.0 * c.vocab_size + tokens * 4.0 * c.n_embd
        embedding = shared + slice_tokens(tokens) * 10.0 * c.n_layer * c.per_layer_size  # before the first block
        return [*moments, max(kept + max(slices, tokens * 8.0 * c.n_embd), embedding)]

    def _block(self, policy: Recompute, tokens: int) -> float:
        """Bytes that exist in the backward pass of one block, beside saved activations."""
        c, again = self.model, policy != "none"
        at_once = slice_tokens(tokens) if again else tokens
        branches = self._branches * (1 + again + 2 * self.dora)  # DoRA: a copy, and its product with the gradient
        branches += c.n_expert_per_token * c.n_embd  # each choice's part of an output or an input's gradient
        sums = (c.n_expert_per_token * at_once / CHUNK + c.n_expert) * self.rank * max(2 * c.n_embd, 3 * c.expert_size)
        mlp = at_once * (2.0 * branches + (self._branches if self.fp8 else 0)) + (4.0 * sums if c.n_expert else 0)
        if at_once == tokens and self.parts == 1:
            return tokens * 2.0 * self._around(policy) + mlp
        if self._by_torch:
            return tokens * 2.0 * self._around(policy) + max(mlp, tokens * 2.0 * self._of_attention)
        around_mlp, around_attention = self._around_parts(policy)
        mlp = max(mlp, tokens * 2.0 * 5 * c.n_embd if c.per_layer_size else 0)  # what torch computes before it
        return max(tokens * 2.0 * around_mlp + mlp, tokens * 2.0 * (around_attention + self._of_attention))

    def _around(self, policy: Recompute) -> int:
        """Features of whole rows in the backward pass of one block, at most, where the MLP takes them at once."""
        c, again = self.model, policy != "none"
        more = {"offload": 3 * c.n_embd, "full-offload": 2 * (c.n_embd + self._raw)}.get(policy, 0)
        more += c.n_embd if self.drops else 0  # a gradient with elements dropped
        more += c.n_embd if c.experts_beside else 0  # the gradient of what experts give, before the norm behind them
        return 5 * c.n_embd + (self._qkv if again else 0) + self._shaped + more

    def _around_parts(self, policy: Recompute) -> tuple[int, int]:
        """Features of whole rows beside a slice of the MLP, and beside attention's own backward pass.

        Both are beside what the policy saves on the device. There is what was fetched or recomputed, and the gradients
        of the block's output and of the stream in the middle. The second takes the memory of the first where it can.
        """
        c, attended, qkv = self.model, self._attended, self._qkv
        width, gradients = c.n_embd, c.n_embd * (2 if c.parallel_residual else 1)
        recomputed, fetched = policy in FULL, policy in ON_HOST
        mlp = gradients + 2 * self._raw
        attention = gradients + attended + self._shaped + (qkv if policy not in ("none", "mlp") else 0)
        if recomputed or fetched:
            mlp += attended + (qkv + self._middle if recomputed else max(width, qkv))
            attention += attended
        if fetched:
            mlp, attention = mlp + width, attention + width
        return mlp, attention

    def _workspaces(self, policies: Sequence[Recompute]) -> float:
        """Bytes of the workspaces, for weights that are dequantised or in FP8."""
        c = self.model
        written = self.quantized or self.dora
        widest, head = max(self._dense_branches, self._widest_of_attention) if written else 0, self._outside
        experts = 2.0 * self._of_experts if self.quantized else 0.0
        if self.fp8:
            return float(max(max(self._branches, self._widest_of_attention), 2 * head) * c.n_embd)
        keeps = written and set(FULL) & set(policies) and not self._by_torch
        kept = self._qkv + self._attended if keeps else 0
        dense = 2.0 * max(widest, head) * c.n_embd
        space = dense + experts if self.ahead else max(dense, experts * 2 / 3)  # gate and up, then down where they lay
        return space + 2.0 * kept * c.n_embd

    def spared(self, policies: Sequence[Recompute]) -> float:
        """Bytes of workspaces that nothing needs where the weights of all blocks are cached: all but those outside."""
        if self.fp8 or self.dora or not self.quantized:
            return 0.0
        return self._workspaces(policies) - 2.0 * self._outside * self.model.n_embd

    def graphs(self, policies: Sequence[Recompute], tokens: int) -> float:
        """Bytes of the pool that CUDA graphs share, whose largest micro-batch has so many tokens.

        It comes in addition to the memory of passes without a graph, with which it shares the workspaces.
        """
        return max(self._moments(policies, tokens))

    @cached_property
    def _outside(self) -> int:
        """Features of the widest product outside of blocks whose weight is quantised: the head's, or of embeddings."""
        c = self.model
        own = c.n_layer * c.per_layer_size if self.quantized else 0
        return max(own, c.vocab_size if self.quantized_head else 0)

    @cached_property
    def _shared(self) -> float:
        """Bytes a token that several blocks read: their own embeddings, and lent keys and values with gradients."""
        c = self.model
        lent = sum(c.kv_heads_of(c.windowed(i)) * c.head_size_of(c.windowed(i)) for i in range(c.n_layer) if c.lends(i))
        own = c.n_layer * c.per_layer_size + c.n_embd if c.per_layer_size else 0
        return 2.0 * own + (2 + 4) * 2 * lent

    @cached_property
    def _middle(self) -> int:
        """Features of the stream between attention and MLP, where it differs from a block's input."""
        return 0 if self.model.parallel_residual else self.model.n_embd

    @cached_property
    def _raw(self) -> int:
        """Features that a norm behind attention or MLP reads, or the gradient of DoRA's lengths."""
        return 0 if self.model.norm_position == "before" and not self.dora else self.model.n_embd

    @cached_property
    def _shaped(self) -> int:
        """Features of queries and keys behind their norms, and of copies on the way there."""
        c = self.model
        if self._by_torch:  # the gradients of the lookup's inputs and output, and what is split and joined for them
            shaped = 6 * self._queries
        elif in_one_kernel(c):
            shaped = (2 if c.attention_gate else 1) * self._queries + (2 if c.value_norm else 1) * self._keys
        else:
            shaped = 2 * self._qkv if c.qk_norm != "none" or c.clip_qkv else 0
        return max(shaped, self._within_chunks)

    @cached_property
    def _of_attention(self) -> int:
        """Features of attention's own backward pass, beside those around it.

        These are the gradients of queries, keys and values, and those of queries in float32. Those of keys and values
        come first for each head of queries. cuDNN needs less. Where devices share rows, there are queries, keys,
        values, outputs and their gradients of all tokens too.
        """
        c = self.model
        grouped = 2 * self._queries if self._keys < self._queries else 0
        alone = 2 * self._qkv + 4 * self._attended if self._by_torch else self._qkv + 2 * self._queries + grouped
        if self.parts == 1:
            return alone
        copies = math.lcm(c.n_kv_head, self.parts) // c.n_kv_head
        return alone + 3 * self._queries + 2 * copies * self._keys

    @cached_property
    def _by_torch(self) -> bool:
        """True if attention is computed by torch; see lit_qlora.fused.torch_block."""
        return self.model.kv_latent_size > 0 or (self.model.attention_gate and not norms_heads(self.model))

    @cached_property
    def _qkv(self) -> int:
        """The features of _qkv_of_attention, or of a state if the model has any."""
        return max(self._qkv_of_attention, self._of_state)

    @cached_property
    def _qkv_of_attention(self) -> int:
        """Features of queries, keys and values together; of all that autograd saves, where torch computes attention."""
        c = self.model
        if self._by_torch:
            (into, _, _), *_ = self._stacks_of_attention
            lookup = 4 * self._queries + c.n_head * c.value_size  # values are padded to the size of keys
            return 2 * c.n_embd + into + c.q_latent_size + c.kv_latent_size + lookup
        return (2 if c.attention_gate else 1) * self._queries + 2 * self._keys

    @cached_property
    def _of_state(self) -> int:
        """Features that autograd saves of a gated delta net or state space, or of a short convolution.

        These are inputs and outputs of its products, queries, keys and values behind the convolution, and what the rule
        reads and gives. The kernels of fla-core save a row of a chunk's matrix for each head, too.
        """
        c = self.model
        keys, values = 2 * c.delta_key_heads * c.delta_key_size, c.delta_value_heads * c.delta_value_size
        delta = 2 * c.n_embd + 2 * keys + 5 * values + (DELTA_CHUNK + 8) * c.delta_value_heads if c.delta_layers else 0
        return max(delta, 6 * c.n_embd if c.conv_layers else 0)

    @cached_property
    def _within_chunks(self) -> int:
        """Features of a gated delta net's backward pass: gradients, and what its rule computes again."""
        c = self.model
        keys, values = 2 * c.delta_key_heads * c.delta_key_size, c.delta_value_heads * c.delta_value_size
        inside = c.delta_value_heads * by_kernels_within_chunks(c) if self.delta_kernels else 2 * within_chunks(c)
        return keys + 3 * values + inside if c.delta_layers else 0

    @cached_property
    def _attended(self) -> int:
        """Features of what attention finds, where they are saved beside qkv."""
        return 0 if self._by_torch else self._queries

    @cached_property
    def _queries(self) -> int:
        """Features of the queries, in the blocks with the most."""
        return self.model.n_head * max(self.model.head_size_of(windowed) for windowed in (True, False))

    @cached_property
    def _keys(self) -> int:
        """Features of the keys, in the blocks with the most."""
        c = self.model
        return max(c.kv_heads_of(windowed) * c.head_size_of(windowed) for windowed in (True, False))

    @cached_property
    def _stacks_of_attention(self) -> list[tuple[int, int, int]]:
        """Output features, input features and layers of each stack of attention."""
        c = self.model
        if not c.kv_latent_size:
            gate = self._queries if c.attention_gate else 0
            into, width = self._queries + gate + 2 * self._keys, self._queries
            if c.delta_layers:
                values = c.delta_value_heads * c.delta_value_size
                into = max(into, 2 * (c.delta_key_heads * c.delta_key_size + values + c.delta_value_heads))
                width = max(width, values)
            layers = 4 if c.attention_gate else 3
            return [(max(into, 3 * c.n_embd if c.conv_layers else 0), c.n_embd, layers), (c.n_embd, width, 1)]
        narrow = c.kv_latent_size + c.latent_rope_size
        keys_and_values = c.n_head * (c.head_size - c.latent_rope_size + c.value_size)
        later = [(keys_and_values, c.kv_latent_size, 2), (c.n_embd, c.n_head * c.value_size, 1)]
        if not c.q_latent_size:
            return [(self._queries + narrow, c.n_embd, 2), *later]
        return [(c.q_latent_size + narrow, c.n_embd, 2), (self._queries, c.q_latent_size, 1), *later]

    @cached_property
    def _widest_of_attention(self) -> int:
        """Elements of the largest stack of attention, as features of n_embd weights each."""
        return max(-(-n * k // self.model.n_embd) for n, k, _ in self._stacks_of_attention)

    @cached_property
    def _branches(self) -> int:
        """Features of gate and up together, or of up alone, that are computed for a token, in the blocks with the most.

        In a model with experts a block without any counts as one with.
        """
        return max(self._branches_of(reuses) for reuses in {False, self.model.shared_kv_layers > 0})

    def _branches_of(self, reuses: bool) -> int:
        """The same of blocks that use the keys and values of another one (`reuses`), or of the others."""
        c = self.model
        size = (c.shared_kv_ffn_size if reuses else 0) or c.ffn_size
        size = c.n_expert_per_token * c.expert_size + self._beside_experts if c.n_expert else size
        return size * (2 if "glu" in c.ffn else 1)

    @cached_property
    def _dense_branches(self) -> int:
        """The same of an MLP that every token goes through."""
        c = self.model
        if not c.n_expert:
            return self._branches
        return max(self._beside_experts, c.ffn_size if c.dense_layers else 0) * (2 if "glu" in c.ffn else 1)

    @cached_property
    def _beside_experts(self) -> int:
        """Features inside of what every token goes through in a block with experts."""
        return self.model.ffn_size if self.model.experts_beside else self.model.shared_expert_size

    @cached_property
    def _of_experts(self) -> int:
        """Elements of the weights of a block's experts."""
        c = self.model
        return (3 if "glu" in c.ffn else 2) * c.n_expert * c.expert_size * c.n_embd


def _mix(policy: Recompute, rest: Recompute, others: int, blocks: int) -> list[Recompute]:
    """Give the last blocks the policy that saves more: their backward pass comes first."""
    return [policy] * others + [rest] * (blocks - others)


def _fewest(sizes: FastSizes, policy: Recompute, rest: Recompute, blocks: int, tokens: int, free: float) -> int:
    """Count the fewest blocks that must have `policy`, for the backward passes of the rest and the head to fit.

    From one block on, they fit the better the more have it. The moments of these blocks themselves only grow, so where
    the fewest do not fit, no mix of the two does.
    """

    def holds(others: int) -> bool:
        return sizes.peak(_mix(policy, rest, others, blocks), tokens, first=others) <= free

    if holds(0):
        return 0
    return bisect_left(range(1, blocks), True, key=holds) + 1


def choose(sizes: FastSizes, blocks: int, tokens: int, free: float, free_host: float = math.inf) -> list[Recompute]:
    """The fastest mix of policies that fits into `free` bytes; where none fits, it is the one that needs least.

    Some blocks save all, and the others share one policy. Or all recompute, some of them from inputs on the host.

    Args:
        free_host: bytes of pinned host memory.
    """

    def fits(mix: list[Recompute]) -> bool:
        return sizes.peak(mix, tokens) <= free and sizes.on_host(mix, tokens) <= free_host

    pairs: list[tuple[Recompute, Recompute]] = [*((policy, "none") for policy in COST), ("full-offload", "full")]
    best: tuple[float, list[Recompute]] | None = None
    for policy, rest in pairs:
        others = _fewest(sizes, policy, rest, blocks, tokens, free)
        mix = _mix(policy, rest, others, blocks)
        cost = sum(COST[one] for one in mix[sizes.lowest :])
        if (best is None or cost < best[0]) and fits(mix):  # more of them would take more of the host, and more time
            best = cost, mix
    if best:
        return best[1]
    least = min(COST, key=lambda policy: sizes.peak([policy] * blocks, tokens))
    return [least if sizes.on_host([least] * blocks, tokens) <= free_host else "full"] * blocks
