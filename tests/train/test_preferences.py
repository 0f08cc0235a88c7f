"""Comparisons in shared, packed rows have the loss and the gradients of their answers one by one, and those of TRL."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.data import Batching, Sample, Samples, Step, steps
from lit_qlora.data.batches import validation_pairs
from lit_qlora.data.comparisons import CHOSEN, ELSEWHERE, REJECTED, Comparisons, Layout
from lit_qlora.data.preferences import to_their_ends
from lit_qlora.fused import fuse
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import LoRALinear, add_lora, lora_state
from lit_qlora.lora.score import add_score
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GuardConfig, LoRAConfig, PreferenceConfig, TrainConfig
from lit_qlora.train.guards import Guard
from lit_qlora.train.loop import Learner, train
from lit_qlora.train.preferences import Preferences, answers_of, token_losses
from tests.conftest import ROOT, tiny_model
from tests.train.test_preference_losses import BY_TRL, how_of

CPU = torch.device("cpu")


def comparisons(share: bool = True, tail: float = 1.0, prompts: bool = False, unpaired: bool = False) -> Comparisons:
    """Five prompts with two or three answers each; some of the answers begin alike."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 320, (count,), generator=generator).tolist()  # type: ignore[no-any-return]

    samples, bounds, sides = list[Sample](), [0], list[int]()
    for prompt, answers in ((5, (3, 6)), (9, (4, 2, 3)), (1, (5, 4)), (2, (1, 1)), (7, (2, 5))):
        asked, first = ids(prompt), ids(1)
        answers = answers[:2] if unpaired else answers
        samples += [Sample.of([*asked, *first, *ids(length - 1)], prompt) for length in answers]
        sides += (
            [(CHOSEN, REJECTED)[len(bounds) % 2], ELSEWHERE] if unpaired else [CHOSEN] + [REJECTED] * (len(answers) - 1)
        )
        bounds.append(len(samples))
    margins = np.linspace(0, 0.4, 5, dtype=np.float32)
    reference = -np.linspace(5, 40, len(samples), dtype=np.float32)
    return Comparisons(
        Samples.of(samples),
        np.array(bounds),
        np.array(sides, np.int8),
        margins,
        Layout(share, tail, prompts),
        reference,
    )


def adapted_model(**changes: Any) -> GPT:
    model = tiny_model(**changes)
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=4, dropout=0.0, targets="all"))
    for tensor in lora_state(model).values():
        nn.init.normal_(tensor, std=0.1)
    return model.train()


def one_step(data: Comparisons, micro: int = 1, packed: bool = False) -> Step:
    batching = Batching(batch_size=5, micro_batch_size=micro, seed=0, row_length=64 if packed else None)
    return next(steps(data, batching, 1))


def learn(model: GPT, how: PreferenceConfig, step: Step) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """The loss, the gradients and the metrics of a step."""
    model.zero_grad()
    objective, total = Preferences(how, CPU), 0.0
    objective.prepare(model, step.batches, lambda sums: sums)
    for batch in step.batches:
        loss = objective.loss(model, batch, step)
        loss.backward()
        total += loss.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, gradients, objective.measure(objective.sums.tolist())


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[2] == pytest.approx(other[2], rel=1e-4, abs=1e-5)
    for name, gradient in other[1].items():
        assert float((one[1][name] - gradient).norm()) < 2e-4 * float(gradient.norm()), name


HOW: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ld": {"ld_alpha": 0.3},
    "orpo": {"loss": "orpo", "sft_prompts": True},
    "kto": {"loss": "kto"},
}


@pytest.mark.parametrize("name", HOW)
def test_sharing_packing_and_micro_batches_change_neither_loss_nor_gradient(name: str) -> None:
    model, how = adapted_model(), PreferenceConfig(**HOW[name])

    def data(share: bool) -> Comparisons:
        return comparisons(share, how.ld_alpha, how.sft_prompts, unpaired=name == "kto")

    alone = one_step(data(share=False))
    shared, packed = one_step(data(share=True), micro=3), one_step(data(share=True), micro=2, packed=True)
    assert packed.batches[0].tokens.numel() < sum(batch.tokens.numel() for batch in alone.batches)
    expected = learn(model, how, alone)
    for other in (shared, packed):
        assert_same(learn(model, how, other), expected)


