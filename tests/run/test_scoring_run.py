"""A run with a head that reads labels: what it learns, leaves, and is to transformers and PEFT."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.convert.to_gguf import export_gguf
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import UsageError
from lit_qlora.evaluate.sample_losses import FILE_NAME, SampleLosses
from lit_qlora.inference import load_for_inference
from lit_qlora.lora.adapter import read_adapter
from lit_qlora.run.finetune import finetune
from lit_qlora.run.lessons import FILE_NAME as LESSONS
from lit_qlora.settings import DataConfig, EvalConfig, FinetuneConfig, LoRAConfig, TrainConfig
from tests.conftest import run_here
from tests.run.conftest import log_of

TEXTS = ["Q: What is 1 plus 2?", "A: 7", "Q: What is 29 plus 3? A: 32"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts of two classes, which their first letter tells."""
    path = tmp_path / "texts.jsonl"
    kinds = (("Q", "asks"), ("A", "says"))
    rows = [{"text": f"{kind}: {i} plus {i}", "label": name} for i in range(20) for kind, name in kinds]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(checkpoint: Path, texts: Path, out: Path, **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "head": "classify",
        "data": DataConfig(path=str(texts), val_fraction=0.2, packing=True, cache_dir="none"),
        "train": TrainConfig(
            batch_size=8, micro_batch_size=2, max_steps=8, save_every=4, keep_last=9, learning_rate=0.01
        ),
        "eval": EvalConfig(every=4, best="val_f1"),
        "lora": LoRAConfig(targets="all", dropout=0.1),
        "quiet": True,
    }
    return FinetuneConfig(checkpoint_dir=checkpoint, out_dir=out, **settings | changes)


def scores(checkpoint: Path, adapter: Path | None = None) -> Tensor:
    """The outputs of ours for TEXTS."""
    loaded = load_for_inference(checkpoint, adapter, heads=True)
    rows = [loaded.tokenizer.encode(text) for text in TEXTS]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], labels[i, len(row) - 1] = torch.tensor(row), 0
    return loaded.model.scores(tokens, labels).detach()


