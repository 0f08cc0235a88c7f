"""The language model inside a model of text and images: the same logits, and the complete model back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lit_qlora.checkpoint import checkpoint
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.families import WRAPPERS, read_config
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.gguf_architectures import check_supported
from lit_qlora.convert.to_gguf import plan_tensors
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError
from lit_qlora.lora.adapter import load_adapter, read_adapter
from lit_qlora.lora.layer import add_lora
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import LoRAConfig
from lit_qlora.settings.lora import Target
from tests.lora.test_adapter import save, trained
from tests.model.test_gpt import token_by_token
from tests.reference import (
    DELTA,
    DELTA_EXPERTS,
    GEMMA4,
    GEMMA4_E,
    GEMMA4_EXPERTS,
    GROUPED,
    LATENT,
    LAYER_TYPES,
    LLAMA4,
    SMALL,
    UNIFIED,
    WIDE_HEADS,
    WINDOWS,
    YARN,
    transformers,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "embed_dim": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
GEMMA4_VISION = {**VISION, "num_key_value_heads": 2, "position_embedding_size": 16, "patch_size": 4}
MROPE = {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
PIXTRAL, CLIP, SIGLIP = (
    {**VISION, "model_type": kind} for kind in ("pixtral", "clip_vision_model", "siglip_vision_model")
)
GRID = {"image_grid_pinpoints": [[28, 28]]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", {**WIDE_HEADS, **WINDOWS, "query_pre_attn_scalar": 24}, VISION, {}),
    "mistral3": ("mistral3", {"model_type": "mistral", **WIDE_HEADS, "sliding_window": None}, PIXTRAL, {}),
    "mistral3-ministral3": (
        "mistral3",
        {"model_type": "ministral3", **WIDE_HEADS, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}},
        PIXTRAL,
        {"tie_word_embeddings": False},
    ),
    "mistral3-mistral4": (
        "mistral3",
        {
            "model_type": "mistral4",
            **LATENT,
            "q_lora_rank": 40,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
        },
        PIXTRAL,
        {"tie_word_embeddings": False},
    ),
    "internvl": (
        "internvl",
        {"model_type": "qwen3", **WIDE_HEADS},
        {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        {"tie_word_embeddings": False},
    ),
    "llava": ("llava", {"model_type": "llama"}, CLIP, {}),
    "llava_next": ("llava_next", {"model_type": "mistral", **GROUPED, "sliding_window": 8}, CLIP, GRID),
    "llava_onevision": ("llava_onevision", {"model_type": "qwen2", **GROUPED}, SIGLIP, GRID),
    "qwen2_vl": ("qwen2_vl", MROPE, {**QWEN_VISION, "hidden_size": 64}, {"tie_word_embeddings": True}),
    "qwen2_5_vl": ("qwen2_5_vl", MROPE, QWEN_VISION, {}),
    "qwen3_vl": ("qwen3_vl", {**MROPE, "head_dim": 16}, QWEN_VISION, {"tie_word_embeddings": True}),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {**MROPE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        QWEN_VISION,
        {},
    ),
    "gemma4": ("gemma4", {**GEMMA4, **GEMMA4_E, "final_logit_softcapping": 5.0, "pad_token_id": 0}, GEMMA4_VISION, {}),
    "gemma4_moe": ("gemma4", {**GEMMA4, **GEMMA4_EXPERTS, "pad_token_id": 0}, GEMMA4_VISION, {}),
    "gemma4_unified": ("gemma4_unified", {**UNIFIED, "pad_token_id": 0}, {"patch_size": 4, "mm_embed_dim": 32}, {}),
    "qwen3_5": ("qwen3_5", {**DELTA, "layer_types": LAYER_TYPES}, QWEN_VISION, {"tie_word_embeddings": True}),
    "qwen3_5_moe": ("qwen3_5_moe", {**DELTA, **DELTA_EXPERTS, "layer_types": LAYER_TYPES}, QWEN_VISION, {}),
    "llama4": ("llama4", LLAMA4, VISION, {}),
    "idefics3": ("idefics3", {"model_type": "llama", **GROUPED}, VISION, {}),
    "smolvlm": ("smolvlm", {"model_type": "llama", **GROUPED}, VISION, {"tie_word_embeddings": True}),
}
"""Case -> wrapper, its text_config, its vision_config, and the rest."""
QUICK = ("gemma3", "mistral3-ministral3", "mistral3-mistral4", "qwen2_5_vl", "qwen3_vl_moe", "smolvlm")
"""The cases that differ from each other in more than the encoder."""
TOKENS = torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(0))


def wrapper_model(directory: Path, case: str) -> Any:
    """A random model of transformers with its processor's files, saved to `directory`."""
    torch.manual_seed(0)
    wrapper, text, vision, more = CASES[case]
    config = transformers.AutoConfig.for_model(wrapper, text_config=SMALL | text, vision_config=vision, **more)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.tie_weights()
    model.save_pretrained(directory)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (directory / name).write_text(f'{{ "of":  "{name}" }}\n')
    return model


