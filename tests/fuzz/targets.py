"""Files that commands read, each with a good one and with the code that reads it."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from lightning.fabric import Fabric

from lit_qlora import cli
from lit_qlora.checkpoint import quantization_table, safetensors_io, score
from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.checkpoint.identity import base_facts, identity
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.to_gguf import export_gguf
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.data.load import load
from lit_qlora.data.prompt_files import read_prompts
from lit_qlora.data.scoring import read_scored
from lit_qlora.errors import UserError
from lit_qlora.files.hashing import hash_file
from lit_qlora.files.manifest import MANIFEST
from lit_qlora.lora.adapter import STATE, attach_adapter, check_base, read_adapter, save_adapter
from lit_qlora.lora.layer import add_lora
from lit_qlora.lora.merge import Merge, merge_checkpoint
from lit_qlora.lora.score import fill_score
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.scoring import Scoring
from lit_qlora.partial_answers import Part
from lit_qlora.prompts.added_tokens import NEW_TOKENS, read_new_tokens
from lit_qlora.prompts.style import STYLES, read_style
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.quantize import Storage
from lit_qlora.report import RunLog, metrics
from lit_qlora.run import resume, states
from lit_qlora.run.figures import losses_figure, rewards_figure
from lit_qlora.run.preferences import falling
from lit_qlora.run.summary import summarize, table
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig
from lit_qlora.train.training_state import restore, state_files
from tests.conftest import load_script, run_here, tiny_model, write_checkpoint, write_tokenizer
from tests.data.test_sources import compressed
from tests.fuzz import strategies
from tests.fuzz.property import holds

Spoil = Callable[[bytes], st.SearchStrategy[bytes]]
SETTINGS = b"""\
seed: 3
checkpoint_dir: x
data: {path: a.jsonl, prompt: qa, max_length: 64}
lora:
  r: 4
  targets: [query, value]
  rank_pattern: {"blocks.1.*": 2}
train: &t
  learning_rate: 1e-3
  epochs: 2
"""
TASK = b"""\
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: a.jsonl}}
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""
ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add.", "input": "1, 2", "output": "3", "weight": 0.5},
]
MESSAGES = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "It shines.", "train": True},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
]
TOKENIZED = [{"input_ids": [1, 20, 21, 2], "labels": [-100, 20, 21, 2]}]
STEP = {
    "step": 1,
    "epoch": 0.5,
    "loss": 2.0,
    "lr": 3e-4,
    "grad_norm": 1.5,
    "tokens": 100,
    "samples": 4,
    "tokens_per_second": 12.5,
    "peak_gib": 0.5,
    "seconds": 1.0,
}


@dataclass(frozen=True)
class Target:
    """A file that somebody else may have written.

    Attributes:
        file: its path in the folder.
        use: reads the folder as commands do.
        spoil: makes broken contents of the good one.
    """

    folder: Path
    file: str
    use: Callable[[Path], object]
    spoil: Spoil

    @property
    def good(self) -> bytes:
        """The content of the file as it should be."""
        return (self.folder / self.file).read_bytes()

    def holds(self, kind: str, content: bytes) -> bool:
        """property.holds for a folder in which the file has this content, and nothing is left behind."""
        path, good = self.folder / self.file, self.good
        try:
            path.write_bytes(content)
            return holds(kind, content, lambda: self.use(self.folder))
        finally:
            path.write_bytes(good)


