"""On a GPU in bf16 the fast path of every family is about as near to float64 as the plain path."""

import copy
import statistics

import pytest
import torch
from torch import nn

from lit_qlora.fused import fuse, why_not
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.model.gpt import IGNORE
from lit_qlora.settings import LoRAConfig
from tests.gpu.test_fused_gpu import errors, gradients, in_float64
from tests.model.test_switches import model_of
from tests.reference import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", CASES)
def test_errors_are_about_those_of_the_plain_path(case: str) -> None:
    """Tiny models: a choice of experts that one rounding turns over can decide about a tensor, so medians count."""
    model_of.cache_clear()  # adapters are added in place
    try:
        model = model_of(case).to("cuda", torch.bfloat16)
    except ValueError as error:  # an older transformers
        pytest.skip(str(error).partition(".")[0])
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=16, alpha=16, targets="all", dropout=0.0))
    for tensor in lora_state(model).values():
        nn.init.normal_(tensor, std=0.1)
    model.train()
    assert why_not(model) == ""
    exact_model, plain_model = in_float64(model), copy.deepcopy(model)
    fuse(model)
    ratios: list[float] = []
    for seed in range(4):
        tokens = torch.randint(0, 96, (1, 26), generator=torch.Generator().manual_seed(seed))
        lengths = torch.tensor([9, 13, 4])  # two documents, and padding
        positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
        segments = torch.tensor([0, 1, -1]).repeat_interleave(lengths)[None]
        labels = tokens.roll(-1, 1)
        labels[:, -4:] = labels[:, 2:4] = IGNORE
        arguments = [one.to("cuda") for one in (tokens, labels, torch.rand(1, 26), positions, segments)]
        exact_loss, exact = gradients(exact_model, *arguments)
        plain = gradients(plain_model, *arguments)[1]
        loss, fast = gradients(model, *arguments)
        assert abs(loss - exact_loss) < 0.05 * exact_loss
        known = {name: gradient for name, gradient in exact.items() if gradient.any() and name in plain}
        ratios += [a / max(b, 1e-6) for a, b in zip(errors(fast, known), errors(plain, known), strict=True)]
    model_of.cache_clear()
    assert statistics.median(ratios) < 1.2, statistics.median(ratios)
