"""Make what the demo needs: the base model of a small world, questions to fine-tune on, and a held-out task.

python scripts/make_demo.py
"""

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import demo_world

from lit_qlora import cli

if TYPE_CHECKING:
    from torch import Tensor

    from lit_qlora.model import GPT
    from lit_qlora.tokenizer import Tokenizer

NAME = "lit-qlora/tiny-world"
WORLD_SEED, STORY_SEED, SPLIT_SEED, MODEL_SEED = 1, 2, 3, 4
VOCAB_SIZE, BLOCK_SIZE = 1280, 256
TASK = """\
task: tiny_world_qa
dataset_path: json
dataset_kwargs:
  data_files:
    test: test.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclass(frozen=True, kw_only=True)
class MakeDemoConfig:
    """Make what the demo needs: the base model of a small world, questions to fine-tune on, and a held-out task."""

    only: Literal["all", "data", "task", "tokenizer", "model"] = "all"
    """Make this part alone; the model needs the tokenizer."""
    out_dir: Path = Path()
    """The directory in which checkpoints/, finetune/ and eval/ are."""
    steps: int = 1800
    """Pre-training steps of 2048 tokens."""


def main(config: MakeDemoConfig) -> None:
    """Make the parts that are asked for, in the order in which they need each other."""
    world = demo_world.make_world(WORLD_SEED)
    checkpoint = config.out_dir / "checkpoints" / NAME
    if config.only in ("all", "data"):
        make_data(world, config.out_dir / "finetune" / "demo")
    if config.only in ("all", "task"):
        make_task(world, config.out_dir / "eval" / "demo")
    if config.only in ("all", "tokenizer"):
        make_tokenizer(world, checkpoint)
    if config.only in ("all", "model"):
        make_model(world, checkpoint, config.steps)


def make_data(world: list[demo_world.Subject], directory: Path) -> None:
    """Write train.jsonl and val.jsonl with the columns instruction, input and output."""
    parts = demo_world.split(world, SPLIT_SEED)
    for part in ("train", "val"):
        rows = [{"instruction": q.instruction, "input": q.input, "output": q.answer} for q in parts[part]]
        write_rows(directory / f"{part}.jsonl", rows)


def make_task(world: list[demo_world.Subject], directory: Path) -> None:
    """Write the lm-eval task and its questions, the right answer equally often in each place."""
    rng = random.Random(SPLIT_SEED)
    rows = []
    for i, q in enumerate(demo_world.split(world, SPLIT_SEED)["test"]):
        choices = rng.sample(q.wrong, len(q.wrong))
        choices.insert(i % (len(q.wrong) + 1), q.answer)
        question = f"{q.instruction}\n{q.input}" if q.input else q.instruction
        rows.append({"question": question, "choices": choices, "answer": choices.index(q.answer)})
    write_rows(directory / "test.jsonl", rows)
    (directory / "tiny_world_qa.yaml").write_text(TASK)


def make_tokenizer(world: list[demo_world.Subject], checkpoint: Path) -> None:
    """Train tokenizer.model on the world's stories and write the small files that go with it."""
    import io

    import sentencepiece

    checkpoint.mkdir(parents=True, exist_ok=True)
    lines = (line for story in islice(demo_world.stories(world, STORY_SEED), 4000) for line in story.split("\n"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,  # also what makes a newline encodable
        split_digits=True,
        required_chars="".join(map(chr, range(33, 127))),
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,  # the result would depend on it
        minloglevel=2,
    )
    (checkpoint / "tokenizer.model").write_bytes(model.getvalue())
    for name, content in {
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",  # for transformers: what reads tokenizer.model as we do
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "prompt_style.json": {"style": "qa"},
    }.items():
        (checkpoint / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{checkpoint / 'tokenizer.model'}: {len(model.getvalue())} bytes")


def make_model(world: list[demo_world.Subject], checkpoint: Path, steps: int) -> None:
    """Pre-train a Llama on the stories and write its weights (bf16) and config."""
    import torch

    from lit_qlora.checkpoint import save_weights
    from lit_qlora.config import ModelConfig
    from lit_qlora.model import GPT
    from lit_qlora.tokenizer import Tokenizer

    tokenizer = Tokenizer(checkpoint)
    config = ModelConfig(
        name=NAME,
        n_layer=4,
        n_embd=192,
        n_head=6,
        n_kv_head=2,
        head_size=32,
        ffn_size=512,
        vocab_size=tokenizer.size,
        block_size=BLOCK_SIZE,
    )
    torch.manual_seed(MODEL_SEED)
    model = GPT(config)
    initialise(model)
    pretrain(model, batches(tokenizer, world), steps)

    weights = {name: weight.detach().to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_weights(checkpoint, config, weights, weights.items())
    print(f"{checkpoint}: {sum(w.numel() for w in weights.values()):,} parameters")


def initialise(model: "GPT") -> None:
    """Small normal weights, smaller still where they add to the residual stream. Radford et al. 2019, sec. 2.3."""
    from torch import nn

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = path.endswith(("projection", "down"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * model.config.n_layer) if adds else 0.02)


def batches(
    tokenizer: "Tokenizer", world: list[demo_world.Subject], rows: int = 8
) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Stories end to end, each between BOS and EOS.

    Yields:
        tokens and labels, each (rows, BLOCK_SIZE) int64.
    """
    import torch

    ids: list[int] = []
    size = rows * BLOCK_SIZE
    for story in demo_world.stories(world, STORY_SEED):
        ids += tokenizer.encode(story, bos=True, eos=True)
        if len(ids) > size:
            chunk = torch.tensor(ids[: size + 1])
            yield chunk[:-1].view(rows, BLOCK_SIZE), chunk[1:].view(rows, BLOCK_SIZE)
            ids = ids[size:]


def pretrain(model: "GPT", data: Iterator[tuple["Tensor", "Tensor"]], steps: int, peak: float = 3e-3) -> None:
    """AdamW with a short warm-up and a cosine to zero; prints loss and speed."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    start, seen, recent = time.perf_counter(), 0, 0.0
    for step, (tokens, labels) in enumerate(islice(data, steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = model.loss(tokens, labels) / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen, recent = seen + labels.numel(), recent + loss.item()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(
                f"step {step}/{steps}  loss {recent / ((step - 1) % 100 + 1):.3f}  "
                f"{seen / seconds:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
            recent = 0.0


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write a JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    cli.run(main, MakeDemoConfig)
