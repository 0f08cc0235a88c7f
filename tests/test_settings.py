"""Settings: their ranges, and that every one of them survives the way through YAML."""

import json
import math
import random
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_qlora.cli import parse, to_yaml
from lit_qlora.errors import UsageError
from lit_qlora.inference import InferenceConfig
from lit_qlora.serve.limits import Limits
from lit_qlora.settings import (
    SCHEMES,
    TARGETS,
    DataConfig,
    DistillConfig,
    EvalConfig,
    FinetuneConfig,
    GenerationConfig,
    LogConfig,
    LoRAConfig,
    OptimizerConfig,
    PreferenceRunConfig,
    TrainConfig,
    is_pattern,
)
from tests.conftest import ROOT

WRONG: list[tuple[type, str, list[Any]]] = [
    (LoRAConfig, "r", [0, -1]),
    (LoRAConfig, "alpha", [0, -1.0, math.nan, math.inf]),
    (LoRAConfig, "dropout", [-0.1, 1, math.nan]),
    (LoRAConfig, "targets", [(), ("query", "qerry")]),
    (DataConfig, "path", [()]),
    (DataConfig, "val_fraction", [-0.1, math.nan, math.inf]),
    (DataConfig, "max_length", [0, 7]),
    (DataConfig, "max_length_prompt", [1]),
    (DataConfig, "max_length_answer", [1]),
    (DataConfig, "max_samples", [0]),
    (DataConfig, "pack_length", [0, 64]),
    (DataConfig, "pad_to_multiple_of", [0]),
    (DataConfig, "seed", [-1, 2**32]),
    (DataConfig, "validation_strategy", ["custom"]),
    (TrainConfig, "epochs", [0, -1, math.nan, math.inf]),
    (TrainConfig, "max_steps", [-1]),
    (TrainConfig, "batch_size", [0]),
    (TrainConfig, "micro_batch_size", [0]),
    (TrainConfig, "learning_rate", [0, -1e-4, math.nan, math.inf]),
    (TrainConfig, "warmup", [-0.1, math.nan, math.inf]),
    (LoRAConfig, "rank_pattern", [{"query": 0}, {"(": 3}]),
    (LoRAConfig, "alpha_pattern", [{"query": 0}, {"query": -1.0}, {"query": math.nan}, {"query": math.inf}]),
    (LoRAConfig, "first_layers", [0, -1]),
    (LoRAConfig, "last_layers", [0]),
    (LoRAConfig, "loftq_steps", [0, 2]),
    (TrainConfig, "neftune", [-1, math.nan, math.inf]),
    (TrainConfig, "floor", [-0.1, 1.1, math.nan]),
    (TrainConfig, "cycles", [0]),
    (TrainConfig, "power", [0, -1, math.nan]),
    (TrainConfig, "decay", [0, -1, math.nan]),
    (OptimizerConfig, "name", ["admw", "os.system", "torch.optim.lr_scheduler.StepLR", "torch.optim.", "lit_qlora.x"]),
    (OptimizerConfig, "betas", [(0.9, 1.0), (-0.1,)]),
    (OptimizerConfig, "eps", [0, -1, math.nan]),
    (OptimizerConfig, "momentum", [-0.1, 1.0, math.nan]),
    (OptimizerConfig, "lora_plus", [0, -1, math.inf]),
    (OptimizerConfig, "options", [{"lr": 1.0}, {"fused": True}, {"betas": 0.5}]),
    (TrainConfig, "weight_decay", [-0.1, math.nan, math.inf]),
    (TrainConfig, "max_norm", [-1, math.nan]),
    (TrainConfig, "save_every", [-1]),
    (TrainConfig, "keep_last", [0]),
    (EvalConfig, "every", [-1]),
    (EvalConfig, "epochs", [0, -1.0, math.nan]),
    (EvalConfig, "num_beams", [0, 2]),
    (EvalConfig, "min_new_tokens", [-1, 2]),
    (EvalConfig, "repetition_penalty", [0, 1.2]),
    (TrainConfig, "warmup_epochs", [-1, math.nan]),
    (OptimizerConfig, "rate_pattern", [{"query": 0}, {"(": 1}]),
    (EvalConfig, "max_samples", [0]),
    (EvalConfig, "generate", [-1]),
    (EvalConfig, "max_new_tokens", [0, 5]),
    (EvalConfig, "tasks_every", [0, 5]),
    (EvalConfig, "tasks_limit", [0, -1.0, math.nan, 5]),
    (EvalConfig, "tasks_num_fewshot", [-1, 5]),
    (EvalConfig, "tasks_include_path", [Path("tasks")]),
    (LogConfig, "to", [("tensorbord",), ("wandb", "wandb")]),
    (GenerationConfig, "max_new_tokens", [0]),
    (GenerationConfig, "temperature", [-0.1, math.nan]),
    (DataConfig, "length_quantile", [0, 1.1, math.nan]),
    (DataConfig, "token_dropout", [-0.1, 1, math.nan]),
    (TrainConfig, "hidden_dropout", [-0.1, 1, math.nan]),
    (TrainConfig, "router_balance_loss", [-0.1, math.nan, math.inf]),
    (TrainConfig, "router_z_loss", [-0.1, math.nan, math.inf]),
    (GenerationConfig, "top_k", [0]),
    (GenerationConfig, "top_p", [0, 1.1, math.nan]),
    (GenerationConfig, "min_p", [-0.1, 1.1, math.nan]),
    (GenerationConfig, "typical_p", [0, 1.1, math.nan]),
    (GenerationConfig, "min_new_tokens", [-1, 129]),
    (GenerationConfig, "repetition_penalty", [0, -1, math.nan, math.inf]),
    (GenerationConfig, "no_repeat_ngram_size", [-1]),
    (GenerationConfig, "num_return_sequences", [0]),
    (GenerationConfig, "num_beams", [0]),
    (GenerationConfig, "num_beam_groups", [0, 2]),
    (GenerationConfig, "diversity_penalty", [-1.0, math.nan, math.inf]),
    (GenerationConfig, "length_penalty", [math.nan, math.inf]),
    (GenerationConfig, "seed", [-2, 2**32]),
    (FinetuneConfig, "seed", [-2, 2**32]),
    (FinetuneConfig, "num_nodes", [0]),
    (FinetuneConfig, "devices", [0]),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"), [(kind, field, value) for kind, field, values in WRONG for value in values]
)
def test_a_value_out_of_range_is_refused_by_the_name_that_was_typed(kind: type, field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig(r="8"), "lora.r: expected int, got '8'."),  # type: ignore[arg-type]
        (lambda: LoRAConfig(r=True), "lora.r: expected int, got True."),
        (lambda: LoRAConfig(r=8.0), "lora.r: expected int, got 8.0."),  # type: ignore[arg-type]
        (lambda: LoRAConfig(rslora=1), "lora.rslora: expected bool, got 1."),  # type: ignore[arg-type]
        (lambda: LoRAConfig(start=3), "lora.start: expected Path, got 3."),  # type: ignore[arg-type]
        (lambda: LoRAConfig(rank_pattern={"query": "4"}), "lora.rank_pattern.query: expected int, got '4'."),  # type: ignore[dict-item]
        (lambda: OptimizerConfig(betas=0.9), "optimizer.betas: expected list, got 0.9."),  # type: ignore[arg-type]
        (lambda: FinetuneConfig(lora={"r": 4}), "lora: expected LoRAConfig, got {'r': 4}."),  # type: ignore[arg-type]
        (lambda: FinetuneConfig(devices="two"), "devices: expected int or one of auto, got 'two'."),  # type: ignore[arg-type]
        (
            lambda: TrainConfig(schedule="cosin"),  # type: ignore[arg-type]
            "train.schedule: expected one of constant, linear, cosine, cosine-restarts, polynomial, inverse-sqrt, wsd, "
            "got 'cosin'. Did you mean cosine?",
        ),
        (
            lambda: LoRAConfig(targets=["query", "valu"]),  # type: ignore[arg-type]
            "lora.targets: expected one of query, key, value, latent, projection, delta, conv, per_layer, mlp, router, "
            "head, all, got 'valu'. Did you mean value?",
        ),
    ],
)
def test_a_value_of_another_type_is_refused_in_python_as_on_the_command_line(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(message)}$"):
        make()


