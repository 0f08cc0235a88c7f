"""Compile the kernels for a card that is not there, and print the shared memory that each of them takes.

    python -m tests.kernels.compile_for_card 86 --width 4096 --rank 16 --rank 64

This is a program of its own because tests on a CPU run kernels in the interpreter. Compilation ends where Triton has
laid out shared memory, which takes a third of the time; --machine-code goes on to the end, and names kernels again,
with ", serialized", whose matrix units wait for each instruction. --few leaves out launches that take no more than
others, --experts all kernels but those of mixtures.
"""

import argparse
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_qlora.kernels import (
    attention,
    chosen_experts,
    experts,
    experts_dequantize,
    experts_lora,
    experts_mlp,
    experts_products,
    launch,
)
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.beside import BesideWeights
from lit_qlora.kernels.causal_conv import HeadConv, convolve, convolve_backward
from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.kernels.decode_attention import attend, store
from lit_qlora.kernels.delta_gates import gates_backward, gates_forward
from lit_qlora.kernels.dequantize import dequantize
from lit_qlora.kernels.dropout import Dropout, drop
from lit_qlora.kernels.experts_dequantize import Matrices
from lit_qlora.kernels.experts_products import LowRank
from lit_qlora.kernels.fp8 import FP8, quantize_rows, quantize_weights
from lit_qlora.kernels.gate import gate_backward, gate_forward
from lit_qlora.kernels.gated_conv import GatedConv, gated_conv, gated_conv_backward
from lit_qlora.kernels.gated_norm import GatedNorm, gated_norm, gated_norm_backward
from lit_qlora.kernels.lora_products import (
    MOST_RANK,
    Pending,
    copy_scaled,
    grad_a,
    grad_b,
    project,
    rank_update,
    scale_rows,
)
from lit_qlora.kernels.mlp import mlp_backward, mlp_forward
from lit_qlora.kernels.norm import Norm, add_norm, norm_backward
from lit_qlora.kernels.normed_input import normed_input_backward
from lit_qlora.kernels.qk_norm_rope import HeadNorm, Rotation, norm_rotate, norm_rotate_backward
from lit_qlora.kernels.rope import rotate_, rotate_backward
from lit_qlora.kernels.scale import scale_
from lit_qlora.kernels.small_batch_linear import product
from lit_qlora.kernels.stack import EightBit, FourBit, Stack

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may take, by compute capability times ten. CUDA C++ Programming Guide, table of
technical specifications."""
ACTIVATIONS = [Activation("silu", gated=True), Activation("gelu", gated=False)]
T = 2048
F32 = torch.float32


@dataclass(frozen=True)
class Variants:
    """Those that kernels are launched for."""

    schemes: tuple[str, ...] = ("nf4-dq", "nf4", "int8", "none")
    windows: tuple[int | None, ...] = (None, 4096)
    norms_of_heads: tuple[str, ...] = ("none", "plain", "late", "values", "values_of_keys")
    head_sizes: tuple[int, ...] = (64, 128, 256, 272, 512)
    """Of attention by the project's own kernels, as far as they take them on the card."""
    caches: tuple[tuple[int, int, int], ...] = ((1, 8, 64), (8, 4, 128), (2, 4, 256), (71, 1, 64), (8, 1, 512))
    """Queries that share a key, keys and the size of their heads, in generation; 71 are falcon-7b's, 512 gemma-4's."""
    products_in_16_bit: bool = True
    """In generation; float32 takes more."""
    weights_before: tuple[bool, ...] = (False, True)
    """Experts whose weight multiplies what they make, or what they read."""
    convolutions: tuple[tuple[int, bool], ...] = ((128, True), (64, True), (128, False))
    """Features of a head before a delta net or state space, and whether it is normed."""
    gated_norms: tuple[tuple[int, bool], ...] = ((8, False), (32, False), (1, True))
    """Groups of a row, and whether the gate is before the norm."""
    chunked: tuple[bool, ...] = (False, True)
    """Windows of attention in generation that slide, or are chunks."""


