"""What validations measure: tokens, answers, the distance to the base; and that measuring disturbs nothing."""
# ruff: noqa: F811 - fixtures are arguments

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.data import RunData, read_data
from lit_qlora.evaluate import measures
from lit_qlora.evaluate.measures import (
    Dispensable,
    Losses,
    answer,
    best_and_worst,
    kl_to_base,
    more_measures,
    tasks_measure,
)
from lit_qlora.evaluate.metrics import text_metrics
from lit_qlora.evaluate.validation_inputs import Probes, Question, read_probes
from lit_qlora.generation import generate
from lit_qlora.lora.adapter import start_adapters
from lit_qlora.lora.layer import add_lora, without_adapters
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.prompts.style import TemplateStyle
from lit_qlora.settings import EvalConfig, FinetuneConfig, GenerationConfig, LoRAConfig
from lit_qlora.signals import StopRequest
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer
from tests.evaluate.test_validation_inputs import config, data  # noqa: F401 - fixtures


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def adapted(std: float = 0.05, **changes: object) -> GPT:
    """A model whose adapters are not zero."""
    model = tiny_model(**changes)
    add_lora(model, LoRAConfig(targets="all"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_b" in name:
            nn.init.normal_(parameter, std=std)
    return model.eval()


# Tokens


@pytest.mark.parametrize("at_once", [1, 5000, 2**26])
def test_loss_and_accuracy_are_those_of_the_plain_model(
    data: RunData, fabric: Fabric, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(measures, "LOGITS_AT_ONCE", at_once)
    model = adapted()
    loss = right = labelled = 0
    with torch.no_grad():
        for batch in data.val_batches:
            counted = batch.labels != IGNORE
            loss += float(model.loss(*batch))
            right += int((model(batch.tokens).argmax(-1) == batch.labels)[counted].sum())
            labelled += int(counted.sum())
    record = Losses(fabric, model, data.val_batches)(0)
    assert record["val_loss"] == pytest.approx(loss / labelled, rel=1e-5)
    assert record["val_accuracy"] == right / labelled
    assert labelled > 0


def test_no_more_logits_than_allowed_exist_at_once(
    config: FinetuneConfig, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "LOGITS_AT_ONCE", 20 * 320)
    data = read_data(replace(config, train=replace(config.train, micro_batch_size=8)))
    model, seen = adapted(), []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    measure = Losses(fabric, model, data.val_batches)
    measure(0)
    assert measure.scores is not None
    labelled, everything = int(measure.scores[:, 2].sum()), data.val_batches[0].tokens.numel()
    assert set(seen) == {16 * 320}
    assert 16 < labelled <= 16 * len(seen) < everything  # of labelled tokens alone


def test_the_samples_with_the_smallest_and_largest_mean_losses_are_known(data: RunData, fabric: Fabric) -> None:
    model = adapted()
    measure = Losses(fabric, model, data.val_batches)
    measure(0)
    assert measure.scores is not None
    rows = [row for batch in data.val_batches for row in zip(batch.tokens, batch.labels, strict=True)]
    with torch.no_grad():
        means = [float(model.loss(t[None], y[None]) / (y >= 0).sum()) for t, y in rows]
    order = sorted(range(len(rows)), key=means.__getitem__)
    assert best_and_worst(measure.scores, 2) == (order[:2], order[-1:-3:-1])
    assert best_and_worst(measure.scores[:3], 2)[1] == [max(range(3), key=means.__getitem__)]


def test_a_signal_cuts_a_validation_short(data: RunData, fabric: Fabric) -> None:
    stop = StopRequest()
    stop.signal = 15
    assert Losses(fabric, adapted(), data.val_batches, stop)(0) == {}


# Answers


def test_answers_are_the_likeliest_and_in_the_order_of_the_questions(
    config: FinetuneConfig, data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "ANSWERS_AT_ONCE", 3)
    model = adapted()
    asked = read_probes(replace(config, eval=EvalConfig(generate=8)), data).questions[::-1]
    stops = data.tokenizer.stop_ids | data.style.stop_ids(data.tokenizer)
    expected = [
        data.tokenizer.decode(
            generate(model, [q.ids], GenerationConfig(max_new_tokens=9), stops, data.tokenizer.size)[0]
        )
        for q in asked
    ]
    assert answer(model, data, asked, GenerationConfig(max_new_tokens=9)) == [text.strip() for text in expected]


def test_answers_are_made_as_the_settings_say(config: FinetuneConfig, data: RunData) -> None:
    model, asked = adapted(), read_probes(replace(config, eval=EvalConfig(generate=2)), data).questions
    how = {"max_new_tokens": 9, "min_new_tokens": 2, "num_beams": 2, "repetition_penalty": 1.5}
    written: dict[int, list] = {}
    settings = replace(config, eval=EvalConfig(generate=2, **how))
    fabric, probes = Fabric(accelerator="cpu", devices=1), read_probes(settings, data)
    (measure,) = more_measures(
        fabric, model, data, probes, settings.eval.answers, lambda step, rows: written.update({step: rows})
    )
    measure(0)
    stops = data.tokenizer.stop_ids | data.style.stop_ids(data.tokenizer)
    made = generate(model, [q.ids for q in asked], GenerationConfig(**how), stops, data.tokenizer.size)  # type: ignore[arg-type]
    assert [row["answer"] for row in written[0]] == [
        data.style.said(data.tokenizer.decode(ids)).strip() for ids in made
    ]


def test_a_prompt_that_fills_the_context_loses_its_beginning(config: FinetuneConfig, data: RunData) -> None:
    asked = Question([5] * 200, "")
    assert len(answer(adapted(), data, [asked], GenerationConfig(max_new_tokens=500))) == 1


def test_metrics_compare_answers_and_all_are_written(config: FinetuneConfig, data: RunData, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("What is 1 plus 1?\n")
    config = replace(config, eval=EvalConfig(generate=3, prompts=tmp_path / "p.txt", max_new_tokens=5))
    probes, written, model = read_probes(config, data), {}, adapted()
    (measure,) = more_measures(
        Fabric(accelerator="cpu", devices=1),
        model,
        data,
        probes,
        config.eval.answers,
        lambda step, rows: written.update({step: rows}),
    )
    record = measure(7)
    said = answer(model, data, probes.questions, GenerationConfig(max_new_tokens=5))
    assert record == text_metrics(said, [q.wanted for q in probes.questions])
    rows = written[7]
    assert [row["answer"] for row in rows[:3]] == said
    assert [row["wanted"] for row in rows[:3]] == [q.wanted for q in probes.questions]
    assert rows[3].keys() == {"step", "prompt", "answer"}


def test_metrics_compare_what_stands_behind_a_thought_and_the_whole_is_written(
    config: FinetuneConfig, data: RunData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, eval=EvalConfig(generate=2))
    probes = read_probes(config, data)
    wanted = [asked.wanted for asked in probes.questions]
    said = [f"<think>\nHm.\n</think>\n\n{wanted[0]}", "<think>\nHm, and"]
    monkeypatch.setattr(measures, "answer", lambda *_: said)
    thinking = replace(data, style=TemplateStyle("<think></think>"))
    rows: list[dict] = []
    (measure,) = more_measures(
        Fabric(accelerator="cpu", devices=1),
        adapted(),
        thinking,
        probes,
        config.eval.answers,
        lambda step, found: rows.extend(found),
    )
    assert measure(3) == text_metrics([wanted[0], ""], wanted)
    assert [row["answer"] for row in rows] == said
    assert [row["compared"] for row in rows] == [wanted[0], ""]
    assert [row["chrf"] for row in rows] == [1.0, 0.0]
    note = "after step 3, 2 of 2 answers are compared without their thought; 1 of them end within it, so raise"
    assert note in capsys.readouterr().err


# The distance to the base


def start(tmp_path: Path, settings: LoRAConfig, **model: object) -> tuple[GPT, GPT]:
    """A model whose adapters have moved, and its base."""
    directory = write_checkpoint(tmp_path / "base", tiny_model(**model))
    write_tokenizer(directory)
    base, moved = (load_model(directory, torch.float32, torch.device("cpu"), "none", False) for _ in range(2))
    add_lora(moved, settings)
    start_adapters(moved, settings, directory)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return moved.eval(), base.eval()


VARIANTS = {
    "plain": (LoRAConfig(targets="all"), {}),
    "head": (LoRAConfig(targets=("all", "head")), {}),
    "dora": (LoRAConfig(targets="all", dora=True), {}),
    "pissa": (LoRAConfig(targets="all", init="pissa"), {}),
    "olora": (LoRAConfig(targets="all", init="olora", rslora=True), {}),
    "embeddings": (LoRAConfig(train_embeddings=True), {"tied_head": True}),
    "tokens": (LoRAConfig(train_tokens=(3, 5)), {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_its_adapters_a_model_is_its_base_and_is_itself_again(tmp_path: Path, variant: str) -> None:
    settings, changes = VARIANTS[variant]
    model, base = start(tmp_path, settings, **changes)
    tokens = torch.arange(1, 60)[None]
    before, modules, parameters = model(tokens), list(model.named_modules()), list(model.named_parameters())
    assert not torch.allclose(before, base(tokens), atol=1e-3)
    with without_adapters(model):
        torch.testing.assert_close(model(tokens), base(tokens), rtol=1e-4, atol=1e-4)
    assert [(name, id(module)) for name, module in modules] == [(n, id(m)) for n, m in model.named_modules()]
    assert [(name, id(p)) for name, p in parameters] == [(n, id(p)) for n, p in model.named_parameters()]
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("at_once", [320, 2**26])
def test_the_distance_is_the_divergence_of_the_base_from_the_model(
    tmp_path: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(measures, "LOGITS_AT_ONCE", at_once)
    model, base = start(tmp_path, LoRAConfig(targets=("all", "head")))
    ids = list(range(1, 40))
    with torch.no_grad():
        theirs, mine = (m(torch.tensor([ids])).double().log_softmax(-1) for m in (base, model))
    expected = nn.functional.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1).mean()
    assert kl_to_base(fabric, model, ids) == pytest.approx(float(expected), rel=1e-4)
    assert expected > 1e-3


def test_a_fresh_adapter_is_at_its_base(fabric: Fabric) -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig())
    assert kl_to_base(fabric, model, list(range(1, 40))) == pytest.approx(0, abs=1e-9)


# What fails, and what is disturbed


def noisy(model: GPT, fail: bool) -> Callable[[int], dict]:
    """Changes all that a measure could change."""

    def measure(step: int) -> dict:
        assert not model.training
        model.train()
        torch.manual_seed(step)
        random.seed(step)
        torch.rand(3)
        if fail:
            raise RuntimeError("too hard\nbecause")
        return {"metric": 1.0}

    return measure


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_measure_leaves_mode_and_randomness_as_they_were(
    fabric: Fabric, capsys: pytest.CaptureFixture[str], fail: bool, training: bool
) -> None:
    model = adapted().train(training)
    states = torch.get_rng_state(), random.getstate()
    record = Dispensable(fabric, model, "the test", noisy(model, fail))(5)
    assert record == ({} if fail else {"metric": 1.0})
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    said = "  note    the test after step 5 failed: RuntimeError: too hard\n" if fail else ""
    assert capsys.readouterr().err == said


def test_a_measure_that_finds_no_room_gets_what_only_makes_training_faster(fabric: Fabric) -> None:
    model, tries = adapted(), []
    fast = SimpleNamespace(can_release=True, release=lambda: setattr(fast, "can_release", False))
    model.fast = fast

    def measure(step: int) -> dict:
        tries.append(fast.can_release)
        if fast.can_release or len(tries) > 2:
            raise torch.OutOfMemoryError("no room")
        return {"found": step}

    measured = Dispensable(fabric, model, "the test", measure)
    assert measured(3) == {"found": 3}
    assert tries == [True, False]
    assert measured(4) == {}  # there is nothing left to give back


def test_only_what_is_asked_for_is_measured(data: RunData, fabric: Fabric) -> None:
    nothing = more_measures(fabric, adapted(), data, Probes([], [], []), None, lambda *given: None)
    assert nothing == []


@pytest.mark.parametrize(("every", "asked"), [(None, [0, 2, 4, 5, 6, 7]), (3, [0, 4, 7]), (100, [0, 7])])
def test_tasks_are_asked_at_both_ends_and_every_so_often_also_after_an_interruption(
    every: int | None, asked: list[int]
) -> None:
    records: list[dict] = []
    for step in (0, 2, 4, 5, 6, 7):
        measure = tasks_measure(lambda model: {"a/acc": 1.0}, tiny_model(), every, 7, list(records))
        records += [{"step": step, "loss": 1.0}, {"step": step, "val_loss": 1.0, **measure(step)}]
    assert [record["step"] for record in records if "a/acc" in record] == asked
