"""What is said before a run begins."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_qlora.data import read_data
from lit_qlora.errors import CheckpointError, ResourceError, UsageError
from lit_qlora.lora.peft_layout import check_layers
from lit_qlora.quantize import Storage
from lit_qlora.run.banner import few_steps, longest_batch, of_experts, plan_run, savings, tell_plan, usual_tokens
from lit_qlora.run.plan import MicroBatches, Plan, Room, make_plan
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig, OptimizerConfig, TrainConfig
from tests.conftest import tiny_config
from tests.test_report import Terminal


def said(checkpoint: Path, examples: Path, screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> str:
    config = FinetuneConfig(
        checkpoint_dir=checkpoint,
        precision="32-true",
        data=DataConfig(path=str(examples), prompt="qa", cache_dir="none", val_fraction=0.1),
    )
    data = read_data(config)
    plan = plan_run(config, data)
    monkeypatch.setattr("sys.stdout", screen)
    tell_plan(config, data, 12, plan)
    return screen.getvalue()


def test_a_run_of_few_steps_says_what_a_step_holds_and_how_to_get_more(
    tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none", max_samples=9)
    config = FinetuneConfig(checkpoint_dir=tiny_checkpoint, precision="32-true", data=data)
    read = read_data(config)
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    tell_plan(config, read, 3, plan_run(config, read))
    assert "plan    3 steps x 9 samples," in screen.getvalue()
    more = few_steps(config, read, 3)
    assert more == "3 steps are few to learn from: --train.batch_size 1 or --train.epochs 50 makes more"
    assert f"note    {more}" in screen.getvalue()
    assert not few_steps(replace(config, train=TrainConfig(max_steps=3)), read, 3)
    assert not few_steps(config, read, 50)
    assert "batch_size" not in few_steps(replace(config, train=TrainConfig(batch_size=1)), read, 27)


def test_what_would_need_less_is_not_hidden_by_memory_that_is_taken_because_it_is_left(
    tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.run.banner.gpu_bytes", lambda: 2**33)
    monkeypatch.setattr("lit_qlora.run.banner.weights_dtype", lambda precision: torch.bfloat16)
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none", val_fraction=0.1)
    config = FinetuneConfig(checkpoint_dir=tiny_checkpoint, data=data, quantize="bnb.nf4")
    read = read_data(config)
    assert plan_run(config, read).cached_blocks > 0
    tips = savings(config, read)
    assert "--train.micro_batch_size" in tips
    assert "keep_dequantized" not in tips
    asked = replace(config, train=replace(config.train, keep_dequantized=2))
    assert "--train.keep_dequantized 0 saves" in savings(asked, read)


def test_rows_that_are_packed_have_graphs_if_they_are_short(
    tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.run.banner.gpu_bytes", lambda: 2**33)
    monkeypatch.setattr("lit_qlora.run.banner.weights_dtype", lambda precision: torch.bfloat16)
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none", packing=True, pack_length=256)
    train = TrainConfig(batch_size=32, micro_batch_size=2)
    config = FinetuneConfig(checkpoint_dir=tiny_checkpoint, data=data, train=train)
    read = read_data(config)
    assert longest_batch(read.train, read.batching, 1).tokens.shape == (2, 256)
    assert 256 < usual_tokens(read, 1) <= 2 * 256
    assert plan_run(config, read).graph_tokens == 2 * 256
    few = replace(config, train=replace(train, batch_size=4))
    read = read_data(few)
    four = int(read.train.lengths.sum()) / len(read.train) * 4
    longest = longest_batch(read.train, read.batching, 1)
    assert len(longest.tokens) == 1
    assert longest.tokens.size(1) < 1.5 * four + 64  # no longer than all samples of a step
    assert usual_tokens(read, 1) <= longest.tokens.numel()
    read = read_data(replace(config, train=replace(train, batch_size=16)))
    sizes = [longest_batch(read.train, read.batching, processes).tokens.numel() for processes in (1, 2)]
    assert sizes[1] < sizes[0]
    assert usual_tokens(read, 2) < 0.7 * usual_tokens(read, 1)  # half of the samples for each
    long = replace(config, data=replace(data, pack_length=8192))
    read = read_data(long)
    longest = longest_batch(read.train, read.batching, 1)
    assert 8192 > plan_run(long, read).graph_tokens >= longest.tokens.numel()  # a step is far from filling one
    monkeypatch.setattr("lit_qlora.fused.graphs.MOST_TOKENS", 256)
    assert plan_run(long, read).graph_tokens == 0


def test_memory_of_the_host_is_planned_said_and_not_overdrawn(
    tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.run.banner.gpu_bytes", lambda: 2**33)
    monkeypatch.setattr("lit_qlora.run.banner.host_bytes", lambda: 2**30)
    monkeypatch.setattr("lit_qlora.run.banner.weights_dtype", lambda precision: torch.bfloat16)
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none", val_fraction=0.1)
    config = FinetuneConfig(
        checkpoint_dir=tiny_checkpoint, precision="32-true", data=data, train=TrainConfig(recompute="offload")
    )
    read = read_data(config)
    plan = plan_run(config, read)
    assert plan.host > 0
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    tell_plan(config, read, 12, plan)
    assert f"; on the host {plan.host / 2**30:.2f}\n" in screen.getvalue()
    monkeypatch.setattr("lit_qlora.run.banner.host_bytes", lambda: 1.5 * plan.host)
    assert plan_run(config, read).host == plan.host
    both = replace(config, devices=2)  # which share it
    with pytest.raises(ResourceError, match=r"offload needs .* GiB of the host's memory(.|\n)*recompute full"):
        plan_run(both, read)
    assert plan_run(replace(both, force=True), read).host == plan.host
    assert "offload" not in plan_run(replace(both, train=TrainConfig()), read).recompute


def test_a_run_that_could_not_begin_is_refused_with_its_plan(tiny_checkpoint: Path, examples_file: Path) -> None:
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none")
    config = FinetuneConfig(checkpoint_dir=tiny_checkpoint, precision="32-true", data=data)
    few = replace(config, devices=4, num_nodes=2, train=TrainConfig(batch_size=7, micro_batch_size=1))
    with pytest.raises(UsageError, match=r"batch_size 7 leaves some of 8 devices without a sample\.\nTake more"):
        plan_run(few, read_data(few))


def test_weights_that_are_missing_are_seen_before_they_are_loaded(
    tiny_checkpoint: Path, examples_file: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare)
    (bare / "lit_model.safetensors").unlink()
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none")
    config = FinetuneConfig(checkpoint_dir=bare, precision="32-true", data=data)
    with pytest.raises(CheckpointError, match=r"bare has no lit_model\.safetensors"):
        plan_run(config, read_data(config))


@pytest.mark.parametrize(("no_color", "first"), [("", "\x1b[2mQ: What is"), ("1", "[Q: What is")])
def test_unlabelled_tokens_of_the_first_sample_are_dimmed_where_that_is_wanted(
    tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch, no_color: str, first: str
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    text = said(tiny_checkpoint, examples_file, Terminal(), monkeypatch)
    assert f"  sample  {first}" in text
    assert ("\x1b" in text) is not bool(no_color)


def test_the_banner_fits_a_screen_and_names_data_model_plan_and_memory(
    tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(tiny_checkpoint, examples_file, Terminal(), monkeypatch)
    assert len(text.splitlines()) <= 24
    for word in ("data", "model", "plan", "memory", "path", "sample", "answer"):
        assert f"\n  {word:<8}" in text
    assert "36 train / 4 val" in text
    assert "12 steps x 32 samples" in text


def test_what_peft_would_refuse_is_said_before_the_run() -> None:
    def caveat(dora: bool) -> str:
        experts = {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32, "dense_layers": (0,)}
        return check_layers(tiny_config(family="deepseek_v2", **experts), LoRAConfig(targets=("mlp",), dora=dora))

    assert "it refuses this adapter" in caveat(dora=True)
    assert caveat(dora=False) == ""


def planned(lora: LoRAConfig, **changes: int) -> Plan:
    """The plan of a run of Qwen3-30B-A3B, or of a smaller one, on a GPU of 80 GB."""
    model = tiny_config(
        n_embd=2048, n_head=32, n_kv_head=4, head_size=128, ffn_size=6144, n_expert_per_token=8, expert_size=768,
        **{"n_layer": 48, "n_expert": 128, "vocab_size": 151936} | changes,
    )  # fmt: skip
    storage = Storage(torch.bfloat16, "bnb.nf4-dq")
    return make_plan(model, lora, storage, MicroBatches(512, 2), TrainConfig(), Room(80e9, 64e9))


def test_adapters_of_experts_that_need_much_memory_are_named_with_what_needs_less() -> None:
    lora = LoRAConfig(r=16, targets=("all",))
    plan = planned(lora, n_layer=1, n_expert=64, vocab_size=320)
    assert plan.experts == 64 * 3 * 16 * (2048 + 768)
    said = of_experts(plan, FinetuneConfig(lora=lora))
    assert said.startswith(f"adapters of experts have {plan.experts:,} of the trainable parameters, ")
    # A quarter of the rank saves three quarters; 8-bit state six of the sixteen bytes of a parameter.
    for flag in ("targets [query,key,value,projection] saves", "rank_pattern '{experts.*: 4}'", "adamw8bit saves"):
        assert flag in said
    assert "adamw8bit" not in of_experts(plan, FinetuneConfig(lora=lora, optimizer=OptimizerConfig(name="sgd")))
    assert of_experts(planned(LoRAConfig(), n_layer=1, n_expert=64, vocab_size=320), FinetuneConfig()) == ""


@pytest.mark.slow
def test_adapters_of_all_experts_of_qwen3_30b_are_845_million_parameters_and_13_gb() -> None:
    plan = planned(LoRAConfig(r=16, targets=("all",)))
    assert round(plan.trainable / 1e6) == 844
    assert 13.5e9 < plan.learning < 13.6e9
