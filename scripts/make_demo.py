"""Make the files of the demo: the base model of a small world, questions to fine-tune on, and a held-out task.

python scripts/make_demo.py
python scripts/make_demo.py --model tiny-neox --seed 11 --out_dir out/tiny-neox    # another model of another world
"""

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import demo_world

from lit_qlora import cli
from lit_qlora.settings import check

if TYPE_CHECKING:
    from torch import Tensor

    from lit_qlora.model.gpt import GPT
    from lit_qlora.prompts.tokenizer import Tokenizer

VOCAB_SIZE, BLOCK_SIZE = 1280, 256
SIZES = {"n_layer": 4, "n_embd": 192, "n_head": 6, "head_size": 32, "block_size": BLOCK_SIZE}
MODELS: dict[str, dict[str, Any]] = {
    "tiny-world": SIZES | {"n_kv_head": 2, "ffn_size": 512},
    "tiny-neox": SIZES
    | {"family": "gpt_neox", "n_kv_head": 6, "ffn_size": 768, "ffn": "gelu", "norm": "layer", "rope_fraction": 0.25}
    | {"parallel_residual": True, "qkv_bias": True, "projection_bias": True, "mlp_bias": True},
}
"""Fields of ModelConfig: the demo's Llama, and a GPT-NeoX like those of Pythia."""
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
    """Make the files of the demo: the base model of a small world, questions to fine-tune on, and a held-out task."""

    only: Literal["all", "data", "task", "tokenizer", "model"] = "all"
    """Make only this part; the model needs the tokenizer."""
    model: Literal["tiny-world", "tiny-neox"] = "tiny-world"
    """Model to pre-train: a Llama, or a GPT-NeoX with layer norms, biases and a parallel residual."""
    seed: int = 1
    """Seed of the world, its stories, the choice of held-out questions, and the initial weights."""
    out_dir: Path = Path()
    """Directory that holds checkpoints/, finetune/ and eval/."""
    steps: int = 1800
    """Pre-training steps of 2048 tokens."""

    def __post_init__(self) -> None:
        """Keep another world's files from the demo's."""
        check(
            self.out_dir != Path() or (self.model, self.seed) == ("tiny-world", 1),
            "Here is the demo of tiny-world and seed 1. Give another model or seed an --out_dir of its own.",
        )


def main(config: MakeDemoConfig) -> None:
    """Make the parts that are asked for, in the order in which they need each other."""
    world_seed, story_seed, split_seed, model_seed = range(config.seed, config.seed + 4)
    world = demo_world.make_world(world_seed)
    checkpoint = config.out_dir / "checkpoints/lit-qlora" / config.model
    if config.only in ("all", "data"):
        make_data(world, config.out_dir / "finetune" / "demo", split_seed)
    if config.only in ("all", "task"):
        make_task(world, config.out_dir / "eval" / "demo", split_seed)
    if config.only in ("all", "tokenizer"):
        make_tokenizer(demo_world.stories(world, story_seed), checkpoint)
    if config.only in ("all", "model"):
        make_model(demo_world.stories(world, story_seed), checkpoint, config.steps, model_seed)


def make_data(world: list[demo_world.Subject], directory: Path, seed: int) -> None:
    """Write train.jsonl and val.jsonl with the columns instruction, input and output."""
    parts = demo_world.split(world, seed)
    for part in ("train", "val"):
        rows = [{"instruction": q.instruction, "input": q.input, "output": q.answer} for q in parts[part]]
        write_rows(directory / f"{part}.jsonl", rows)


def make_task(world: list[demo_world.Subject], directory: Path, seed: int) -> None:
    """Write the lm-eval task and its questions, the right answer equally often in each place."""
    rng = random.Random(seed)
    rows = []
    for i, q in enumerate(demo_world.split(world, seed)["test"]):
        choices = rng.sample(q.wrong, len(q.wrong))
        choices.insert(i % (len(q.wrong) + 1), q.answer)
        question = f"{q.instruction}\n{q.input}" if q.input else q.instruction
        rows.append({"question": question, "choices": choices, "answer": choices.index(q.answer)})
    write_rows(directory / "test.jsonl", rows)
    (directory / "tiny_world_qa.yaml").write_text(TASK)


def make_tokenizer(stories: Iterator[str], checkpoint: Path) -> None:
    """Train tokenizer.model on the first stories and write the small files that go with it."""
    import io

    import sentencepiece

    checkpoint.mkdir(parents=True, exist_ok=True)
    lines = (line for story in islice(stories, 4000) for line in story.split("\n"))
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


def make_model(stories: Iterator[str], checkpoint: Path, steps: int, seed: int) -> None:
    """Pre-train the model that `checkpoint` is named after and write its weights (bf16) and config."""
    import torch

    from lit_qlora.checkpoint.checkpoint import save_weights
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.model.gpt import GPT
    from lit_qlora.prompts.tokenizer import Tokenizer

    tokenizer = Tokenizer(checkpoint)
    fields = MODELS[checkpoint.name]
    config = ModelConfig(name=f"lit-qlora/{checkpoint.name}", vocab_size=tokenizer.size, **fields)
    torch.manual_seed(seed)
    model = GPT(config)
    initialise(model)
    pretrain(model, batches(tokenizer, stories), steps)

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
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def batches(tokenizer: "Tokenizer", stories: Iterator[str], rows: int = 8) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Stories end to end, each between BOS and EOS.

    Yields:
        tokens and labels, each (rows, BLOCK_SIZE) int64.
    """
    import torch

    ids: list[int] = []
    size = rows * BLOCK_SIZE
    for story in stories:
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


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    cli.run(main, MakeDemoConfig)
