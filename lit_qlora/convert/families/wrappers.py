"""Models of text and images: the language model inside is read, the encoders around it are kept as they are.

config.json has the language model's settings in text_config; its weights have another beginning in files than in
transformers' memory. Text alone never meets an encoder, so its logits are those of the whole model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lit_qlora.convert.families import llama4_rows
from lit_qlora.convert.families.read import Family, Theirs
from lit_qlora.convert.families.rules import EitherWay, Fused, Rule, Stacked

TEXT = ("model.", "lm_head.")
"""How the names of body and head begin in a language model of its own."""


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A `model_type` with a language model inside."""

    text: str
    """The model_type of a text_config that names none."""
    names: tuple[tuple[str, str], ...]
    """What stands for TEXT: first in published files, last in transformers' memory and in adapters, which vLLM maps to
    names of its own."""
    kept: tuple[str, ...]
    """First or second parts of the names of the other tensors."""
    tied: bool
    """tie_word_embeddings where config.json leaves it out."""
    text_ties: bool = False
    """A text_config that ties the head counts, too."""
    shapes_logits: bool = False
    """Its class scales or caps logits as that of the language model alone does."""
    windows: bool = True
    """Its class reads use_sliding_window as that of the language model alone does."""
    text_class: bool = False
    """transformers has a class of the language model alone, which an adapter is to fit as well."""
    weights: Mapping[str, Rule] = field(default_factory=dict)
    """Rules beyond those of the language model, in its own names."""


_LLAVA = (("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head."))
_QWEN_VL = (TEXT, ("model.language_model.", "lm_head."))
_QWEN3_VL = (("model.language_model.", "lm_head."),)
_SMOLVLM = (("model.text_model.", "lm_head."),)
_TOWER = ("vision_tower", "multi_modal_projector")
_GEMMA4 = ("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio")
_EXPERTS = "model.layers.{i}.mlp.experts"
_EXPERT = "blocks.{i}.mlp.experts.{e}"
WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(text="gemma3_text", names=_LLAVA, kept=_TOWER, tied=True, text_class=True),
    "mistral3": Wrapper(text="mistral", names=_LLAVA, kept=_TOWER, tied=True),
    "internvl": Wrapper(text="qwen2", names=_LLAVA, kept=_TOWER, tied=True),
    "llava": Wrapper(text="llama", names=_LLAVA, kept=_TOWER, tied=False, text_ties=True),
    "llava_next": Wrapper(text="llama", names=_LLAVA, kept=(*_TOWER, "image_newline"), tied=False),
    "llava_onevision": Wrapper(text="qwen2", names=_LLAVA, kept=(*_TOWER, "image_newline"), tied=False, text_ties=True),
    "qwen2_vl": Wrapper(text="qwen2_vl_text", names=_QWEN_VL, kept=("visual",), tied=False, text_ties=True),
    "qwen2_5_vl": Wrapper(text="qwen2_5_vl_text", names=_QWEN_VL, kept=("visual",), tied=False, text_ties=True),
    "qwen3_vl": Wrapper(text="qwen3_vl_text", names=_QWEN3_VL, kept=("visual",), tied=False, windows=False),
    "qwen3_vl_moe": Wrapper(
        text="qwen3_vl_moe_text",
        names=_QWEN3_VL,
        kept=("visual",),
        tied=False,
        windows=False,
        weights={
            f"{_EXPERTS}.gate_up_proj": Stacked(
                EitherWay(Fused((f"{_EXPERT}.gate.weight", f"{_EXPERT}.up.weight"), "blocks"), "n_embd")
            ),
            f"{_EXPERTS}.down_proj": Stacked(EitherWay(f"{_EXPERT}.down.weight", "expert_size")),
        },
    ),
    "qwen3_5": Wrapper(text="qwen3_5_text", names=_QWEN3_VL, kept=("visual",), tied=False, text_class=True),
    "qwen3_5_moe": Wrapper(
        text="qwen3_5_moe_text",
        names=_QWEN3_VL,
        kept=("visual",),
        tied=False,
        text_class=True,
        weights={
            f"{_EXPERTS}.gate_up_proj": Stacked(Fused((f"{_EXPERT}.gate.weight", f"{_EXPERT}.up.weight"), "blocks")),
            f"{_EXPERTS}.down_proj": Stacked(f"{_EXPERT}.down.weight"),
        },
    ),
    "gemma4": Wrapper(
        text="gemma4_text", names=_QWEN3_VL, kept=_GEMMA4, tied=True, shapes_logits=True, text_class=True
    ),
    "gemma4_unified": Wrapper(
        text="gemma4_unified_text", names=_QWEN3_VL, kept=_GEMMA4, tied=True, shapes_logits=True, text_class=True
    ),
    "llama4": Wrapper(
        text="llama4_text",
        names=(("language_model.model.", "language_model.lm_head."),),
        kept=("vision_model", "multi_modal_projector"),
        tied=False,
        text_class=True,
    ),
    "idefics3": Wrapper(text="llama", names=_SMOLVLM, kept=("vision_model", "connector"), tied=False),
    "smolvlm": Wrapper(text="llama", names=_SMOLVLM, kept=("vision_model", "connector"), tied=False),
}
ROWS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""model_type of a text_config -> the row that reads it, where that has another name."""


def _sizes(layers: int, width: int, heads: int, inside: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inside,
        "vocab_size": vocabulary,
    }


_QWEN2_VL = {
    **_sizes(80, 8192, 64, 29_568, 152_064),
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_LONG = {"max_position_embeddings": 128_000, "rope_theta": 500_000.0}
SIZES: dict[str, dict[str, Any]] = {
    "gemma3_text": _sizes(26, 2304, 8, 9216, 262_208),
    "llama": _sizes(32, 4096, 32, 11_008, 32_000),
    "llama4_text": llama4_rows.SIZES,
    "ministral3": _sizes(34, 4096, 32, 14_336, 131_072),
    "mistral": _sizes(32, 4096, 32, 14_336, 32_000),
    "mistral4": _sizes(36, 4096, 32, 12_288, 131_072),
    "qwen2": _sizes(32, 4096, 32, 22_016, 151_936),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3": _sizes(32, 4096, 32, 22_016, 151_936),
    "qwen3_vl_text": {**_sizes(32, 4096, 32, 22_016, 151_936), **_LONG, "num_key_value_heads": 32},
    "qwen3_vl_moe_text": {
        **_sizes(24, 2048, 16, 5632, 151_936),
        **_LONG,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
    "gemma4_text": _sizes(30, 2304, 8, 9216, 262_144),
    "gemma4_unified_text": _sizes(30, 2304, 8, 9216, 262_144),
    "qwen3_5_text": _sizes(32, 4096, 16, 12_288, 248_320),
    "qwen3_5_moe_text": {
        "num_hidden_layers": 40,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "vocab_size": 248_320,
    },
}
"""model_type of a text_config -> what transformers assumes where it leaves keys out, beyond its row's defaults.