def as_published(path: Path) -> None:
    """Turn the experts of Qwen3-VL around, as they are on the hub; transformers reads them either way."""
    weights = load_file(path)
    turned = {name: tensor.mT.contiguous() for name, tensor in weights.items() if ".experts." in name}
    save_file(weights | turned, path, {"format": "pt"})


def as_published_with_more(path: Path, theirs: Any) -> None:
    """Stack the experts of Qwen3.5 as they are on the hub, beside layers that predict further tokens."""
    stacked = {name: parameter.detach() for name, parameter in theirs.named_parameters() if ".experts." in name}
    weights = {name: tensor for name, tensor in load_file(path).items() if ".experts." not in name}
    save_file(weights | stacked | {"mtp.fc.weight": torch.randn(64, 128)}, path, {"format": "pt"})


@pytest.fixture(
    scope="module", params=[case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Theirs, and a directory with hub/ and, converted, ours/."""
    directory = tmp_path_factory.mktemp("wrapper")
    theirs = wrapper_model(directory / "hub", request.param)
    if request.param == "qwen3_vl_moe":
        as_published(directory / "hub/model.safetensors")
    if request.param.startswith("qwen3_5"):
        as_published_with_more(directory / "hub/model.safetensors", theirs)
    if request.param == "gemma4":  # blocks that use the keys of another one have unused ones on the hub
        path, name = directory / "hub/model.safetensors", "model.language_model.layers.5.self_attn.k_proj.weight"
        save_file(load_file(path) | {name: torch.randn(96, 64)}, path, {"format": "pt"})
    convert_hf_checkpoint(directory / "hub", directory / "ours", name=request.param)
    return theirs, directory


def test_text_has_the_logits_of_the_whole_model(models: tuple[Any, Path]) -> None:
    theirs, directory = models
    ours = load_model(directory / "ours").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        for logits in (ours(TOKENS), token_by_token(ours, TOKENS)):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_complete_model_comes_back_bit_for_bit(models: tuple[Any, Path], tmp_path: Path) -> None:
    _, directory = models
    export_hf(directory / "ours", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (directory / "hub", tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for path in directory.glob("hub/*.json"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_newer_spellings_are_read_and_written(models: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, directory = models
    (tmp_path / "hub").mkdir()
    tied = set(theirs.all_tied_weights_keys)
    newer = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items() if name not in tied}
    save_file(newer, tmp_path / "hub/model.safetensors")
    (tmp_path / "hub/config.json").write_bytes((directory / "hub/config.json").read_bytes())
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert load_file(tmp_path / "back/model.safetensors").keys() == newer.keys()
    one, other = (load_file(folder / "ours/lit_model.safetensors") for folder in (directory, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_fits_the_wrapper_in_peft_and_a_merge_exports_the_complete_model(
    models: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, directory = models
    model = load_model(directory / "ours")
    more: tuple[Target, ...] = ("per_layer",) if model.config.per_layer_size else ()
    lora = LoRAConfig(r=4, targets=("query", "value", "projection", *more))
    ours = trained(model, lora).eval()
    save(tmp_path / "adapter", ours, lora, directory / "ours")
    merge_checkpoint(read_adapter(tmp_path / "adapter"), directory / "ours", tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "back")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(whole[1].values()), whole[1]
    fresh = transformers.AutoModelForImageTextToText.from_pretrained(directory / "hub", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    encoders = [
        name
        for name, _ in adapted.named_modules()
        if set(name.split(".")) & set(WRAPPERS[theirs.config.model_type].kept)
    ]
    assert encoders
    assert not any("lora_" in name for name in encoders)
    with torch.no_grad():
        expected = ours(TOKENS)
        assert not torch.allclose(expected, theirs(TOKENS).logits, rtol=1e-2)
        for model in (adapted, whole[0]):
            torch.testing.assert_close(
                model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )
    kept = load_file(directory / "ours" / checkpoint.KEPT)
    assert all(torch.equal(load_file(tmp_path / "back/model.safetensors")[name], kept[name]) for name in kept)


def test_one_adapter_of_gemma_3_fits_both_of_its_classes(tmp_path: Path) -> None:
    theirs = wrapper_model(tmp_path / "hub", "gemma3")
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    lora = LoRAConfig(r=4, targets=("query", "mlp"), train_tokens=(5, 7))
    ours = trained(load_model(tmp_path / "ours"), lora).eval()
    save(tmp_path / "adapter", ours, lora, tmp_path / "ours")
    text = transformers.Gemma3ForCausalLM._from_config(theirs.config.text_config, attn_implementation="eager")
    text.model.load_state_dict(theirs.model.language_model.state_dict())
    for model in (theirs, text.eval()):
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        with torch.no_grad():
            expected = ours(TOKENS)
            torch.testing.assert_close(adapted(TOKENS).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_that_peft_trained_on_either_class_has_the_same_logits_here(alone: bool, tmp_path: Path) -> None:
    theirs = wrapper_model(tmp_path / "hub", "gemma3")
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "hub")
    if alone:
        text = transformers.Gemma3ForCausalLM._from_config(theirs.config.text_config, attn_implementation="eager")
        text.model.load_state_dict(theirs.model.language_model.state_dict())
        theirs = text.eval()
    targets = r"model\.(language_model\.)?layers.*(q|up)_proj"
    adapted = get_peft_model(theirs, LoraConfig(r=4, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "hub")
    add_lora(ours, read_adapter(tmp_path / "adapter").config)
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(TOKENS).logits
        torch.testing.assert_close(ours.eval()(TOKENS), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_text_config_leaves_out_is_what_its_class_assumes(wrapper: str) -> None:
    kinds = {
        "mistral3": ("mistral", "ministral3", "mistral4"),
        "internvl": ("qwen2", "qwen3"),
        "llava": ("llama", "mistral"),
    }
    for kind in kinds.get(wrapper, (None,)):
        text = {"model_type": kind} if kind else {}
        config = transformers.AutoConfig.for_model(wrapper, text_config=text)
        full = json.loads(config.to_json_string(use_diff=False))
        assert read_config({"model_type": wrapper, "text_config": text}, "x") == read_config(full, "x")


def test_the_language_model_inside_becomes_the_gguf_file_of_its_family() -> None:
    pytest.importorskip("gguf")
    text = {"hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 96, "vocab_size": 96, "head_dim": 16}
    config = read_config({"model_type": "gemma3", "text_config": {**text, "query_pre_attn_scalar": 16}}, "x")
    alone = dataclasses.replace(config, wrapper="")
    names = [name for name, _ in GPT.skeleton(config).named_parameters()]
    assert check_supported(config) == check_supported(alone)
    assert plan_tensors(names, config) == plan_tensors(names, alone)


def test_every_wrapper_has_a_case() -> None:
    assert {case[0] for case in CASES.values()} == set(WRAPPERS)


def test_the_first_files_of_qwen2_vl_have_no_text_config() -> None:
    wrapper, text, vision, _ = CASES["qwen2_5_vl"]
    text = SMALL | text
    flat = {**text, "model_type": wrapper, "vision_config": vision, "tie_word_embeddings": True}
    del flat["rope_parameters"]
    flat |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    nested = {"model_type": wrapper, "text_config": {**text, "tie_word_embeddings": True}}
    assert read_config(flat, "x") == read_config(nested, "x")
    assert read_config(flat, "x").tied_head


def test_a_language_model_without_a_row_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="model_type 'mamba' is not supported"):
        read_config({"model_type": "llava", "text_config": {"model_type": "mamba"}}, "x")
    with pytest.raises(CheckpointError, match="already quantised"):
        read_config({"model_type": "llava", "quantization_config": {"quant_method": "gptq"}}, "x")


@pytest.mark.parametrize("wrapper", ["qwen3_vl", "qwen3_vl_moe"])
def test_a_window_that_the_class_of_the_wrapper_leaves_out_is_refused(wrapper: str) -> None:
    text = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    with pytest.raises(CheckpointError, match=f"no sliding window in {wrapper}"):
        read_config({"model_type": wrapper, "text_config": text}, "x")
