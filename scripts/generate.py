"""Answer a prompt, or a file of them.

python scripts/generate.py --prompt "What does the fox eat?" --lora_path out/lora/tiny-world
python scripts/generate.py --prompts questions.jsonl --out answers.jsonl --batch_size 16
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_qlora import cli
from lit_qlora.errors import UsageError
from lit_qlora.inference import (
    DraftConfig,
    InferenceConfig,
    ToolsConfig,
    check_style,
    choose_style,
    decoder_of,
    encode_prompt,
    peak_memory,
    reader_of,
    stop_ids,
)
from lit_qlora.partial_answers import Part
from lit_qlora.prompts.answer_parts import Answer as Parts
from lit_qlora.prompts.calls import as_line
from lit_qlora.prompts.conversation import Conversation, prompt_of
from lit_qlora.settings import GenerationConfig, check

Answer = tuple[str, int, str]
"""Text of an answer, its number of tokens, and the reason why it ended."""
Told = tuple[Parts, int, str]
"""The same with its text taken apart."""
Row = tuple[str, Conversation, dict[str, Any]]
"""Location, conversation to be answered and original record of a prompt."""
BETWEEN = "-" * 20  # on a line of its own between several answers to one prompt


@dataclass(frozen=True, kw_only=True)
class Config(GenerationConfig, DraftConfig, ToolsConfig, InferenceConfig):
    """Answer a prompt, or a file of prompts. Answers go to stdout or --out, thoughts, speed and memory to stderr."""

    prompt: str = "What does the fox eat?"
    """Prompt to answer, or text to continue."""
    input: str = ""
    """Input to the prompt, for styles that keep the two apart."""
    system: str = ""
    """System message before the prompt. By default none."""
    prompts: Path | None = None
    """File of prompts, instead of one prompt. A .txt file has one prompt a line. A .jsonl, .json, .csv, .tsv or
    .parquet file has the column instruction (or prompt), and optionally input and system; or it has messages, and
    optionally tools for a chat template that writes them. Each answer is a JSON line: the record with answer, tokens
    and finish_reason added, and with reasoning and tool_calls where the answer has them."""
    out: Path | None = None
    """File for the JSON lines. By default stdout. An existing file is not overwritten. OUT.part keeps the answers as
    they are made; if the command is stopped, the same command resumes from it."""
    batch_size: int = 8
    """Number of prompts of a file that are answered together."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, e.g. ["Q:"]; they are no part of it."""
    style: str = "auto"
    """Prompt style, such as alpaca or chatml; 'template' is the checkpoint's own chat template. 'none' gives the model
    the prompt as it is. 'auto' is the recorded style of adapter or checkpoint, else the chat template, else none."""

    def __post_init__(self) -> None:
        """Check the settings before the model is loaded."""
        super().__post_init__()
        check_style(self.style)
        self.check_draft(self.num_beams)
        check(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}.")
        check(all(self.stop), "stop holds an empty text, which would end every answer at once.")
        check(self.prompts is None or self.prompts.is_file(), f"prompts {self.prompts} is not a file.")
        given = [name for name in ("prompt", "input") if getattr(self, name) != getattr(Config, name)]
        check(self.prompts is None or not given, f"{' and '.join(given)} has no effect beside prompts. Leave one out.")
        check(self.out is None or self.prompts is not None, "out needs prompts, a file of prompts to answer.")
        check(self.out is None or not self.out.exists(), f"out {self.out} exists already. Give another name.")


def main(config: Config) -> None:
    """Read, load, answer, report."""
    from lit_qlora.device import pick_device

    rows = list(read_rows(config))
    folders = (config.base, config.adapter, config.draft_checkpoint_dir)
    of = (config, pick_device(), rows)
    with Part(config.out, *of, folders=folders) if config.out else nullcontext() as part:
        answer(config, rows, part)