@pytest.mark.parametrize(
    ("loss", "more"), [("dpo", {}), ("orpo", {}), ("cpo", {"sft_weight": 0.5, "sft_prompts": True}), ("reward", {})]
)
def test_the_loss_is_the_mean_of_those_of_single_comparisons(loss: Any, more: dict[str, Any]) -> None:
    how, data = PreferenceConfig(loss=loss, **more), comparisons(prompts="sft_prompts" in more)
    model = adapted_model()
    if loss == "reward":
        add_score(model, 1)
        data = to_their_ends(data)
    objective, batching = Preferences(how, CPU), Batching(batch_size=5, micro_batch_size=2, seed=0, row_length=64)
    labelled = int(data.labelled.sum())

    def each(some: Comparisons) -> list[float]:
        found = list[float]()
        for batch in validation_pairs(some, batching):
            losses = objective.values(model, batch).detach()
            one = objective.of_each(batch, losses, len(data), labelled)
            assert float(one.sum()) / len(data) == pytest.approx(
                float(objective.of_losses(batch, losses, len(data), labelled)), rel=1e-5
            )
            found += one.tolist()
        return found

    alone = [each(data.take([number]))[0] for number in range(len(data))]
    assert sorted(each(data)) == pytest.approx(sorted(alone), rel=1e-4)


@pytest.mark.skipif(not AVAILABLE or torch.cuda.is_available(), reason="in float32, so for Triton's interpreter")
def test_the_fast_path_has_the_loss_and_the_gradients_of_the_plain_one() -> None:
    model, step = adapted_model(n_embd=64, vocab_size=320), one_step(comparisons(), micro=2, packed=True)
    expected = learn(model, PreferenceConfig(), step)
    fuse(model)
    assert_same(learn(model, PreferenceConfig(), step), expected)


@torch.no_grad()
def test_the_log_probability_of_an_answer_is_that_of_its_tokens_behind_the_prompt() -> None:
    model, data = adapted_model().eval(), comparisons()
    batching = Batching(batch_size=1, micro_batch_size=2, seed=0, row_length=64)
    found = sorted(
        value
        for batch in validation_pairs(data, batching)
        for row, side in zip(answers_of(batch, token_losses(model, batch))[0].tolist(), batch.sides, strict=True)
        for value, there in zip(row, side.tolist(), strict=True)
        if there
    )
    expected = []
    for sample in data.samples:
        ids = torch.from_numpy(sample.tokens).long()
        log_probs = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        expected.append(float(log_probs[sample.trained[1:]].sum()))
    assert found == pytest.approx(sorted(expected), rel=1e-5)


def test_rewards_are_changes_of_log_probabilities_times_beta() -> None:
    model, data, how = adapted_model(), comparisons(), PreferenceConfig(beta=0.5)
    step = one_step(data, micro=2)
    _, _, metrics = learn(model, how, step)
    rewards = []
    for batch in step.batches:
        log_probs = answers_of(batch, token_losses(model, batch))[0].detach()
        rewards.append(0.5 * (log_probs - batch.reference)[:, 0])  # chosen answers come first
    assert metrics["reward_chosen"] == pytest.approx(float(torch.cat(rewards).mean()), rel=1e-4)
    assert metrics["length_chosen"] == pytest.approx(np.mean([3, 4, 5, 1, 2]))
    assert 0 <= metrics["reward_accuracy"] <= 1


# What TRL computes on the model that is shipped.


def model_of_trl() -> GPT:
    """The shipped model with the adapter of the cases, whose numbers are formulas."""
    model = load_model(ROOT / "checkpoints/lit-qlora/tiny-world", dtype=torch.float32)
    add_lora(model, LoRAConfig(r=4, alpha=8, dropout=0.0, targets="all"))
    layers = ("query", "key", "value", "projection", "gate", "up", "down")
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            _, block, _, layer = path.split(".")
            m = 7 * int(block) + layers.index(layer)
            for parameter, (row, column, shift, modulus, size) in (
                (module.lora_a, (31, 17, 7, 101, 500)),
                (module.lora_b, (29, 13, 5, 97, 1500)),
            ):
                i, j = (torch.arange(n, dtype=torch.float64) for n in parameter.shape)
                numbers = (row * i[:, None] + column * j + shift * m) % modulus - modulus // 2
                parameter.data = (numbers / size).float()
    return model.train()


def pairs_of_trl(how: PreferenceConfig) -> Comparisons:
    samples, reference = list[Sample](), list[float]()
    for pair in BY_TRL["pairs"]:
        for side in ("chosen", "rejected"):
            samples.append(Sample.of(pair[f"{side}_ids"], pair["prompt_tokens"]))
            reference.append(pair[f"{side}_ref_logp"])
    layout = Layout(True, how.ld_alpha, how.sft_prompts)
    sides, bounds = np.array([CHOSEN, REJECTED] * 4, np.int8), np.arange(0, 9, 2)
    data = Comparisons(Samples.of(samples), bounds, sides, np.zeros(4, np.float32), layout)
    if how.ld_alpha != 1:
        reference = reference_by_hand(data)
    return data.with_reference(np.array(reference, np.float32))