def make_targets(root: Path) -> Mapping[str, Target]:
    """Good files in `root` -> by the names of their kinds."""
    base = write_checkpoint(root / "base", tiny_model())
    write_tokenizer(base)
    for name, content in beside_the_tokenizer(300).items():
        (base / name).write_text(json.dumps(content))
    theirs = root / "theirs"
    export_hf(base, theirs)
    fast = root / "fast"
    shutil.copytree(base, fast)
    (fast / "tokenizer.model").unlink()
    (fast / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    (fast / "source.json").write_text(json.dumps({"repo_id": "a/b", "commit": "0" * 40, "files": {"x": {"bytes": 1}}}))
    (fast / "merge_report.json").write_text(
        json.dumps({"base": {"name": "a/b"}, "adapter": {"path": "x"}, "layers": []})
    )
    for name, content in beside_the_tokenizer(100).items():
        (fast / name).write_text(json.dumps(content))
    exportable = root / "exportable"
    shutil.copytree(fast, exportable)
    by_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (exportable / "tokenizer.json").write_text(
        json.dumps(fast_tokenizer() | {"pre_tokenizer": by_gpt2, "normalizer": None})
    )
    tekken = root / "tekken"
    shutil.copytree(base, tekken)
    (tekken / "tokenizer.model").unlink()
    (tekken / "tekken.json").write_text(json.dumps(tekken_tokenizer()))
    for name, content in beside_the_tokenizer(262).items():
        (tekken / name).write_text(json.dumps(content))
    adapter = write_adapter(root / "run", base)
    (root / "run/log.jsonl").write_text("".join(json.dumps(STEP | {"step": n}) + "\n" for n in (1, 2)))
    with open(root / "run/log.jsonl", "a") as log:
        log.write(json.dumps({"step": 2, "val_loss": 1.5, "val_ppl": 4.5}) + "\n")
    foreign = root / "foreign"
    shutil.copytree(adapter, foreign)
    (foreign / MANIFEST).unlink()
    pickled = root / "pickled"
    shutil.copytree(theirs, pickled)
    weights = next(pickled.glob("*.safetensors"))
    torch.save(safetensors_io.read_all(weights), pickled / "pytorch_model.bin")
    weights.unlink()
    headed = root / "headed"
    headed.mkdir()
    score.write(headed, torch.ones(2, 64), Scoring("classify", ("no", "yes")))
    files = root / "files"
    write_data(files)
    (files / NEW_TOKENS).write_text(json.dumps({"tokens": {"<x>": 300, "<y>": 301}}))
    quantization_table.write_table(base, effects_on(base))

    def use_base(folder: Path) -> None:
        ModelConfig.load(folder)
        identity(folder)
        read_style(folder)
        tokenizer = Tokenizer(folder)
        tokenizer.decode(tokenizer.encode("What is 1 plus 2?\n</s>", eos=True))

    def use_adapter(folder: Path) -> None:
        found = read_adapter(folder)
        check_base(found, base)
        Merge([found], base)
        read_style(folder)
        Storage.of_training(found.manifest or {})
        attach_adapter(load_model(base), found, base)

    def use_manifest(folder: Path) -> None:
        use_adapter(folder)
        states.find(folder)
        states.step_of(folder)

    def use_head(folder: Path) -> None:
        if found := score.read(folder):
            fill_score(plain_model, found[0], str(folder))

    def use_labels(folder: Path) -> None:
        data = DataConfig(path=str(folder / "labels.jsonl"), cache_dir="none")
        read_scored(FinetuneConfig(checkpoint_dir=base, head="classify", data=data))

    def use_state(folder: Path) -> None:
        config = FinetuneConfig(checkpoint_dir=base, out_dir=folder)
        without_digests(folder / "final")
        if found := resume.newest(folder):
            resume.check_same_run(config, {"a": "b"}, "x", found)
            model, optimizer = learner(base)
            restore(Fabric(accelerator="cpu", devices=1), model, optimizer, found.state)

    def use_log(folder: Path) -> None:
        log = RunLog(folder / "log.jsonl", 4, io.StringIO())
        summarize(plain_model, LoRAConfig(), "none", "32-true", log.records)
        table(log.records)
        metrics(log.records)
        losses_figure(log.records)
        rewards_figure(log.records)
        falling(log.records)
        resume.read_log(folder / "log.jsonl", 2)
        log(STEP | {"step": 3})
        log.close()

    def use_data(name: str, prompt: str = "qa", **settings: Any) -> Callable[[Path], None]:
        def use(folder: Path) -> None:
            data = DataConfig(path=str(folder / name), prompt=prompt, cache_dir="none", **settings)
            load(data, base, tokenizer, 96, seed=1)

        return use

    def use_theirs(folder: Path) -> None:
        whole_or_absent(folder.with_name("converted"), lambda out: convert_hf_checkpoint(folder, out))

    def use_exports(folder: Path) -> None:
        whole_or_absent(folder.with_name("exported"), lambda out: export_hf(folder, out))
        whole_or_absent(folder.with_name("exported.gguf"), lambda out: export_gguf(folder, out), "exported.Modelfile")

    def merge(folder: Path) -> None:
        whole_or_absent(folder.with_name("merged"), lambda out: merge_checkpoint(read_adapter(folder), base, out))

    def prepare(folder: Path) -> None:
        flags = ("--csv_path", folder / "a.csv", "--checkpoint_dir", base)
        whole_or_absent(
            folder.with_name("prepared"),
            lambda out: command("scripts/prepare_csv.py", *flags, "--out_dir", out),
        )

    def read_task(folder: Path) -> None:
        sandbox.check_code(list(tasks.task_files(folder)), folder, False)
        tasks.with_absolute_paths(folder / "own.yaml", folder)

    tokenizer, plain_model = Tokenizer(base), tiny_model()
    chat, tasks, sandbox = map(load_script, ("scripts/chat.py", "eval/lm_eval_tasks.py", "eval/lm_eval_sandbox.py"))
    as_json, as_lines, as_bytes = strategies.spoilt_json, strategies.spoilt_lines, strategies.spoilt
    tensors = strategies.spoilt_safetensors
    return {
        "config": Target(
            files, "run.yaml", lambda f: cli.parse(FinetuneConfig, [f"--config={f / 'run.yaml'}"]), as_bytes
        ),
        "task": Target(files, "own.yaml", read_task, as_bytes),
        "model_config": Target(base, "model_config.json", use_base, as_json),
        "tokenizer_config": Target(base, "tokenizer_config.json", use_base, as_json),
        "special_tokens_map": Target(base, "special_tokens_map.json", use_base, as_json),
        "added_tokens": Target(base, "added_tokens.json", use_base, as_json),
        "new_tokens": Target(files, NEW_TOKENS, read_new_tokens, as_json),
        "generation_config": Target(base, "generation_config.json", use_base, as_json),
        "tokenizer_model": Target(base, "tokenizer.model", use_base, as_bytes),
        "tokenizer_json": Target(fast, "tokenizer.json", use_base, as_json),
        "tekken": Target(tekken, "tekken.json", use_base, as_json),
        "head": Target(headed, score.FACTS, use_head, as_json),
        "head_weights": Target(headed, score.WEIGHTS, use_head, tensors),
        "weights": Target(base, "lit_model.safetensors", lambda f: load_model(f), tensors),
        "manifest": Target(adapter, MANIFEST, use_manifest, as_json),
        "adapter_config": Target(foreign, "adapter_config.json", use_adapter, as_json),
        "prompt_style": Target(foreign, "prompt_style.json", use_adapter, as_json),
        "adapter_weights": Target(foreign, "adapter_model.safetensors", use_adapter, tensors),
        "state": Target(root / "run", "final.state/state.json", use_state, as_json),
        "state_tensors": Target(root / "run", "final.state/train_state.safetensors", use_state, tensors),
        "log": Target(root / "run", "log.jsonl", use_log, as_lines),
        "merged": Target(foreign, "adapter_model.safetensors", merge, tensors),
        "exported_template": Target(exportable, "tokenizer_config.json", use_exports, as_json),
        "exported_tokenizer": Target(exportable, "tokenizer.json", use_exports, as_json),
        "exported_source": Target(exportable, "source.json", use_exports, as_json),
        "exported_report": Target(exportable, "merge_report.json", use_exports, as_json),
        "hf_config": Target(theirs, "config.json", use_theirs, as_json),
        "hf_weights": Target(theirs, "model.safetensors", use_theirs, tensors),
        "pickle": Target(pickled, "pytorch_model.bin", use_theirs, as_bytes),
        "jsonl": Target(files, "a.jsonl", use_data("a.jsonl"), as_lines),
        "labels": Target(files, "labels.jsonl", use_labels, as_lines),
        "json": Target(files, "a.json", use_data("a.json"), as_json),
        "messages": Target(files, "messages.jsonl", use_data("messages.jsonl", "auto"), as_lines),
        "tokenized": Target(files, "tokenized.jsonl", use_data("tokenized.jsonl"), as_lines),
        "csv": Target(files, "a.csv", use_data("a.csv"), as_bytes),
        "prepare_csv": Target(files, "a.csv", prepare, as_bytes),
        "tsv": Target(files, "a.tsv", use_data("a.tsv"), as_bytes),
        "txt": Target(files, "a.txt", use_data("a.txt"), as_bytes),
        "parquet": Target(files, "a.parquet", use_data("a.parquet"), as_bytes),
        "arrow": Target(files, "a.arrow", use_data("a.arrow"), as_bytes),
        "gzip": Target(files, "a.jsonl.gz", use_data("a.jsonl.gz"), as_bytes),
        "zstandard": Target(files, "a.jsonl.zst", use_data("a.jsonl.zst"), as_bytes),
        "saved": Target(files, "saved/state.json", use_data("saved"), as_json),
        "prompts": Target(files, "prompts.jsonl", lambda f: list(read_prompts(f / "prompts.jsonl")), as_lines),
        "history": Target(files, "history.jsonl", lambda f: chat.read_history(f / "history.jsonl"), as_lines),
        "answers": Target(files, "out.part", read_answers, as_bytes),
        "quantization_table": Target(
            base, quantization_table.FILE, lambda f: quantization_table.choose(f, "30bits", torch.float32), as_json
        ),
    }


def effects_on(base: Path) -> quantization_table.Table:
    """Effects that nobody has measured."""
    groups = tuple(
        quantization_table.Group((name,), 4096, dict.fromkeys(quantization_table.MEASURED, 0.5))
        for name in ("up", "key")
    )
    return quantization_table.Table(content_hash(base), "0" * 64, 512, "float32", groups)


def read_answers(folder: Path) -> None:
    """Go on with the answers of a command that was stopped."""
    part = Part(folder / "out", "x", folders=())
    part.file.close()


def beside_the_tokenizer(size: int) -> dict[str, Any]:
    """The files of settings beside a tokenizer of so many tokens."""
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "add_bos_token": True}
    decoder = {
        str(size): {"content": "<x>", "special": True, "lstrip": True},
        str(size + 1): {"content": "<y>", "special": False},
    }
    functions = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    template = functions + "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    return {
        "tokenizer_config.json": {**named, "added_tokens_decoder": decoder, "chat_template": template},
        "special_tokens_map.json": {**named, "additional_special_tokens": ["<x>"], "pad_token": "<unk>"},
        "added_tokens.json": {"<x>": size, "<y>": size + 1},
        "generation_config.json": {"eos_token_id": [2], "bos_token_id": 1},
    }