def answer(config: Config, rows: list[Row], part: Part | None) -> None:
    """Load, answer the prompts that `part` lacks, and write the answers there or to stdout."""
    from lit_qlora.generation import ends_with, generate, room_for_answer, text_of

    loaded = config.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    style = choose_style(config.style, loaded.style, config.base, config.template_variables)
    gap, tail = (style.gap, style.tail) if style else ("", "")
    decoder, stops, stop = (
        decoder_of(tokenizer, style),
        stop_ids(tokenizer, style),
        ends_with(tokenizer, config.stop, gap),
    )
    draft = config.load_draft(tokenizer, model.config, config.precision)
    prompts, rooms = [], []
    for place, asked, _ in rows:
        try:
            prompts.append(encode_prompt(tokenizer, style, asked))
            rooms.append(room_for_answer(model, len(prompts[-1]), config.max_new_tokens))
        except UsageError as error:
            raise UsageError(f"{place}: {error}" if config.prompts else str(error)) from None

    start, tokens = time.perf_counter(), 0
    answered: dict[int, list[Answer]] = {}
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # so that batches need little padding
    for at in range(0, len(order), config.batch_size):
        batch = order[at : at + config.batch_size]
        if part and part.answered.keys() >= set(batch):
            answered |= {i: part.answered[i] for i in batch}
            continue
        answers = generate(model, [prompts[i] for i in batch], config, stops, tokenizer.size, stop, draft=draft)
        tokens += sum(map(len, answers))
        for place, ids in enumerate(answers):
            i = batch[place // config.num_return_sequences]
            full = len(ids) == rooms[i] and not (stop and stop(ids))
            text = text_of(decoder, ids, gap, tail, config.stop)
            answered.setdefault(i, []).append((text, len(ids), "length" if full else "stop"))
        if part:
            part.add({i: answered[i] for i in batch})
    seconds = time.perf_counter() - start

    def told(i: int) -> list[Told]:
        """Take the answers to prompt `i` apart."""
        tools = rows[i][1].variables.get("tools", ())
        return [(reader_of(tokenizer, style, prompts[i], tools).whole(text), *rest) for text, *rest in answered[i]]

    if config.prompts:
        lines = as_lines([(original, told(i)) for i, (_, _, original) in enumerate(rows)])
        if part:
            part.end("".join(lines))
            print(f"{len(lines)} answers are in {config.out}.", file=sys.stderr)
        else:
            print("".join(lines), end="")
    else:
        parts = [found for found, *_ in told(0)]
        for thought in filter(None, (found.reasoning for found in parts)):
            print(f"{thought}\n", file=sys.stderr)
        print(f"\n{BETWEEN}\n".join(map(words_and_calls, parts)))
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s, {peak_memory()}", file=sys.stderr)
    cut = [i for i in answered if rooms[i] < config.max_new_tokens and any(end == "length" for *_, end in answered[i])]
    if cut:
        of = f" of {len(cut)} prompts" if len(rows) > 1 else ""
        print(
            f"The answers{of} end where the model's context of {model.config.block_size} tokens is full, for example: "
            f"{len(prompts[cut[0]])} of prompt and {rooms[cut[0]]} of answer, not {config.max_new_tokens}.",
            file=sys.stderr,
        )


def read_rows(config: Config) -> Iterator[Row]:
    """Yield the prompts.

    Raises:
        DataError: if the file cannot be read, holds no prompt, or a row has none.
    """
    if config.prompts is None:
        asked = prompt_of(config.prompt, config.input, config.system or None)
        yield "prompt", replace(asked, variables=config.variables()), {}
        return
    from lit_qlora.data.prompt_files import read_prompts

    yield from read_prompts(config.prompts, config.system, config.variables())


def words_and_calls(parts: Parts) -> str:
    """Return what an answer says, then its calls, a line each."""
    return "\n".join(filter(None, (parts.content, *map(as_line, parts.calls))))


def as_lines(rows: list[tuple[dict[str, Any], list[Told]]]) -> list[str]:
    """Return a JSON line for each answer."""
    return [
        json.dumps(
            row | {"answer": parts.content} | _others(parts) | {"tokens": tokens, "finish_reason": end},
            ensure_ascii=False,
            default=str,
        )
        + "\n"
        for row, answers in rows
        for parts, tokens, end in answers
    ]


def _others(parts: Parts) -> dict[str, Any]:
    """Return the thoughts and the calls, if there are some."""
    found = {"reasoning": parts.reasoning, "tool_calls": parts.calls}
    return {name: value for name, value in found.items() if value}


if __name__ == "__main__":
    cli.run(main, Config)
