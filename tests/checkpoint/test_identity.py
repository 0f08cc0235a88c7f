"""An adapter and a run know their base by all that decides what it computes."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.checkpoint.identity import base_facts, config_hash, differing_parts
from lit_qlora.errors import CheckpointError
from lit_qlora.inference import load_for_inference
from lit_qlora.lora.adapter import check_base, read_adapter, save_adapter
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.model.config import ModelConfig
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import trained

WEIGHTS = "lit_model.safetensors"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter that was trained on it. Read only."""
    folder = tmp_path_factory.mktemp("identity")
    base = write_checkpoint(folder / "base", tiny_model())
    write_tokenizer(base)
    (base / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": "{{ x }}"}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6}))
    model = trained(load_model(base), LoRAConfig())
    save_adapter(folder / "final", model, LoRAConfig(), STYLES["qa"], {"base": base_facts(base)})
    return base, folder / "final"


@pytest.fixture
def base(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the base, to be changed."""
    return shutil.copytree(pair[0], tmp_path / "base")


def in_json(file: str, **changes: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def other_weights(base: Path) -> None:
    """Of the same size and time of content, beside the hash of those before."""
    content_hash(base)
    before = (base / WEIGHTS).stat()
    shutil.copy(write_checkpoint(base / "other", tiny_model(seed=5)) / WEIGHTS, base / WEIGHTS)
    os.utime(base / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (base / WEIGHTS).stat().st_size == before.st_size


def other_tokenizer(base: Path) -> None:
    content = bytearray((base / "tokenizer.model").read_bytes())
    content[-1] ^= 1
    (base / "tokenizer.model").write_bytes(content)


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (other_weights, "other weights"),
    "rope_theta": (in_json("model_config.json", rope_theta=500.0), "another model_config.json"),
    "norm_eps": (in_json("model_config.json", norm_eps=0.1), "another model_config.json"),
    "tokenizer": (other_tokenizer, "another tokenizer"),
    "no tokenizer": (lambda base: (base / "tokenizer.model").unlink(), "another tokenizer"),
    "bos": (in_json("tokenizer_config.json", add_bos_token=False), "another tokenizer"),
    "eos": (in_json("generation_config.json", eos_token_id=1), "another tokenizer"),
    "added": (lambda base: (base / "added_tokens.json").write_text('{"<x>": 300}'), "another tokenizer"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_is_refused_on_any_base_but_its_own(other: str, pair: tuple[Path, Path], base: Path) -> None:
    change, words = OTHERS[other]
    change(base)
    adapter = read_adapter(pair[1])
    with pytest.raises(CheckpointError, match=rf"was trained on (.|\n)*{base} holds {words}"):
        check_base(adapter, base)


def test_neither_generation_nor_a_merge_takes_it(pair: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    other_weights(base)
    with pytest.raises(CheckpointError, match="other weights"):
        load_for_inference(base, pair[1], precision="32-true")
    with pytest.raises(CheckpointError, match="other weights"):
        merge_checkpoint(read_adapter(pair[1]), base, tmp_path / "merged")


SAME: dict[str, Callable[[Path], object]] = {
    "a copy": lambda base: None,
    "another name": in_json("model_config.json", name="other/name"),
    "another chat template": in_json("tokenizer_config.json", chat_template="{{ y }}"),
    "another temperature": in_json("generation_config.json", temperature=1.0),
    "a README": lambda base: (base / "README.md").write_text("x"),
}


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_change_an_answer_does_not_count(change: str, pair: tuple[Path, Path], base: Path) -> None:
    SAME[change](base)
    check_base(read_adapter(pair[1]), base)


def test_an_adapter_of_an_earlier_version_has_the_check_that_it_carries(pair: tuple[Path, Path], base: Path) -> None:
    adapter = read_adapter(pair[1])
    assert adapter.manifest
    earlier = dataclasses.replace(
        adapter, manifest=adapter.manifest | {"base": {"name": "x", "sha256": content_hash(base)}}
    )
    in_json("model_config.json", rope_theta=500.0)(base)
    check_base(earlier, base)
    other_weights(base)
    with pytest.raises(CheckpointError, match="other weights"):
        check_base(earlier, base)


def test_all_parts_that_differ_are_named(pair: tuple[Path, Path], base: Path) -> None:
    for change, _ in OTHERS.values():
        if (base / "tokenizer.model").exists():
            change(base)
    assert differing_parts(base_facts(pair[0]), base) == ["sha256", "model_config", "tokenizer"]


def test_a_field_that_a_later_version_adds_changes_no_hash() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(ModelConfig):
        added_later: int = 7

    config = tiny_model().config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert config_hash(Later(**values)) == config_hash(config)
    assert config_hash(Later(**values, added_later=8)) != config_hash(config)
