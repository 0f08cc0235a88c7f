"""A run on judged answers, from end to end."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lit_qlora.checkpoint.identity import base_facts
from lit_qlora.data import reference
from lit_qlora.data.comparisons import Comparisons
from lit_qlora.data.exclude import hash_of, read_hashes
from lit_qlora.data.of_run import read_of_run
from lit_qlora.errors import UsageError
from lit_qlora.evaluate.sample_losses import FILE_NAME, SampleLosses
from lit_qlora.run.finetune import finetune
from lit_qlora.run.folder import default_out_dir
from lit_qlora.run.lessons import FILE_NAME as LESSONS
from lit_qlora.run.preferences import falling, off_the_fast_path
from lit_qlora.run.resume import Checkpoint, check_same_run, plain
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig, PreferenceConfig, PreferenceRunConfig
from lit_qlora.settings.preference import PreferenceEvalConfig, PreferenceTrainConfig
from tests.conftest import run_here
from tests.run.conftest import log_of


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty pairs that prefer short answers."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {a} plus {b}?", "chosen": f"{a + b}", "rejected": f"It is {a + b}."}
        for a in range(8)
        for b in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    checkpoint: Path,
    pairs: Path,
    out: Path,
    loss: str = "dpo",
    packing: bool = True,
    val_fraction: float = 0.05,
    train_samples: int = 0,
    **changes: Any,
) -> Path:
    config = PreferenceRunConfig(
        checkpoint_dir=checkpoint,
        out_dir=out,
        data=DataConfig(
            path=str(pairs),
            prompt="qa",
            cache_dir=str(pairs.parent / "cache"),
            packing=packing,
            val_fraction=val_fraction,
        ),
        train=PreferenceTrainConfig(
            batch_size=8, micro_batch_size=2, max_steps=4, save_every=2, learning_rate=0.01, keep_last=9
        ),
        eval=PreferenceEvalConfig(every=2, train_samples=train_samples),
        lora=LoRAConfig(targets="all", dropout=0.2),
        preference=PreferenceConfig(loss=loss),  # type: ignore[arg-type]
        quiet=True,
        **changes,
    )
    return finetune(config)


def adapter(out: Path) -> bytes:
    return (out / "final/adapter_model.safetensors").read_bytes()


def test_a_run_prefers_what_is_chosen_and_says_so(tiny_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    swapped = {"prompt": "What is 3 plus 4?", "chosen": "It is 7.", "rejected": "7"}
    pairs.write_text(pairs.read_text() + json.dumps(swapped) + "\n")
    out = run(tiny_checkpoint, pairs, tmp_path / "out", val_fraction=0.1, train_samples=99)
    train, val = log_of(out)
    assert {"reward_margin", "reward_accuracy", "logp_chosen", "length_rejected"} <= set(train[0])
    assert "accuracy" not in train[0]
    assert val[0]["val_loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: nothing is learnt yet
    assert val[-1]["val_loss"] < 0.5
    assert val[-1]["val_reward_accuracy"] == 1.0
    assert val[-1]["kl_to_base"] > val[0]["kl_to_base"] == 0
    for name, file in (("val_loss", FILE_NAME), ("seen_loss", LESSONS)):
        kept = SampleLosses.read(out, file)
        assert kept
        assert fmean(kept.losses[4]) == pytest.approx(val[-1][name], rel=1e-4)
    page = (out / "report.html").read_text()
    assert "37 training samples. Losses are the loss dpo of a comparison" in page
    assert "Same prompt, several answers: 1<" in page
    assert "7 | not: It is 7." in page
    review = run_here("scripts/review_data.py", "--run", out)
    assert "contradict 1 prompts with several answers" in review.stdout, review.stderr
    assert "by heart" not in review.stdout
    (wrong,) = read_hashes(out / "exclude.txt")
    config = PreferenceRunConfig(
        checkpoint_dir=tiny_checkpoint,
        data=DataConfig(path=str(pairs), prompt="qa", val_fraction=0.1, exclude=out / "exclude.txt", cache_dir="none"),
    )
    data = read_of_run(config).train
    assert isinstance(data, Comparisons)
    assert len(data) == 36
    assert wrong not in [hash_of(*one.answers) for one in data]
    assert "Rewards of chosen and rejected answers" in page
    assert "loss of a comparison" in page
    assert "dpo, beta 0.1 · " in page


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_with_the_log_probabilities_of_before(
    tiny_checkpoint: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(tiny_checkpoint, pairs, tmp_path / "out")
    monkeypatch.setattr(
        "lit_qlora.run.preferences.log_probabilities", lambda *arguments: pytest.fail("it is in the cache")
    )
    resumed = run(tiny_checkpoint, pairs, tmp_path / "again", resume=str(out / "step-000002"))
    assert adapter(resumed) == adapter(out)
    monkeypatch.undo()
    monkeypatch.setattr(reference, "find", lambda *arguments: None)
    anew = run(tiny_checkpoint, pairs, tmp_path / "anew", resume=str(out / "step-000002"))
    assert adapter(anew) == adapter(out)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "orpo"])
def test_other_losses_learn_too(loss: str, tiny_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    _, val = log_of(run(tiny_checkpoint, pairs, tmp_path / "out", loss, packing=loss == "orpo"))
    assert val[-1]["val_loss"] < val[0]["val_loss"]
    assert val[-1]["val_reward_margin"] > val[0]["val_reward_margin"]


@pytest.mark.slow
def test_a_reward_model_gives_numbers_to_answers(tiny_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    out = run(tiny_checkpoint, pairs, tmp_path / "out", "reward")
    _, val = log_of(out)
    assert val[-1]["val_reward_accuracy"] == 1.0
    assert val[-1]["val_loss"] < val[0]["val_loss"]
    values = []
    for answer in ("7", "It is 7."):
        asked = run_here("scripts/classify.py", "--lora_path", out, "--prompt", "What is 3 plus 4?", "--text", answer)
        values.append(json.loads(asked.stdout)["value"])
    assert values[0] > values[1]
    refused = run_here("scripts/classify.py", "--lora_path", out, "--text", "7")
    assert "Give --prompt too" in refused.stderr


@pytest.mark.slow
def test_a_run_needs_nothing_to_validate_on(tiny_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    train, val = log_of(run(tiny_checkpoint, pairs, tmp_path / "out", val_fraction=0))
    assert len(train) == 4
    assert all("val_loss" not in record for record in val)


def test_a_run_of_the_other_command_is_no_run_to_resume(tiny_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    config = PreferenceRunConfig(checkpoint_dir=tiny_checkpoint, out_dir=tmp_path)
    of_lora = {"base": base_facts(tiny_checkpoint), "config": plain(FinetuneConfig(checkpoint_dir=tiny_checkpoint))}
    with pytest.raises(UsageError, match="the other command"):
        check_same_run(config, {}, "", Checkpoint(tmp_path / "step-000001", tmp_path / "step-000001.state", of_lora))
    assert str(default_out_dir(config)).startswith("out/preference/")


@pytest.mark.parametrize(
    ("lora", "fast"), [({"targets": ("head",)}, False), ({"train_tokens": (3,)}, False), ({}, True)]
)
def test_a_head_or_embeddings_that_learn_take_the_plain_path(
    lora: dict[str, Any], fast: bool, tiny_checkpoint: Path
) -> None:
    config = PreferenceRunConfig(checkpoint_dir=tiny_checkpoint, lora=LoRAConfig(**lora))
    assert off_the_fast_path(config).train.fast == fast


def test_a_warning_says_that_chosen_answers_became_less_likely() -> None:
    fell = [{"step": 0, "val_logp_chosen": -9.0}, {"step": 4, "loss": 0.5}, {"step": 4, "val_logp_chosen": -11.0}]
    assert "-9.0000 -> -11.00" in falling(fell)
    assert falling(fell[:1]) == falling([*fell, {"step": 6, "val_logp_chosen": -8.0}]) == ""


def test_settings_of_single_samples_are_refused_by_name() -> None:
    for setting in ({"columns": "a:instruction,b:output"}, {"mask_prompt": False}, {"weighting": "samples"}):
        with pytest.raises(UsageError, match=f"data.{next(iter(setting))}"):
            PreferenceRunConfig(data=DataConfig(**setting))  # type: ignore[arg-type]