FEW = Variants(
    schemes=("nf4-dq", "int8", "none"),
    windows=(None,),
    norms_of_heads=("none", "plain"),
    head_sizes=(128, 256, 512),
    caches=((2, 4, 256), (71, 1, 64), (8, 1, 512)),
    products_in_16_bit=False,
    weights_before=(False,),
    convolutions=((128, True), (64, True)),
    gated_norms=((8, False), (1, True)),
    chunked=(False,),
)
"""As few as take the most; tests/kernels/test_every_card.py holds them against all."""


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """A tensor without memory: compiling asks for its dtype alone."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def integers(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def table_of(stack: Stack) -> Tensor:
    return empty(len(stack.rows), 3, dtype=torch.int32)


def weight_of(scheme: str, n: int, k: int, dtype: torch.dtype) -> FourBit | EightBit | Tensor:
    """Stacked weights of three layers, as they are stored."""
    if scheme == "none":
        return empty(n, k, dtype=dtype)
    if scheme == "int8":
        return EightBit(empty(n, k, dtype=torch.int8), empty(n))
    packed, blocks = empty(n * k // 2, dtype=torch.uint8), n * k // 64
    if scheme == "nf4":
        return FourBit(packed, empty(blocks), empty(16), None)
    nested = (empty(256), empty(blocks // 256 + 1), empty(3))
    return FourBit(packed, empty(blocks, dtype=torch.uint8), empty(16), nested)


def groups_of(width: int, rank: int) -> list[Stack]:
    """Query, key and value; gate and up; a layer on its own."""
    ffn = width * 7 // 2
    return [
        Stack((width, width // 4, width // 4), (0, 1, 2), rank),
        Stack((ffn, ffn), (0, 1), rank),
        Stack((width,), (0,), rank),
    ]


def linear_layers(width: int, rank: int, dropout: Dropout, dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernels of a group of layers, of their adapters and of the norm before them."""
    pending = Pending()
    x, d_x = empty(T, width, dtype=dtype), empty(T, width, dtype=dtype)
    norms = [Norm("rms", 1e-5, empty(width, dtype=dtype)), Norm("layer", 1e-5, *empty(2, width, dtype=dtype))]
    for stack in groups_of(width, rank):
        both, z = empty(T, width + stack.rank, dtype=dtype), empty(T, stack.rank, dtype=dtype)
        a, b = empty(stack.rank, width, dtype=dtype), empty(stack.adapted_rows, rank, dtype=dtype)
        copy_scaled(empty(*a.shape), 2.0, a)
        scale_rows(z, empty(T))
        for scheme in of.schemes:
            weight, out = weight_of(scheme, stack.n, width, dtype), empty(stack.n, width + stack.rank, dtype=dtype)
            if isinstance(weight, Tensor):
                BesideWeights().write([(out, b, stack)])
            else:
                dequantize(weight, b, out, stack, table_of(stack))
        statistics = [add_norm(x, d_x, norm, both)[1] for norm in norms]
        drop(x, dropout)
        for norm, own in zip(norms, statistics, strict=True):
            norm_backward(d_x, x, norm, own, d_x)
        if rank > MOST_RANK:  # cuBLAS does the products
            continue
        project(both, a, both, dropout=dropout)
        rank_update(both, a, width, dropout)
        grad_a(both, z, empty(*a.shape), 1.0, pending, dropout=dropout)
        grad_b(empty(T, stack.n, dtype=dtype), z, empty(*b.shape), stack, table_of(stack), pending)
        for norm, own in zip(norms, statistics, strict=True):
            grad_a(x, z, empty(*a.shape), 1.0, pending, norm, own, dropout)
        of_rms = norms[0], statistics[0]
        normed_input_backward(both, x, z, a, empty(*a.shape), 1.0, pending, *of_rms, d_x, dropout)
    pending.flush()


def mlp(width: int, rank: int, dropout: Dropout, dtype: torch.dtype) -> None:
    """Launch the kernels of an MLP of this inner width."""
    pending = Pending()
    for activation in ACTIVATIONS:
        stack = Stack((width,) * activation.branches, tuple(range(activation.branches)), rank)
        branches, h = empty(T, stack.n, dtype=dtype), empty(T, width + rank, dtype=dtype)
        mlp_forward(branches, h, activation)
        if rank > MOST_RANK:
            mlp_backward(branches, h, activation, None, None, None, None, stack, 1.0, pending, dropout, writes_h=True)
            continue
        a, z = empty(rank, width, dtype=dtype), empty(T, stack.rank, dtype=dtype)
        project(branches, a, h, activation, dropout=dropout)
        grads = empty(rank, width), empty(stack.adapted_rows, rank)
        mlp_backward(branches, h, activation, a, grads[0], z, grads[1], stack, 1.0, pending, dropout)
    pending.flush()