def test_what_a_command_loads_and_a_client_may_cost_is_checked_as_a_run_is() -> None:
    with pytest.raises(
        UsageError, match=r"^quantize: expected one of auto, none, .*, got 'nf4'\. Did you mean bnb\.nf4\?$"
    ):
        InferenceConfig(quantize="nf4")  # type: ignore[arg-type]
    assert InferenceConfig(checkpoint_dir="a/b").checkpoint_dir == Path("a/b")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^body_bytes must be at least 1024, got 5\.$"):
        Limits(body_bytes=5)


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (FinetuneConfig(checkpoint_dir="a/b"), FinetuneConfig(checkpoint_dir=Path("a/b"))),  # type: ignore[arg-type]
        (DataConfig(path=Path("a.json")), DataConfig(path=("a.json",))),  # type: ignore[arg-type]
        (LoRAConfig(r=np.int64(4), alpha=np.float32(2)), LoRAConfig(r=4, alpha=2.0)),  # type: ignore[arg-type]
        (LoRAConfig(targets=["query"], train_tokens=5), LoRAConfig(targets=("query",), train_tokens=(5,))),  # type: ignore[arg-type]
        (TrainConfig(warmup=10), TrainConfig(warmup=10.0)),
    ],
)
def test_what_stands_for_a_value_becomes_it(config: Any, same: Any) -> None:
    assert repr(config) == repr(same)


