"""Processes that read a checkpoint together hold the bytes that one would hold."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint import checkpoint, safetensors_io
from lit_qlora.checkpoint.checkpoint import load_stored
from lit_qlora.errors import CheckpointError
from lit_qlora.quantize import SCHEMES, QuantizedLinear, Storage
from lit_qlora.sharded import HostEmbedding, ShardedBase
from tests.conftest import tiny_model, write_checkpoint
from tests.train.test_parallel import loopback, together

__all__ = ["loopback"]
MIXTURE = {"family": "qwen3_moe", "qk_norm": "head", "n_expert": 4, "n_expert_per_token": 2, "expert_size": 64}
HERE = torch.device("cpu")


def parts_of(layer: Any, like: Any) -> dict[str, torch.Tensor]:
    """The buffers of a layer as bytes; its scales are decoded where those of `like` are."""
    if not isinstance(layer, QuantizedLinear):
        return {"packed": layer.weight.detach().flatten().view(torch.uint8)}
    if layer.absmax.dtype != like.absmax.dtype if layer.scheme != "none" else False:
        layer.decode_scales()
    found = {name: getattr(layer, name) for name in layer.PARTS if hasattr(layer, name)}
    return {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in found.items()}


def different(one: Any, whole: Any) -> list[str]:
    """Names of the buffers in blocks that are not the same to the bit."""
    found = []
    for i, block in enumerate(one.blocks):
        one.gathers.need(i)
        for path, layer in block.named_modules():
            if isinstance(layer, QuantizedLinear):
                mine, theirs = parts_of(layer, layer), parts_of(whole.blocks[i].get_submodule(path), layer)
                found += [f"{i}.{path}.{name}" for name in theirs if not torch.equal(mine[name], theirs[name])]
    return found


FEW = [("bnb.nf4-dq", 3, MIXTURE)]
ALL = [(scheme, 2, changes) for scheme in SCHEMES for changes in ({}, MIXTURE)]


@pytest.mark.parametrize(
    ("scheme", "ranks", "changes"), [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)]
)
def test_the_bytes_of_all_shares_are_those_of_the_whole_base(
    tmp_path: Path, scheme: str, ranks: int, changes: dict[str, Any]
) -> None:
    directory = write_checkpoint(tmp_path / "base", tiny_model(**changes))
    storage = Storage(torch.bfloat16, scheme)  # type: ignore[arg-type]

    def work(fabric: Any) -> tuple[list[str], bool]:
        model = load_stored(directory, storage, HERE, sharded=True)
        bad = different(model, load_stored(directory, storage, HERE))
        return bad, isinstance(model.gathers, ShardedBase) and not model.gathers.differs()

    assert together(tmp_path, work, ranks) == [([], True)] * ranks


def test_each_process_reads_its_part_of_the_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "base", tiny_model(n_layer=4))

    def work(fabric: Any) -> set[str]:
        names, read = set(), safetensors_io.read_tensor

        def noted(path: Path, name: str) -> torch.Tensor:
            names.add(name)
            return read(path, name)

        monkeypatch.setattr(safetensors_io, "read_tensor", noted)
        load_stored(directory, Storage(), HERE, sharded=True)
        return names

    one, other = together(tmp_path, work)
    assert {name for name in one & other if ".attn." in name or ".mlp." in name} == set()
    sizes = {name: spec.numel() for name, spec in checkpoint.open_weights(directory).specs.items()}
    in_blocks = [sum(sizes[name] for name in names if name.startswith("blocks.")) for names in (one, other)]
    assert in_blocks[0] == pytest.approx(in_blocks[1], rel=0.1)


def test_an_embedding_in_host_memory_gives_the_same_rows() -> None:
    plain, tokens = torch.nn.Embedding(9, 4).bfloat16(), torch.randint(0, 9, (2, 5))
    assert torch.equal(HostEmbedding(plain.weight)(tokens), plain(tokens))


def test_an_element_that_is_not_finite_ends_all_processes_with_the_same_message(tmp_path: Path) -> None:
    model = tiny_model()
    model.blocks[0].mlp.down.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator, index]
    directory = write_checkpoint(tmp_path / "base", model)

    def work(fabric: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_stored(directory, Storage(), HERE, sharded=True)
        return str(caught.value)

    one, other = together(tmp_path, work)
    assert "blocks.0.mlp.down.weight: 1" in one
    assert one == other
