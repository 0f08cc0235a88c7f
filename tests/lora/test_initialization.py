"""Where adapters start is what the papers say, and what is saved works on the base as it was published."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.lora.adapter import attach_adapter, read_adapter, settle, start_adapters
from lit_qlora.lora.initialization import EXACT, pissa
from lit_qlora.lora.layer import LoRALinear, add_lora, lora_state
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import QuantizedLinear, frozen_weight
from lit_qlora.settings import FinetuneConfig, LoRAConfig, Scheme
from tests.conftest import tiny_model, write_checkpoint
from tests.lora.test_adapter import save
from tests.reference import hugging_face_model

TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))
SCHEMES: list[Scheme] = ["bnb.nf4", "bnb.nf4-dq", "bnb.int8"]


def trained_like(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A random matrix whose singular values fall, as those of trained weights do."""
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), full_matrices=False)
    return u * torch.logspace(0, -2, u.size(1)) @ vh


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of such weights."""
    model = tiny_model()
    for i, module in enumerate(module for module in model.modules() if isinstance(module, nn.Linear)):
        module.weight.data = trained_like(tuple(module.weight.shape), seed=i)  # type: ignore[arg-type]
    return write_checkpoint(tmp_path / "base", model)


def started(base: Path, config: LoRAConfig, scheme: Scheme = "none", head: bool = False) -> GPT:
    model = load_model(base, quantize=scheme, quantize_head=head)
    torch.manual_seed(0)
    add_lora(model, config)
    start_adapters(model, config, base)
    return model.eval()


def adapters(model: GPT) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def effective(layer: LoRALinear) -> Tensor:
    return frozen_weight(layer.base) + layer.scale * layer.lora_b.detach() @ layer.lora_a.detach()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_inside_the_weight_changes_nothing(init: Any, rslora: bool, dora: bool, base: Path) -> None:
    config = LoRAConfig(r=4, init=init, targets=("all", "head"), rslora=rslora, dora=dora)
    with torch.no_grad():
        expected = load_model(base).eval()(TOKENS)
        torch.testing.assert_close(started(base, config)(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_may_start_inside_its_weight(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "tied", tiny_model(tied_head=True))
    for scheme, head in (("none", False), ("bnb.int8", True)):
        model = started(base, LoRAConfig(r=4, init="pissa", targets="head"), scheme, head)  # type: ignore[arg-type]
        assert torch.equal(model.embed.weight, load_model(base).embed.weight)
        torch.testing.assert_close(effective(adapters(model)["head"]), model.embed.weight.detach(), atol=0.02, rtol=0)


def test_pissa_begins_with_the_largest_singular_values(base: Path) -> None:
    layers = adapters(started(base, LoRAConfig(r=4, alpha=12, init="pissa")))
    original = load_model(base)
    for path, layer in layers.items():
        weight = original.get_parameter(f"{path}.weight").detach()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        product = layer.scale * layer.lora_b.detach() @ layer.lora_a.detach()
        torch.testing.assert_close(product, u[:, :4] * s[:4] @ vh[:4], rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_norm(frozen_weight(layer.base), 2) == pytest.approx(float(s[4]), rel=1e-3)
        torch.testing.assert_close(layer.lora_a.detach().norm(dim=1), layer.lora_b.detach().norm(dim=0))


def test_olora_begins_with_an_orthonormal_b(base: Path) -> None:
    for layer in adapters(started(base, LoRAConfig(r=4, init="olora"))).values():
        torch.testing.assert_close(layer.lora_b.T @ layer.lora_b, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_and_b_are_those_of_peft(init: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    hugging_face_model(tmp_path, "llama-gqa")
    convert_hf_checkpoint(tmp_path, tmp_path)
    ours = adapters(started(tmp_path, LoRAConfig(r=4, alpha=12, init=init, targets="projection")))
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["o_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(hugging_face_model(tmp_path, "llama-gqa"), config).base_model.model.model.layers
    for i, layer in enumerate(ours.values()):
        module = theirs[i].self_attn.o_proj
        expected = module.lora_B["default"].weight @ module.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_b @ layer.lora_a, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.base.weight, module.base_layer.weight, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("init", "share"), [("pissa", 0.95), ("loftq", 0.95)])
def test_the_start_is_nearer_to_the_weight_than_plain_quantisation(
    init: Any, share: float, scheme: Scheme, base: Path
) -> None:
    layers = adapters(started(base, LoRAConfig(r=8, init=init, targets="all"), scheme))
    original, plain = load_model(base), load_model(base, quantize=scheme)
    for path, layer in layers.items():
        weight = original.get_parameter(f"{path}.weight").detach()
        lost = (weight - frozen_weight(plain.get_submodule(path))).norm()
        assert (weight - effective(layer)).norm() < share * lost, path


def test_with_quantisation_pissa_quantises_what_is_left(base: Path) -> None:
    layer = next(iter(adapters(started(base, LoRAConfig(r=4, init="pissa"), "bnb.nf4")).values()))
    weight = load_model(base).blocks[0].attn.query.weight.detach()  # type: ignore[union-attr]
    rest = weight - layer.scale * layer.lora_b.detach() @ layer.lora_a.detach()
    assert torch.equal(frozen_weight(layer.base), QuantizedLinear(rest, None, "bnb.nf4").dequantize())


def test_loftq_comes_nearer_with_every_step(base: Path) -> None:
    def distance(steps: int) -> float:
        layers = adapters(started(base, LoRAConfig(r=8, init="loftq", targets="all", loftq_steps=steps), "bnb.nf4"))
        original = load_model(base)
        return sum(
            float((original.get_parameter(f"{path}.weight").detach() - effective(layer)).norm())
            for path, layer in layers.items()
        )

    assert distance(5) < distance(2) < distance(1)


def test_loftq_of_one_step_leaves_the_quantised_base_as_it_is(base: Path) -> None:
    plain = load_model(base, quantize="bnb.nf4")
    for path, layer in adapters(started(base, LoRAConfig(r=4, init="loftq"), "bnb.nf4")).items():
        assert torch.equal(frozen_weight(layer.base), frozen_weight(plain.get_submodule(path)))


def test_loftq_of_a_layer_that_is_not_quantised_changes_nothing(base: Path) -> None:
    model = started(base, LoRAConfig(r=4, init="loftq", targets=("query", "head")), "bnb.nf4")
    assert not adapters(model)["head"].lora_b.any()
    with pytest.raises(UsageError, match=r"loftq makes up for the error of quantisation, so it needs --quantize"):
        FinetuneConfig(lora=LoRAConfig(init="loftq"))


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_start_is_the_same_every_time(init: Any, base: Path) -> None:
    one, other = (started(base, LoRAConfig(r=4, init=init), "bnb.nf4") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(lora_state(one).values(), lora_state(other).values(), strict=True))
    assert torch.equal(one(TOKENS), other(TOKENS))


def test_singular_values_of_a_large_matrix_are_found_by_iteration() -> None:
    torch.manual_seed(0)
    weight = trained_like((EXACT + 6, EXACT + 16))
    before = torch.get_rng_state()
    rest, a, b = pissa(weight, 8, 1.0)
    assert torch.equal(torch.get_rng_state(), before)
    u, s, vh = torch.linalg.svd(weight)
    best = (weight - u[:, :8] * s[:8] @ vh[:8]).norm()
    assert torch.equal(rest, weight - b @ a)
    assert rest.norm() < 1.0005 * best  # singular values this close have no sharp directions


def test_a_rank_that_the_weight_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"init pissa: blocks.0.attn.key is 32 x 64, so it has no 33 directions"):
        add_lora(tiny_model(), LoRAConfig(r=33, init="pissa", targets="key"))


def disturb(model: GPT) -> None:
    """As if it had been trained."""
    torch.manual_seed(5)
    for tensor in lora_state(model).values():
        tensor.add_(0.03 * torch.randn_like(tensor))


@pytest.mark.parametrize(
    ("init", "rslora", "dora"),
    [
        pytest.param(
            init, rslora, dora, marks=[] if (init == "pissa") + rslora + dora in (1, 3) else [pytest.mark.slow]
        )
        for init in ("pissa", "olora")
        for rslora in (False, True)
        for dora in (False, True)
    ],
)
def test_what_is_saved_is_a_change_of_the_published_base(
    init: Any, rslora: bool, dora: bool, base: Path, tmp_path: Path
) -> None:
    config = LoRAConfig(r=4, alpha=12, init=init, targets="all", rslora=rslora, dora=dora, rank_pattern={"down": 6})
    model = started(base, config)
    disturb(model)
    save(tmp_path / "final", model, config, base)
    adapter = read_adapter(tmp_path / "final")
    assert (adapter.config.r, adapter.config.rank("x.down"), adapter.config.init) == (8, 12, "default")
    other = load_model(base)
    attach_adapter(other, adapter, base)
    merge_checkpoint(adapter, base, tmp_path / "merged")
    with torch.no_grad():
        expected = model(TOKENS)
        assert (expected - load_model(base).eval()(TOKENS)).abs().max() > 1e-2
        for found in (other, load_model(tmp_path / "merged")):
            torch.testing.assert_close(found.eval()(TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_trained_on_a_quantised_base_it_is_a_change_of_the_published_one_too(
    init: Any, base: Path, tmp_path: Path
) -> None:
    """The adapter moves the published weights by what the training moved the adapter."""
    config = LoRAConfig(r=4, alpha=12, init=init, targets="all")
    model = started(base, config, "bnb.nf4")
    before = {path: effective(layer) for path, layer in adapters(model).items()}
    disturb(model)
    save(tmp_path / "final", model, config, base)
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged")
    merged, original = load_model(tmp_path / "merged"), load_model(base)
    for path, layer in adapters(model).items():
        moved = merged.get_parameter(f"{path}.weight") - original.get_parameter(f"{path}.weight")
        torch.testing.assert_close(moved.detach(), effective(layer) - before[path], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "settings",
    [{"init": "pissa"}, {"init": "olora", "dora": True}, {"init": "loftq"}, {"init": "loftq", "loftq_steps": 3}],
    ids=str,
)
def test_on_a_base_that_is_quantised_as_in_training_it_is_exactly_what_was_trained(
    settings: dict, scheme: Scheme, base: Path, tmp_path: Path
) -> None:
    config = LoRAConfig(r=4, alpha=12, targets="all", rank_pattern={"key": 2}, **settings)
    model = started(base, config, scheme)
    disturb(model)
    save(tmp_path / "final", model, config, base, quantize=scheme, quantize_head=False, precision="32-true")
    adapter = read_adapter(tmp_path / "final")
    again, other = (load_model(base, quantize=kind) for kind in (scheme, "bnb.fp4"))  # type: ignore[arg-type]
    for one in (again, other):
        attach_adapter(one, adapter, base)
    merge_checkpoint(adapter, base, tmp_path / "merged", base="quantized")
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(again.eval()(TOKENS), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_model(tmp_path / "merged").eval()(TOKENS), expected, rtol=1e-4, atol=1e-4)
        assert (other.eval()(TOKENS) - expected).abs().max() < 1  # a change of the published base, on any base


# Another adapter to start from.


def test_a_run_may_start_from_an_adapter_and_its_settings(base: Path, tmp_path: Path) -> None:
    config = LoRAConfig(r=6, alpha=20, targets=("mlp", "key"), rslora=True, rank_pattern={"down": 3}, last_layers=1)
    model = started(base, config)
    disturb(model)
    save(tmp_path / "first", model, config, base)
    given = LoRAConfig(start=tmp_path / "first", dropout=0.2, r=6)
    found = settle(given, base)
    assert found == dataclasses.replace(config, start=tmp_path / "first", dropout=0.2)
    second = started(base, found)
    assert all(torch.equal(a, b) for a, b in zip(lora_state(model).values(), lora_state(second).values(), strict=True))
    save(tmp_path / "second", second, found, base)
    assert json.loads((tmp_path / "second/manifest.json").read_text())["lora"]["start"] is None


def test_a_run_may_start_from_an_adapter_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = hugging_face_model(tmp_path, "llama-gqa")
    convert_hf_checkpoint(tmp_path, tmp_path)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    model = started(tmp_path, settle(LoRAConfig(start=tmp_path / "adapter"), tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_setting_that_is_not_the_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    config = LoRAConfig(r=6)
    model = started(base, config)
    disturb(model)
    save(tmp_path / "first", model, config, base)
    with pytest.raises(UsageError, match=r"lora.r is 16, but the adapter in .* has 6"):
        settle(LoRAConfig(start=tmp_path / "first", r=16), base)
    with pytest.raises(CheckpointError, match="holds other weights"):
        settle(LoRAConfig(start=tmp_path / "first"), write_checkpoint(tmp_path / "other", tiny_model(seed=9)))
    with pytest.raises(UsageError, match=r"lora.start and lora.init both set"):
        LoRAConfig(start=tmp_path / "first", init="pissa")
