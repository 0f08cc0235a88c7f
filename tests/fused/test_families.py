"""Every family takes the fast path and has the gradients of the plain path."""

import pytest
import torch

from lit_qlora.fused import fuse, why_not
from lit_qlora.fused.support import unhandled
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.model.gpt import IGNORE
from lit_qlora.settings import LoRAConfig
from tests.fused.test_fused import DEVICE, assert_equal, gradients
from tests.model.test_switches import config_of, model_of
from tests.reference import CASES

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
    # Triton's interpreter computes exp(-x) for a sigmoid whose x is very negative, and then 1 / inf.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
REPRESENTATIVE = [
    *(
        "gemma2",
        "gpt_oss",
        "llama-biases",
        "qwen3",
        "gemma3_text",
        "olmo2",
        "granite",
        "glm",
        "gpt2",
        "phi-qk-norm",
        "stablelm",
        "cohere",
        "arcee",
    ),
    *(
        "mixtral",
        "qwen3_moe-dense-layers",
        "apertus",
        "hunyuan",
        "ministral3-window",
        "olmo",
        "smollm3-window",
        "falcon-40b",
        "phi3-longrope",
        "llama4",
    ),
]
"""Between them they have all that the fast path handles; `make test-all` goes through every case."""


def test_the_kernels_compute_every_case() -> None:
    assert {case: reason for case in CASES if (reason := unhandled(config_of(case)))} == {}


QUICK = [(case, "none") for case in REPRESENTATIVE] + [
    ("olmo2", "attn"),
    ("gemma3_text", "full"),
    ("gemma4", "full"),
    ("qwen3_next", "full"),
    ("phi-qk-norm", "full"),
]


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        pytest.param(case, policy, marks=[] if (case, policy) in QUICK else pytest.mark.slow)
        for case in CASES
        for policy in ("none", "attn", "full")
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_path(case: str, policy: str) -> None:
    model_of.cache_clear()  # adapters are added in place
    model = model_of(case)
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=4, alpha=8, targets="all", dropout=0.0))
    for tensor in lora_state(model).values():
        torch.nn.init.normal_(tensor, std=0.1)
    model.to(DEVICE).train()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 96, (1, 26), generator=generator)
    lengths = torch.tensor([9, 13, 4])  # two documents, of which one outgrows the windows, and padding
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    segments = torch.tensor([0, 1, -1]).repeat_interleave(lengths)[None]
    labels = tokens.roll(-1, 1)
    labels[:, -4:] = labels[:, 2:4] = IGNORE
    arguments = [tensor.to(DEVICE) for tensor in (tokens, labels, torch.rand(1, 26), positions, segments)]
    expected = gradients(model, *arguments)
    assert why_not(model) == ""
    fused = fuse(model)
    fused.set_recompute([policy] * len(fused.blocks))  # type: ignore[list-item]
    loss, found = gradients(model, *arguments)
    of_idle_experts = {name: found.pop(name) for name in found.keys() - expected[1].keys()}
    assert not any(gradient.any() for gradient in of_idle_experts.values())  # the plain path has none for them
    assert_equal((loss, found), expected)
    model_of.cache_clear()
