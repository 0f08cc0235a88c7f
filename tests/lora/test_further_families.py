"""The families that spell otherwise what others have: PEFT computes with their adapters as we do."""

from pathlib import Path

import pytest

from lit_qlora.convert.families import read_config
from lit_qlora.lora.peft_layout import check_layers
from lit_qlora.settings import LoRAConfig
from tests.lora.test_adapter import ours_in_peft, peft, theirs_in_ours
from tests.reference import CASES, FURTHER, SMALL, transformers

EVERY_FAMILY = list({family: case for case, (family, _) in reversed(FURTHER.items()) if family != "afmoe"}.values())
"""A case of each that PEFT can adapt."""
ATTENTION = ("query", "key", "value", "projection", "head")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:UserWarning")
@pytest.mark.parametrize("case", EVERY_FAMILY)
def test_an_adapter_has_the_same_logits_in_peft(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    theirs = transformers.AutoConfig.for_model(family, **SMALL | changes).to_dict()
    experts = read_config(theirs, case).n_expert
    ours_in_peft(case, ATTENTION if experts else ("all", "head"), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize("case", EVERY_FAMILY)
def test_an_adapter_of_peft_has_the_same_logits_here(case: str, tmp_path: Path) -> None:
    theirs_in_ours(case, peft.LoraConfig(r=4, lora_alpha=12, target_modules=r".*attn\..*(proj|c_attn)"), tmp_path)


def test_where_peft_takes_a_gate_of_attention_for_an_expert_s_there_is_a_caveat() -> None:
    family, changes = CASES["afmoe"]
    theirs = transformers.AutoConfig.for_model(family, **SMALL | changes)
    caveat = check_layers(read_config(theirs.to_dict(), "afmoe"), LoRAConfig(targets=("query",)))
    assert caveat.startswith("PEFT 0.21 takes model.layers.0.self_attn.gate_proj for an expert's")
    with pytest.raises(ValueError, match="gate_proj without also targeting up_proj"):
        peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_config(theirs), peft.LoraConfig(target_modules=".*attn.gate_proj")
        )
