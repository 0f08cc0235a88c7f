"""The plan of a run: its memory and its path, worked out before weights are loaded."""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch

from lit_qlora.fused.memory import (
    COPY_BY_BLOCK,
    ON_HOST,
    FastSizes,
    adapters_met,
    choose,
    lowest_learning,
    rope_rows,
)
from lit_qlora.kernels.launch import Card, why_no_kernels
from lit_qlora.lora.embeddings import add_noise
from lit_qlora.lora.layer import LoRALinear, add_lora
from lit_qlora.lora.score import add_score
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, LOGITS_AT_ONCE
from lit_qlora.model.rope import rotates_locally
from lit_qlora.quantize import Storage, bits_per_weight
from lit_qlora.run import plain_memory
from lit_qlora.run.plain_memory import Adapted, Rows, adapted_sizes
from lit_qlora.settings import LoRAConfig, Recompute, TrainConfig, check
from lit_qlora.sharded import LEAST_BUFFERS, lies_on_host, slabs_of

GIB = 2**30
SPARE = 0.05  # share of the GPU's memory that cached weights leave free
HOLES = 0.15  # share of activation memory lost to fragmentation when weights take its place; 0.14 on an H100
BY_KERNELS = "by fla-core"
HOST_SHARE = 0.8  # share of the host's free memory that may hold activations


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a run; bytes are per device."""

    frozen: int
    """Parameters of the base, as in the checkpoint."""
    trainable: int
    """Parameters of the adapter."""
    experts: int
    """Of these, parameters of adapters on experts."""
    weights: float
    """Bytes of the base on the device."""
    learning: float
    """Bytes of adapter, gradients and initial values (with lora.init), all float32, and of the optimizer's state."""
    activations: float
    """Bytes that a micro-batch of the longest samples saves for backward; an estimate."""
    recompute: tuple[Recompute, ...]
    """How each block recomputes."""
    slow_because: str
    """Reason against the fast path; '' if the run takes it."""
    graph_tokens: int = 0
    """Tokens of the largest micro-batch that is padded for CUDA graphs; 0 for none."""
    graphs: float = 0.0
    """Bytes of the memory that graphs share, an estimate; 0 if nothing is captured, for lack of memory or else."""
    cached_blocks: int = 0
    """Blocks whose quantised weights are also cached in 16 bit."""
    cached: float = 0.0
    """Bytes of these cached weights, and of a sharded base's buffers beyond the first two."""
    copies_at_once: bool = False
    """Whether even large adapters are copied to 16 bit at once: if all blocks are cached and memory is left."""
    ahead: bool = True
    """Whether the weights of experts are dequantised ahead; see lit_qlora.fused.ahead."""
    carries: bool = False
    """Whether weights dequantised in a backward pass are carried over to the next forward pass."""
    host: float = 0.0
    """Bytes of activations in the host's memory, and of a sharded base's embedding."""
    dtype: torch.dtype | None = None
    """Dtype that the fast path gives to frozen weights in another one; None where it leaves them as they are."""
    attention: str = ""
    """How the fast path computes attention; '' for the usual way: by torch, or by kernels of the project's own."""
    delta_rule: str = ""
    """How the fast path computes the rule of gated delta nets; '' where there are none."""
    fp8: bool = False
    """Whether the blocks multiply by their frozen weights in FP8."""
    processes: int = 0
    """Processes over which the blocks' weights are sharded; 0 if each holds all of them."""
    buffers: int = LEAST_BUFFERS
    """Blocks of a sharded base that are in memory at a time."""
    parts: int = 1
    """Devices that share each row."""
    caveat: str = ""
    """What PEFT would not read of the adapter; '' if it reads all."""

    @property
    def total(self) -> float:
        """Bytes at the peak of the run."""
        return self.weights + self.learning + self.activations + self.graphs + self.cached


@dataclass(frozen=True)
class MicroBatches:
    """Sizes of the micro-batches of a run on one device."""

    tokens: int
    """Tokens of the largest one, padding included."""
    rows: int | None = None
    """Rows of the largest one; by default train.micro_batch_size."""
    usual: float | None = None
    """Tokens of a usual one, padding included; None for no CUDA graphs."""
    packed: bool = False
    """Whether their rows are packed."""
    lesson: int = 0
    """Tokens of a teacher that are known of each labelled token; 0 without a teacher."""


