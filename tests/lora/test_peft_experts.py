"""Adapters on experts, which transformers stacks: PEFT computes with ours what we compute, and we with PEFT's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.families import FAMILIES, their_module
from lit_qlora.errors import CheckpointError
from lit_qlora.lora.adapter import our_tensors, read_adapter, save_state
from lit_qlora.lora.layer import lora_state
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.lora.peft_experts import Stacks
from lit_qlora.lora.peft_layout import check_layers
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import LoRAConfig
from tests.conftest import tiny_config
from tests.lora.test_adapter import TOKENS, ours_in_peft, theirs_in_ours
from tests.reference import CASES, hugging_face_model

peft = pytest.importorskip("peft")
SLOW = pytest.mark.slow
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:UserWarning"),
]
QUICK = ("gpt_oss", "deepseek_v3", "qwen3_moe", "mixtral", "granitemoe")
"""Families that stack experts in their files or not, alternating or not, with names and MLPs of their own."""


def of_family(family: str) -> ModelConfig:
    """A configuration of a family, with experts where it has them."""
    return tiny_config(family=family, experts_beside=family == "gemma4_text")


WITH_EXPERTS = [
    case if family in QUICK else pytest.param(case, marks=SLOW)
    for family, case in {family: case for case, (family, _) in reversed(CASES.items())}.items()
    if family not in ("minicpm3", "youtu", "afmoe", "granitemoehybrid") and Stacks.of(of_family(family), LoRAConfig())
]
WITH_EXPERTS.append(pytest.param("granitemoehybrid-experts", marks=SLOW))
"""A case of each family with experts. minicpm3 and youtu have DeepSeek's attention alone; PEFT 0.21 takes the gate of
afmoe's attention for an expert's, see test_further_families."""
ROUTED = [
    case if case == "mixtral" or not isinstance(case, str) else pytest.param(case, marks=SLOW) for case in WITH_EXPERTS
]
"""The same; the quick one has other names in memory than in its files."""
MIXED = "qwen3_moe-dense-layers"
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
OUTPUT = r".*self_attn\.(o|out)_proj"
RANKS: dict[str, Any] = {
    "rank_pattern": {"mlp.experts.[0-9].down": 2, "gate": 3},
    "alpha_pattern": {"mlp.experts.[0-9].down": 6.0, "gate": 9.0},
}
SMALL: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 40}


@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_peft_computes_the_same_with_experts_of_other_ranks_than_the_rest(case: str, tmp_path: Path) -> None:
    ours_in_peft(case, ("all",), tmp_path, **RANKS)


def test_peft_computes_the_same_with_some_blocks_and_mlps_beside_experts(tmp_path: Path) -> None:
    ours_in_peft(MIXED, ("mlp",), tmp_path, last_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"rslora": True}, {"last_layers": 1}, {"first_layers": 1}], ids=str)
@pytest.mark.parametrize("case", [*WITH_EXPERTS, MIXED])
def test_peft_computes_the_same_with_every_variant(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours_in_peft(case, ("all",), tmp_path, **settings)


@pytest.mark.parametrize("case", ROUTED)
def test_an_adapter_with_one_a_for_gate_and_up_is_pefts_to_the_bit(case: str, tmp_path: Path) -> None:
    ours_in_peft(case, ("mlp",), tmp_path / "ours", tied=True)
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=OUTPUT, target_parameters=BOTH)
    theirs_in_ours(case, config, tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs/adapter")
    model = ModelConfig.load(tmp_path / "theirs/base")
    assert read.config.tied
    facts = {"base": {"name": "x", "sha256": "y"}}
    save_state(tmp_path / "again", our_tensors(read, model), model, read.config, None, facts)
    back, first = (read_adapter(folder).peft_tensors for folder in (tmp_path / "again", tmp_path / "theirs/adapter"))
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())
    assert not any(back[name].any() for name in back.keys() - first.keys())  # of MLPs that are no experts


@pytest.mark.parametrize("case", ROUTED)
def test_peft_computes_the_same_with_routers_that_learn(case: str, tmp_path: Path) -> None:
    ours_in_peft(case, ("router", "query"), tmp_path, rank_pattern={"router": 2})


@pytest.mark.parametrize("case", ROUTED)
def test_we_compute_the_same_with_routers_that_peft_trained(case: str, tmp_path: Path) -> None:
    family = CASES[case][0]
    ours = "blocks.1.beside.mlp.router" if family == "gemma4_text" else "blocks.1.mlp.router"
    router, _ = their_module(ours, FAMILIES[family])
    parameters = [f"{router.partition('layers.1.')[2]}.weight", BOTH[1]]
    theirs_in_ours(case, peft.LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=parameters), tmp_path)


def of_parameters(parameters: list[str]) -> Any:
    """An adapter of PEFT on stacked experts, with ranks and scales of their own."""
    return peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=OUTPUT,
        target_parameters=[parameter.removeprefix("mlp.") for parameter in parameters],  # Gemma 4 has them elsewhere
        rank_pattern={"gate_up_proj": 2},
        alpha_pattern={r".*\.down_proj": 5},
    )


@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_we_compute_the_same_with_pefts_adapter_of_stacked_experts(case: str, tmp_path: Path) -> None:
    theirs_in_ours(case, of_parameters(BOTH), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [BOTH[:1], BOTH[1:], ["gate_up_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_we_compute_the_same_with_an_adapter_of_either_parameter(
    case: str, parameters: list[str], tmp_path: Path
) -> None:
    theirs_in_ours(case, of_parameters(parameters), tmp_path)


def test_the_names_of_single_experts_that_peft_turns_into_parameters_are_understood(tmp_path: Path) -> None:
    theirs_in_ours("mixtral", peft.LoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"]), tmp_path)


def test_parameters_of_plain_mlps_are_understood(tmp_path: Path) -> None:
    parameters = [*BOTH, "mlp.gate_proj.weight", "mlp.shared_experts.down_proj.weight"]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=parameters, rank_pattern={"gate_proj.weight": 2})
    theirs_in_ours("deepseek_v3", config, tmp_path)


def written(folder: Path, model: ModelConfig, **changes: Any) -> tuple[dict[str, Tensor], Path]:
    """An adapter of stacked experts as PEFT writes it."""
    torch.manual_seed(3)
    e, f, experts = model.n_embd, model.expert_size, model.n_expert
    base = "base_model.model.model.layers.{}.mlp.experts"
    shapes = {"base_layer.lora_A": (experts * 2, e), "base_layer.lora_B": (2 * f, 2 * experts)}
    shapes |= {"lora_A": (experts * 2, f), "lora_B": (e, 2 * experts)}
    tensors = {
        f"{base.format(i)}.{name}.weight": torch.randn(shape)
        for i in range(model.n_layer)
        for name, shape in shapes.items()
    }
    write(folder, tensors, {"r": 2, "lora_alpha": 4, "target_parameters": BOTH, **changes})
    return tensors, folder


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_the_linear_layers_that_unsloth_makes_of_experts_are_the_stacked_parameters(tmp_path: Path) -> None:
    """In 4 bit, unsloth_zoo/temporary_patches/gpt_oss.py has a list of linear layers for each parameter."""
    model = tiny_config(family="gpt_oss", ffn="swiglu_clamped", **SMALL)
    tensors, folder = written(tmp_path / "stacked", model)
    expected, single = our_tensors(read_adapter(folder), model), {}
    for name, tensor in tensors.items():
        module, _, part = name.partition(".lora_")
        kind = "gate_up_projs" if "base_layer" in module else "down_projs"
        for e in range(3):  # the last one has no adapter
            own = tensor[2 * e : 2 * e + 2] if part.startswith("A") else tensor[:, e::4]
            single[f"{module.removesuffix('.base_layer')}.{kind}.{e}.lora_{part}"] = own
    router = {f"base_model.model.model.layers.0.mlp.router.linear.lora_{x}.weight" for x in "AB"}
    single |= {name: torch.ones((2, model.n_embd) if "_A" in name else (4, 2)) for name in router}
    folder = tmp_path / "single"
    write(folder, single, {"r": 2, "lora_alpha": 4, "target_modules": "(.*projs.*|linear)"})
    read = read_adapter(folder)
    found = our_tensors(read, model)
    assert read.config.tied
    assert set(read.config.targets) == {"mlp", "router"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if ".experts.3." not in name)
    assert not any(found[name].any() for name in expected if ".experts.3." in name)
    assert found["blocks.0.mlp.router.lora_a"].all()


def test_parameters_of_some_blocks_as_the_recipes_of_trl_name_them_are_understood(tmp_path: Path) -> None:
    model = tiny_config(family="qwen3_moe", **SMALL)
    tensors = written(tmp_path / "all", model)[0]
    some = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    write(tmp_path / "some", some, {"r": 2, "lora_alpha": 4, "target_parameters": [f"1.mlp.{name}" for name in BOTH]})
    found = our_tensors(read_adapter(tmp_path / "some"), model)
    expected = our_tensors(read_adapter(tmp_path / "all"), model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items() if name.startswith("blocks.1."))
    assert not any(tensor.any() for name, tensor in found.items() if name.startswith("blocks.0."))


def test_parameters_that_no_family_here_has_are_refused_by_name(tmp_path: Path) -> None:
    tensors = written(tmp_path / "all", tiny_config(family="qwen3_moe", **SMALL))[0]
    write(tmp_path / "a", tensors, {"r": 2, "lora_alpha": 4, "target_parameters": ["experts.up_proj"]})
    with pytest.raises(CheckpointError, match=r"target_parameters = \['experts.up_proj'\], which is not understood"):
        read_adapter(tmp_path / "a")


def test_inputs_and_outputs_that_peft_18_exchanged_are_put_back(tmp_path: Path) -> None:
    model = tiny_config(family="qwen3_moe", **SMALL)
    tensors, folder = written(tmp_path / "new", model)
    old = {}
    for name, tensor in tensors.items():
        twin = name.replace("lora_A", "?").replace("lora_B", "lora_A").replace("?", "lora_B")
        experts = tensors[twin].unflatten(0, (4, 2)).permute(2, 1, 0) if "lora_B" in name else None
        # A of each expert is the transposed B, and B the transposed A.
        old[name] = (
            experts.flatten(1)
            if experts is not None
            else tensors[twin].unflatten(1, (2, 4)).permute(2, 1, 0).flatten(0, 1)
        )
        assert old[name].shape[-1] != tensor.shape[-1] or "lora_B" in name
    write(tmp_path / "old", old, json.loads((folder / "adapter_config.json").read_text()))
    new, back = (our_tensors(read_adapter(tmp_path / name), model) for name in ("new", "old"))
    assert new.keys() == back.keys()
    assert all(torch.equal(new[name], back[name]) for name in new)


def test_a_square_layer_of_an_unknown_peft_is_refused(tmp_path: Path) -> None:
    model = tiny_config(family="qwen3_moe", **SMALL | {"expert_size": tiny_config().n_embd})
    folder = written(tmp_path / "a", model)[1]
    with pytest.raises(
        CheckpointError, match=r"has as many inputs as outputs, and adapter_config.json lacks peft_version"
    ):
        our_tensors(read_adapter(folder), model)
    new, old = (
        our_tensors(read_adapter(written(tmp_path / version, model, peft_version=version)[1]), model)
        for version in ("0.19.1", "0.18.0")
    )
    name = "blocks.0.mlp.experts.1.down.lora_a"
    assert new[name].shape == old[name].shape
    assert not torch.equal(new[name], old[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "base_layer.lora_A.weight adapts experts, but target_param"),
        ({"target_parameters": None}, "target_parameters in adapter_config.json names none of their parameters"),
        ({"target_parameters": ["mlp.experts.gate_up_proj_bias"]}, "uses target_parameters = .*_bias"),
        ({"r": 3}, "has rank 8, but adapter_config.json says 3"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_explain_the_tensors_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "a", tiny_config(family="qwen3_moe", **SMALL), **changes)[1]
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder)


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", tiny_config(family="qwen3_moe", **SMALL))[1]
    with pytest.raises(CheckpointError, match=r"gate_up_proj in blocks.0 has shapes \(8, \d+\) and .*3 experts of"):
        our_tensors(read_adapter(folder), tiny_config(family="qwen3_moe", **SMALL | {"n_expert": 3}))


@pytest.mark.parametrize("case", ROUTED)
def test_routers_that_peft_trained_as_a_whole_compute_the_same_here_and_again_in_peft(
    case: str, tmp_path: Path
) -> None:
    family = CASES[case][0]
    path = "blocks.1.beside.mlp.router" if family == "gemma4_text" else "blocks.1.mlp.router"
    router, _ = their_module(path, FAMILIES[family])
    name = router.partition("layers.1.")[2]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=OUTPUT, modules_to_save=[name])
    theirs, ours = theirs_in_ours(case, config, tmp_path)
    read = read_adapter(tmp_path / "adapter")
    assert read.config.rank(path) == ours.config.n_expert
    save_state(
        tmp_path / "again", lora_state(ours), ours.config, read.config, None, {"base": {"name": "", "sha256": ""}}
    )
    again = peft.PeftModel.from_pretrained(hugging_face_model(tmp_path / "base", case), tmp_path / "again").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    merge_checkpoint(read, tmp_path / "base", tmp_path / "merged")
    merged = load_model(tmp_path / "merged").get_parameter(f"{path}.weight")
    torch.testing.assert_close(merged, theirs.base_model.model.get_submodule(router).weight, rtol=0, atol=1e-7)


def with_whole(folder: Path, model: ModelConfig, name: str, weight: Tensor) -> Path:
    """An adapter of PEFT that has this tensor of block 0 as a whole."""
    tensors = written(folder, model, modules_to_save=["gate"])[0]
    write(
        folder,
        tensors | {f"base_model.model.model.layers.0.{name}": weight},
        json.loads((folder / "adapter_config.json").read_text()),
    )
    return folder


def test_what_a_routers_adapter_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_config(family="qwen3_moe", **SMALL)
    base = GPT(model).state_dict().__getitem__
    for name, shape, message in (
        (
            "mlp.shared.weight",
            (4, model.n_embd),
            "modules_to_save holds .*layers.0.mlp.shared.weight, and is understood",
        ),
        ("mlp.gate.weight", (5, model.n_embd), r"gate.weight has shape \(5, \d+\), expected \(4, "),
        (
            "mlp.gate.weight",
            (4,),
            "modules_to_save holds .*gate.weight, and is understood for the embeddings and routers",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            our_tensors(read_adapter(with_whole(tmp_path / "a", model, name, torch.ones(shape))), model, base)
    model = tiny_config(family="gpt_oss", ffn="swiglu_clamped", router_bias=True, **SMALL)
    folder = with_whole(tmp_path / "b", model, "mlp.router.weight", torch.ones(4, model.n_embd))
    tensors = load_file(folder / "adapter_model.safetensors")
    bias = {"base_model.model.model.layers.0.mlp.router.bias": torch.zeros(4)}
    write(folder, tensors | bias, json.loads((folder / "adapter_config.json").read_text()))
    base = GPT(model).state_dict().__getitem__
    assert our_tensors(read_adapter(folder), model, base)["blocks.0.mlp.router.lora_b"].equal(torch.eye(4))
    bias = {name: tensor + 1 for name, tensor in bias.items()}
    write(folder, tensors | bias, json.loads((folder / "adapter_config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"has another model.layers.0.mlp.router.bias than .*its weight alone"):
        our_tensors(read_adapter(folder), model, base)


def test_what_no_stack_can_hold_is_refused_before_it_is_trained() -> None:
    def check(family: str, **settings: Any) -> str:
        return check_layers(tiny_config(family=family, **SMALL), LoRAConfig(targets=("mlp",), **settings))

    with pytest.raises(CheckpointError, match="PEFT knows no DoRA of stacks"):
        check("gpt_oss", dora=True)
    with pytest.raises(CheckpointError, match=r"one parameter in Hugging Face's model .gate_up_proj., with one scale"):
        check("qwen3_moe", alpha_pattern={"gate": 3.0})
    assert "it refuses this adapter" in check("qwen3_moe", dora=True)
    assert check("gpt_oss") == check("deepseek_v3", rslora=True) == ""
