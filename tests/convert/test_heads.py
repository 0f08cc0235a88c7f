"""A head that reads labels, in transformers' class of each family."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lit_qlora.checkpoint import score
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError
from lit_qlora.lora.score import fill_score
from lit_qlora.model.gpt import IGNORE
from lit_qlora.model.scoring import Scoring
from tests.reference import hugging_face_model

CASES = ("llama-tied", "qwen2", "gemma2", "gpt_neox", "gpt2", "falcon-7b", "mixtral", "deepseek_v3", "qwen3_next")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_logits(case: str, tmp_path: Path) -> None:
    hugging_face_model(tmp_path / "hub", case)
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    model = load_model(tmp_path / "ours").eval()
    weight = torch.randn(3, model.config.n_embd)
    fill_score(model, weight, case)
    score.write(tmp_path / "ours", weight, Scoring("classify", ("a", "b", "c")))
    export_hf(tmp_path / "ours", tmp_path / "back")
    theirs: Any
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    tokens = torch.randint(3, 60, (1, 9))
    labels = torch.full_like(tokens, IGNORE)
    labels[0, -1] = 0
    with torch.no_grad():
        torch.testing.assert_close(model.scores(tokens, labels), theirs.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_damaged_is_refused_in_words(tmp_path: Path) -> None:
    assert score.read(tmp_path) is None
    score.write(tmp_path, torch.ones(2, 4), Scoring("classify", ("a", "b")))
    found = score.read(tmp_path)
    assert found
    assert found[1].classes == ("a", "b")
    for facts in ('{"kind": "classify", "classes": ["a"]}', '{"kind": "regress", "classes": []}', '{"kind": "sum"}'):
        (tmp_path / score.FACTS).write_text(facts)
        with pytest.raises(CheckpointError, match="does not say what its head with 2 outputs means"):
            score.read(tmp_path)
    (tmp_path / score.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"no {score.WEIGHTS}")):
        score.read(tmp_path)
