"""Processes gather the same blocks in the same order, whatever happens in one of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage
from lit_qlora.sharded import ShardedBase, slabs_of
from tests.conftest import tiny_config
from tests.train.test_parallel import together

BLOCKS = 5
Facts = list[dict[str, Any]]


def base_of(buffers: int = 2) -> ShardedBase:
    """The bytes of block i are i + 1 in each process."""
    model = GPT.skeleton(tiny_config(n_layer=BLOCKS))
    base = ShardedBase(slabs_of(model, Storage(), distributed.get_world_size()), torch.device("cpu"), buffers)
    for i, share in enumerate(base.shares):
        share.fill_(i + 1)
    return base


def right(base: ShardedBase, block: int) -> bool:
    base.need(block)
    return bool((base.memory(block) == block + 1).all())


def whole_pass(base: ShardedBase) -> bool:
    base.begin()
    found = [right(base, i) for i in (*range(BLOCKS), *reversed(range(BLOCKS)))]
    return all(found)


def facts_of(fabric: Any) -> dict[str, Any]:
    """What tests look at, from one start of the processes."""
    base, first, facts = base_of(), fabric.global_rank == 0, {}
    addresses = [base.memory(i).data_ptr() for i in range(BLOCKS)]
    facts["right"], counts = [], []
    for _ in range(3):
        before = base.gathers
        facts["right"].append(whole_pass(base))
        counts.append(base.gathers - before)
    facts["counts"], facts["sent"] = counts, base.sent
    for stop in (0, 3, BLOCKS):  # one process fails in the forward pass before block `stop`, or behind the last one
        base.begin()
        for i in range(stop if first else BLOCKS):
            base.need(i)
        base.complete()
        facts["right"].append(whole_pass(base))
    base.begin()
    for i in (*range(BLOCKS), *reversed(range(2 if first else 0, BLOCKS))):  # here one fails in the backward pass
        base.need(i)
    base.complete()
    base.begin()
    base.complete(backward=False)
    facts["right"].append(whole_pass(base))
    if first:
        try:
            with base.led():
                base.begin()
                facts["led"] = [right(base, i) for i in range(3)]
                raise ValueError
        except ValueError:
            pass
    else:
        base.follow()
    facts["right"].append(whole_pass(base))
    facts["still"] = addresses == [base.memory(i).data_ptr() for i in range(BLOCKS)]
    facts["differs"] = base.differs()
    base.order += first
    facts["differs, once one was alone"] = base.differs()
    facts["share"] = base.slabs[0].share
    facts["more buffers"] = {}
    for asked in (3, 4, 9):
        wide, gathers = base_of(asked + first), []  # the processes have room for different numbers
        for _ in range(3):
            before = wide.gathers
            facts["right"].append(whole_pass(wide))
            gathers.append(wide.gathers - before)
        facts["more buffers"][len(wide.buffers)] = gathers
    return facts


@pytest.fixture(scope="module", params=[2, 4])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        work: Callable[..., Any] = facts_of
        path: Path = tmp_path_factory.mktemp("store")
        return together(path, work, ranks=request.param)


def test_each_process_gets_the_bytes_of_the_block_it_asks_for(facts: Facts) -> None:
    assert all(all(fact["right"]) for fact in facts)


def test_a_pass_gathers_each_block_twice_but_for_those_that_are_still_there(facts: Facts) -> None:
    for fact in facts:
        assert fact["counts"] == [2 * BLOCKS - 2, 2 * (BLOCKS - 2), 2 * (BLOCKS - 2)]
        assert fact["sent"] == sum(fact["counts"]) * (len(facts) - 1) * fact["share"]  # as a ring does


def test_more_buffers_save_gathers_and_the_process_with_least_room_decides(facts: Facts) -> None:
    for fact in facts:
        assert fact["more buffers"] == {n: [2 * BLOCKS - n] + [2 * (BLOCKS - n)] * 2 for n in (3, 4, 5)}


def test_the_first_process_may_compute_alone_and_fail(facts: Facts) -> None:
    assert facts[0]["led"] == [True] * 3


def test_blocks_do_not_move(facts: Facts) -> None:
    assert all(fact["still"] for fact in facts)


def test_processes_notice_that_they_gathered_in_different_orders(facts: Facts) -> None:
    assert {fact["differs"] for fact in facts} == {False}
    assert {fact["differs, once one was alone"] for fact in facts} == {True}
