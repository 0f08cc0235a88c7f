"""Memory of the GPU as torch's allocator takes it, and the order of its streams."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from lit_qlora.quantize import QuantizedLinear
from lit_qlora.settings import OPTIMIZERS, OptimizerConfig, Scheme, TrainConfig
from lit_qlora.train.optim import make_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = """
import torch
from lit_qlora.device import let_segments_grow
let_segments_grow()
torch.cuda.is_available()
kept = torch.empty(2**26, device="cuda")
print([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()])
"""


@pytest.mark.parametrize(("users", "grow"), [({}, True), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, False)])
def test_segments_grow_unless_the_user_has_settings_of_the_allocator(users: dict[str, str], grow: bool) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if name not in names} | users
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"[{grow}]"


@pytest.mark.parametrize("scheme", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.int8"])
def test_a_weight_that_another_stream_still_writes_is_quantised_when_it_is_written(scheme: Scheme) -> None:
    weight = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    expected = QuantizedLinear(weight, None, scheme)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
        torch.cuda._sleep(100_000_000)  # 50 ms, for which the host does not wait
        late = torch.zeros_like(weight).copy_(weight)
        layer = QuantizedLinear(late, None, scheme)
        late.zero_()  # which must not come first
    torch.cuda.synchronize()
    for name, tensor in expected.named_buffers():
        assert torch.equal(layer.get_buffer(name), tensor), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_on_another_stream_read_gradients_when_they_are_there(name: str) -> None:
    def learn() -> torch.Tensor:
        parameter = nn.Parameter(torch.linspace(-1, 1, 2**20, device="cuda").view(1024, 1024))
        optimizer = make_optimizer([("a", parameter)], OptimizerConfig(name=name), TrainConfig(learning_rate=0.1))
        for step in range(4):
            parameter.grad = torch.zeros_like(parameter)
            torch.cuda._sleep(20_000_000)
            parameter.grad.copy_((parameter.detach() + step).sin())
            optimizer.step()
            parameter.grad.zero_()
        return parameter.detach().clone()

    expected = learn()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
        found = learn()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


HOLES = """
import sys
import torch
from lit_qlora.device import lay_end_to_end, let_segments_grow, precede_other_streams
let_segments_grow()
MIB = 2**20
kept = [torch.full((250 * MIB,), 250, dtype=torch.uint8, device="cuda")]  # an embedding, not a small tensor
between = []
for i in range(64):
    between.append(torch.empty(30 * MIB, dtype=torch.uint8, device="cuda"))
    kept.append(torch.full((3 * MIB,), i, dtype=torch.uint8, device="cuda"))
view = kept[5][MIB:]
between.clear()
torch.cuda.empty_cache()
before = torch.cuda.memory_reserved()
if sys.argv[1] == "own stream":
    precede_other_streams()  # as runs with experts do before
lay_end_to_end([*kept, view])
print(before > 64 * 19 * MIB, torch.cuda.memory_reserved() < (250 + 64 * 3 + 3 * 20) * MIB)
print(all(bool((tensor == value).all()) for tensor, value in zip(kept, [250, *range(64)])))
kept[5].zero_()
print(not view.any())
"""


@pytest.mark.parametrize("stream", ["default stream", "own stream"])
def test_weights_laid_end_to_end_keep_their_values_and_views_and_leave_no_holes(stream: str) -> None:
    said = subprocess.run([sys.executable, "-c", HOLES, stream], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True"] * 4
