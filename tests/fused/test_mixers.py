"""Delta nets and what is like them by kernels: their documents, a replay of them, and the bytes that they save.

That their losses and gradients are the plain path's is in tests/fused/test_families.py.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.fused import fuse
from lit_qlora.fused.attention import Layout
from lit_qlora.fused.documents import Documents
from lit_qlora.fused.graphs import Graphs
from lit_qlora.fused.kernel_block import mixing_layers
from lit_qlora.fused.memory import FastSizes
from lit_qlora.fused.mixers import ConvMixer, DeltaMixer
from lit_qlora.fused.passes import Pass
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.delta_net import CHUNK, DeltaNet
from lit_qlora.model.short_conv import ShortConv
from tests.conftest import tiny_config
from tests.fused.test_fused import adapted_model, assert_equal, batch, gradients
from tests.fused.test_graphs import Recording
from tests.fused.test_memory import Live

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]
CPU = torch.device("cpu")
DELTA = {"delta_key_heads": 1, "delta_value_heads": 2, "delta_key_size": 16, "delta_value_size": 32}


@pytest.mark.parametrize("lengths", [[5, CHUNK, CHUNK + 1, 1, 3 * CHUNK + 7], [1, 1, 1], [CHUNK], [2 * CHUNK + 3, 0]])
def test_every_token_is_in_one_chunk_of_its_document_and_spare_chunks_are_of_an_empty_one(lengths: list[int]) -> None:
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    found = Documents.of(Layout(1, sum(lengths), max(lengths), ends), CPU)
    assert (found.ends, found.chunks, found.numbers) != (None, None, None)
    bounds = found.ends.tolist()  # type: ignore[union-attr]
    chunks = [(bounds[d] + n * CHUNK, bounds[d + 1]) for d, n in found.chunks.tolist()]  # type: ignore[union-attr]
    tokens = [t for begin, end in chunks for t in range(begin, min(begin + CHUNK, end))]
    assert tokens == list(range(sum(lengths)))
    each = [(d, t) for d, length in enumerate(lengths) for t in [sum(lengths[:d])] * length]
    assert found.numbers.flatten().tolist() == [d for d, _ in each]  # type: ignore[union-attr]
    assert found.firsts.tolist() == [first for _, first in each]


def test_rows_that_are_not_packed_are_a_document_each() -> None:
    found = Documents.of(Layout(2, 3, 3), CPU)
    assert found.firsts.tolist() == [0, 0, 0, 3, 3, 3]
    assert found.numbers is found.ends is found.chunks is None


@pytest.mark.slow
def test_a_replay_reads_the_documents_of_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 1)
    model = adapted_model(n_layer=1, delta_layers=(0,), targets=("value", "projection"), **DELTA)
    batches = []
    for lengths in ([5, 7, 8], [9, 3, 8]):
        segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batches.append((*batch(1, 20), None, positions, segments))
    expected = [gradients(model, *one) for one in batches]
    fused, recording = fuse(model), Recording()
    fused.graphs = Graphs(fused, 128, recording)
    gradients(model, *batches[0])
    for one, other in zip(batches, expected, strict=True):
        assert_equal(gradients(model, *one), other)
    assert (recording.captured, recording.replayed) == (2, 4)


def test_the_planner_counts_what_a_delta_net_saves() -> None:
    config = tiny_config(delta_layers=(0,), **DELTA)
    module = DeltaNet(config)
    mixer = DeltaMixer(module, *map(product_of, mixing_layers(module)))
    planned = FastSizes(config, rank=4, adapted=7, quantized=True)._of_state
    planned -= config.n_embd + CHUNK * config.delta_value_heads  # its input, and what fla-core saves
    assert saved(mixer, 96) == pytest.approx(planned, rel=0.04)


def test_the_planner_counts_what_a_short_convolution_saves() -> None:
    config = tiny_config(conv_layers=(0,))
    module = ShortConv(config)
    mixer = ConvMixer(module, *map(product_of, mixing_layers(module)))
    planned = FastSizes(config, rank=4, adapted=7, quantized=True)._of_state - config.n_embd
    assert saved(mixer, 96) == pytest.approx(planned, rel=0.04)


def product_of(layers: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    weight = torch.cat([layer.weight.detach() for layer in layers]).T  # type: ignore[operator]
    return lambda x: x @ weight


def saved(mixer: DeltaMixer | ConvMixer, tokens: int) -> float:
    """Features that live for each token between the passes."""
    x, live = torch.randn(tokens, 64, requires_grad=True), Live()
    layout = Layout(1, tokens, tokens)
    documents = Documents.of(layout, CPU)
    run = Pass(layout, x, None, None, (None,) * 3, None, None, True, False, documents=documents)  # type: ignore[arg-type]
    with live:
        out = mixer(x, run)
        count = live.bytes
    out.sum().backward()  # and it can be differentiated
    return count / (4 * tokens)
