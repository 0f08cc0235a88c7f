"""A checkpoint of ours into a complete Hugging Face folder, a tensor at a time; the inverse of convert.

config.json is the one that travelled with the checkpoint, with what a new dtype, head or vocabulary makes wrong put
right; where none travelled it is made from ModelConfig through the family's row. Either way it is read back and has to
describe the same model, or nothing is written.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_qlora.checkpoint import checkpoint, score, shards
from lit_qlora.convert.ending import Ending, read_ending
from lit_qlora.convert.families import family_of, read_config, their_tensors, to_ours
from lit_qlora.convert.families.wrappers import spelled_like, text_table
from lit_qlora.convert.from_hugging_face import THEIR_WEIGHTS, find_weights
from lit_qlora.convert.hub import SOURCE
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files import atomic
from lit_qlora.files.reading import read_json
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts import tokenizer
from lit_qlora.prompts.published import chat_template

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
"""Family -> the model's class in config.json; tools other than transformers go by it."""
DTYPE = ("dtype", "torch_dtype")
"""Names of one key of config.json, in newer and in older versions of transformers."""
ROPE = ("rope_scaling", "rope_factor", "rope_original_block_size", "rope_attention_factor")
"""Fields that scaled positions change, beside block_size."""
HIDDEN_ACT = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def export_hf(checkpoint_dir: Path, out_dir: Path, limit: int = shards.SHARD_BYTES) -> ModelConfig:
    """Write the Hugging Face folder of a checkpoint, whole or not at all.

    Args:
        limit: most bytes of weights in a file.

    Raises:
        CheckpointError: if the checkpoint is damaged, or Hugging Face's layout cannot describe it.
        UsageError: if `out_dir` has something in it.
        ResourceError: if there is not enough room.
    """
    config = ModelConfig.load(checkpoint_dir)
    weights = checkpoint.open_weights(checkpoint_dir)
    checkpoint.check_weights(weights.specs, config, location=str(weights.location))
    theirs, ending = their_config(checkpoint_dir, config, weights.specs), read_ending(checkpoint_dir)
    head = score.read(checkpoint_dir)
    ours = {name: spec for name, spec in weights.specs.items() if not head or not name.startswith("head.")}
    plan = [tensor for tensor in their_tensors(weights.specs, config) if ours.keys() >= set(tensor.ours)]
    if head:
        theirs |= _of_head(theirs, head[1], ending)
    kept = _open_kept(checkpoint_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"{out_dir} has something in it. Give --out_dir a new name, or remove it.")

    names = {t.name: spelled_like(t.name, kept.specs, config.wrapper) if config.wrapper else t.name for t in plan}
    specs = {names[tensor.name]: tensor.join(weights.specs, config) for tensor in plan} | kept.specs
    specs |= {score.NAME: head[0]} if head else {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for tensor in plan:
            yield names[tensor.name], tensor.join({name: weights.read(name) for name in tensor.ours}, config)
        yield from ((name, kept.read(name)) for name in kept.specs)
        if head:
            yield score.NAME, head[0]

    with atomic.writing(out_dir), atomic.temporary_directory(out_dir) as folder:
        shards.write(folder, THEIR_WEIGHTS[0], specs, tensors(), limit)
        travelled = checkpoint_dir / "config.json"
        if travelled.is_file() and read_json(travelled) == theirs:
            shutil.copyfile(travelled, folder / travelled.name)
        else:
            (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        for name in tokenizer.FILES:
            if (checkpoint_dir / name).is_file():
                shutil.copyfile(checkpoint_dir / name, folder / name)
        name_tokenizer(folder, ending, config.family)
        _write_ending(folder, ending)
        (folder / "README.md").write_text(model_card(checkpoint_dir, config, bool(head)), errors="backslashreplace")
        _read_back(folder, config, ours)
        atomic.publish(folder, out_dir)
    return config


def _of_head(theirs: Mapping[str, Any], scoring: Scoring, ending: Ending | None) -> dict[str, Any]:
    """The keys of config.json that a head makes another: a class of transformers, the names of its outputs, padding.

    Raises:
        CheckpointError: if transformers has no such class for the model.
    """
    names = theirs.get("architectures") or [f"{theirs.get('model_type')}"]
    kind = re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", names[0])
    if kind == names[0]:
        raise CheckpointError(f"transformers classifies no texts with {names[0]}, so this model cannot be exported.")
    classes = dict(enumerate(scoring.classes or ("LABEL_0",)))
    padding = (
        {} if theirs.get("pad_token_id") is not None or ending is None else {"pad_token_id": ending.tokenizer.eos_id}
    )
    return {
        "architectures": [kind],
        "id2label": {str(number): name for number, name in classes.items()},
        "label2id": {name: number for number, name in classes.items()},
        "problem_type": "single_label_classification" if scoring.classes else "regression",
        **padding,
    }


def _open_kept(checkpoint_dir: Path) -> shards.Weights:
    """The tensors that came with the published model, and that only an export has a use for."""
    path = checkpoint_dir / checkpoint.KEPT
    return shards.open_weights(path) if path.is_file() else shards.Weights(location=path, specs={}, files={})


def their_config(checkpoint_dir: Path, config: ModelConfig, specs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a checkpoint.

    Raises:
        CheckpointError: if config.json cannot describe the model, naming the settings.
    """
    path = checkpoint_dir / "config.json"
    theirs: dict[str, Any] = read_json(path) if path.is_file() else _new_config(config)
    text = text_table(theirs)
    tables = [theirs] if text is theirs else [theirs, text]
    for table in tables:
        table.pop("quantization_config", None)  # packed tensors are written unpacked
    said = read_config(theirs, config.name)
    for key, ours, home in (("tie_word_embeddings", "tied_head", theirs), ("vocab_size", "vocab_size", text)):
        if getattr(said, ours) != getattr(config, ours):
            for table in [table for table in tables if key in table] or [home]:
                table[key] = getattr(config, ours)
    if any(getattr(said, name) != getattr(config, name) for name in ROPE):
        rope = text.get("rope_parameters")  # as transformers 5 writes it
        text |= their_context(config)
        text |= {"rope_parameters": rope | scaling_table(config)} if rope else {"rope_scaling": scaling_table(config)}
    sizes = Counter[torch.dtype]()
    for spec in specs.values():
        sizes[spec.dtype] += spec.numel()
    dtype = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    if not any(key in theirs for key in DTYPE):
        theirs[DTYPE[-1]] = dtype
    for table in tables:
        table |= {key: dtype for key in DTYPE if key in table}
    described, meant = asdict(read_config(theirs, config.name)), asdict(config)
    if config.rope_scaling == "dynamic":
        meant["block_size"] = described["block_size"]
    if wrong := [name for name in meant if described[name] != meant[name]]:
        raise CheckpointError(
            f"{path if path.is_file() else checkpoint_dir}: a config.json of {config.family} would say "
            + ", ".join(f"{name} {described[name]!r} instead of {meant[name]!r}" for name in wrong)
            + ", so this model cannot be exported."
        )
    return theirs


def _new_config(config: ModelConfig) -> dict[str, Any]:
    """A config.json in the keys that every version of transformers reads."""
    family = family_of(config)
    theirs = {key: getattr(config, ours) for ours, key in family.fields.items() if isinstance(key, str)}
    theirs |= {"model_type": config.family, "hidden_act": HIDDEN_ACT.get(config.ffn, config.ffn)}
    if config.family in ARCHITECTURES:
        theirs["architectures"] = [ARCHITECTURES[config.family]]
    if config.rope_scaling != "none":
        theirs |= {"rope_scaling": scaling_table(config), **their_context(config)}
    return theirs


def scaling_table(config: ModelConfig) -> dict[str, Any]:
    """The keys of rope_parameters, or of rope_scaling before transformers 5, by which RoPE is scaled."""
    table: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling in ("llama3", "yarn"):
        table["original_max_position_embeddings"] = config.rope_original_block_size
    if config.rope_scaling == "llama3":
        table |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    return table


def their_context(config: ModelConfig) -> dict[str, int]:
    """Their key of the context's length; where scaling is dynamic it is the length that the scaling starts from."""
    key = family_of(config).fields["block_size"]
    length = config.rope_original_block_size if config.rope_scaling == "dynamic" else config.block_size
    return {key if isinstance(key, str) else "max_position_embeddings": length}


def model_card(checkpoint_dir: Path, config: ModelConfig, head: bool = False) -> str:
    """README.md with the front matter that the hub reads."""
    merged = _read_text(checkpoint_dir / "merge_report.json", "base", "name")
    base = merged or _read_text(checkpoint_dir / SOURCE, "repo_id") or config.name
    commit = _read_text(checkpoint_dir / SOURCE, "commit")
    made = f"{base} with a LoRA adapter merged into it" if merged else f"The weights of {base}"
    made += f", commit {commit}" if commit else ""
    tags = "".join(f"- {tag}\n" for tag in ["lit_qlora", config.family, *(["lora"] if merged else [])])
    task, kind = ("classification", "SequenceClassification") if head else ("generation", "CausalLM")
    return (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: transformers\npipeline_tag: text-{task}\n"
        f"tags:\n{tags}---\n\n# {config.name}\n\n{made}. Written by lit_qlora.\n\n"
        f"```python\nfrom transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
        f'model = AutoModelFor{kind}.from_pretrained(".", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
    )


def _read_facts(path: Path) -> dict[str, Any]:
    """Read a JSON file; {} where there is none."""
    facts: dict[str, Any] = read_json(path) if path.is_file() else {}
    return facts


def _read_text(path: Path, *keys: str) -> str:
    """The text under `keys` in a JSON file; '' where there is no file.

    Raises:
        CheckpointError: if the file has no such text.
    """
    if not path.is_file():
        return ""
    found: Any = read_json(path)
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, str):
        raise CheckpointError(f"{path}: {'.'.join(keys)} is not a text. Remove the file, or mend it.")
    return found


def name_tokenizer(folder: Path, ending: Ending | None, family: str) -> None:
    """Say in tokenizer_config.json that tokenizer.model is Llama's kind and if texts begin with BOS, unless it does.

    transformers 5.23 reads such a folder without a class with another one, which gives other ids; and where no
    add_bos_token is given, it takes none.
    """
    is_llamas = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if ending is None or family not in ("llama", "mistral") or not is_llamas:
        return
    used, path = ending.tokenizer, folder / "tokenizer_config.json"
    names = {i: name for name, i in used.control_tokens.items()}
    tokens = {"bos_token": names.get(used.bos_id or 0), "eos_token": names.get(used.eos_id), "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": used.use_bos, "add_eos_token": False}
    known = _read_facts(path)
    if not settings.keys() - {"add_eos_token"} <= known.keys():
        content = {**settings, **(tokens if not known else {}), **known}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_ending(folder: Path, ending: Ending | None) -> None:
    """Tell where answers end, in generation_config.json, and how conversations are written, in chat_template.jinja."""
    if ending is None:
        return
    path = folder / "generation_config.json"
    known, stops = _read_facts(path), list(ending.stop_ids)
    told = {"bos_token_id": ending.tokenizer.bos_id} if not known and ending.tokenizer.bos_id is not None else {}
    told["eos_token_id"] = stops[0] if len(stops) == 1 else stops  # type: ignore[assignment]
    if {*tokenizer.as_list(known.get("eos_token_id"))} != {*stops}:
        path.write_text(json.dumps(known | told, indent=2) + "\n")
    if ending.style:
        (folder / "chat_template.jinja").write_text(chat_template(ending.style, ending.tokenizer), encoding="utf-8")
        config = folder / "tokenizer_config.json"
        settings = _read_facts(config)
        if settings.pop("chat_template", None) is not None:  # that of the base
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_back(folder: Path, config: ModelConfig, specs: Mapping[str, Tensor]) -> None:
    """Convert the headers of the written files: they have to give the checkpoint again."""
    back: dict[str, Tensor] = {}
    for name, spec in find_weights(folder).specs.items():
        if name == score.NAME:
            continue
        back |= to_ours(name, spec, config)
    kinds, expected = ({name: (s.shape, s.dtype) for name, s in of.items()} for of in (back, specs))
    assert kinds == expected, set(kinds.items()) ^ set(expected.items())
