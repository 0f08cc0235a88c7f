"""A dialled adapter is the base at 0 and itself at 1, and the one within a budget is the best that it allows."""

from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import content_hash
from lit_qlora.data import Batch
from lit_qlora.errors import UsageError
from lit_qlora.evaluate.weigh import THIRDS, Dial, Strength, scaled, third_of, within_budget
from lit_qlora.lora.adapter import our_tensors, read_adapter, save_adapter
from lit_qlora.lora.layer import add_lora
from lit_qlora.lora.verify import mean_loss
from lit_qlora.model.gpt import GPT
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig
from tests.conftest import run_here, tiny_model
from tests.lora.test_adapter import trained

TEXT = list(range(3, 40))
TOKENS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
BATCHES = [Batch(TOKENS[:, :-1], TOKENS[:, 1:])]
CONFIG = LoRAConfig(r=4, targets=("all", "head"))


@pytest.fixture
def model() -> GPT:
    return trained(tiny_model(n_layer=3), CONFIG)


def test_the_ends_of_the_dial_are_the_base_and_the_adapter(model: GPT) -> None:
    dial = Dial(model, BATCHES, TEXT)
    whole = mean_loss(model, BATCHES)
    base, own = dial.measure("all", 0.0), dial.measure("all", 1.0)
    assert base == Strength("all", 0.0, mean_loss(tiny_model(n_layer=3), BATCHES), 0.0)
    assert own.val_loss == whole == dial.measure("first third", 1.0).val_loss
    assert mean_loss(model, BATCHES) == whole  # the model is as it was


def test_the_distance_is_that_of_the_distributions_in_double_precision(model: GPT) -> None:
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        p, q = (m(ids).double().log_softmax(-1) for m in (tiny_model(n_layer=3), model.eval()))
    expected = float((p.exp() * (p - q)).sum() / len(TEXT))
    assert Dial(model, BATCHES, TEXT).kl(1.0) == pytest.approx(expected, rel=1e-4)


def test_a_third_is_dialled_while_the_others_stay(model: GPT) -> None:
    assert [third_of(f"blocks.{n}.attn.query", 8) for n in range(8)] == [THIRDS[n] for n in (0, 0, 0, 1, 1, 1, 2, 2)]
    assert third_of("head", 8) == "last third"
    point = Dial(model, BATCHES, TEXT).measure("middle third", 0.5)
    for path, parameter in model.named_parameters():
        if path.startswith("blocks.1.") and path.endswith("lora_b"):
            parameter.data *= 0.5
    assert point.val_loss == pytest.approx(mean_loss(model, BATCHES), rel=1e-6)


@pytest.mark.parametrize("budget", [0.0, 1e-3, 0.02, 1e9])
def test_the_best_within_a_budget_is_within_it_and_no_point_of_the_curve_is_better(model: GPT, budget: float) -> None:
    dial = Dial(model, BATCHES, TEXT)
    curve = [dial.measure("all", factor) for factor in (0.0, 0.5, 1.0, 1.5)]
    best = within_budget(dial, curve, budget)
    assert best.kl <= budget
    assert best.val_loss <= min(point.val_loss for point in curve if point.kl <= budget)


@pytest.mark.parametrize("config", [LoRAConfig(dora=True), LoRAConfig(train_tokens=(3,))])
def test_an_update_without_multiples_is_refused(config: LoRAConfig) -> None:
    model = tiny_model()
    add_lora(model, config)
    with pytest.raises(UsageError, match=r"has no multiples: it has (DoRA|trained embeddings)"):
        Dial(model, BATCHES, TEXT)


def test_the_command_writes_the_adapter_of_a_factor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    facts = {"base": {"name": "x", "sha256": content_hash(tiny_checkpoint)}}
    save_adapter(tmp_path / "final", trained(tiny_model(), CONFIG), CONFIG, STYLES["qa"], facts)
    (tmp_path / "val.jsonl").write_text('{"instruction": "What is 3 plus 4?", "input": "", "output": "7"}\n' * 2)
    flags = (
        "--lora_path",
        tmp_path / "final",
        "--checkpoint_dir",
        tiny_checkpoint,
        "--data",
        tmp_path / "val.jsonl",
        "--factors",
        "[0, 1]",
    )
    run = run_here("scripts/weigh_lora.py", *flags, "--factor", 0.5)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "final-x0.5") in run.stdout.splitlines()
    before, after = (
        our_tensors(read_adapter(tmp_path / name), tiny_model().config) for name in ("final", "final-x0.5")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in scaled(before, 0.5).items())
    assert "both choose" in run_here("scripts/weigh_lora.py", *flags, "--factor", 1, "--kl_budget", 1).stderr
