"""Adapters are PEFT's folders: PEFT computes with ours what we compute, and we with PEFT's what PEFT computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.errors import CheckpointError
from lit_qlora.inference import load_for_inference
from lit_qlora.lora.adapter import attach_adapter, check_base, load_adapter, read_adapter, save_adapter
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.lora.peft_layout import check_layers
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig, Target
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer
from tests.reference import CASES, FURTHER, hugging_face_model

peft = pytest.importorskip("peft")
TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama-gqa", "llama-biases", "mistral", "qwen2", "gpt_neox"]
EVERY_FAMILY = list({CASES[case][0]: case for case in reversed(CASES) if case not in FURTHER}.values())
"""A case of each; tests/lora/test_further_families.py has the others."""
TARGETS: list[tuple[Target, ...]] = [
    ("query",),
    ("key",),
    ("value",),
    ("projection",),
    ("mlp",),
    ("head",),
    ("query", "value"),
    ("all", "head"),
]


def combined(families: list[str], quick: list[str]) -> list[Any]:
    """Each family with each of TARGETS; but for the quick ones, `make test` has each of them once."""
    return [
        pytest.param(family, targets, marks=[] if family in quick or i == j % len(TARGETS) else [pytest.mark.slow])
        for j, family in enumerate(families)
        for i, targets in enumerate(TARGETS)
    ]


def trained(model: GPT, config: LoRAConfig) -> GPT:
    """`model` with an adapter that does something."""
    torch.manual_seed(1)
    add_lora(model, config)
    for tensor in lora_state(model).values():
        torch.nn.init.normal_(tensor, std=0.05)
    return model.eval()


def save(folder: Path, model: GPT, config: LoRAConfig, base: Path, **facts: Any) -> None:
    save_adapter(folder, model, config, None, {"base": {"name": "x", "sha256": content_hash(base)}, **facts})


def ours_in_peft(case: str, targets: tuple[Target, ...], place: Path, **settings: Any) -> None:
    """Train `targets` of a small model here and compare with PEFT on the same base, and with the merged model."""
    theirs = hugging_face_model(place / "base", case)
    convert_hf_checkpoint(place / "base", place / "base")
    config = LoRAConfig(**{"r": 4, "alpha": 12, "targets": targets} | settings)
    ours = trained(load_model(place / "base"), config)
    save(place / "adapter", ours, config, place / "base")
    again = load_model(place / "base")
    add_lora(again, read_adapter(place / "adapter").config)
    load_adapter(again, place / "adapter")
    with torch.no_grad():
        expected = ours(TOKENS)
        base = theirs(TOKENS).logits
        assert torch.equal(again.eval()(TOKENS), expected)
        actual = peft.PeftModel.from_pretrained(theirs, place / "adapter").eval()(TOKENS).logits
        if settings:
            merge_checkpoint(read_adapter(place / "adapter"), place / "base", place / "merged")
            merged = load_model(place / "merged").eval()(TOKENS)
            torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (expected - base).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "targets"), combined(FAMILIES, ["llama-gqa", "gpt_neox"]))
def test_peft_computes_the_same_logits_with_our_adapter(
    family: str, targets: tuple[Target, ...], tmp_path: Path
) -> None:
    ours_in_peft(family, targets, tmp_path)


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora, rslora": {"dora": True, "rslora": True},
    "ranks": {"rank_pattern": {"mlp.down": 7, "blocks.0.attn.projection": 2}},
    "ranks, rslora": {"rank_pattern": {"mlp.down": 7, "blocks.0.attn.projection": 2}, "rslora": True},
    "alphas, dora": {"alpha_pattern": {"blocks.1.mlp.down": 3.0}, "dora": True},
    "last block": {"last_layers": 1},
    "first block, ranks, dora": {"first_layers": 1, "rank_pattern": {"mlp.down": 3}, "dora": True},
    "tokens": {"train_tokens": (5, 90, 6)},
    "embeddings": {"train_embeddings": True},
    "tokens, dora, rows of the head": {"train_tokens": (5, 9), "dora": True, "train_head_rows": True},
}

QUICK_VARIANTS = {
    "phi3": [*VARIANTS],
    "llama-gqa": ["rslora", "last block"],
    "llama-tied": ["dora", "tokens", "embeddings"],
    "llama-biases": ["dora", "ranks"],
    "gpt_neox": ["dora, rslora", "embeddings", "tokens, dora, rows of the head"],
    "gpt2": ["alphas, dora", "tokens", "embeddings"],
}
"""Those of each case that `make test` runs."""


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True but the target module is `torch.nn.Linear`:UserWarning"
)
@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, marks=[] if variant in quick else [pytest.mark.slow])
        for case, quick in QUICK_VARIANTS.items()
        for variant in VARIANTS
    ],
)
def test_peft_computes_the_same_logits_with_every_variant(case: str, variant: str, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    tied = case in ("llama-tied", "gpt2")
    if (case, variant) == ("gpt2", "embeddings"):  # PEFT ties no embedding but one called embed_tokens
        hugging_face_model(tmp_path, case)
        convert_hf_checkpoint(tmp_path, tmp_path)
        with pytest.raises(CheckpointError, match=r"cannot hold lora\.train_embeddings"):
            check_layers(ModelConfig.load(tmp_path), LoRAConfig(**settings))
        return
    ours_in_peft(case, ("all",) if tied or "train_head_rows" in settings else ("all", "head"), tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True, "targets": "query"}, r"PEFT knows DoRA of the whole of it only"),
        ({"rank_pattern": {"query": 2}, "targets": "all"}, r"with one scale"),
    ],
)
def test_variants_of_stacked_layers_that_peft_cannot_hold_are_refused_before_they_are_trained(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hugging_face_model(tmp_path, "phi3")
    convert_hf_checkpoint(tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_layers(ModelConfig.load(tmp_path), LoRAConfig(**settings))


def test_stacked_layers_may_have_ranks_of_their_own_where_the_scale_is_one(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"query": 2, "up": 6}, "alpha_pattern": {"query": 6.0, "up": 18.0}}
    ours_in_peft("phi3", ("all",), tmp_path, **patterns)


# What PEFT 0.21 says about heads that are tied, GPT-2's two kinds of layers, and its own patterns for experts:
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True but the target module is `torch.nn.Linear`:UserWarning"
)
@pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:UserWarning")
@pytest.mark.parametrize("case", EVERY_FAMILY)
def test_every_family_has_a_place_in_pefts_layout(case: str, tmp_path: Path) -> None:
    ours_in_peft(case, ("all", "head"), tmp_path)


def theirs_in_ours(case: str, config: Any, place: Path) -> tuple[Any, GPT]:
    """A random adapter of PEFT on a small model, and ours with it; they have to compute the same."""
    base = hugging_face_model(place / "base", case)
    convert_hf_checkpoint(place / "base", place / "base")
    with torch.no_grad():
        plain = base(TOKENS).logits
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        # An adapter of a router cannot hold what it has beside its weight.
        if parameter.requires_grad and ("modules_to_save" not in name or name.endswith(".weight")):
            torch.nn.init.normal_(parameter, mean=float("magnitude" in name), std=0.05)
    theirs.save_pretrained(place / "adapter")
    model = load_model(place / "base")
    add_lora(model, read_adapter(place / "adapter").config)
    load_adapter(model, place / "adapter")
    with torch.no_grad():
        expected = theirs.eval()(TOKENS).logits
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(model.eval()(TOKENS), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return theirs, model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize("case", EVERY_FAMILY)
def test_we_compute_the_same_logits_with_an_adapter_of_peft(case: str, tmp_path: Path) -> None:
    # PEFT's all-linear leaves out the head, and takes the routers of some families, which is refused by name.
    # That of Llama 4 cannot run with an adapter in PEFT 0.21.
    experts = any(word in case for word in ("mixtral", "moe", "deepseek", "next", "llama4"))
    targets = ["o_proj", "kv_b_proj" if "deepseek" in case else "k_proj"] if experts else "all-linear"
    theirs_in_ours(case, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scale_of_rslora_is_alpha_over_the_root_of_the_rank(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear")
    _, model = theirs_in_ours(family, config, tmp_path)
    assert {m.scale for m in model.modules() if hasattr(m, "lora_a")} == {12 / 2}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt_neox", "phi3"])
def test_layers_of_different_ranks_and_scales_are_understood(family: str, rslora: bool, tmp_path: Path) -> None:
    down = {"gpt_neox": "dense_4h_to_h"}.get(family, "down_proj")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules="all-linear",
        rank_pattern={down: 7, "layers.1.*": 2},
        alpha_pattern={rf".*\.0\..*{down}": 5},
    )
    theirs_in_ours(family, config, tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_some_of_the_layers_is_understood(dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], use_dora=dora)
    theirs_in_ours("llama-gqa", config, tmp_path)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied", "gpt_neox", "phi3", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"trainable_token_indices": [5, 90, 6]},
        {"modules_to_save": ["embed"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_variants_of_peft_are_understood(settings: dict[str, Any], case: str, tmp_path: Path) -> None:
    name = {"gpt_neox": "embed_in", "gpt2": "wte"}.get(case, "embed_tokens")
    if "modules_to_save" in settings:
        if case == "gpt2":
            pytest.skip("PEFT 0.21 cannot tie what is not called embed_tokens")
        settings = {"modules_to_save": [name], "ensure_weight_tying": case == "llama-tied"}
    if "trainable_token_indices" in settings and name != "embed_tokens":
        settings = {"trainable_token_indices": {name: [5, 90, 6]}}
    theirs_in_ours(case, peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings), tmp_path)


@pytest.mark.parametrize("of_head", [[5, 90], pytest.param([5], marks=pytest.mark.slow)])
def test_tokens_that_peft_trained_in_embedding_and_head_are_understood_where_they_are_the_same(
    of_head: list[int], tmp_path: Path
) -> None:
    indices = {"embed_tokens": [5, 90], "lm_head": of_head}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
    if of_head == [5, 90]:
        theirs_in_ours("llama-gqa", config, tmp_path)
        return
    with pytest.raises(CheckpointError, match="but for the same tokens of embedding and head"):
        theirs_in_ours("llama-gqa", config, tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
def test_embeddings_that_were_parted_from_their_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has parted embedding and head"):
        theirs_in_ours("llama-tied", peft.LoraConfig(r=4, modules_to_save=["embed_tokens"]), tmp_path)


def test_an_adapter_in_the_file_format_of_2023_is_read(saved: tuple[Path, Path]) -> None:
    base, folder = saved
    expected = read_adapter(folder).peft_tensors
    torch.save(expected, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "manifest.json").unlink()
    actual = read_adapter(folder).peft_tensors
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    load_for_inference(base, folder, precision="32-true")


@pytest.mark.parametrize("version", [4, 5])
def test_an_adapter_on_the_head_of_gpt_neox_fits_both_names_that_transformers_gave_it(
    version: int, tmp_path: Path
) -> None:
    """In transformers before 5 the head was embed_out; a model with that name stands for it."""
    theirs = hugging_face_model(tmp_path / "base", "gpt_neox")
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    config = LoRAConfig(r=4, alpha=12, targets=("head",))
    ours = trained(load_model(tmp_path / "base"), config)
    save(tmp_path / "adapter", ours, config, tmp_path / "base")
    names = {name.split(".lora_")[0] for name in load_file(tmp_path / "adapter/adapter_model.safetensors")}
    assert names == {"base_model.model.embed_out", "base_model.model.lm_head"}
    if version == 4:
        theirs.embed_out = theirs.lm_head
        del theirs.lm_head
        theirs.lm_head = lambda hidden: theirs.embed_out(hidden)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = adapted(TOKENS).logits
        torch.testing.assert_close(logits, ours(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_comes_back_bit_equal(family: str, tmp_path: Path) -> None:
    hugging_face_model(tmp_path / "base", family)
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    config = LoRAConfig(targets=("all", "head"))
    model, other = trained(load_model(tmp_path / "base"), config), load_model(tmp_path / "base")
    save(tmp_path / "adapter", model, config, tmp_path / "base")
    add_lora(other, config)
    load_adapter(other, tmp_path / "adapter")
    before, after = lora_state(model), lora_state(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A base checkpoint and an adapter on it."""
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    model = trained(load_model(base), LoRAConfig())
    facts = {"base": {"name": "x", "sha256": content_hash(base)}}
    save_adapter(tmp_path / "final", model, LoRAConfig(), STYLES["qa"], facts)
    return base, tmp_path / "final"