@torch.no_grad()
def reference_by_hand(data: Comparisons) -> list[float]:
    """Weighed log-probabilities of the base, in the order of the answers."""
    base = load_model(ROOT / "checkpoints/lit-qlora/tiny-world", dtype=torch.float32)
    found = []
    for i in range(len(data)):
        batching = Batching(batch_size=1, micro_batch_size=1, seed=0)
        alone = Comparisons(data.samples, data.bounds[i : i + 2], data.sides, data.margins[i:], data.layout)
        (batch,) = validation_pairs(alone, batching)
        found += answers_of(batch, token_losses(base, batch))[0][0].tolist()
    return found


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


WATCHED = {
    "layers.0.q_proj.lora_A": "blocks.0.attn.query.lora_a",
    "layers.3.down_proj.lora_B": "blocks.3.mlp.down.lora_b",
}


def test_losses_gradients_and_rewards_are_those_of_trl() -> None:
    model = model_of_trl()
    for case in BY_TRL["cases"]:
        how = how_of(case)
        step = next(steps(pairs_of_trl(how), Batching(batch_size=4, micro_batch_size=4, seed=0), 1))
        loss, gradients, metrics = learn(model, how, step)
        tolerance = {"ipo": 2e-5}.get(how.loss, 2e-6)
        assert loss == pytest.approx(case["loss"], abs=tolerance), case
        assert norm(gradients) == pytest.approx(case["grad_norm"], rel=1e-5), case
        for theirs, ours in WATCHED.items():
            assert float(gradients[ours].norm()) == pytest.approx(case["grad_norms"][theirs], rel=2e-5), case
        if how.loss != "sft":
            for side in ("chosen", "rejected"):
                assert metrics[f"reward_{side}"] == pytest.approx(case["logged"][f"rewards/{side}"], rel=1e-4), case
            assert metrics["reward_accuracy"] == case["logged"]["rewards/accuracies"]


RUNS = {"sigmoid": {}, "ipo": {"loss": "ipo"}, "sigmoid + sft, 1 micro-batch of 4": {"sft_weight": 1.0}}


@pytest.mark.parametrize(
    ("name", "micro"),
    [("sigmoid", 4), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in RUNS)],
)
def test_five_steps_are_those_of_trl_however_they_are_split(name: str, micro: int) -> None:
    how = PreferenceConfig(**RUNS[name])  # type: ignore[arg-type]
    config = TrainConfig(learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0, max_norm=1.0)
    fabric, model = Fabric(accelerator="cpu", devices=1), model_of_trl()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-3, weight_decay=0.0)
    learner = Learner(fabric, model, optimizer, objective=Preferences(how, CPU))
    data = steps(pairs_of_trl(how), Batching(batch_size=4, micro_batch_size=micro, seed=0), 5)
    found = list(train(learner, data, 5, config, Guard(GuardConfig())))
    for record, theirs in zip(found, BY_TRL["training"]["steps"][name], strict=True):
        assert record["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert record["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for side in ("chosen", "rejected"):
            assert record[f"reward_{side}"] == pytest.approx(theirs[f"rewards/{side}"], abs=2e-5)
            assert record[f"logp_{side}"] == pytest.approx(theirs[f"logps/{side}"], rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_reward_model_learns_as_from_whole_answers_alone(packed: bool) -> None:
    how, data = PreferenceConfig(loss="reward"), to_their_ends(comparisons(share=packed))
    model = adapted_model()
    add_score(model, 1)
    step = one_step(data, micro=9, packed=packed)
    found = learn(model, how, step)
    model.zero_grad()
    losses = []
    for one in data:  # as TRL's RewardTrainer has it: each answer a row, read at its last token
        rewards = []
        for answer in one.answers:
            tokens = torch.from_numpy(answer.tokens[:-1]).long()[None]
            rewards.append(model.score(model.hidden(tokens)[0, -1])[0])  # type: ignore[misc]
        each = [-nn.functional.logsigmoid(rewards[0] - other - one.margin) for other in rewards[1:]]
        losses.append(torch.stack(each).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert found[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[1][name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert {"reward_accuracy", "reward_margin"} <= found[2].keys()
    assert "logp_chosen" not in found[2]