@dataclass(frozen=True)
class Room:
    """Free memory in bytes, and the GPU that has it."""

    gpu: float | None = None
    """Of the GPU; None without a GPU, or for a plan of the plain path."""
    host: float | None = None
    """Of the host, for each process; None if nobody knows."""
    card: Card | None = None
    """The GPU, if it is not the one of this machine."""

    def holds(self, plan: Plan) -> bool:
        """Tell whether a run of this plan fits."""
        return plan.total <= (self.gpu or math.inf) and plan.host <= (math.inf if self.host is None else self.host)


def make_plan(
    model: ModelConfig,
    lora: LoRAConfig,
    storage: Storage,
    batches: MicroBatches,
    train: TrainConfig,
    room: Room,
    state_bytes: float = 8.0,
    fast_dtype: torch.dtype | None = None,
) -> Plan:
    """Work out what a run needs; see Planner."""
    return Planner(model, lora, storage, train, state_bytes, fast_dtype).plan(batches, room)


class Planner:
    """Plans runs that differ in their micro-batches and in the memory that they have.

    Args:
        state_bytes: bytes of optimizer state for each parameter; AdamW has two moments in float32.
        fast_dtype: dtype of weights on the fast path; by default that of `storage`.
        outputs: of a head that learns labels; 0 for none.
        sharded: processes over which the blocks' weights are sharded; 0 if each holds all of them.
        parts: devices that share each row; the tokens of micro-batches are those of one.

    Raises:
        UsageError: if the LoRA settings do not fit the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        lora: LoRAConfig,
        storage: Storage,
        train: TrainConfig,
        state_bytes: float = 8.0,
        fast_dtype: torch.dtype | None = None,
        outputs: int = 0,
        sharded: int = 0,
        parts: int = 1,
    ) -> None:
        self.lora, self.storage, self.train, self.sharded = lora, storage, train, sharded
        self.dtype = fast_dtype or storage.dtype
        self.router_losses = [name for name in ("router_balance_loss", "router_z_loss") if getattr(train, name)]
        gpt = GPT.skeleton(model)
        storage.check_layers(gpt)
        frozen = sum(p.numel() for p in gpt.parameters())
        on_host = model.vocab_size * model.n_embd * storage.dtype.itemsize * (sharded > 0 and lies_on_host(model, lora))
        stored = sharded_bytes(gpt, storage, sharded) - on_host if sharded else stored_bytes(gpt, storage)
        add_lora(gpt, lora)
        if outputs:
            add_score(gpt, outputs)
        add_noise(gpt, train.neftune)
        gpt.set_dropout(train.hidden_dropout)
        learnt = {name: p.numel() for name, p in gpt.named_parameters() if p.requires_grad}
        self.gpt, trainable = gpt, sum(learnt.values())
        origin = 0 if lora.init == "default" else 4 * _low_rank(gpt)
        self.bare = Plan(
            frozen=frozen,
            trainable=trainable,
            experts=sum(count for name, count in learnt.items() if ".experts." in name),
            weights=stored,
            learning=origin + (8 + state_bytes) * trainable,
            activations=0.0,
            recompute=("full" if sharded else plain_recompute(train.recompute),) * model.n_layer,
            slow_because="",
            fp8=train.fp8,
            processes=sharded,
            parts=parts,
            ahead=not sharded,
            host=on_host,
        )

    def plan(self, batches: MicroBatches, room: Room) -> Plan:
        """Work out what a run needs.

        Raises:
            UsageError: if a setting needs the fast path and the run cannot take it.
        """
        gpt, storage, train, dtype = self.gpt, self.storage, self.train, self.dtype
        model = gpt.config
        reason = self._slow_because(room)
        check_fp8(train.fp8, reason)
        check(
            not train.fp8 or dtype == torch.bfloat16,
            "train.fp8 gives products in bfloat16 alone.\nTake --precision bf16-true, or leave out --train.fp8.",
        )
        check(
            not (train.fp8 and model.n_expert),
            "train.fp8: the products of experts, which are most of this model's, are not in FP8. "
            "Leave out --train.fp8.",
        )
        check(not (train.fp8 and self.lora.dora), "train.fp8: DoRA scales weights in 16 bit. Leave one of them out.")
        check(
            bool(model.n_expert) or not self.router_losses,
            f"train.{' and train.'.join(self.router_losses)}: this model has no experts, so it has no routers. "
            "Leave it out.",
        )
        _check_cached(train, storage, reason)
        full, size = self.bare.recompute[0] == "full", storage.dtype.itemsize
        length = self.bare.parts * batches.tokens // (batches.rows or train.micro_batch_size)
        rows = Rows(batches.tokens, length, batches.packed)
        activations = plain_memory.activations(gpt, self.lora, self._adapted, size, rows, full)
        activations += _exchanged(model, batches.tokens, self.bare.parts, size)
        seen = batches.tokens * _routed(model) if self.router_losses else 0.0
        seen += _of_lesson(model, batches)
        plan = replace(self.bare, slow_because=reason, activations=activations + seen)
        if reason or room.gpu is None:
            return plan
        plan = replace(plan, dtype=None if dtype == storage.dtype else dtype, attention=_attention(gpt, room.card))
        corrects = bool(model.delta_layers) and not model.state_space
        plan = replace(plan, delta_rule=_delta_rule(room.card, model.delta_key_size) if corrects else "")
        return self._on_fast_path(plan, batches, room, seen)

    def _slow_because(self, room: Room) -> str:
        if not self.train.fast:
            return "train.fast is false"
        if room.gpu is None:
            return "the fast one needs a CUDA device"
        from lit_qlora.fused.support import GROWING, HALF  # imports Triton

        if self.bare.parts > 1 and self.gpt.config.rope_scaling in GROWING:
            return "RoPE depends on the length of a row, and several devices share it"

        if self.dtype not in HALF:
            return "the fast one needs bf16-true, 16-true or 16-mixed"
        if room.card:
            return room.card.why_no_kernels(self.dtype) or self._why_not
        present = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return why_no_kernels(present, self.dtype) or self._why_not

    @cached_property
    def _why_not(self) -> str:
        from lit_qlora.fused.support import mixed_stack, why_not

        return mixed_stack(self.gpt, self.storage) or why_not(self.gpt)

    @cached_property
    def _decoded_scales(self) -> int:
        from lit_qlora.fused.support import decoded_scales

        return 0 if self.sharded else decoded_scales(self.gpt, self.storage)

    @cached_property
    def _slab(self) -> int:
        """Bytes of a buffer of a sharded base."""
        if not self.sharded:
            return 0
        return max(slab.size for slab in slabs_of(GPT.skeleton(self.gpt.config), self.storage, self.sharded))

    @cached_property
    def _adapted(self) -> list[Adapted]:
        return adapted_sizes(self.gpt, self.lora.dora)

    @cached_property
    def _dequantized(self) -> list[tuple[int, int]]:
        from lit_qlora.fused.support import dequantized_bytes

        return dequantized_bytes(self.gpt, self.storage)

    @cached_property
    def _beside(self) -> int:
        from lit_qlora.fused.support import copied_bytes

        return copied_bytes(self.gpt)

    @cached_property
    def _copied(self) -> tuple[int, int]:
        """Parameters of adapters that are copied to 16 bit at the same time, and how many more there are.

        The others are copied at the same time too where memory is left for it.
        """
        parts = _adapters_of_parts(self.gpt)
        copied = max(parts) if sum(parts) >= COPY_BY_BLOCK else sum(parts)
        return copied, sum(parts) - copied

    @cached_property
    def sizes(self) -> FastSizes:
        """Memory of the fast path's activations."""
        gpt, storage = self.gpt, self.storage
        adapted = max(adapters_met(block, gpt.config) for block in gpt.blocks)
        rank = max((m.lora_a.size(0) for m in gpt.modules() if isinstance(m, LoRALinear)), default=self.lora.r)
        written, ahead = not storage.plain or self.sharded > 0, not self.sharded
        head, parts = storage.quantizes("head"), self.bare.parts
        fp8, lowest = self.train.fp8, lowest_learning(gpt)
        dora = self.lora.dora
        carried = () if dora else tuple(dense for dense, _ in self._dequantized)
        known = (rank, adapted, written, head, fp8, ahead, parts, lowest, carried)
        return FastSizes(gpt.config, *known, drops=gpt.dropout > 0, dora=dora)

    def _on_fast_path(self, plan: Plan, batches: MicroBatches, room: Room, seen: float) -> Plan:
        """Turn the plan of the plain path into one of the fast path; `seen`: bytes of routers' losses and a lesson."""
        assert room.gpu is not None
        model, train = self.gpt.config, self.train
        weights = plan.weights + self._decoded_scales
        copied, others = self._copied
        learning = plan.learning + 2 * copied + self._beside + _rotations(model, batches, train, plan.parts)
        free = 0.97 * room.gpu - weights - learning - seen
        eager = self.router_losses or self.sharded or plan.parts > 1
        graph_tokens = 0 if eager else _graph_tokens(model, train, batches)
        tokens = max(batches.tokens, graph_tokens)  # padded, even where nothing is captured
        host = math.inf if room.host is None else HOST_SHARE * room.host - plan.host
        sizes = replace(self.sizes, delta_kernels=plan.delta_rule == BY_KERNELS)
        sizes, policies = _fastest(sizes, train.recompute, tokens, free, host)
        activations = sizes.peak(policies, tokens)
        captures = graph_tokens and not set(ON_HOST) & set(policies)
        graphs = sizes.graphs(policies, graph_tokens) if captures else 0.0
        if activations + graphs > free:  # graphs take only memory that is left, but before cached weights
            graphs = 0.0
        cached_blocks, carries, buffers, held = 0, False, plan.buffers, [0.0]
        usable = free - SPARE * room.gpu - graphs
        spare = usable - activations
        if self.sharded:
            buffers = max(buffers, min(model.n_layer, buffers + int(spare // self._slab)))
        if sizes.quantized and not train.fp8 and not self.sharded:
            often = round(batches.usual or tokens)

            def carrying(cached: int) -> int:
                return 0 if graphs and often <= graph_tokens else sum(sizes.carries(policies, often, cached))

            holes, wanted = HOLES * activations, train.keep_dequantized
            held = list(accumulate(map(sum, reversed(self._dequantized)), initial=0.0))
            cached_blocks, carries = _share(spare, held, holes, carrying, wanted)
        whole, more = cached_blocks == model.n_layer, 2 * others
        activations -= sizes.spared(policies) if whole else 0.0
        copies_at_once = whole and activations + held[cached_blocks] + more <= usable  # given up before cached weights
        learning += more if copies_at_once else 0
        return replace(
            plan,
            weights=weights,
            learning=learning,
            activations=activations + seen,
            recompute=tuple(policies),
            graph_tokens=graph_tokens,
            graphs=graphs,
            cached_blocks=cached_blocks,
            cached=held[cached_blocks] + (buffers - plan.buffers) * self._slab,
            copies_at_once=copies_at_once,
            buffers=buffers,
            ahead=sizes.ahead,
            carries=carries,
            host=plan.host + sizes.on_host(policies, tokens),
        )


def _lacks_kernels(head_size: int, card: Card | None) -> bool:
    from lit_qlora.fused.attention import flash_on, has_flash, has_kernel
    from lit_qlora.kernels.launch import shared_memory

    if card:
        return not (flash_on(card.capability, head_size) or has_kernel(head_size, card.shared_memory))
    if not torch.cuda.is_available():
        return False
    gpu = torch.empty(0, device="cuda")
    return not (has_flash(head_size, gpu.device) or has_kernel(head_size, shared_memory(gpu)))


def _attention(gpt: GPT, card: Card | None) -> str:
    from lit_qlora.fused.flash_4 import INSTALL, why_not

    model = gpt.config
    if not gpt.dropout and _lacks_kernels(model.head_size, card):
        return "in plain torch"
    if gpt.dropout or model.attention_softcap is not None or model.kv_latent_size:
        return ""
    reason = why_not(card.capability if card else _capability_here(), model.head_size)
    if not reason:
        return "by FlashAttention 4"
    return f"by torch ({reason} is faster)" if reason == INSTALL else ""


def _capability_here() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _delta_rule(card: Card | None, key_size: int) -> str:
    from lit_qlora.fused.delta_rule import why_no_kernels

    reason = why_no_kernels(card.capability if card else _capability_here(), key_size)
    return f"in plain torch ({reason})" if reason else BY_KERNELS


def _fastest(
    sizes: FastSizes, setting: Literal["auto"] | Recompute, tokens: int, free: float, free_host: float
) -> tuple[FastSizes, list[Recompute]]:
    """The sizes with or without experts' weights ahead, and the policies: nothing is recomputed to have them ahead."""
    without, blocks = replace(sizes, ahead=False), sizes.model.n_layer

    def policies(sizes: FastSizes) -> list[Recompute]:
        return choose(sizes, blocks, tokens, free, free_host) if setting == "auto" else [setting] * blocks

    mix, least = policies(sizes), policies(without)
    return (sizes, mix) if mix == least and sizes.peak(mix, tokens) <= free else (without, least)


def sharded_bytes(gpt: GPT, storage: Storage, processes: int) -> float:
    """Count the bytes of the base's weights in each of so many processes that share those of the blocks.

    There are its shares, buffers for the blocks in use, and what each process holds.
    """
    slabs = slabs_of(gpt, storage, processes)
    shared = sum(slab.share for slab in slabs) + min(LEAST_BUFFERS, len(slabs)) * max(slab.size for slab in slabs)
    in_slabs = {f"blocks.{i}.{layer}.weight" for i, slab in enumerate(slabs) for layer in slab.layers}
    return shared + stored_bytes(gpt, storage, in_slabs)


def stored_bytes(gpt: GPT, storage: Storage, but: Collection[str] = ()) -> float:
    """Count the bytes of the base's weights, but for those of these names."""
    bits = 0.0
    weights = {f"{path}.weight" for path, module in gpt.named_modules() if isinstance(module, torch.nn.Linear)}
    for path, parameter in gpt.named_parameters():
        if path in but:
            continue
        scheme = storage.scheme(path.removesuffix(".weight")) if path in weights else "none"
        bits += parameter.numel() * bits_per_weight(scheme, storage.dtype)
    if gpt.config.tied_head and storage.quantizes("head"):
        # The embedding is looked up as it is.
        bits += gpt.head.weight.numel() * bits_per_weight(storage.scheme("head"), storage.dtype)
    return bits / 8


def _share(
    spare: float, held: Sequence[float], holes: float, carrying: Callable[[int], int], wanted: int | Literal["auto"]
) -> tuple[int, bool]:
    """Choose how many blocks have cached weights, and whether other blocks carry theirs over.

    A cached weight saves two dequantisations per micro-batch, a carried one saves one; the larger saving wins.

    Args:
        spare: bytes left.
        held: bytes of the cached weights of 0, 1, ... or all blocks.
        holes: bytes lost to fragmentation if weights are carried over.
        carrying: tells how many of the blocks carry weights over in a usual micro-batch if so many are cached.
        wanted: train.keep_dequantized; 0 forbids both.
    """

    def cached(spare: float) -> int:
        return max(0, bisect_right(held, spare) - 1) if wanted == "auto" else min(len(held) - 1, wanted)

    alone, beside = cached(spare), cached(spare - holes)
    fits = wanted != 0 and held[beside] + holes <= spare
    return (beside, True) if fits and 2 * beside + carrying(beside) > 2 * alone else (alone, False)


def _check_cached(train: TrainConfig, storage: Storage, slow_because: str) -> None:
    """Raise UsageError if weights should be cached dequantised, but the run dequantises none."""
    reason = slow_because or ("the base is not quantised" if storage.plain else "")
    check(
        train.keep_dequantized in (0, "auto") or not reason,
        f"train.keep_dequantized is for a quantised base on the fast path: {reason}. Leave it out.",
    )


def _graph_tokens(model: ModelConfig, train: TrainConfig, batches: MicroBatches) -> int:
    """Tokens of the largest micro-batch that is padded for CUDA graphs, 0 for none; see lit_qlora.fused.graphs."""
    from lit_qlora.fused.graphs import most_tokens, row_width
    from lit_qlora.fused.support import GROWING

    if train.cuda_graphs == "never" or batches.usual is None or model.rope_scaling in GROWING:
        return 0
    most, rows = most_tokens(model), batches.rows or train.micro_batch_size
    counts = (batches.usual, batches.tokens)
    common, longest = (rows * row_width(model, math.ceil(count / rows), batches.packed) for count in counts)
    return min(most, longest) if common <= most else 0


def _rotations(model: ModelConfig, batches: MicroBatches, train: TrainConfig, parts: int) -> float:
    """Bytes of the tables of RoPE on the fast path: cosines and sines in float32, with and without a window."""
    from lit_qlora.fused.support import GROWING

    rows = batches.tokens
    if model.rope_scaling not in GROWING:
        longest = parts * batches.tokens // (batches.rows or train.micro_batch_size)
        rows = rope_rows(model, min(longest, model.block_size))
    local = model.rotated if rotates_locally(model) else 0
    return 8.0 * rows * (max(model.rotated, model.full_head_size) + local) / 2


def _adapters_of_parts(gpt: GPT) -> list[int]:
    """Count the elements of A and B in each block, and in all that is outside of blocks."""
    outside = torch.nn.ModuleList(part for part in (gpt.per_layer, gpt.head) if part is not None)
    names = ("lora_a", "lora_b")
    return [
        sum(p.numel() for name, p in part.named_parameters() if name.endswith(names)) for part in (*gpt.blocks, outside)
    ]


def _low_rank(gpt: GPT) -> int:
    """Count the elements of all A and B."""
    adapters = [module for module in gpt.modules() if isinstance(module, LoRALinear)]
    return sum(adapter.lora_a.numel() + adapter.lora_b.numel() for adapter in adapters)


def plain_recompute(setting: str) -> Recompute:
    """Translate train.recompute for the plain path, which recomputes all or nothing."""
    return "none" if setting in ("auto", "none") else "full"


def check_fp8(wanted: bool, slow_because: str) -> None:
    """Raise UsageError if FP8 is wanted but the run cannot take the fast path, the only one with FP8."""
    check(
        not (wanted and slow_because),
        f"train.fp8 needs the fast path, which this run cannot take: {slow_because}.\n"
        "Leave out --train.fp8; the run then computes in the precision of --precision.",
    )


def _of_lesson(model: ModelConfig, batches: MicroBatches) -> float:
    """Bytes that learning from a teacher takes: what is known of each token, and a slice of logits a few times."""
    if not batches.lesson:
        return 0.0
    at_once = min(batches.tokens, max(256, LOGITS_AT_ONCE // model.vocab_size))
    return 4.0 * batches.tokens * (2 * batches.lesson + 1) + 16.0 * at_once * model.vocab_size


def _exchanged(config: ModelConfig, tokens: int, parts: int, itemsize: int) -> float:
    """Bytes of what goes to and from the other devices of a row, at most, in the backward pass of attention.

    There are queries, keys, values, outputs and their gradients of all tokens, and the gradients as they travel.
    """
    if parts == 1:
        return 0.0
    most = 0.0
    for windowed in {config.windowed(i) for i in range(config.n_layer)}:
        keys = math.lcm(config.kv_heads_of(windowed), parts)
        most = max(most, (6.0 * config.n_head + 8 * keys) * config.head_size_of(windowed))
    return most * tokens * itemsize


def _routed(config: ModelConfig) -> float:
    """Bytes a token that the losses of routers save: scores, and what a softmax and a log-sum-exp read, in float32."""
    return 3.0 * 4 * config.n_expert * sum(config.has_experts(i) for i in range(config.n_layer))
