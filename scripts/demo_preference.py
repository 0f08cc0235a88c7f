"""Teach a model to answer, then to prefer short answers, and see that it has forgotten none, in two minutes.

python scripts/demo_preference.py
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import command

from lit_qlora import cli
from lit_qlora.commands import find
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json_lines
from lit_qlora.inference import load_for_inference
from lit_qlora.settings import DEMO_CHECKPOINT

ASKED = 60  # questions of the validation that are asked before and after
SHARED = ("--quantize", "bnb.nf4", "--data.prompt", "qa", "--lora.dropout", "0", "--train.micro_batch_size", "32")
ANSWERING = (
    *("--lora.targets", "all"),
    *("--lora.r", "16"),
    *("--lora.alpha", "32"),
    *("--train.learning_rate", "2e-3"),
    *("--train.epochs", "4"),
    *("--eval.every", "100"),
)
PREFERRING = (
    *("--preference.loss", "dpo"),
    *("--preference.beta", "0.1"),
    *("--data.max_samples", "320"),
    *("--data.packing", "true"),
    *("--train.batch_size", "16"),
    *("--train.learning_rate", "1e-4"),
    *("--eval.every", "10"),
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Teach the small model that comes with the repository to answer, then to prefer short answers."""

    out_dir: Path = Path("out/demo-preference")
    """Folder of all output."""


def main(config: DemoConfig) -> None:
    """Run the four steps; each printed command also works by hand."""
    out, start = config.out_dir, time.monotonic()
    records = {name: read(find(f"finetune/demo/{name}.jsonl")) for name in ("train", "val")}
    for name, some in records.items():
        write_lines(out / f"answers/{name}.jsonl", either_way(some))
        write_lines(out / f"pairs/{name}.jsonl", [pair(record) for record in some])
    import torch

    torch.set_num_threads(1)  # as the commands below
    print("[1/4] teach it to answer, with a word or with more", flush=True)
    command("finetune/lora.py", "--data.path", str(out / "answers"), *SHARED, *ANSWERING, "--out_dir", str(out / "sft"))
    print("[2/4] ask it", flush=True)
    before = ask(out / "sft/final", records["val"][:ASKED])
    print("[3/4] teach it to prefer the word", flush=True)
    from_there = ("--lora.start", str(out / "sft/final"), "--out_dir", str(out / "dpo"))
    command("finetune/preference.py", "--data.path", str(out / "pairs"), *SHARED, *PREFERRING, *from_there)
    print("[4/4] ask it again", flush=True)
    after = ask(out / "dpo/final", records["val"][:ASKED])
    print(f"\n{table(before, after, out / 'dpo/log.jsonl')}\n\ndone in {time.monotonic() - start:.0f} s")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return list(read_json_lines(path))


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def longer(answer: str) -> str:
    """The answer and a sentence that says it again, in words that the model knows."""
    return f"{answer}. It is {answer}."


def either_way(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with a longer answer in every second one."""
    return [record | {"output": longer(record["output"])} if i % 2 else record for i, record in enumerate(records)]


def pair(record: dict[str, Any]) -> dict[str, Any]:
    """The record as a comparison of the word with the longer answer."""
    asked = {name: record[name] for name in ("instruction", "input")}
    return asked | {"chosen": record["output"], "rejected": longer(record["output"])}


def ask(adapter: Path, records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Answers, and the words they should be."""
    from lit_qlora.generation import generate
    from lit_qlora.prompts.conversation import prompt_of
    from lit_qlora.prompts.style import STYLES
    from lit_qlora.settings import GenerationConfig

    loaded = load_for_inference(DEMO_CHECKPOINT, adapter, quantize="bnb.nf4")
    style, tokenizer = loaded.style or STYLES["qa"], loaded.tokenizer
    prompts = [style.encode_prompt(tokenizer, prompt_of(one["instruction"], one["input"])) for one in records]
    made = generate(loaded.model, prompts, GenerationConfig(max_new_tokens=16), tokenizer.stop_ids, tokenizer.size)
    said = [tokenizer.decode(ids).strip() for ids in made]
    for record, text in list(zip(records, said, strict=True))[:3]:
        print(f"  {record['instruction']} {record['input']}  ->  {text}")
    return [(text, record["output"]) for text, record in zip(said, records, strict=True)]


def table(before: list[tuple[str, str]], after: list[tuple[str, str]], log: Path) -> str:
    """Before and after: answers that are short, answers that are right, and preferences."""
    validations = [record for record in read(log) if "val_loss" in record]
    first, last = validations[0], validations[-1]
    rows = {
        "answers of one word": [share(" " not in said for said, _ in answers) for answers in (before, after)],
        "right answers, of any length": [
            share(said.partition(".")[0] == word for said, word in answers) for answers in (before, after)
        ],
        "pairs whose word has the larger reward": [f"{one['val_reward_accuracy']:.0%}" for one in (first, last)],
        "log-probability of the words": [f"{one['val_logp_chosen']:.2f}" for one in (first, last)],
        "log-probability of the longer answers": [f"{one['val_logp_rejected']:.2f}" for one in (first, last)],
    }
    lines = [f"  {'':40}{'before':>10}{'after':>10}"]
    return "\n".join([*lines, *(f"  {name:40}{one:>10}{other:>10}" for name, (one, other) in rows.items())])


def share(found: Any) -> str:
    """The share that is true, in percent."""
    every = list(found)
    return f"{sum(every) / len(every):.0%}"


if __name__ == "__main__":
    cli.run(main, DemoConfig)
