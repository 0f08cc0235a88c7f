"""Other programs are said not to take an adapter where they would not."""

from typing import Any

import pytest

from lit_qlora.lora.elsewhere import caveats
from lit_qlora.lora.layer import add_lora, saved_state
from lit_qlora.lora.peft_layout import to_peft
from lit_qlora.settings import LoRAConfig
from tests.conftest import tiny_model


def of(tied_head: bool = False, **settings: Any) -> list[str]:
    """The caveats of an adapter with these settings, by its adapter_config.json."""
    model = tiny_model(tied_head=tied_head)
    config = LoRAConfig(**settings)
    add_lora(model, config)
    state, config = saved_state(model, config)
    return caveats(to_peft(state, model.config, config)[1], tied_head)


def test_plain_lora_goes_everywhere() -> None:
    assert of(r=16) == []


@pytest.mark.parametrize(
    ("settings", "vllm", "cpp"),
    [
        ({"dora": True}, "DoRA", "DoRA"),
        ({"train_embeddings": True}, "trained embeddings", "trained embeddings"),
        ({"train_tokens": (1, 2)}, "trained tokens", "trained tokens"),
        ({"targets": ("all", "head")}, "an adapter of the head", None),
        ({"targets": ("all", "head"), "tied_head": True}, "an adapter of the head", "an adapter of a head that is the"),
        ({"rank_pattern": {"query": 4}, "alpha_pattern": {"query": 4.0}}, "ranks of layers", "alphas of layers"),
        ({"rslora": True}, None, "rsLoRA"),
        ({"r": 513}, "rank 513, above 512", None),
    ],
    ids=str,
)
def test_what_a_program_does_not_take_is_named(settings: dict[str, Any], vllm: str | None, cpp: str | None) -> None:
    said = of(**settings)
    assert len(said) == (vllm is not None) + (cpp is not None)
    for name, reason in (("vLLM", vllm), ("llama.cpp", cpp)):
        if reason:
            assert any(line.startswith(f"{name} does not take this adapter: it has {reason}") for line in said)


def test_a_rank_that_vllm_has_to_be_told_is_said() -> None:
    assert of(r=48) == ["vLLM takes this adapter with --max-lora-rank 64."]


def test_an_adapter_that_reads_labels_is_for_one_class_of_models() -> None:
    (said,) = caveats({"task_type": "SEQ_CLS", "r": 999, "modules_to_save": ["classifier", "score"]}, False)
    assert "AutoModelForSequenceClassification" in said
