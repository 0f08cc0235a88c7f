"""Bytes that the fast path saves of a micro-batch, and the blocks that recompute so that it fits."""

import math
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_qlora.fused.memory import COST, SLICE, FastSizes, choose, head_tokens, slice_tokens, within_chunks
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.delta_net import delta_rule
from lit_qlora.settings import Recompute
from tests.conftest import tiny_config

BLOCKS = 8
WIDE: dict[str, Any] = {"n_embd": 256, "n_head": 4, "n_kv_head": 4, "head_size": 64, "ffn_size": 704}
CARRIED = (1.7e6, 1.2e6, 1.7e6, 0.0, 1.7e6, 1.7e6, 1.7e6, 1.7e6)
"""Bytes of weights: a block has some in 16 bit, another all."""


def sizes(**changes: Any) -> FastSizes:
    config: ModelConfig = tiny_config(n_layer=BLOCKS, **{**WIDE, **changes})
    return FastSizes(config, rank=4, adapted=7, quantized=True, carried=CARRIED)


def test_the_peak_is_in_the_backward_pass_of_the_last_block_where_all_do_the_same() -> None:
    one = sizes()
    for policy in COST:
        more = one.peak([policy] * BLOCKS, 512) - one.peak([policy] * (BLOCKS - 1), 512)
        assert more == pytest.approx(one.saved(policy, 512))


def test_fewer_logits_exist_where_the_vocabulary_is_large() -> None:
    vocabularies = (32_000, 100_352, 128_256, 151_936, 262_144, 1_000_000)
    assert [head_tokens(vocab) for vocab in vocabularies] == [2048, 1024, 1024, 768, 512, 256]


@pytest.mark.parametrize(("vocab", "bytes_"), [(16, 8 * 512 * 256), (1_000_000, 4 * 512 * 256 + 2 * 256 * 1_000_000)])
def test_the_head_needs_two_pairs_of_streams_or_one_beside_logits(vocab: int, bytes_: int) -> None:
    one = sizes(vocab_size=vocab)
    *_, last = one._moments(["full"] * BLOCKS, 512)
    assert last == BLOCKS * one.saved("full", 512) + bytes_


def test_blocks_that_save_all_are_freed_before_the_blocks_below_recompute() -> None:
    one = sizes(vocab_size=16)
    mixed: list[Recompute] = [*["full"] * (BLOCKS - 1), "none"]
    kept = (BLOCKS - 1) * one.saved("full", 512)
    first = one.peak(["full"] * (BLOCKS - 1), 512)  # when the last one is done
    second = one.peak(["none"], 512) + kept  # when it is not
    workspaces = one.peak(["full"], 0)
    assert one.peak(mixed, 512) == pytest.approx(max(first, second - one.peak(["none"], 0) + workspaces))
    assert one.peak(mixed, 512) < first + one.saved("none", 512)


@pytest.mark.parametrize("tokens", [64, 512, 4096])
@pytest.mark.parametrize("others", COST)
@pytest.mark.parametrize("save_all", [0, 1, 3, BLOCKS])
def test_carried_weights_never_raise_the_peak(tokens: int, others: Recompute, save_all: int) -> None:
    one = sizes()
    policies: list[Recompute] = [*[others] * (BLOCKS - save_all), *["none"] * save_all]  # type: ignore[list-item]
    stay, most = one.carries(policies, tokens), one.peak(policies, tokens)
    for i in range(BLOCKS):  # a block's activations lie beside the weights of those that follow and its own
        held = sum(size for size, carries in zip(CARRIED[i:], stay[i:], strict=True) if carries)
        assert one.peak(policies[: i + 1], tokens) + held <= most or not held


