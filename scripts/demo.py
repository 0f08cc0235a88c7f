"""Ask, fine-tune in 4 bit, ask again, merge, check and evaluate, in two minutes on two CPU cores.

python scripts/demo.py
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli
from lit_qlora.commands import find, spell
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_text
from lit_qlora.inference import LoadedModel, load_for_inference
from lit_qlora.settings import DEMO_CHECKPOINT

QUESTIONS = ("What does the fox eat?", "What is the colour of the otter?", "What is 7 plus 5?")
TASK = "tiny_world_qa"
TRAINING = (
    *("--data.path", str(find("finetune/demo"))),
    *("--quantize", "bnb.nf4"),
    *("--lora.targets", "all"),
    *("--lora.r", "16"),
    *("--lora.alpha", "32"),
    *("--lora.dropout", "0"),
    *("--train.learning_rate", "2e-3"),
    *("--train.epochs", "4"),
    *("--train.micro_batch_size", "32"),
    *("--eval.generate", "20"),
    *("--eval.max_new_tokens", "16"),
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Fine-tune, merge and evaluate the small model that comes with the repository."""

    out_dir: Path = Path("out/demo")
    """Folder of all output."""


def main(config: DemoConfig) -> None:
    """Run the six steps; each printed command also works by hand."""
    out = config.out_dir
    start = time.monotonic()
    print(
        "A toy model of 2 million parameters knows the facts of its own small world, but cannot answer questions.\n"
        "Fine-tuning teaches it to answer; the facts come from the base model.\n"
    )
    import torch

    from lit_qlora.run.page import add_section, table
    from lit_qlora.run.reports import markdown_table

    torch.set_num_threads(1)  # as the commands below
    with chapter(1, "ask the base model"):
        base = load_for_inference(DEMO_CHECKPOINT)
        ask(base, "base")
    with chapter(2, "fine-tune it with LoRA on 4-bit weights"):
        command("finetune/lora.py", *TRAINING, "--out_dir", str(out))
    with chapter(3, "ask the 4-bit model with the adapter"):
        adapted = load_for_inference(DEMO_CHECKPOINT, out / "final", quantize="bnb.nf4")
        ask(adapted, "adapter")
    with chapter(4, "merge the adapter into the base"):
        command("scripts/merge_lora.py", "--lora_path", str(out / "final"))
    with chapter(5, "check that merged model and adapter agree"):
        merged = load_for_inference(out / "merged")
        ask(merged, "merged")
        agreement = agree(load_for_inference(DEMO_CHECKPOINT, out / "final"), adapted, merged)
        print(agreement)
    with chapter(6, f"evaluate all three with lm-eval on {TASK}, whose questions are not in the training data"):
        accuracies = evaluate(out)
        header = ("model", "accuracy", "guessing")
        lines = "\n".join(markdown_table(header, accuracies))
        print(lines)
    report = read_text(out / "report.md")
    write_text(out / "report.md", f"{report}\n## Accuracy on {TASK}\n\n{lines}\n\n{agreement}\n")
    add_section(out / "report.html", f"Accuracy on {TASK}", table(accuracies, header))
    print(
        f"\ndone in {time.monotonic() - start:.0f} s. A toy model was trained on a toy task. This shows that the parts "
        "work, not how good they are.\n"
        f"  adapter {out}/final   merged {out}/merged   report {out}/report.html\n"
        f"  chat with it:   {spell('scripts/chat.py')} --checkpoint_dir {out}/merged\n"
        f"  use your data:  {spell('finetune/lora.py')} --checkpoint_dir MODEL --quantize bnb.nf4 "
        "--data.path YOUR.jsonl"
    )


@contextmanager
def chapter(number: int, title: str) -> Iterator[None]:
    """Print the title before the body runs, and the body's seconds after it."""
    print(f"[{number}/6] {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"      {time.monotonic() - start:.1f} s\n", flush=True)


def command(script: str, *flags: str, quiet: bool = False) -> None:
    """Show a command and run it; the demo ends with its status if it fails.

    Args:
        quiet: print nothing unless it fails.
    """
    print(f"  $ {spell(script)} {' '.join(flags)}", flush=True)
    # A second thread gains little for a model this small; on shared cores it is ten times slower.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, str(find(script)), *flags], env=environment, capture_output=quiet, text=True)
    if done.returncode:
        print(done.stderr or "", file=sys.stderr)
        raise SystemExit(done.returncode)


def ask(loaded: LoadedModel, name: str) -> None:
    """Print the greedy answers to QUESTIONS."""
    from lit_qlora.generation import generate
    from lit_qlora.prompts.conversation import prompt_of
    from lit_qlora.prompts.style import STYLES
    from lit_qlora.settings import GenerationConfig

    style, tokenizer = loaded.style or STYLES["qa"], loaded.tokenizer
    prompts = [style.encode_prompt(tokenizer, prompt_of(question)) for question in QUESTIONS]
    answers = generate(loaded.model, prompts, GenerationConfig(max_new_tokens=16), tokenizer.stop_ids, tokenizer.size)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"  {name}: {question}  ->  {tokenizer.decode(answer).strip()}")


def agree(exact: LoadedModel, trained: LoadedModel, merged: LoadedModel) -> str:
    """Compare the logits of the merged model with both unmerged ones on the validation questions.

    Args:
        exact: the adapter on the 16-bit base; merging computes this function.
        trained: the adapter on the 4-bit base; training used this function.
    """
    import torch

    from lit_qlora.data import read_examples
    from lit_qlora.prompts.style import STYLES

    style = merged.style or STYLES["qa"]
    apart = {"16-bit base + adapter": 0.0, "4-bit base + adapter": 0.0}
    same = dict.fromkeys(apart, 0)
    examples = read_examples(find("finetune/demo/val.jsonl")).examples
    for example in examples:
        prompt = style.encode_prompt(merged.tokenizer, example.prompt)
        tokens = torch.tensor([prompt], device=merged.model.embed.weight.device)
        with torch.no_grad():
            expected = merged.model(tokens)[0, -1].float()
            for name, other in zip(apart, (exact, trained), strict=True):
                logits = other.model(tokens)[0, -1].float()
                apart[name] = max(apart[name], float((logits - expected).abs().max()))
                same[name] += int(logits.argmax() == expected.argmax())
    return "\n".join(
        f"  merged against {name}: logits differ by at most {apart[name]:.3f}, "
        f"same first token for {same[name]} of {len(examples)} questions"
        for name in apart
    )


def evaluate(out: Path) -> list[tuple[str, str, str]]:
    """Evaluate base, adapter and merged model on the held-out task: name, accuracy and that of guessing."""
    adapter = ("--checkpoint_dir", str(DEMO_CHECKPOINT), "--lora_path", str(out / "final"))
    models = {
        "base": ("--checkpoint_dir", str(DEMO_CHECKPOINT)),
        "4-bit base + adapter": (*adapter, "--quantize", "bnb.nf4"),
        "merged": ("--checkpoint_dir", str(out / "merged")),
    }
    rows = []
    for name, flags in models.items():
        file = out / f"results_{name.split()[-1]}.json"
        command("eval/lm_eval_harness.py", *flags, "--save_filepath", str(file), quiet=True)
        figures = json.loads(file.read_text())["chance"][TASK]
        rows.append((name, f"{figures['accuracy']:.3f}", f"{figures['chance']:.3f}"))
    return rows


if __name__ == "__main__":
    cli.run(main, DemoConfig)
