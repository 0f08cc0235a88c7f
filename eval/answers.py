"""Answer a data file and compare with its own answers: exact match, BLEU, chrF, ROUGE-L.

python eval/answers.py --data.path val.jsonl --lora_path out/lora/tiny-world/final --out predictions.jsonl
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_qlora import cli
from lit_qlora.errors import UsageError
from lit_qlora.files.reading import read_json_lines
from lit_qlora.inference import (
    InferenceConfig,
    TemplateConfig,
    check_style,
    choose_style,
    decoder_of,
    encode_prompt,
    peak_memory,
    reader_of,
    stop_ids,
)
from lit_qlora.partial_answers import Part
from lit_qlora.prompts.answer_parts import PLAIN
from lit_qlora.settings import GenerationConfig, check

if TYPE_CHECKING:
    from lit_qlora.data import Example

SHOWN = 3  # best and worst answers that are printed


@dataclass(frozen=True, kw_only=True)
class Config(GenerationConfig, TemplateConfig, InferenceConfig):
    """Answer a data file and compare with its own answers. In a conversation the model gives the last answer."""

    data: str
    """Data file, in a format that finetune/lora.py reads."""
    format: str = "auto"
    """Record format, as data.format of finetune/lora.py."""
    columns: str = ""
    """Meaning of columns, as data.columns of finetune/lora.py."""
    max_samples: int | None = None
    """Answer the first N records only. By default all."""
    style: str = "auto"
    """Prompt style, such as alpaca or chatml; 'template' is the checkpoint's own chat template. 'none' gives the model
    the prompt as it is. 'auto' is the recorded style of adapter or checkpoint, else the chat template, else none."""
    batch_size: int = 16
    """Number of records that are answered together."""
    out: Path | None = None
    """File for the predictions: JSON lines with prompt, input, prediction, reference and chrf, in the order of the
    data. Metrics leave out thoughts; where there is one, 'compared' has the rest. By default predictions.jsonl in the
    run folder for adapters in OUT, else in out/eval/<checkpoint name>. OUT.part keeps the predictions as they are made;
    if the command is stopped, the same command resumes from it."""

    def __post_init__(self) -> None:
        """Check the settings before the model is loaded."""
        super().__post_init__()
        check_style(self.style)
        check(self.num_return_sequences == 1, "One answer to each example is compared, so num_return_sequences is 1.")
        check(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}.")
        check(self.max_samples is None or self.max_samples >= 1, f"max_samples is {self.max_samples}, below 1.")


def main(config: Config) -> None:
    """Read, load, answer, compare, write and print."""
    from lit_qlora.data import read_examples
    from lit_qlora.data.sources import find_sources
    from lit_qlora.device import pick_device

    out = config.out or default_out(config)
    check_replaceable(out)
    (source,), _ = find_sources([config.data], None)
    examples = read_examples(source, format=config.format, columns=config.columns).examples[: config.max_samples]
    with Part(out, config, pick_device(), examples, folders=(config.base, config.adapter)) as part:
        answer(config, examples, part)


def answer(config: Config, examples: "list[Example]", part: Part) -> None:
    """Load, answer the records that `part` lacks, compare, write and print."""
    from tqdm import tqdm

    from lit_qlora.evaluate.metrics import chrf, text_metrics
    from lit_qlora.generation import generate, room_for_answer, text_of

    loaded = config.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    style = choose_style(config.style, loaded.style, config.base, config.template_variables)
    gap, tail = (style.gap, style.tail) if style else ("", "")
    decoder, stops = decoder_of(tokenizer, style), stop_ids(tokenizer, style)
    prompts = []
    for example in examples:
        ids = encode_prompt(tokenizer, style, example.prompt)
        # A prompt that fills the context loses its beginning, so that there is room for half an answer at least.
        most = model.config.block_size - min(config.max_new_tokens, model.config.block_size // 2)
        prompts.append(ids[-most:])
        room_for_answer(model, len(prompts[-1]), 1)

    start, before = time.perf_counter(), len(part.answered)
    order = sorted(range(len(examples)), key=lambda i: -len(prompts[i]))
    for at in tqdm(range(0, len(order), config.batch_size), disable=None, desc="Answering"):
        batch = order[at : at + config.batch_size]
        if part.answered.keys() >= set(batch):
            continue
        ids_of = generate(model, [prompts[i] for i in batch], config, stops, tokenizer.size)
        part.add({i: text_of(decoder, ids, gap, tail).strip() for i, ids in zip(batch, ids_of, strict=True)})
    predictions = [part.answered[i] for i in range(len(examples))]
    seconds = time.perf_counter() - start

    references = [example.output.strip() for example in examples]
    notation = style.notation if style else PLAIN
    wanted = list(map(notation.behind_thought, references))
    readers = [reader_of(tokenizer, style, ids) for ids in prompts]
    said = [reader.whole(text).content.strip() for reader, text in zip(readers, predictions, strict=True)]
    rows = [
        {
            "prompt": example.question,
            "input": example.input,
            "prediction": prediction,
            "reference": reference,
            **({"compared": words} if words != prediction else {}),
            "chrf": chrf(words, answer),
        }
        for example, prediction, reference, words, answer in zip(
            examples, predictions, references, said, wanted, strict=True
        )
    ]
    part.end("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(report(text_metrics(said, wanted), rows))
    tell_of_thoughts(rows)
    made = len(rows) - before
    print(f"{made} answers in {seconds:.1f} s, {peak_memory()}. Predictions: {part.out}", file=sys.stderr)


def tell_of_thoughts(rows: list[dict[str, Any]]) -> None:
    """Say on stderr that metrics leave thoughts out, and which answers are nothing else."""
    thoughtful = [row["compared"] for row in rows if "compared" in row]
    if thoughtful:
        silent = sum(not said for said in thoughtful)
        more = f" {silent} of them end within it: raise --max_new_tokens." if silent else ""
        print(f"{len(thoughtful)} of {len(rows)} answers are compared without their thought.{more}", file=sys.stderr)


def default_out(config: Config) -> Path:
    """Return predictions.jsonl in the run folder, or under out/eval for a model without an adapter."""
    folder = config.adapter.parent if config.adapter else Path("out/eval") / config.base.resolve().name
    return folder / "predictions.jsonl"


def check_replaceable(out: Path) -> None:
    """Raise UsageError if writing predictions to `out` would destroy anything but predictions."""
    if not out.exists():
        return
    try:
        if "prediction" in next(read_json_lines(out), {}):
            return
    except OSError:
        pass
    raise UsageError(f"out: {out} exists and holds no predictions. Name another file.")


def report(scores: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """Return the scores as a markdown table, then the best and the worst answers by chrF."""
    names = {"exact_match": "exact match", "bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}
    lines = [
        f"| examples | {' | '.join(names.values())} |",
        f"|---:|{'---:|' * len(names)}",
        f"| {len(rows)} | {' | '.join(f'{scores[name]:.4f}' for name in names)} |",
    ]
    by_score = sorted(rows, key=lambda row: -row["chrf"])
    best = by_score[: min(SHOWN, -(-len(rows) // 2))]
    worst = by_score[len(best) :][-SHOWN:]
    for title, some in (("best", best), ("worst", worst[::-1])):
        for row in some:
            prompt = shorten(f"{row['prompt']} {row['input']}")
            prediction, reference = shorten(row["prediction"]), shorten(row["reference"])
            lines.append(f"\n{title}, chrF {row['chrf']:.2f}: {prompt}\n  said   {prediction}\n  wanted {reference}")
    return "\n".join(lines)


def shorten(text: str, most: int = 200) -> str:
    """Return `text` on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


if __name__ == "__main__":
    cli.run(main, Config)
