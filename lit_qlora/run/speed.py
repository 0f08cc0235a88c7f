"""The speed of the fast path, estimated from what a step asks of the GPU and of the host.

A forward or backward pass takes as long as the slowest of three that overlap: the GPU's operations and bytes, the
launches of its kernels by the host, and the copies of activations to or from the host. The backward pass begins where
both the GPU and the host have ended the forward pass, with the head: there the GPU has most to do for each launch.
The step ends with an update. So a step of one micro-batch is meant; more of them share an update.

The numbers hold for GPUs of 700 W, whose power limits products: the H200 has more bandwidth than the H100, and the same
clock. Sources are entries of LOG.md and rows of benchmarks/results.csv; "fitted" are rates to the rows of Llama-2-7B,
TinyLlama and Qwen3-30B-A3B there. The host's share is that of some machines: others are a quarter slower or faster.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lit_qlora.fused.attention import MOST_FLASH
from lit_qlora.fused.memory import FULL, head_tokens
from lit_qlora.kernels.lora_products import MOST_RANK
from lit_qlora.quantize import bits_per_weight
from lit_qlora.run.plan import Plan, Planner
from lit_qlora.settings import Recompute

BANDWIDTH: Mapping[str, float] = {"H100 80GB": 2.7e12, "H200": 4.0e12}
"""GPUs that were measured -> bytes a second of their memory, as dequantisation reads and writes it."""
RATE, RATE_OF_EXPERTS = 670e12, 600e12
"""Operations a second of products in bfloat16, and of those of experts: fitted."""
RATE_OF_ATTENTION = 500e12
"""Operations a second of causal attention, as a row of 200,192 tokens and the forward pass of one of 2,048 showed."""
TRAVELS = 5
"""Times that a byte that is saved for the backward pass travels, a third of them forward: fitted. What is neither
product nor attention in a profile of Llama-2-7B gives 7."""
OF_LEARNING = 80
"""Bytes of a trainable parameter that travel in a step: AdamW's 28, sums, copies and gradients; fitted at rank 64."""
LINK = 52e9
"""Bytes a second to the host, and at the same time from it."""
LAUNCH, GAP = 56e-6, 2e-6
"""Seconds of the host for each kernel with all that comes with it (fitted), and of the GPU between two kernels."""
AGAIN: Mapping[Recompute, tuple[str, ...]] = {
    "none": (),
    "mlp": ("gate",),
    "attn": ("qkv", "gate"),
    "offload": ("qkv", "gate"),
    "full": ("qkv", "projection", "gate"),
    "full-offload": ("qkv", "projection", "gate"),
}
"""The products of a block that a backward pass computes again."""
LAUNCHES_AGAIN: Mapping[Recompute, int] = {
    "none": 0, "mlp": 4, "attn": 9, "offload": 9, "full": 16, "full-offload": 16
}  # fmt: skip
"""Their launches and those of what lies between, counted."""
SENT: Mapping[Recompute, float] = {"offload": 3.5, "full-offload": 1}
"""Tensors of a block that go to the host and come back; each takes three launches each way."""
OTHER_KINDS = ("kv_latent_size", "delta_layers", "conv_layers", "per_layer_size")
"""Fields of models with layers whose speed was not measured."""


@dataclass
class Stack:
    """The weights of one block that read the same input, of all its experts or of none."""

    elements: float = 0.0
    met: float = 0.0
    """Elements that a token is multiplied with."""
    learnt: float = 0.0
    """The same of adapters; 0 without any."""
    dequantized: float = 0.0
    """Bytes that travel when the weights are dequantised; 0 where they are in 16 bit."""


@dataclass
class Pass:
    """Needs of a pass over the model: operations, bytes of the GPU's memory, bytes of the host's, launches."""

    products: float = 0.0
    of_experts: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    copied: float = 0.0
    launches: float = 0.0

    def seconds(self, bandwidth: float, replayed: bool) -> float:
        """The time of the slowest of GPU, host and link."""
        products = self.products / RATE + self.of_experts / RATE_OF_EXPERTS + self.attention / RATE_OF_ATTENTION
        gpu = products + self.traffic / bandwidth + GAP * self.launches
        return max(gpu, 0.0 if replayed else LAUNCH * self.launches, self.copied / LINK)


