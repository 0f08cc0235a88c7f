"""The plan of a base that lies over several processes counts its bytes."""

from collections.abc import Callable

import pytest
import torch

from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage
from lit_qlora.run.plan import MicroBatches, Plan, Planner, Room
from lit_qlora.settings import LoRAConfig, TrainConfig
from lit_qlora.sharded import slabs_of
from tests.conftest import tiny_config

STORAGE = Storage(torch.bfloat16, "bnb.nf4")
DEEP = tiny_config(n_layer=12)
ROOM = Room(1e9, 1e9)


def plan(sharded: int, room: Room = ROOM, train: TrainConfig | None = None) -> Plan:
    planner = Planner(DEEP, LoRAConfig(), STORAGE, train or TrainConfig(), sharded=sharded)
    return planner.plan(MicroBatches(64, 1, 64.0), room)


def test_a_process_has_its_shares_the_buffers_and_all_that_is_outside_of_blocks() -> None:
    slabs = slabs_of(GPT.skeleton(DEEP), STORAGE, 4)
    norms = 2 * (2 * 12 + 1) * DEEP.n_embd  # two in a block, and the last one, in 16 bits
    head = 2 * DEEP.vocab_size * DEEP.n_embd
    assert plan(4).weights == sum(slab.share for slab in slabs) + 2 * slabs[0].size + norms + head


def test_the_embedding_is_in_host_memory() -> None:
    assert plan(4).host - plan(0).host == 2 * DEEP.vocab_size * DEEP.n_embd


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
def test_nothing_is_planned_that_would_read_the_weights_of_a_block_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Planner, "_slow_because", lambda self, room: "")
    one, several = plan(0), plan(4)
    assert (one.cached_blocks, one.carries, one.graph_tokens) != (0, False, 0)
    assert (several.cached_blocks, several.carries, several.graph_tokens, several.ahead) == (0, False, 0, False)


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
def test_memory_that_is_left_holds_more_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "_slow_because", lambda self, room: "")
    slab = slabs_of(GPT.skeleton(DEEP), STORAGE, 4)[0].size
    full = TrainConfig(recompute="full")
    little = plan(4, Room(1.0, 1e9), full)
    assert little.buffers == 2
    assert plan(4, ROOM, full).buffers == DEEP.n_layer
    some = plan(4, Room((little.total + 3.5 * slab) / 0.92, 1e9), full)
    assert (some.buffers, some.cached) == (5, 3 * slab)


def test_the_plain_path_recomputes_every_block(
    finetune: Callable[..., int], capsys: pytest.CaptureFixture[str], no_weights: None
) -> None:
    assert set(plan(4, Room()).recompute) == {"full"}
    assert finetune("--strategy=sharded", "--train.recompute=none") == 2
    assert "train.recompute none does not work with --strategy sharded on the plain path" in capsys.readouterr().err
