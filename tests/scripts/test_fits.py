"""The largest runs of a GPU are found with the planner of a run, without weights, GPU or network."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lit_qlora.errors import UsageError
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.config import ModelConfig
from lit_qlora.run.fits import GIB, STEP, find_fit, gpu_called, least_gb, longest_row, plan_rows, planner_for
from lit_qlora.run.plan import Planner
from lit_qlora.settings import LoRAConfig, OptimizerConfig, TrainConfig
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
SMALL = ModelConfig(
    name="small", n_layer=4, n_embd=2048, n_head=16, n_kv_head=4, head_size=128, ffn_size=8192, vocab_size=32_000,
    block_size=2**20,
)  # fmt: skip
HOST = 64.0 * GIB


@pytest.fixture(scope="module")
def fits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fits", ROOT / "scripts/fits.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planner(gpu: str = "24") -> Planner:
    return planner_for(gpu_called(gpu).card, SMALL, LoRAConfig(), "bnb.nf4-dq", TrainConfig())


def test_a_row_more_or_a_longer_one_would_not_fit() -> None:
    plans, gpu = planner(), gpu_called("3")
    fit, room = find_fit(plans, gpu, 4096, HOST), gpu.room(HOST)

    def holds(rows: int, length: int) -> bool:
        return room.holds(plan_rows(plans, rows, length, room))

    assert 1 < fit.rows < 64
    assert [holds(rows, 4096) for rows in (fit.rows, fit.rows + 1)] == [True, False]
    assert [holds(1, length) for length in (fit.longest, fit.longest + STEP)] == [True, False]


def test_four_gpus_that_share_a_row_hold_nearly_four_times_its_tokens() -> None:
    card, room = gpu_called("6").card, gpu_called("6").room(HOST)
    one, four = (
        longest_row(planner_for(card, SMALL, LoRAConfig(), "bnb.nf4-dq", TrainConfig(), parts=parts), room)
        for parts in (1, 4)
    )
    assert 2.9 * one < four < 4 * (one + STEP)  # each has angles for the whole row


def test_rows_of_a_model_whose_heads_gpus_cannot_divide_are_refused(fits: ModuleType) -> None:
    with pytest.raises(UsageError, match="sequence_parallel 3 does not suit Qwen/Qwen3-8B: so many devices cannot"):
        list(fits.find_fits(fits.FitsConfig(model="Qwen/Qwen3-8B", gpu="24", sequence_parallel=3)))
    with pytest.raises(UsageError, match="sequence_parallel 3 does not divide 4 devices"):
        fits.FitsConfig(devices=4, sequence_parallel=3)


def test_the_smallest_gpu_of_a_model_holds_it_and_a_smaller_one_does_not() -> None:
    plans = planner()
    gb = least_gb(plans, 65_536, HOST)
    assert [find_fit(plans, gpu_called(str(size)), 65_536, HOST).rows > 0 for size in (gb - 1, gb)] == [False, True]


@pytest.mark.parametrize(
    ("gpu", "dtype", "reason"),
    [("nvidia GeForce rtx 4090", torch.bfloat16, ""), ("T4", torch.float16, ""), ("V100 16GB", torch.float16, "7.5")],
)
def test_a_gpu_is_planned_with_what_it_computes(gpu: str, dtype: torch.dtype, reason: str) -> None:
    plans = planner(gpu)
    assert plans.dtype == dtype
    assert find_fit(plans, gpu_called(gpu), 512, HOST).slow_because.endswith(reason)


@pytest.mark.parametrize("gpu", ["RTX 4091", "0.5", "nan"])
def test_a_gpu_that_nobody_knows_is_refused(gpu: str) -> None:
    with pytest.raises(UsageError, match=r"^gpu "):
        gpu_called(gpu)


def test_a_model_is_a_checkpoint_or_well_known(fits: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fits.main(fits.FitsConfig(gpu="8", model=str(ROOT / "checkpoints/lit-qlora/tiny-world"), json=True))
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["rows"], row["recompute"], row["gpu"]) == (64, "none", "8 GB")
    assert row["longest"] == row["length"] == row["context"] == 256
    with pytest.raises(UsageError, match=r"Did you mean Qwen/Qwen3-8B\?"):
        fits.main(fits.FitsConfig(model="Qwen/Qwen3-8"))


def test_rows_beyond_the_context_of_a_model_are_refused_and_in_a_table_named(
    fits: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = str(ROOT / "checkpoints/lit-qlora/tiny-world")
    with pytest.raises(UsageError, match=r"length 257: \S+ reads 256 tokens\. Take a smaller --length"):
        fits.main(fits.FitsConfig(model=tiny, gpu="8", length=257))
    fits.main(fits.FitsConfig(model=tiny, gpu="8", length=512, lora=LoRAConfig(rope_scaling="yarn", rope_factor=2.0)))
    assert "cannot read" not in capsys.readouterr().out
    monkeypatch.setattr(fits, "models", lambda config: iter([SMALL, ModelConfig.load(Path(tiny))]))
    fits.main(fits.FitsConfig(gpu="8", length=300))
    assert capsys.readouterr().out.endswith("cannot read 300 tokens: lit-qlora/tiny-world (256)\n")
    assert fits.overview(list(fits.find_fits(fits.FitsConfig(gpu="8"))), 2048).endswith("lit-qlora/tiny-world (256)")


def test_an_optimizer_with_8_bit_state_is_planned_with_its_bytes(fits: ModuleType) -> None:
    state = fits.state_bytes(OptimizerConfig(name="adamw8bit"))
    assert 2 <= state < 2.2
    own = [
        planner_for(gpu_called("24").card, SMALL, LoRAConfig(), "bnb.nf4-dq", TrainConfig(), size)
        for size in (8, state)
    ]
    plans = [plan_rows(each, 1, 128, gpu_called("24").room(HOST)) for each in own]
    assert plans[0].learning - plans[1].learning == pytest.approx((8 - state) * plans[0].trainable)


@pytest.mark.slow
def test_two_gpus_hold_what_one_of_them_does_not(fits: ModuleType) -> None:
    lora = LoRAConfig(r=8, alpha=16, targets=("all",))
    given = {"model": "meta-llama/Llama-3.1-70B", "gpu": "24", "lora": lora, "host": 128.0}
    (alone,), (both,) = (list(fits.find_fits(fits.FitsConfig(devices=devices, **given))) for devices in (1, 2))
    assert alone.longest == 0
    assert both.rows >= 1
    assert not both.slow_because


@pytest.mark.slow
def test_all_of_a_mixture_of_30b_trains_in_40_gb_with_its_experts(fits: ModuleType) -> None:
    lora, optimizer = LoRAConfig(r=8, alpha=16, targets=("all",)), OptimizerConfig(name="adamw8bit")
    config = fits.FitsConfig(model="Qwen/Qwen3-30B-A3B", gpu="A100 40GB", lora=lora, optimizer=optimizer)
    (fit,) = fits.find_fits(config)
    assert fit.rows >= 2
    assert fit.recompute == "none"
    assert not fit.slow_because


@pytest.mark.slow
def test_the_pages_have_the_table_that_the_command_prints(fits: ModuleType) -> None:
    table = fits.overview(list(fits.find_fits(fits.FitsConfig())), 2048)
    page = (ROOT / "docs/fits.md").read_text(encoding="utf-8")
    assert table in page
    config = fits.FitsConfig(model="Qwen/Qwen3-8B")
    *told, _24, _40, _48, _80 = fits.listing(list(fits.find_fits(config)), config).splitlines()
    assert "\n".join(told) in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in readme if " · " in line]
    assert rows
    assert set(rows) < set(table.splitlines())


def test_a_speed_is_given_where_it_was_measured_alone(fits: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    (of_h100,) = fits.find_fits(fits.FitsConfig(model="meta-llama/Llama-2-7b-hf", gpu="H100 80GB"))
    assert 18_000 < of_h100.tokens_per_second < 21_000
    assert "tokens/s, about" in fits.listing([of_h100], fits.FitsConfig(model=of_h100.model))
    (of_t4,) = fits.find_fits(fits.FitsConfig(model="meta-llama/Llama-2-7b-hf", gpu="T4"))
    assert of_t4.tokens_per_second is None