class StepTime:
    """Estimates the time of steps of one model with its adapters."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self.model, self.sizes = planner, planner.gpt.config, planner.sizes
        self.widest_head = max(self.model.head_size_of(windowed) for windowed in (True, False))
        self.stacks = [_stacks(planner, i) for i in range(self.model.n_layer)]

    def tokens_per_second(self, plan: Plan, tokens: int, attended: float, gpu: str) -> float | None:
        """Estimate the speed of steps with a micro-batch of so many tokens.

        Args:
            attended: length of the row, or of the document in a packed row, that a token is in, on average.
            gpu: a name of BANDWIDTH.

        Returns:
            None where nothing like it was measured: on the plain path, on other GPUs or several, in FP8, with DoRA or
            dropout in the model, and for models with other layers, or heads that flash attention does not take.
        """
        unlike = plan.slow_because or plan.fp8 or plan.processes or plan.parts > 1 or self.widest_head > MOST_FLASH
        unlike = bool(unlike or self.planner.gpt.dropout or self.planner.lora.dora)
        if unlike or gpu not in BANDWIDTH or any(getattr(self.model, name) for name in OTHER_KINDS):
            return None
        replayed = plan.graphs > 0 and tokens <= plan.graph_tokens
        return tokens / sum(one.seconds(BANDWIDTH[gpu], replayed) for one in self._passes(plan, tokens, attended))

    def _passes(self, plan: Plan, tokens: int, attended: float) -> tuple[Pass, Pass]:
        """The forward pass over the blocks; and the head, the backward pass and the update."""
        c, policies, cached = self.model, plan.recompute, self.model.n_layer - plan.cached_blocks
        carried = self.sizes.carries(policies, tokens, plan.cached_blocks) if plan.carries else [False] * c.n_layer
        copied = self.sizes.on_host(policies, tokens)
        forward, backward = Pass(copied=copied), Pass(copied=copied)
        for i, policy in enumerate(policies):
            forward.launches += 3 * SENT.get(policy, 0)
            self._add_block(forward, i, tokens, attended, dequantizes=i < cached and not carried[i])
            if i >= self.sizes.lowest:
                self._add_block(backward, i, tokens, attended, dequantizes=i < cached, back=True)
                self._add_again(backward, i, policy, tokens, attended)
        slices = -(-tokens // head_tokens(c.vocab_size))
        backward.products += 4.0 * tokens * c.vocab_size * c.n_embd
        backward.traffic += 4.0 * slices * c.vocab_size * c.n_embd + 6.0 * tokens * c.vocab_size  # the loss: 3 times
        backward.traffic += OF_LEARNING * self.planner.bare.trainable
        backward.launches += 4 * slices + 60
        return forward, backward

    def _add_block(
        self, work: Pass, i: int, tokens: int, attended: float, dequantizes: bool, back: bool = False
    ) -> None:
        """Add a block; its backward pass has twice the work beside products with frozen weights."""
        c, stacks, twice = self.model, self.stacks[i], 1 + back
        for (_, of_experts), stack in stacks.items():
            _multiply(work, stack, of_experts, tokens, twice)
            work.traffic += stack.dequantized if dequantizes else 0.0
        work.attention += (2.5 if back else 1.0) * self._attention(i, tokens, attended)
        work.traffic += TRAVELS * twice / 3 * self._saved(tokens)
        adapted = sum(stack.learnt > 0 for stack in stacks.values())
        launches = 26 + (9.5 if self.sizes.rank > MOST_RANK else 5.5) * adapted
        launches += (18 if c.has_experts(i) else 0) + (6 if c.norm_position == "both" else 0)
        work.launches += twice / 3 * launches + (
            2 if dequantizes and any(s.dequantized for s in stacks.values()) else 0
        )

    def _add_again(self, work: Pass, i: int, policy: Recompute, tokens: int, attended: float) -> None:
        """Add what the backward pass of a block computes again."""
        kinds = set(AGAIN[policy]) - ({"qkv"} if policy == "offload" and self.sizes.sends_qkv(i) else set())
        again = {key: stack for key, stack in self.stacks[i].items() if key[0] in kinds}
        for (_, of_experts), stack in again.items():
            _multiply(work, stack, of_experts, tokens)
        share = sum(stack.met for stack in again.values()) / sum(stack.met for stack in self.stacks[i].values())
        work.traffic += TRAVELS / 3 * share * self._saved(tokens)
        work.attention += self._attention(i, tokens, attended) if policy in FULL else 0.0
        work.launches += LAUNCHES_AGAIN[policy] + 3 * SENT.get(policy, 0)

    def _attention(self, i: int, tokens: int, attended: float) -> float:
        """Operations of a forward pass of causal attention."""
        c, windowed = self.model, self.model.windowed(i)
        seen = min(attended, c.sliding_window or attended) if windowed else attended
        return 2.0 * tokens * seen * c.n_head * c.head_size_of(windowed)

    def _saved(self, tokens: int) -> float:
        """Bytes that a block saves if it recomputes nothing, and those of each choice's part of what experts give."""
        c = self.model
        return self.sizes.saved("none", tokens) + 2.0 * tokens * c.n_expert_per_token * c.n_embd


def _multiply(work: Pass, stack: Stack, of_experts: bool, tokens: int, adapters: int = 1) -> None:
    """Add a product of each token with a stack, which reads the weights, and so many with its adapters."""
    operations = 2.0 * tokens * (stack.met + adapters * stack.learnt)
    work.of_experts += operations if of_experts else 0.0
    work.products += 0.0 if of_experts else operations
    work.traffic += 2.0 * stack.elements


def _stacks(planner: Planner, i: int) -> dict[tuple[str, bool], Stack]:
    """The weights of a block: (kind, whether they are experts') -> stack."""
    c, storage, found = planner.gpt.config, planner.storage, defaultdict[tuple[str, bool], Stack](Stack)
    for name, parameter in planner.gpt.blocks[i].named_parameters():
        if parameter.ndim != 2:
            continue
        path, _, last = name.removesuffix(".base.weight").removesuffix(".weight").rpartition(".")
        layer = path.rpartition(".")[2] if last in ("lora_a", "lora_b") else last
        of_experts = ".experts." in name
        kind = layer if layer in ("projection", "down") else "qkv" if path.startswith("attn") else "gate"
        stack, share = found[kind, of_experts], c.n_expert_per_token / c.n_expert if of_experts else 1.0
        if last in ("lora_a", "lora_b"):
            stack.learnt += share * parameter.numel()
            continue
        scheme = storage.scheme(f"blocks.{i}.{path}.{last}")
        stack.elements, stack.met = stack.elements + parameter.numel(), stack.met + share * parameter.numel()
        if scheme != "none":
            stack.dequantized += (2 + bits_per_weight(scheme, storage.dtype) / 8) * parameter.numel()
    return found