def test_a_section_names_its_settings_by_their_flags() -> None:
    sections = {field.name: field.type for field in fields(FinetuneConfig) if is_dataclass(field.type)}
    assert {name: kind.prefix for name, kind in sections.items()} == {name: f"{name}." for name in sections}


def test_messages_and_help_name_settings_that_exist() -> None:
    sections = {field.name: field.type for field in fields(FinetuneConfig) if is_dataclass(field.type)}
    known = {f"{name}.{field.name}" for name, kind in sections.items() for field in fields(kind)}
    text = "".join(path.read_text() for path in (ROOT / "lit_qlora/settings").glob("*.py"))
    named = set(re.findall(rf"(?<![\w.])(?:{'|'.join(sections)})\.(?!jsonl|py)[a-z]\w+(?!\w|\.\.\.)", text))
    assert len(named) > 20
    assert named <= known


@pytest.mark.parametrize("kind", [LoRAConfig, DataConfig, TrainConfig, OptimizerConfig, EvalConfig, FinetuneConfig])
def test_the_defaults_are_in_range(kind: type) -> None:
    assert kind() == kind()


@pytest.mark.parametrize(
    "settings", [{"cycles": 2}, {"power": 2.0}, {"decay": 0.2}, {"floor": 0.1, "schedule": "constant"}], ids=str
)
def test_a_setting_of_another_schedule_is_refused(settings: dict) -> None:
    with pytest.raises(UsageError, match=f"train.{next(iter(settings))} has no effect"):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_strategy": "automatic", "val_path": "v.json"}, "val_path would have no effect"),
        ({"packing": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of has no effect"),
        (
            {"packing": True, "length_quantile": 0.9},
            "data.length_quantile saves padding, and packed rows have hardly any",
        ),
        ({"group_by_length": True, "shuffle": False}, "needs data.shuffle"),
        (
            {"text_prompt_start": "Q"},
            r"^data.text_prompt_start belongs to prompt style knobs, and data.prompt is auto\. Add",
        ),
        (
            {"text_system_start": "S", "add_eos_token_to_prompt": False, "prompt": "qa"},
            "^data.text_system_start and data.add_eos_token_to_prompt belong to prompt style knobs, and .* is qa. Add",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.5, "seed": 3},
        {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5, "length_penalty": -1.0},
        {"num_beams": 2, "early_stopping": True},
        {"num_beams": 2, "num_return_sequences": 2, "early_stopping": "never", "min_new_tokens": 3},
        {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "max_new_tokens": 9},
    ],
    ids=str,
)
def test_flags_of_generation_mean_what_they_say(settings: dict[str, Any]) -> None:
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value).lower())]
    assert parse(GenerationConfig, argv) == GenerationConfig(**settings)


def test_what_concerns_sampling_is_noted_without_it() -> None:
    config = GenerationConfig(do_sample=False, temperature=0.3, top_k=5)
    assert config.notes() == ["do_sample is false, so temperature, top_k has no effect."]
    assert not config.samples
    assert GenerationConfig(do_sample=False, temperature=0.0).notes() == GenerationConfig(temperature=0.3).notes() == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora": LoRAConfig(dora=True)}, "lora.dora"),
        ({"lora": LoRAConfig(init="pissa")}, "lora.init pissa"),
        ({"train": TrainConfig(fp8=True)}, "train.fp8"),
        ({"train": TrainConfig(keep_dequantized=3)}, "train.keep_dequantized 3"),
        ({"train": TrainConfig(fast=False, recompute="attn")}, "train.recompute attn on the plain path"),
        ({"quantize_cache": "/cache"}, "quantize_cache /cache"),
        ({"head": "classify"}, "head classify"),
    ],
)
def test_a_setting_that_needs_a_whole_base_is_refused_where_none_is(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=rf"strategy sharded: {named} does not work with it: "):
        FinetuneConfig(strategy="sharded", **settings)
    FinetuneConfig(strategy="ddp", **settings)


