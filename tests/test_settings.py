"""Settings: their ranges, and that every one of them survives the way through YAML."""

import math
import random
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.cli import parse, to_yaml
from lit_qlora.errors import UsageError
from lit_qlora.settings import (
    SCHEMES,
    TARGETS,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    LoRAConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)

WRONG: list[tuple[type, str, list[Any]]] = [
    (LoRAConfig, "r", [0, -1]),
    (LoRAConfig, "alpha", [0, -1.0, math.nan, math.inf]),
    (LoRAConfig, "dropout", [-0.1, 1, math.nan]),
    (LoRAConfig, "targets", [(), ("query", "qerry")]),
    (DataConfig, "val_fraction", [-0.1, 1, math.nan]),
    (DataConfig, "max_length", [0, 7]),
    (TrainConfig, "epochs", [0, -1, math.nan, math.inf]),
    (TrainConfig, "max_steps", [0, -1]),
    (TrainConfig, "batch_size", [0]),
    (TrainConfig, "micro_batch_size", [0]),
    (TrainConfig, "learning_rate", [0, -1e-4, math.nan, math.inf]),
    (TrainConfig, "warmup", [-0.1, math.nan, math.inf]),
    (TrainConfig, "weight_decay", [-0.1, math.nan, math.inf]),
    (TrainConfig, "max_norm", [-1, math.nan]),
    (TrainConfig, "save_every", [-1]),
    (TrainConfig, "keep_last", [0]),
    (EvalConfig, "every", [-1]),
    (EvalConfig, "max_samples", [0]),
    (SamplingConfig, "max_new_tokens", [0]),
    (SamplingConfig, "temperature", [-0.1, math.nan]),
    (SamplingConfig, "top_k", [0]),
    (SamplingConfig, "top_p", [0, 1.1, math.nan]),
    (FinetuneConfig, "seed", [-1, 2**32]),
    (FinetuneConfig, "num_nodes", [0]),
    (FinetuneConfig, "devices", [0]),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"), [(kind, field, value) for kind, field, values in WRONG for value in values]
)
def test_a_value_out_of_range_is_refused_by_the_name_that_was_typed(kind: type, field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        kind(**{field: value})


@pytest.mark.parametrize("kind", [LoRAConfig, DataConfig, TrainConfig, OptimizerConfig, EvalConfig, FinetuneConfig])
def test_the_defaults_are_in_range(kind: type) -> None:
    assert kind() == kind()


def test_one_target_may_be_given_as_a_word() -> None:
    assert LoRAConfig(targets="mlp").targets == ("mlp",)


def random_settings(rng: random.Random) -> FinetuneConfig:
    """Settings in which nothing is left at its default, but for what has one value only."""
    return FinetuneConfig(
        checkpoint_dir=Path(rng.choice(["a/b", "with space/é", "/abs: olute", "null", "1e3", "~x", "#c"])),
        out_dir=rng.choice([None, Path("out"), Path("true")]),
        quantize=rng.choice(SCHEMES),
        quantize_head=rng.random() < 0.5,
        precision=rng.choice(["bf16-true", "bf16-mixed", "16-mixed", "32-true"]),
        devices=rng.choice(["auto", 2, 8]),
        num_nodes=rng.randint(2, 9),
        strategy="ddp",
        seed=rng.randrange(2**32),
        dry_run=rng.random() < 0.5,
        lora=LoRAConfig(
            r=rng.randint(1, 256),
            alpha=rng.uniform(1e-6, 1e6),
            dropout=rng.random(),
            targets=tuple(rng.sample(TARGETS, rng.randint(1, len(TARGETS)))),
        ),
        data=DataConfig(
            path=Path(rng.choice(["d.jsonl", "0x10", "a: b"])),
            val_path=rng.choice([None, Path("v.json")]),
            val_fraction=rng.random(),
            prompt=rng.choice(["qa", "plain"]),
            max_length=rng.choice([None, 8, 4096]),
            mask_prompt=rng.random() < 0.5,
        ),
        train=TrainConfig(
            epochs=rng.uniform(1e-9, 1e9),
            max_steps=rng.choice([None, 1, 10**6]),
            batch_size=rng.randint(1, 999),
            micro_batch_size=rng.randint(1, 99),
            learning_rate=10 ** rng.uniform(-12, 1),
            schedule=rng.choice(["linear", "constant"]),
            warmup=rng.choice([0, 0.1, 100.0]),
            weight_decay=10 ** rng.uniform(-12, 1),
            max_norm=rng.choice([0, 1e-5, 1e16]),
            save_every=rng.randint(0, 99),
            keep_last=rng.randint(1, 99),
            recompute="full",
        ),
        optimizer=OptimizerConfig(name="sgd"),
        eval=EvalConfig(every=rng.randint(0, 99), max_samples=rng.choice([None, 7])),
    )


@pytest.mark.parametrize("seed", range(10))
def test_settings_survive_the_way_through_yaml(tmp_path: Path, seed: int) -> None:
    config = random_settings(random.Random(seed))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(FinetuneConfig, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("seed", range(3))
def test_every_setting_has_a_flag_of_its_name(seed: int) -> None:
    config = random_settings(random.Random(seed))

    def flags(part: Any, prefix: str = "") -> list[str]:
        found = []
        for field in fields(part):
            value = getattr(part, field.name)
            if is_dataclass(value):
                found += flags(value, f"{prefix}{field.name}.")
            else:
                text = f"[{','.join(value)}]" if isinstance(value, tuple) else "null" if value is None else str(value)
                found.append(f"--{prefix}{field.name}={text}")
        return found

    assert parse(FinetuneConfig, flags(config)) == config
