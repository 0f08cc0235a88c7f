"""The identity of a base: an adapter fits no other, and a run goes on with no other."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lit_qlora.checkpoint.checkpoint import content_hash
from lit_qlora.files.hashing import hash_text
from lit_qlora.model.config import ModelConfig
from lit_qlora.prompts.fingerprint import fingerprint

PARTS = {"sha256": "other weights", "model_config": "another model_config.json", "tokenizer": "another tokenizer"}
"""The parts of an identity, and words for another one."""


def identity(checkpoint_dir: Path) -> dict[str, str | None]:
    """sha256 by part: of the weights, of the configuration but for its name, and of the tokenizer, if there is one.

    Raises:
        CheckpointError: if the checkpoint is absent or damaged.
    """
    return {
        "sha256": content_hash(checkpoint_dir),
        "model_config": config_hash(ModelConfig.load(checkpoint_dir)),
        "tokenizer": fingerprint(checkpoint_dir),
    }


def base_facts(checkpoint_dir: Path) -> dict[str, str | None]:
    """The facts of a base for a manifest: name, path and identity."""
    name = ModelConfig.load(checkpoint_dir).name
    return {"name": name, "path": str(checkpoint_dir), **identity(checkpoint_dir)}


def differing_parts(known: Mapping[str, Any], checkpoint_dir: Path) -> list[str]:
    """The parts in which a base is not the one that a manifest knows; manifests of earlier versions know weights alone.

    Returns:
        Of PARTS; none if it is the same base.
    """
    now = identity(checkpoint_dir)
    return [part for part in PARTS if part in known and known[part] != now[part]]


def config_hash(config: ModelConfig) -> str:
    """sha256 of all fields that are not their defaults, so that a field that is added later changes no hash."""
    chosen = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name != "name" and getattr(config, field.name) != field.default
    }
    return hash_text(json.dumps(chosen, sort_keys=True))