def test_preferences_need_whole_bases_and_rows() -> None:
    with pytest.raises(UsageError, match=r"strategy sharded is for finetune/lora.py"):
        PreferenceRunConfig(strategy="sharded")
    with pytest.raises(UsageError, match=r"sequence_parallel is for finetune/lora.py"):
        PreferenceRunConfig(sequence_parallel=2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"head": "regress"}, "head regress"),
        ({"distill": DistillConfig(teacher=Path("base"))}, "distill.teacher"),
        ({"train": TrainConfig(neftune=5.0)}, "train.neftune"),
    ],
)
def test_a_setting_that_needs_whole_rows_is_refused_where_none_are(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=rf"sequence_parallel 2: {named} does not work with it: "):
        FinetuneConfig(sequence_parallel=2, **settings)
    FinetuneConfig(**settings)


def test_a_seed_of_minus_one_is_another_one_each_time() -> None:
    seeds = {GenerationConfig(seed=-1).seed for _ in range(3)}
    assert len(seeds) == 3
    assert min(seeds) >= 0


def test_one_path_may_be_given_as_a_word() -> None:
    assert DataConfig(path="a.jsonl").path == ("a.jsonl",)
    assert DataConfig(allow="masked").allow == ("masked",)


def test_one_target_may_be_given_as_a_word() -> None:
    assert LoRAConfig(targets="mlp").targets == ("mlp",)


def random_settings(rng: random.Random) -> FinetuneConfig:
    """Settings in which nothing is left at its default, but for what has one value only."""
    variant = rng.choice(["start", "init"])
    return FinetuneConfig(
        checkpoint_dir=Path(rng.choice(["a/b", "with space/é", "/abs: olute", "null", "1e3", "~x", "#c"])),
        out_dir=rng.choice([None, Path("out"), Path("true")]),
        quantize=rng.choice(SCHEMES[1:]),
        quantize_head=rng.random() < 0.5,
        precision=rng.choice(["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"]),
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
            first_layers=rng.choice([None, 3]),
            last_layers=rng.choice([None, 1]),
            rank_pattern=rng.choice([{"mlp.down": 3}, {r"blocks\.[01]\..*": 7, "key": 1}]),
            alpha_pattern={"query|value": rng.uniform(1e-3, 99)},
            rslora=rng.random() < 0.5,
            dora=rng.random() < 0.5,
            train_tokens=rng.choice([(), (5,), (7, 300)]),
            start=Path("some/where") if variant == "start" else None,
            **({"init": "loftq", "loftq_steps": 4} if variant == "init" else {}),  # type: ignore[arg-type]
        ),
        data=DataConfig(
            path=rng.choice([("d.jsonl",), ("0x10",), ("a: b", "c.csv*0.5"), "hf:org/name:config"]),
            val_path=rng.choice([None, "v.json"]),
            **rng.choice([{"format": "alpaca"}, {"format": "sharegpt"}, {"columns": "a:instruction,b:output"}]),
            on_error="skip",
            max_samples=rng.choice([None, 10]),
            val_fraction=rng.random(),
            prompt="knobs",
            text_system_start="<|system|>",
            text_prompt_start=rng.choice(["<|prompt|>", "1e3"]),
            text_answer_separator="\n",
            add_eos_token_to_system=rng.random() < 0.5,
            add_eos_token_to_prompt=rng.random() < 0.5,
            add_eos_token_to_answer=rng.random() < 0.5,
            system="Be: brief.",
            max_length=rng.choice([None, 8, 4096]),
            max_length_prompt=rng.choice([None, 128]),
            max_length_answer=rng.choice([None, 128]),
            overlong=rng.choice(["truncate_right", "drop", "error"]),
            mask_prompt=rng.random() < 0.5,
            only_last_answer=rng.random() < 0.5,
            packing=True,
            pack_length=rng.choice([None, 8192]),
            weighting="samples",
            group_by_length=rng.random() < 0.5,
            drop_last=rng.random() < 0.5,
            token_dropout=rng.choice([0, 0.1]),
            seed=rng.choice([None, 0, 7]),
            cache_dir=rng.choice(["none", "some/where"]),
            allow=rng.choice([(), ("cut_answers", "masked")]),
        ),
        train=TrainConfig(
            epochs=rng.uniform(1e-9, 1e9),
            max_steps=rng.choice([None, 1, 10**6]),
            batch_size=rng.randint(1, 999),
            micro_batch_size=rng.randint(1, 99),
            learning_rate=10 ** rng.uniform(-12, 1),
            schedule="wsd",
            decay=rng.choice([0.3, 20]),
            floor=rng.random(),
            warmup=rng.choice([0, 0.1, 100.0]),
            weight_decay=10 ** rng.uniform(-12, 1),
            neftune=rng.choice([0.5, 5]),
            hidden_dropout=rng.choice([0, 0.1]),
            max_norm=rng.choice([0, 1e-5, 1e16]),
            save_every=rng.randint(0, 99),
            keep_last=rng.randint(1, 99),
            recompute="full",
        ),
        optimizer=OptimizerConfig(
            name=rng.choice(["sgd", "torch.optim.NAdam"]),
            betas=rng.choice([None, (0.9, 0.95), (0.9, 0.99, 0.999)]),
            eps=rng.choice([None, 1e-6]),
            momentum=rng.choice([None, 0.5]),
            nesterov=rng.random() < 0.5,
            options=rng.choice([{"rho": 0.5}, {"amsgrad": True, "n": 3}]),
            lora_plus=rng.choice([16.0, 1e-3]),
        ),
        eval=EvalConfig(
            every=rng.randint(0, 99),
            max_samples=rng.choice([None, 7]),
            generate=rng.randint(1, 9),
            max_new_tokens=rng.choice([None, 7]),
            prompts=rng.choice([None, Path("some/prompts.txt")]),
            kl_text=rng.choice([None, Path("default")]),
            tasks=rng.choice([("mmlu",), ("a", "b")]),
            tasks_every=rng.choice([None, 7]),
            tasks_limit=rng.choice([None, 0.5, 7]),
            tasks_num_fewshot=rng.choice([None, 0, 5]),
        ),
        log=LogConfig(to=rng.choice([(), ("wandb", "mlflow")])),
        expect_trainable=rng.choice([{}, {"a/b-c.d": 7, "e": 8}]),
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
                text = json.dumps(value) if isinstance(value, tuple | dict) else "null" if value is None else str(value)
                found.append(f"--{prefix}{field.name}={text}")
        return found

    assert parse(FinetuneConfig, flags(config)) == config