def training(width: int, rank: int, dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernels of a training step."""
    dropout = Dropout(0.05, integers(1), 3)
    linear_layers(width, rank, dropout, dtype, of)
    mlp(width * 7 // 2, rank, dropout, dtype)
    positions, angles = empty(T, dtype=torch.int32), empty(4096, 64)
    heads = [empty(T, count, 128, dtype=dtype) for count in (width // 128, width // 512, width // 512)]
    rotate_(empty(T, width * 3 // 2, dtype=dtype), positions, angles, angles, width * 5 // 512, 128)
    rotate_backward(*heads, positions, angles, angles)
    qkv, scale = empty(T, width * 3 // 2, dtype=dtype), empty(T)
    of_heads = HeadNorm(empty(2, 128), 1e-6)
    both = {"values": True, "values_of_keys": True}
    kinds = {"plain": {}, "late": {"late": True}, "values": {"values": True}, "values_of_keys": both}
    for kind in of.norms_of_heads:
        norm = replace(of_heads, **kinds[kind]) if kind in kinds else None
        for half in (64, 32):  # 32: half of a head is not rotated
            rotation = Rotation(positions, empty(4096, half), empty(4096, half), interleaved=half == 32)
            norm_rotate(qkv, norm, rotation, scale, (width // 128, width // 512, 128))
            norm_rotate_backward(*heads, qkv, norm, rotation, scale)
    for of_keys in (False, True):
        norm = HeadNorm(empty(2, 128), 1e-6, values=True, values_of_keys=of_keys)
        rotation = Rotation(positions, empty(4096, 64), empty(4096, 64))
        norm_rotate(qkv, norm, rotation, None, (width // 128, width // 512, 128))
        norm_rotate_backward(*heads, qkv, norm, rotation, None)
    gate_forward(heads[0].flatten(1), qkv[:, :width], empty(T, width + rank, dtype=dtype))
    gate_backward(heads[0].flatten(1), heads[0].flatten(1), qkv[:, :width], qkv[:, :width])
    scale_(heads[0].flatten(1), empty(T, 1))
    attention_of(dtype, of)
    for cap in (None, 30.0):
        cross_entropy_(empty(512, 32000, dtype=dtype), integers(512), empty(512), empty(512), cap, integers(1))


def attention_of(dtype: torch.dtype, of: Variants) -> None:
    """Attention by the project's own kernels."""
    ends = empty(3, dtype=torch.int32)
    for size in of.head_sizes:
        q, k, v = (empty(T, heads, size, dtype=dtype) for heads in (16, 8, 8))
        if size > attention.LARGE and not attention.takes(size, 2, launch.WITHOUT_CARD):
            continue
        variants = [attention.Scores(0.1, 50.0, window=window) for window in of.windows]
        if size <= attention.LARGE:
            variants.append(attention.Scores(0.1, None, 4096, Dropout(0.1, integers(1), 7)))
        for scores in variants:
            out, log_sum = attention.attend(q, k, v, scores, ends, 1024)
            attention.attend_backward(out, q, k, v, out, log_sum, scores, ends, 1024)


def states(width: int, dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernels of delta nets, state spaces and short convolutions."""
    firsts, gates = empty(T, dtype=torch.int32), empty(T, width * 2, dtype=dtype)
    stack = empty(T, width * 3, dtype=dtype)
    for size, norms in of.convolutions:
        taps = empty(4, width * 2, dtype=dtype)
        conv = HeadConv(taps, None if norms else taps[0], width // 2, width, size, 0.1, 1e-6 if norms else None)
        parts = convolve(stack, firsts, conv)
        convolve_backward(*parts, stack, firsts, conv, stack)
    kept, beta = gates_forward(gates[:, :64], empty(32), empty(32))
    gates_backward(kept, beta, gates[:, :64], empty(32), empty(32))
    x = empty(T, width, dtype=dtype)
    for groups, before in of.gated_norms:
        weight = empty(width if before else width // groups, dtype=dtype)
        norm = GatedNorm(weight, 1e-6, groups, before)
        gated_norm_backward(gated_norm(x, gates[:, width:], norm), x, gates[:, width:], norm, gates[:, width:])
    both = GatedConv(empty(3, width, dtype=dtype), empty(width, dtype=dtype))
    gated_conv_backward(gated_conv(stack, firsts, both), stack, firsts, both)


def mixture(width: int, rank: int, dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernels of a mixture of experts, of this width inside as well."""
    count, k, dropout = 8, 2, Dropout(0.05, integers(1), 3)
    weights, chosen = experts.choose(empty(T, count), k, counts=experts.Counts.room(T, k, count, torch.device("meta")))
    choices = experts.sort(weights, chosen, count)
    experts.choose_backward(choices, empty(T, k), 1.0, dtype)
    experts.of_tokens(empty(3, T * k), choices)
    experts.combine(empty(T * k, width, dtype=dtype), choices)
    for scheme in of.schemes:
        stored = weight_of(scheme, count * width, width, dtype)
        if not isinstance(stored, Tensor):
            out = empty(count, width, width, dtype=dtype)
            experts_dequantize.dequantize(Matrices(stored, (count, width, width)), out)
    x, inner = empty(T, width, dtype=dtype), empty(T * k, width, dtype=dtype)
    z, branches = empty(T * k, rank, dtype=dtype), empty(T * k, 2 * width, dtype=dtype)
    a, b = empty(count, 1, rank, width, dtype=dtype), empty(count, width, rank, dtype=dtype).mT
    grad_a, grad_b = empty(count, rank, width), empty(count, 2 * width, rank)
    low, w = LowRank(z, b), empty(count, width, width, dtype=dtype)
    for before in of.weights_before:
        w_both = empty(count, 2 * width, width, dtype=dtype)
        experts_products.gate_up(x, w_both, choices, "silu", (low, low), before=before)
    for gathered in (False, True):
        source = x if gathered else inner
        experts_lora.project(source, a, choices, gathered, dropout)
        experts_lora.add_gradient(source, z, grad_a.mT, choices, 1.0, gathered, dropout)
        for transposed in (False, True):
            experts_products.product(source, w, choices, LowRank(z, b, dropout), None, gathered, transposed)
    down, gate_up = (z, grad_a, 1.0), (empty(T * k, 2 * rank, dtype=dtype), grad_b, (0, 1))
    for before in of.weights_before:
        if rank <= experts_lora.MOST_RANK:
            experts_mlp.mlp_backward(branches, inner, choices, "silu", down, gate_up, dropout, before=before)
        experts_mlp.mlp_backward(branches, inner, choices, "clamped", h=inner, before=before)
        experts_mlp.mlp_backward(branches, inner, choices, "silu", before=before)


def generation(dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernels of an answer's next token that take its attention."""
    rows, lengths = 8, integers(8)
    for shared, groups, size in of.caches:
        cache, angles = empty(rows, groups, 1024, size, dtype=dtype), empty(rows, size // 2)
        qkv = empty(rows, (shared + 2) * groups * size, dtype=dtype)
        queries = store(qkv, lengths, (angles, angles), cache, cache, shared * groups)
        for cap, sinks in ((None, None), (50.0, empty(shared * groups, dtype=dtype))):
            for chunked in of.chunked:
                attend(queries, cache, cache, lengths, 1024, None, 64, cap, sinks, chunked)


def products(width: int, rank: int, dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernels of an answer's next token that multiply it by weights."""
    stack = groups_of(width, rank)[0]
    b = empty(stack.adapted_rows, rank, dtype=dtype)
    for scheme in of.schemes:
        weight = weight_of(scheme, stack.n, width, dtype)
        for rows in (1, 8):
            x, z = empty(rows, width, dtype=dtype), empty(rows, stack.rank, dtype=dtype)
            product(x, weight, stack, table_of(stack), None, z, b)
    experts_of_tokens(width, rank, dtype, of)


def experts_of_tokens(width: int, rank: int, dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernel of two tokens and their two experts each."""
    stack, chosen = Stack((width, width), (0, 1), rank), integers(2, 2)
    x, z, b = empty(2, width, dtype=dtype), empty(4, 2 * rank, dtype=dtype), empty(8, 2 * width, rank, dtype=dtype)
    for scheme in of.schemes:
        stored = weight_of(scheme, 16 * width, width, dtype)
        if isinstance(stored, Tensor):
            weight: Matrices | Tensor = stored.view(8, 2 * width, width)
        else:
            weight = Matrices(stored, (16, width, width))
        chosen_experts.product(x, weight, chosen, stack, table_of(stack), None, z, b, empty(2, 2), F32)


def fp8(width: int, rank: int, dtype: torch.dtype, of: Variants) -> None:
    """Launch the kernels of products in FP8."""
    stack = groups_of(width, rank)[0]
    for scheme in of.schemes:
        weight = weight_of(scheme, stack.n, width, dtype)
        for out in (empty(stack.n, width, dtype=FP8), empty(width, stack.n, dtype=FP8).T):
            quantize_weights(weight, empty(stack.n), out, stack, table_of(stack))
    for columns in (None, empty(width)):
        quantize_rows(empty(T, width, dtype=dtype), width, columns)


class Compiled(Exception):  # noqa: N818 - it is no error
    """Ends a compilation with the bytes of shared memory."""


@contextmanager
def compiling(arch: int, machine_code: bool) -> Iterator[dict[str, tuple[int, str]]]:
    """Compile kernels instead of launching them; yields the most bytes of each, and its settings then."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", arch, 32)
    card = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    driver.set_active(SimpleNamespace(**card))  # type: ignore[arg-type]
    launch.WITHOUT_CARD, launch.CAPABILITY_WITHOUT_CARD = SHARED[arch] * 2**10, (arch // 10, arch % 10)
    knobs.nvidia.dump_ptxas_log = machine_code
    most: dict[str, tuple[int, str]] = {}
    done: set[object] = set()
    run, add_stages, passes = JITFunction.run, compiler.CUDABackend.add_stages, compiler.nvidia.passes.ttgpuir
    lay_out = passes.add_allocate_shared_memory_nv

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        values = [arg.dtype if isinstance(arg, Tensor) else arg for arg in args]
        if (key := (self.fn, str(values), str(settings))) in done:
            return
        done.add(key)
        said, name = io.StringIO(), f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        try:
            with redirect_stdout(said):
                size = run(self, *args, grid=grid, warmup=True, **settings).metadata.shared
        except Compiled as end:
            (size,) = end.args
        if "are serialized" in said.getvalue():  # ptxas' C7510 to C7520
            most[f"{name}, serialized"] = size, str(settings)
        most[name] = max(most.get(name, (-1, "")), (size, str(settings)))

    def stages_up_to_shared_memory(self: Any, stages: dict[str, Any], *more: Any) -> None:
        add_stages(self, stages, *more)
        to_llvm = stages["llir"]

        def stopped(module: Any, metadata: Any) -> None:
            def lay_out_and_stop(manager: Any, *details: Any) -> None:
                lay_out(manager, *details)
                manager.run(module, "make_llir")
                raise Compiled(module.get_int_attr("ttg.shared"))

            passes.add_allocate_shared_memory_nv = lay_out_and_stop
            to_llvm(module, metadata)

        stages["llir"] = stopped

    JITFunction.run = launched  # type: ignore[method-assign]
    if not machine_code:
        compiler.CUDABackend.add_stages = stages_up_to_shared_memory
    yield most


def main() -> None:
    """Print {kernel: [bytes, what it was launched with]}."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("arch", type=int, choices=SHARED)
    parser.add_argument("--width", type=int, action="append", required=True)
    parser.add_argument("--rank", type=int, action="append", required=True)
    parser.add_argument("--machine-code", action="store_true")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--experts", action="store_true")
    flags = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    of = FEW if flags.few else Variants()
    low = torch.bfloat16 if flags.arch >= 80 else torch.float16
    with compiling(flags.arch, flags.machine_code) as most:
        for width in flags.width:
            for rank in flags.rank:
                mixture(width, rank, low, of)
                if not flags.experts:
                    training(width, rank, low, of)
            if flags.experts:
                continue
            states(width, low, of)
            for dtype in (low, F32):  # weights are float32 where --precision says so
                generation(dtype, of)
                if dtype == F32 or of.products_in_16_bit:
                    products(width, flags.rank[0], dtype, of)
            if flags.arch >= 89:
                fp8(width, flags.rank[0], low, of)
    print(json.dumps(most))


if __name__ == "__main__":
    main()