def fast_tokenizer() -> dict[str, Any]:
    """A tokenizer.json."""
    letters = {chr(i): i - 30 for i in range(33, 127)} | {"Ġ": 97, "Ċ": 98, "Wh": 99, "<unk>": 0}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}|\s+"}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    opening = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": c, "special": True, **flags} for i, c in ((1, "<s>"), (2, "</s>"))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "~"}, "content": "-"}],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": opening,
            "pair": opening,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": letters | {"<s>": 1, "</s>": 2},
            "merges": [["W", "h"]],
        },
    }


def tekken_tokenizer() -> dict[str, Any]:
    """A tekken.json."""
    words = [bytes([i]) for i in range(256)] + [b"Wh", b"at"]
    return {
        "config": {"pattern": r"\p{L}+|\p{N}|\s+|.", "default_num_special_tokens": 4, "default_vocab_size": 262},
        "special_tokens": [{"rank": i, "token_str": name} for i, name in enumerate(("<unk>", "<s>", "</s>"))],
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(word).decode()} for i, word in enumerate(words)],
    }


def learner(base: Path) -> tuple[Any, torch.optim.Optimizer]:
    """A model with an adapter that has learnt a step."""
    model = load_model(base)
    add_lora(model, LoRAConfig(r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def write_adapter(run: Path, base: Path) -> Path:
    """The last checkpoint of a run: an adapter, and the state from which it resumes."""
    model, optimizer = learner(base)
    config = FinetuneConfig(checkpoint_dir=base, out_dir=run)
    counters = {
        "step": 3,
        "seconds": 1.0,
        "total": 5,
        "style": "x",
        "base": base_facts(base),
        "data": {"a": "b"},
        "config": resume.plain(config),
        "versions": {"torch": "x"},
    }
    storage = {"quantize": "none", "quantize_head": False, "quantize_layers": {"mlp.down": "none", "(key|up)": "none"}}
    facts = {"base": base_facts(base), **storage, "precision": "32-true"}
    files = state_files(Fabric(accelerator="cpu", devices=1), model, optimizer, counters)
    with states.saved(run / "final", files) as state:
        save_adapter(run / "final", model, LoRAConfig(r=4), STYLES["qa"], {**facts, "step": 3, STATE: state})
    return run / "final"


def without_digests(adapter: Path) -> None:
    """Let the manifest of a state not know its files, and its adapter that manifest, as whoever forges one would."""
    path = states.beside(adapter) / MANIFEST
    path.write_text('{"files": {}}')
    facts = json.loads((adapter / MANIFEST).read_text())
    (adapter / MANIFEST).write_text(json.dumps({**facts, STATE: hash_file(path)}))


LABELS = [{"text": f"{i} plus 2", "label": label, "id": i} for i, label in enumerate(("low", "high", 3, True))]


def write_data(folder: Path) -> None:
    """Data files of each type."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    (folder / "run.yaml").write_bytes(SETTINGS)
    (folder / "own.yaml").write_bytes(TASK)
    for name, rows in (("a", ROWS), ("messages", MESSAGES), ("tokenized", TOKENIZED), ("labels", LABELS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.csv").write_text('instruction,input,output\nAdd.,"1, 2",3\n"Say ""x"".",,x\nA,B,C\n')
    (folder / "a.tsv").write_text("instruction\tinput\toutput\nAdd.\t1 2\t3\n")
    (folder / "a.txt").write_text("A bicycle is steered by its front wheel.\n" * 3)
    (folder / "prompts.jsonl").write_text('{"instruction": "x", "input": "y"}\n{"prompt": "z", "system": "s"}\n')
    history = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    (folder / "history.jsonl").write_text("".join(json.dumps(message) + "\n" for message in history))
    table = pyarrow.table({"instruction": ["a", "b"], "input": ["", "c"], "output": ["x", "y"], "n": [1.5, None]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    for path in (folder / "a.arrow", folder / "saved/data.arrow"):
        path.parent.mkdir(exist_ok=True)
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as batches:
            batches.write(table)
    (folder / "saved/state.json").write_text('{"_data_files": [{"filename": "data.arrow"}], "_split": null}')
    for kind in ("gz", "zst"):
        (folder / f"a.jsonl.{kind}").write_bytes(compressed(kind, (folder / "a.jsonl").read_bytes()))
    part = Part(folder / "out", "x", folders=())
    part.add({0: "a", 1: {"b": [1, 2]}})
    part.file.close()


def whole_or_absent(out: Path, write: Callable[[Path], object], *beside: str) -> None:
    """Write `out` and files `beside` it, which are then whole, or absent after an error."""
    done = False
    try:
        write(out)
        done = True
    finally:
        left = sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.stem))
        is_there = out.exists()
        for path in (out, *(out.with_name(name) for name in beside)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        assert left == sorted([out.name, *beside]) * done, (
            f"{left} of an output that {'succeeded' if done else 'failed'}"
        )
        assert is_there == done


def command(path: str, *flags: object) -> None:
    """Run a command; raise what it ended with as the error that it is."""
    done = run_here(path, *flags)
    if done.returncode:
        assert 2 <= done.returncode <= 6, done.stderr
        raise UserError(done.stderr)