@pytest.mark.parametrize("value", ["[[1],2]", "[a.jsonl, {b: 3}]", "{a: 1}"])
def test_a_list_of_data_with_something_that_is_no_name_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match=rf"^data\.path {re.escape(value)} is no list of names.* in quotation marks"):
        parse(FinetuneConfig, [f"--data.path={value}"])
    assert parse(FinetuneConfig, ['--data.path=["1","b,c.csv"]']).data.path == ("1", "b,c.csv")
    assert parse(FinetuneConfig, ["--data.path=[a.jsonl, 3]"]).data.path == ("a.jsonl", "3")
    for nothing in ("", "[]", "['']"):
        with pytest.raises(UsageError, match=r"^data\.path names no file\.$"):
            parse(FinetuneConfig, [f"--data.path={nothing}"])


@pytest.mark.parametrize(
    "flag", ["train.batch_size", "train.micro_batch_size", "lora.r", "data.max_length", "num_nodes"]
)
def test_a_number_beyond_64_bits_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=rf"^{flag} has more digits than an integer of 64 bits: 9+\.$"):
        parse(FinetuneConfig, [f"--{flag}={'9' * 20}"])


@pytest.mark.parametrize("flag", ["quantize_cache", "data.cache_dir"])
def test_a_file_is_no_folder_of_a_cache(flag: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=f"{flag}: .*file is a file"):
        parse(FinetuneConfig, [f"--{flag}={tmp_path / 'file'}"])


@pytest.mark.parametrize(
    "pattern", ["(", "(a+)+!", "((a*)b)*", "(a|b?){2,9}", ".*" * 6, ".?" * 6, "(.|.)" * 6, "a{1,99}" * 6]
)
def test_a_pattern_that_could_take_for_ever_is_none(pattern: str) -> None:
    assert not is_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "mlp.down",
        "blocks.[01].attn.query",
        r"^model\.layers\.\d+\.self_attn\.[qkv]_proj$",
        "(1|2|3|10)",
        "[(*+)]+",
        "a{3}",
    ],
)
def test_patterns_in_use_are_patterns(pattern: str) -> None:
    assert is_pattern(pattern)