A config.json of its own has to give its sizes; text_config gives what differs from its class (Gemma 3, LLaVA).
"""


def text_part(theirs: Theirs) -> Theirs:
    """The config.json of the language model inside; `theirs` itself if it is one."""
    wrapper = WRAPPERS.get(str(theirs.get("model_type")))
    if wrapper is None:
        return theirs
    text = text_table(theirs)
    kind = str((text is not theirs and text.get("model_type")) or wrapper.text)
    tied = theirs.get("tie_word_embeddings")
    if tied is None:
        tied = wrapper.tied
    if wrapper.text_ties and text.get("tie_word_embeddings"):
        tied = True
    read = {**SIZES.get(kind, {}), **text, "model_type": ROWS.get(kind, kind), "tie_word_embeddings": tied}
    packed = theirs.get("quantization_config")
    return {**_without_mrope(read), **({"quantization_config": packed} if packed else {})}


def text_table(theirs: Theirs) -> Any:
    """The part of config.json that has the language model's settings: Qwen2-VL's first files mix them with the rest."""
    text = theirs.get("text_config")
    return text if isinstance(text, dict) and theirs.get("model_type") in WRAPPERS else theirs


def _without_mrope(theirs: Theirs) -> Theirs:
    """Qwen-VL's three positions of a token are one and the same in text, where its RoPE is the plain one."""
    rope = theirs.get("rope_scaling")
    if not isinstance(rope, dict) or "mrope" not in (rope.get("type"), rope.get("rope_type")):
        return theirs
    return {**theirs, "rope_scaling": {**rope, "rope_type": "default"}}


def wrapped(family: Family, name: str) -> Family:
    """The row of a language model inside the wrapper `name`, whose names are that wrapper's."""
    wrapper = WRAPPERS[name]
    rules = {**wrapper.weights, **family.weights}
    return replace(
        family,
        weights={_begun(their, TEXT, other): rule for other in wrapper.names for their, rule in rules.items()},
        kept=(*family.kept, *wrapper.kept),
        defaults={**family.defaults, "tie_word_embeddings": wrapper.tied},
    )


def in_text_class(name: str, wrapper: str) -> str:
    """Name a module as a class of the language model alone does, from its name in the memory of the wrapper's."""
    return _begun(name, WRAPPERS[wrapper].names[-1], TEXT)


def in_wrapper(name: str, wrapper: str) -> str:
    """The inverse of in_text_class; any other name stays as it is."""
    names = WRAPPERS[wrapper].names
    known = any(name.startswith(begin) for pair in names for begin in pair if begin not in TEXT)
    return name if known else _begun(name, TEXT, names[-1])


def spelled_like(name: str, others: Iterable[str], wrapper: str) -> str:
    """A published name in the spelling of the tensors beside it: newer files have all of them below "model."."""
    names = WRAPPERS[wrapper].names
    return _begun(name, names[0], names[-1]) if any(other.startswith("model.") for other in others) else name


def _begun(name: str, before: tuple[str, str], after: tuple[str, str]) -> str:
    """A name with its beginning exchanged."""
    for old, new in zip(before, after, strict=True):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