def test_the_prompt_style_travels_with_the_adapter(saved: tuple[Path, Path]) -> None:
    base, folder = saved
    loaded = load_for_inference(base, folder, precision="32-true")
    assert loaded.style is not None
    assert loaded.style.render("why?", "") == "Q: why?\nA:"
    assert load_for_inference(base, precision="32-true").style is None


def test_an_adapter_of_another_base_is_refused_with_both_named(saved: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = saved
    other = write_checkpoint(tmp_path / "other", tiny_model(seed=5))
    with pytest.raises(CheckpointError, match=r"final was trained on x(.|\n)*other holds other weights"):
        check_base(read_adapter(folder), other)


def test_an_adapter_that_does_not_fit_is_refused(saved: tuple[Path, Path]) -> None:
    base, folder = saved
    model = load_model(base)
    add_lora(model, LoRAConfig(r=4, targets=("query",)))
    with pytest.raises(
        CheckpointError, match=r"attn.value.lora_a is not in the model(.|\n)*\(8, 64\), expected \(4, 64\)"
    ):
        load_adapter(model, folder)


def change_tensors(folder: Path, change: Any) -> None:
    """Rewrite the adapter's tensors as PEFT would, without a manifest."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    (folder / "manifest.json").unlink()


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "NaN or infinite values in"),
        (lambda tensors: {}, "is empty"),
        (
            lambda tensors: {**tensors, "base_model.model.vision.self_attn.q_proj.lora_A.weight": torch.ones(8, 1)},
            "no layer of",
        ),
    ],
)
def test_damaged_adapters_are_refused(change: Any, message: str, saved: tuple[Path, Path]) -> None:
    base, folder = saved
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_for_inference(base, folder, precision="32-true")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.w"]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(key: str, value: Any, saved: tuple[Path, Path]) -> None:
    _, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=str(value if key == "peft_type" else key)):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, r"has rank 8, but adapter_config.json says 3"),
        ({"rank_pattern": {"q_proj": 5}}, r"q_proj.*has rank 8, but adapter_config.json says 5"),
        ({"r": 0}, "a rank below 1"),
        ({"r": "x"}, "not a PEFT configuration"),
        ({"lora_alpha": None}, "not a PEFT configuration"),
        ({"lora_alpha": float("inf")}, "an alpha that is not above 0"),
        ({"lora_dropout": 2}, r"a dropout outside \[0, 1\)"),
        ({"rank_pattern": 5}, "not a PEFT configuration"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_that_of_the_tensors_is_refused(
    change: dict[str, Any], message: str, saved: tuple[Path, Path]
) -> None:
    _, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_is_found(name: str, saved: tuple[Path, Path]) -> None:
    _, folder = saved
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read_adapter(folder)


def test_a_folder_that_is_no_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        read_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=str)
def test_the_copy_of_the_base_that_peft_stores_has_to_be_our_base(targets: list[str], tmp_path: Path) -> None:
    theirs, _ = theirs_in_ours("llama-gqa", peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets), tmp_path)
    adapter = read_adapter(tmp_path / "adapter")
    (name,) = adapter.copies
    assert targets[1] in name
    check_base(adapter, tmp_path / "base")
    theirs.base_model.model.get_parameter(name.replace(".weight", ".base_layer.weight")).data[3, 3] += 0.01
    theirs.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"holds another {name} than .*: it was trained on another base"):
        check_base(read_adapter(tmp_path / "other"), tmp_path / "base")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_an_adapter_of_an_embedding_that_is_the_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has parted embedding and head, which are one in .*adapter of the embed"
    ):
        theirs_in_ours("llama-tied", peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    "more", [{}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}], ids=["plain", "saved", "head"]
)
def test_a_resized_vocabulary_is_named_as_such(more: dict[str, Any], tmp_path: Path) -> None:
    base = hugging_face_model(tmp_path / "base", "llama-gqa")
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    base.resize_token_embeddings(100, mean_resizing=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **more}))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model = load_model(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"had been resized to 100 tokens; .* has 96"):
        attach(model, tmp_path / "adapter", tmp_path / "base")


def attach(model: GPT, folder: Path, base: Path) -> None:
    """As commands put an adapter on its base."""
    adapter = read_adapter(folder)
    check_base(adapter, base)
    attach_adapter(model, adapter, base)


def test_an_adapter_has_a_card_which_may_be_changed(tmp_path: Path) -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig())
    sources = {"/home/me/secret/faq.csv": "", "hf:org/foxes (train)": ""}
    facts = {"base": {"name": "org/base", "sha256": ""}, "data": sources, "quantize": "bnb.nf4", "step": 120}
    save_adapter(tmp_path / "final", model, LoRAConfig(), STYLES["qa"], facts)
    card = (tmp_path / "final/README.md").read_text()
    assert card.startswith('---\nbase_model: "org/base"\nlibrary_name: peft\n')
    for row in ("| data | faq.csv, hf:org/foxes (train) |", "| rank, alpha | 8, 16 |", "| prompt style | qa |"):
        assert row in card
    assert "/home/me" not in card
    (tmp_path / "final/README.md").write_text("mine")
    read_adapter(tmp_path / "final")
