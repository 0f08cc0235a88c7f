"""The speed of a step is estimated from its operations, bytes and launches, and was measured on an H100 and an H200."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.quantize import Storage
from lit_qlora.run.plan import Plan, Planner
from lit_qlora.run.speed import StepTime
from lit_qlora.settings import LoRAConfig, Recompute, Scheme, Target, TrainConfig
from tests.conftest import ROOT, load_script, tiny_config

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DOCUMENT = 171.0
"""Tokens of the document that a token of a packed row is in, on average; see contestants.task.example_lengths."""
FITTED = ("llama-2-7b", "tinyllama", "qwen3-30b-a3b")
"""Rates were fitted to rows of these shapes."""
WITHOUT = ("Qwen3.5", "gemma-4")
"""Nothing is said of gated delta nets, and of heads of 512."""
UNLIKE = {"plain", "fp8", "pairs", "short", "0.05"}
"""Words of rows that measured something else: the plain path, FP8, other rows, dropout."""
FIRST, LAST_OF_H100 = "2026-11-30", ("7b74b11", "34f08ee")
"""A day, and the commits before it, since which rows are about steps as they are now."""


@cache
def step_time(shape: str, scheme: Scheme, r: int = 16, targets: tuple[Target, ...] = ("all",)) -> StepTime:
    model = load_script("benchmarks/shapes.py").model_config(shape)
    lora = LoRAConfig(r=r, alpha=2 * r, targets=targets)
    return StepTime(Planner(model, lora, Storage(torch.bfloat16, scheme), TrainConfig()))


def plan_as(time: StepTime, policy: Recompute = "none", cached: int = 0, graphs: bool = False) -> Plan:
    count = time.model.n_layer
    return replace(
        time.planner.bare, recompute=(policy,) * count, cached_blocks=cached, graph_tokens=4096, graphs=float(graphs)
    )


def ratio(row: dict[str, str]) -> float:
    """What is estimated of a row of results.csv, by what was measured."""
    flags, tokens = row["flags"], int(row["micro_batch"]) * int(row["tokens"])
    scheme: Any = re.search(r"bnb\.[\w-]+|\bnone r|bf16", flags)
    scheme = "none" if scheme is None or "bnb" not in scheme[0] else scheme[0]
    scheme = "bnb.nf4-dq" if re.match(r"(fixed|packed) nf4-dq", flags) else scheme
    learnt = re.search(r" r\d+ ((\w+)(,\w+)*)", flags)
    targets: Any = tuple(learnt[1].split(",")) if learnt else ()
    policy, cached = re.search(r"recompute ([\w-]+)", flags), re.search(r"dequantized (\d+)", flags)
    rank = re.search(r" r(\d+)", flags)
    assert policy
    assert rank
    time = step_time(row["shape"], scheme, int(rank[1]), targets)
    plan = plan_as(time, policy[1], int(cached[1]) if cached else 0, " graphs" in flags)  # type: ignore[arg-type]
    gpu = "H200" if "H200" in row["gpu"] else "H100 80GB"
    speed = time.tokens_per_second(plan, tokens, DOCUMENT if "packed" in flags else float(row["tokens"]), gpu)
    assert speed
    return float(row["tokens_per_second"]) / speed


def newest(*programs: str) -> list[dict[str, str]]:
    """Of each setting of ours, the row that was measured last."""
    found = {}
    for row in load_script("benchmarks/results.py").read_rows(ROOT / "benchmarks/results.csv"):
        flags = row["flags"].partition(", beside")[0]
        ours = row["program"] in programs and (row["program"] != "peers.py" or " ours " in flags)
        if ours and not UNLIKE & set(flags.split()) and not row["shape"].partition("/")[2].startswith(WITHOUT):
            found[row["gpu"], row["shape"], row["micro_batch"], row["tokens"], flags] = row
    return list(found.values())


def is_fitted(row: dict[str, str]) -> bool:
    return any(name in row["shape"].lower() for name in FITTED)


def is_newest(row: dict[str, str]) -> bool:
    """True of rows of the code as it is: others are older than what they measured has become."""
    return row["date"] >= FIRST or row["commit"] in LAST_OF_H100


def test_steps_of_dense_models_take_as_long_as_they_took() -> None:
    rows = [row for row in newest("predictions.py") if "nf4-dq" in row["flags"] and "a3b" not in row["shape"]]
    ratios = {(row["shape"], row["flags"].split(" as ")[0]): ratio(row) for row in rows}
    assert len(ratios) == 12
    missed = ratios.pop(("tinyllama-1b", "bnb.nf4-dq r16 all recompute full"))
    assert missed == pytest.approx(0.76, abs=0.02), "its launches took a third longer than those of other cases"
    assert all(one == pytest.approx(1, abs=0.07) for one in ratios.values()), ratios


@pytest.mark.slow
def test_steps_of_shapes_that_no_rate_was_fitted_to_take_as_long_as_they_took() -> None:
    rows = [row for row in newest("step.py", "peers.py", "predictions.py") if not is_fitted(row) and is_newest(row)]
    ratios = {tuple(row[name] for name in ("shape", "micro_batch", "tokens", "flags")): ratio(row) for row in rows}
    assert len(ratios) > 30
    assert len({row["shape"] for row in rows}) >= 12
    far = {key: one for key, one in ratios.items() if abs(one - 1) > 0.06}
    assert [key[:3] for key in far] == [("meta-llama/Llama-3.1-8B", "1", "83200")], far


@pytest.mark.slow
def test_so_do_those_of_experts_and_short_rows() -> None:
    rows = [row for row in newest("step.py", "peers.py", "predictions.py") if is_fitted(row) and is_newest(row)]
    ratios = {tuple(row[name] for name in ("shape", "micro_batch", "tokens", "flags")): ratio(row) for row in rows}
    far = {key: one for key, one in ratios.items() if abs(one - 1) > 0.1}
    assert [key[:3] for key in far] == [("tinyllama-1b", "1", "4096")], far


def test_a_step_asks_for_the_operations_of_its_weights_and_of_attention() -> None:
    time, tokens = step_time("llama-2-7b", "bnb.nf4-dq"), 4096
    forward, backward = time._passes(plan_as(time), tokens, 2048)
    weights, adapters = 32 * (4 * 4096**2 + 3 * 4096 * 11008), time.planner.bare.trainable
    assert forward.products == 2 * tokens * (weights + adapters)
    assert backward.products == 2 * tokens * (weights + 2 * adapters + 2 * 4096 * 32000)
    assert forward.attention == 2 * tokens * 2048 * 4096 * 32
    assert backward.attention == 2.5 * forward.attention
    again = time._passes(plan_as(time, "full"), tokens, 2048)[1]
    recomputed = 32 * (4 * 4096**2 + 2 * 4096 * 11008)
    assert again.products - backward.products == pytest.approx(2 * tokens * recomputed, rel=0.01)
    assert again.attention - backward.attention == forward.attention


def test_what_a_block_reads_depends_on_its_window_and_what_it_learns() -> None:
    def attention(**changes: Any) -> float:
        """Operations of both passes."""
        model = tiny_config(n_layer=2, block_size=4096, **changes)
        time = StepTime(Planner(model, LoRAConfig(**learns), Storage(torch.bfloat16), TrainConfig()))
        return sum(one.attention for one in time._passes(plan_as(time), 4096, 4096))

    learns: dict[str, Any] = {}
    whole, windowed = attention(), attention(sliding_window=512, full_attention_layers=(1,))
    assert windowed == whole * (1 + 1 / 8) / 2
    learns["last_layers"] = 1
    assert attention() == pytest.approx(whole * (2 + 2.5) / 7)  # no backward pass below the first block that learns


def test_the_host_is_the_limit_of_small_models_unless_graphs_launch_for_it() -> None:
    time = step_time("tinyllama-1b", "bnb.nf4-dq")
    slow, fast = (time.tokens_per_second(plan_as(time, graphs=graphs), 2048, 2048, "H200") for graphs in (False, True))
    assert slow
    assert fast
    assert fast > 2 * slow
    large = [time.tokens_per_second(plan_as(time, graphs=graphs), 16_384, 2048, "H200") for graphs in (False, True)]
    assert large[0] == large[1]


def test_cached_and_carried_weights_save_the_time_of_their_dequantisation() -> None:
    time = step_time("llama-2-7b", "bnb.nf4-dq")
    plans = plan_as(time), replace(plan_as(time), carries=True), plan_as(time, cached=32)
    seconds = [sum(one.seconds(4e12, False) for one in time._passes(plan, 4096, 2048)) for plan in plans]
    bytes_of_each = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * (2 + 4.127 / 8)
    assert seconds[0] - seconds[2] == pytest.approx(2 * bytes_of_each / 4e12, rel=0.05)
    assert seconds[2] < seconds[1] < seconds[0]


@pytest.mark.parametrize("changes", [{"slow_because": "x"}, {"fp8": True}, {"processes": 2}, {"parts": 2}])
def test_nothing_is_said_of_what_was_not_measured(changes: dict[str, Any]) -> None:
    time = step_time("tinyllama-1b", "bnb.nf4-dq")
    assert time.tokens_per_second(replace(plan_as(time), **changes), 4096, 2048, "H200") is None
    assert time.tokens_per_second(plan_as(time), 4096, 2048, "T4") is None


@pytest.mark.parametrize("shape", ["Qwen/Qwen3.5-4B@4", "google/gemma-4-31B@6"])
def test_nothing_is_said_of_layers_and_heads_that_were_not_measured(shape: str) -> None:
    time = step_time(shape, "bnb.nf4-dq")
    assert time.tokens_per_second(plan_as(time), 4096, 2048, "H200") is None
