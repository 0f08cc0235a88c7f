"""On a GPU in bf16, comparisons in shared and packed rows are no farther from float64 than on the plain path."""

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_qlora.data import Batching, Sample, Samples, Step, steps
from lit_qlora.data.comparisons import CHOSEN, REJECTED, Comparisons, Layout
from lit_qlora.fused import fuse, why_not
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import PreferenceConfig
from lit_qlora.train.preferences import Preferences
from tests.gpu.test_fused_gpu import adapted, errors, in_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def one_step(share: bool = True, packed: bool = True) -> Step:
    """Six prompts with two or three answers each, in rows of at most 512 positions."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 1024, (count,), generator=generator).tolist()

    samples, bounds, sides = list[Sample](), [0], list[int]()
    for prompt, answers in (
        (120, (40, 70)),
        (37, (33, 5, 64)),
        (90, (1, 80)),
        (64, (64, 64)),
        (5, (9, 30)),
        (1, (8, 8)),
    ):
        asked = ids(prompt)
        samples += [Sample.of([*asked, *ids(length)], prompt) for length in answers]
        sides += [CHOSEN, *[REJECTED] * (len(answers) - 1)]
        bounds.append(len(samples))
    data = Comparisons(
        Samples.of(samples), np.array(bounds), np.array(sides, np.int8), np.zeros(6, np.float32), Layout(share)
    )
    batching = Batching(batch_size=6, micro_batch_size=6, seed=0, row_length=512 if packed else None)
    return next(steps(data, batching, 1))


def learn(model: GPT, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    objective = Preferences(PreferenceConfig(beta=0.01), torch.device("cuda"))
    losses = [objective.loss(model, batch, step) for batch in step.batches]
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


CASES: dict[str, dict[str, Any]] = {
    "nf4": {},
    "16 bit": {"scheme": "none"},
    "a window": {"sliding_window": 48},
    "heads of 128": {"head_size": 128},
    "sinks": {"attention_sinks": True},
}


@pytest.mark.parametrize("case", CASES)
def test_shared_and_packed_comparisons_are_as_exact_as_the_plain_path(case: str) -> None:
    model = adapted(**CASES[case])
    exact_loss, exact = learn(in_float64(model), one_step(share=False, packed=False))
    plain_loss, plain = learn(model, one_step(share=False, packed=False))
    assert why_not(model) == ""
    fuse(model)
    for share, packed in ((False, False), (False, True), (True, False), (True, True)):
        loss, fast = learn(model, one_step(share, packed))
        assert abs(float(loss - exact_loss)) < max(0.01, 2 * abs(float(plain_loss - exact_loss)))
        assert statistics.median(errors(fast, exact)) < 1.3 * statistics.median(errors(plain, exact))


@pytest.mark.parametrize("policy", ["mlp", "attn", "full", "offload"])
def test_recomputing_gives_the_same_bits_behind_shared_prompts(policy: Any) -> None:
    model = adapted()
    fused = fuse(model)
    _, expected = learn(model, one_step())
    fused.set_recompute([policy, "none"])
    _, found = learn(model, one_step())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