def test_more_tokens_make_room_for_more_weights() -> None:
    one = sizes()
    counts = [sum(one.carries(["none"] * BLOCKS, tokens)) for tokens in (16, 256, 512, 2048)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == BLOCKS - 2  # all but the last, whose activations are there, and the one without weights
    assert not one.carries(["none"] * BLOCKS, 2048)[3]
    assert not any(one.carries(["offload"] * BLOCKS, 2048))


def test_what_goes_to_the_host_needs_memory_there() -> None:
    one = sizes()
    all_ = one.on_host(["offload"] * BLOCKS, 512)
    assert all_ == (BLOCKS * 3 - 2) * 2 * 512 * 256 + 2 * 512 * 768  # qkv of the last block
    assert one.on_host(["full-offload"] * BLOCKS, 512) == (BLOCKS - 1) * 2 * 512 * 256
    assert one.on_host(["none", "full", "attn", "mlp"] * 2, 512) == 0
    free = one.peak(["offload"] * BLOCKS, 512)
    assert "offload" in choose(one, BLOCKS, 512, free, all_)
    assert "offload" not in choose(one, BLOCKS, 512, free, all_ / 100)
    assert choose(one, BLOCKS, 512, 0, 0) == ["full"] * BLOCKS
    assert choose(one, BLOCKS, 512, 0) == ["offload"] * BLOCKS


def test_as_many_blocks_send_qkv_as_products_hide() -> None:
    def of(width: int, heads: int, keys: int, ffn: int) -> list[bool]:
        shape = {"n_embd": width, "n_head": heads, "n_kv_head": keys, "head_size": 128, "ffn_size": ffn}
        one = FastSizes(tiny_config(n_layer=32, **shape), rank=16, adapted=7, quantized=True)
        found = [one.sends_qkv(i) for i in range(32)]
        others = width * (3 * 32 - 2)  # input, attended and middle, of the last block the input alone
        assert one.on_host(["offload"] * 32, 512) == 2 * 512 * (others + (heads + 2 * keys) * 128 * sum(found))
        return found

    llama_2_7b = of(4096, 32, 32, 11_008)
    assert sum(llama_2_7b) == 21  # 405 million operations a token hide 40 KiB, three tensors of 8 KiB and 0.65 of 24
    assert all(one or other for one, other in pairwise(llama_2_7b))
    assert all(of(4096, 32, 8, 14_336))  # fewer keys
    assert of(2048, 16, 16, 5632) == [False] * 31 + [True]


def test_the_last_block_keeps_gate_and_up_where_the_head_leaves_room() -> None:
    def of(vocab: int, tokens: int, **changes: Any) -> bool:
        shape = {"n_embd": 4096, "n_head": 32, "n_kv_head": 32, "head_size": 128, "ffn_size": 11_008}
        one = FastSizes(tiny_config(vocab_size=vocab, **shape | changes), rank=16, adapted=7, quantized=True)
        return one.keeps_mlp(tokens)

    assert of(32_000, 4096)
    assert not of(32_000, 1024)  # fewer tokens than the head has logits of at once
    assert not of(128_256, 4096)
    assert of(128_256, 8192)
    assert not of(32_000, SLICE + 1)  # whose slices do not lie side by side
    assert not of(32_000, 4096, parallel_residual=True)
    assert not of(32_000, 4096, norm_position="both")


def test_blocks_below_the_first_that_learns_need_no_memory() -> None:
    one = replace(sizes(vocab_size=16), lowest=BLOCKS - 2)
    assert one.peak(["none"] * BLOCKS, 512) == sizes(vocab_size=16).peak(["none"] * 2, 512)
    assert one.on_host(["offload"] * BLOCKS, 512) == sizes().on_host(["offload"] * 2, 512)
    assert not any(one.carries(["none"] * BLOCKS, 512)[: BLOCKS - 2])
    assert choose(one, BLOCKS, 512, one.peak(["none"] * BLOCKS, 512)) == ["none"] * BLOCKS
    least: list[Recompute] = [*["attn"] * (BLOCKS - 1), "none"]  # one block of the two that count
    assert choose(one, BLOCKS, 512, one.peak(least, 512), 0) == least


def test_the_fastest_mix_that_fits_is_chosen() -> None:
    one = sizes()
    costs = []
    for share in (2.0, 1.0, 0.8, 0.5, 0.3, 0.0):
        free = share * one.peak(["none"] * BLOCKS, 512)
        policies = choose(one, BLOCKS, 512, free)
        costs.append(sum(COST[policy] for policy in policies))
        least = min(one.peak([policy] * BLOCKS, 512) for policy in COST)
        assert one.peak(policies, 512) <= max(free, least)
        kept = [one.saved(policy, 512) for policy in policies]
        assert kept == sorted(kept)  # the last keep all: their backward pass comes first
    assert costs[:2] == [0, 0]
    assert costs == sorted(costs)
    assert len(set(costs)) > 3


def test_a_long_row_goes_through_an_mlp_in_slices_of_about_the_same_size() -> None:
    assert [slice_tokens(tokens) for tokens in (0, 1, SLICE - 1, SLICE)] == [0, 1, SLICE - 1, SLICE]
    for tokens in (SLICE + 1, 2 * SLICE, 83_000, 200_001):
        each = slice_tokens(tokens)
        slices = -(-tokens // each)
        assert slices == -(-tokens // SLICE)
        assert each % 64 == 0
        assert each - 64 * slices < tokens - (slices - 1) * each <= each <= SLICE


def test_with_inputs_on_the_host_the_memory_of_a_token_does_not_grow_with_the_blocks() -> None:
    one = FastSizes(tiny_config(n_layer=BLOCKS, **WIDE), rank=0, adapted=0, quantized=True)
    rows = (2 * SLICE, 4 * SLICE)
    few, many = ([one.peak(["full-offload"] * blocks, tokens) for tokens in rows] for blocks in (2, BLOCKS))
    per_token = [(peaks[1] - peaks[0]) / (rows[1] - rows[0]) for peaks in (few, many)]
    assert per_token[1] - per_token[0] < 2 * WIDE["n_embd"]  # a float for each head and block is left
    assert one.peak(["full-offload"] * BLOCKS, rows[1]) < one.peak(["full"] * BLOCKS, rows[1])
    assert choose(one, BLOCKS, rows[1], 0) == ["full-offload"] * BLOCKS


def test_inputs_that_the_host_has_no_room_for_stay_on_the_device() -> None:
    one, tokens = sizes(), 4 * SLICE
    mix: list[Recompute] = [*["full-offload"] * (BLOCKS - 2), "full", "full"]
    host, free = one.on_host(mix, tokens), one.peak(mix, tokens)
    assert host == (BLOCKS - 2) * 2 * tokens * 256
    assert choose(one, BLOCKS, tokens, free, host) == mix


@pytest.mark.parametrize(
    "changes", [{}, {"vocab_size": 100_000}, {"n_expert": 8, "n_expert_per_token": 2, "expert_size": 64}]
)
@pytest.mark.parametrize("tokens", [64, 2048, 20_000])
def test_the_mix_is_that_of_a_search_through_all_mixes(changes: dict[str, Any], tokens: int) -> None:
    one, found = sizes(**changes), set()
    pairs: list[tuple[Recompute, Recompute]] = [*((policy, "none") for policy in COST), ("full-offload", "full")]
    mixes = [[policy] * n + [rest] * (BLOCKS - n) for policy, rest in pairs for n in range(BLOCKS + 1)]
    facts = [(mix, one.peak(mix, tokens), one.on_host(mix, tokens)) for mix in mixes]
    least, most = min(peak for _, peak, _ in facts), max(peak for _, peak, _ in facts)
    for number in range(41):
        free = least + (most - least) * number / 40
        for host in (math.inf, one.on_host(["offload"] * 3, tokens)):
            fitting = [mix for mix, peak, sent in facts if peak <= free and sent <= host]
            if fitting:
                cheapest = min(fitting, key=lambda mix: round(sum(COST[policy] for policy in mix), 9))
                assert choose(one, BLOCKS, tokens, free, host) == cheapest
                found.add(tuple(cheapest))
    assert len(found) > 8


def test_dora_keeps_the_outputs_of_attention_and_mlp_and_a_copy_of_gate_and_up() -> None:
    plain, dora = sizes(), replace(sizes(), dora=True)
    for policy, kept in (("none", 2), ("attn", 2), ("full", 1)):
        assert dora.saved(policy, 512) - plain.saved(policy, 512) == kept * 512 * 2 * WIDE["n_embd"]  # type: ignore[arg-type]
        more = dora.peak([policy], 512) - plain.peak([policy], 512)  # type: ignore[list-item]
        assert more == pytest.approx(kept * 512 * 2 * WIDE["n_embd"] + 512 * 2 * 2 * 2 * WIDE["ffn_size"])


def test_experts_beside_an_mlp_save_what_each_gives_whatever_is_recomputed() -> None:
    experts = {"n_expert": 8, "n_expert_per_token": 2, "expert_size": 64}
    beside, shared = sizes(**experts, experts_beside=True), sizes(**experts, shared_expert_size=WIDE["ffn_size"])
    for policy in COST:
        assert beside.saved(policy, 512) - shared.saved(policy, 512) == 512 * 2 * 2 * WIDE["n_embd"]


def test_blocks_without_a_state_save_no_state_in_a_model_that_has_some() -> None:
    delta = {"delta_key_heads": 2, "delta_value_heads": 4, "delta_key_size": 32, "delta_value_size": 32}
    mixed, plain = sizes(delta_layers=(0, 1, 2, 4, 5, 6), **delta), sizes()
    assert mixed.saved("none", 512, holds_state=False) == plain.saved("none", 512)
    every = sizes(delta_layers=tuple(range(BLOCKS)), **delta)
    spared = 2 * (every.saved("none", 512) - plain.saved("none", 512))
    assert every.peak(["none"] * BLOCKS, 512) - mixed.peak(["none"] * BLOCKS, 512) == spared > 0


def test_blocks_that_use_the_keys_of_another_one_save_none_and_mlps_as_wide_as_theirs() -> None:
    wide = {"shared_kv_layers": 3, "shared_kv_ffn_size": 1408}
    one, tokens = sizes(**wide), 512
    more = one.saved("none", tokens, reuses=True) - one.saved("none", tokens)
    assert more == tokens * 2 * (2 * 704 - 2 * 256)
    every = sizes(ffn_size=1408)  # as wide in all blocks, with keys of their own
    spared = tokens * 2 * (5 * 2 * 704 + 3 * 2 * 256) - tokens * (2 + 4) * 2 * 256  # less what is lent
    assert every.peak(["none"] * BLOCKS, tokens) - one.peak(["none"] * BLOCKS, tokens) == spared


@pytest.mark.parametrize("policy", COST)
def test_what_several_blocks_read_is_there_in_each_of_their_backward_passes(policy: Recompute) -> None:
    own = {"per_layer_size": 16, "per_layer_vocab": 320}
    plain, beside = (sizes(norm_position="both", **more).peak([policy] * BLOCKS, 512) for more in ({}, own))
    assert beside - plain == 512 * 2 * (BLOCKS * 16 + 256)


@pytest.mark.parametrize(("keys", "values"), [(128, 128), (32, 64)])
def test_the_backward_pass_of_the_delta_rule_holds_what_is_counted(keys: int, values: int) -> None:
    count, heads, live = 1024, 2, Live()
    inputs = [torch.randn(1, count, heads, n, requires_grad=True) for n in (keys, keys, values)]
    inputs += [(-torch.rand(1, count, heads)).requires_grad_(), torch.rand(1, count, heads, requires_grad=True)]
    with live:
        delta_rule(*inputs, None)[0].sum().backward()
    shape = {"delta_key_heads": heads, "delta_value_heads": heads, "delta_key_size": keys, "delta_value_size": values}
    config = tiny_config(delta_layers=(0,), **shape)
    assert live.peak / (4 * count) == pytest.approx(within_chunks(config), rel=0.12)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (one.untyped_storage() for one in tree_leaves(made) if isinstance(one, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, storage.nbytes(), storage._cdata)
        return made

    def _free(self, count: int, key: int) -> None:
        self.bytes -= count
        self.known.discard(key)