def theirs(folder: Path, adapter: Path | None = None, outputs: int = 2) -> Tensor:
    """The logits of transformers for TEXTS, one text at a time, with PEFT's adapter if one is given."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    more = {} if adapter is None else {"num_labels": outputs}
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **more)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def test_a_head_learns_classes_and_a_run_leaves_what_tells_them(
    texts: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons = []
    keep = lambda outcome, folder: lessons.append(outcome.lessons)  # noqa: E731 - pages take a third of the time
    monkeypatch.setattr("lit_qlora.run.summary.write_pages", keep)
    texts.write_text(texts.read_text() + '{"text": "Q: 3 plus 3", "label": "says"}\n')
    changes = EvalConfig(every=4, best="val_f1", train_samples=99)
    out = finetune(config(tiny_checkpoint, texts, tmp_path / "out", eval=changes))
    train, val = log_of(out)
    for name, file in (("val_loss", FILE_NAME), ("seen_loss", LESSONS)):
        kept = SampleLosses.read(out, file)
        assert kept
        assert fmean(kept.losses[8]) == pytest.approx(val[-1][name], rel=1e-4)
    assert "Losses are nats a text" in lessons[0]
    review = run_here("scripts/review_data.py", "--run", out)
    assert f"{len(kept.samples)} training samples, mean loss" in review.stdout, review.stderr
    assert "accuracy" in train[0]
    assert {"val_loss", "val_accuracy", "val_f1"} < set(val[0])
    assert val[-1]["val_loss"] < val[0]["val_loss"]
    assert val[-1]["val_f1"] == 1.0
    adapter = read_adapter(out / "final", heads=True)
    assert adapter.scoring.classes == ("asks", "says")
    assert json.loads((out / "final/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    asked = run_here("scripts/classify.py", "--lora_path", out, "--text", "Q: 3 plus 3")
    assert json.loads(asked.stdout)["label"] == "asks", asked.stderr
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "Q: 1", "label": "sings"}\n')
    refused = run_here("scripts/classify.py", "--lora_path", out, "--data.path", strange, "--out", tmp_path / "labels")
    assert "the label 'sings', and the head knows asks, says" in refused.stderr
    assert not (tmp_path / "labels").exists()
    pushed = run_here("scripts/push.py", "--lora_path", out, "--repo_id", "me/head", "--dry_run")
    assert "adapter_model.safetensors" in pushed.stdout, pushed.stderr
    for script in ("scripts/generate.py", "scripts/weigh_lora.py"):
        refused = run_here(script, "--lora_path", out)
        assert refused.returncode == 2
        assert "scripts/classify.py asks it" in refused.stderr


@pytest.mark.slow
def test_a_run_with_a_head_resumes_bit_for_bit(texts: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    start = config(tiny_checkpoint, texts, tmp_path / "out")
    out = finetune(start)
    again = finetune(replace(start, out_dir=tmp_path / "again", resume=str(out / "step-000004")))
    one, other = ((folder / "final/adapter_model.safetensors").read_bytes() for folder in (out, again))
    assert one == other


@pytest.mark.slow
def test_numbers_are_learnt_by_their_squared_error(texts: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    texts.write_text(texts.read_text().replace('"asks"', "-1.5").replace('"says"', "2"))
    out = finetune(
        config(tiny_checkpoint, texts, tmp_path / "out", head="regress", eval=EvalConfig(every=4, best="val_mse"))
    )
    _, val = log_of(out)
    assert val[-1]["val_mse"] == pytest.approx(val[-1]["val_loss"], rel=1e-5)
    assert val[-1]["val_mse"] < val[0]["val_mse"]
    asked = run_here("scripts/classify.py", "--lora_path", out, "--data.path", texts)
    assert "value" in json.loads(asked.stdout.splitlines()[0])
    assert "mse " in asked.stderr
    page = (out / "report.html").read_text()
    assert "regress · " in page
    assert "loss of a text" in page


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "bnb.nf4"])
def test_transformers_and_peft_compute_the_same(
    quantize: Any, texts: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = finetune(config(tiny_checkpoint, texts, tmp_path / "out", quantize=quantize))
    base = tmp_path / "base"
    export_hf(tiny_checkpoint, base)
    wanted = scores(tiny_checkpoint, out / "final")
    torch.testing.assert_close(theirs(base, out / "final"), wanted, rtol=1e-4, atol=1e-4)

    merged = run_here("scripts/merge_lora.py", "--lora_path", out, "--out_dir", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    torch.testing.assert_close(scores(tmp_path / "merged"), wanted, rtol=1e-4, atol=1e-4)
    export_hf(tmp_path / "merged", tmp_path / "hf")
    torch.testing.assert_close(theirs(tmp_path / "hf"), wanted, rtol=1e-4, atol=1e-4)
    table = json.loads((tmp_path / "hf/config.json").read_text())
    assert table["id2label"] == {"0": "asks", "1": "says"}
    assert table["architectures"] == ["LlamaForSequenceClassification"]
    with pytest.raises(UsageError, match="writes none"):
        load_for_inference(tmp_path / "merged")
    with pytest.raises(UsageError, match="GGUF has no place"):
        export_gguf(tmp_path / "merged", tmp_path / "a.gguf")


def test_a_model_without_a_head_cannot_classify(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="has no head"):
        load_for_inference(tiny_checkpoint, heads=True)
    refused = run_here("scripts/classify.py", "--checkpoint_dir", tiny_checkpoint, "--text", "one")
    assert "has no head" in refused.stderr


@pytest.mark.slow
def test_an_adapter_of_peft_reads_labels_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    export_hf(tiny_checkpoint, tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, dtype=torch.float32)
    made: Any = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    found = load_for_inference(tiny_checkpoint, tmp_path / "adapter", heads=True).scoring
    assert found
    assert found.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    wanted = theirs(tmp_path / "base", tmp_path / "adapter", outputs=3)
    torch.testing.assert_close(scores(tiny_checkpoint, tmp_path / "adapter"), wanted, rtol=1e-4, atol=1e-4)
