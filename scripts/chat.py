"""Talk to a model, and compare what its adapters say.

python scripts/chat.py --lora_path out/lora/tiny-world/final
"""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lit_qlora import cli
from lit_qlora.errors import CheckpointError, DataError, UsageError, did_you_mean
from lit_qlora.files.reading import parse_json, read_bytes
from lit_qlora.inference import DraftConfig, InferenceConfig, Roster, check_style, encode_prompt, load_roster, stop_ids
from lit_qlora.prompts.conversation import Message, prompt_of
from lit_qlora.settings import GenerationConfig, check

HELP = """\
/compare QUESTION    show the answers of base and adapters, side by side, and do not remember them
/adapter NAME        choose the adapter that answers: its name, on, or off for the base
/system TEXT         set the system message; without a text there is none
/reset               forget the conversation
/quit or Ctrl-D      leave; Ctrl-C stops an answer"""
COMMANDS = ["/compare", "/adapter", "/system", "/reset", "/help", "/quit"]


@dataclass(frozen=True, kw_only=True)
class Config(GenerationConfig, DraftConfig, InferenceConfig):
    """Talk to a model. It remembers as much of the conversation as fits into its context."""

    adapters: dict[str, Path] = field(default_factory=dict)
    """More adapters of the same base to talk to, each by a name, e.g. --adapters.legal out/legal/final."""
    system: str = ""
    """System message at the beginning of the conversation. By default none."""
    history: Path | None = None
    """File (.jsonl) that records the conversation; the next chat resumes from it."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, e.g. ["Q:"]; they are no part of it."""
    style: str = "auto"
    """Prompt style, such as alpaca or chatml; 'template' is the checkpoint's own chat template. 'none' gives the model
    the typed text as it is. 'auto' is the recorded style of adapter or checkpoint, else the chat template, else
    none."""

    def __post_init__(self) -> None:
        """Check the settings before the model is loaded."""
        super().__post_init__()
        check_style(self.style)
        self.check_draft(self.num_beams)
        check(all(self.stop), "stop holds an empty text, which would end every answer at once.")
        check(self.num_beams == 1, "A chat shows answers as they come, so it cannot search with beams.")
        check(self.num_return_sequences == 1, "A chat gives one answer at a time: num_return_sequences must be 1.")


def main(config: Config) -> None:
    """Load the model, then answer line after line."""
    past = read_history(config.history)
    conversation = Conversation(load_roster(config, config.adapters, config.style), config)
    conversation.resume(past)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - gives input() its editing and its memory of lines
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a stray byte from a pipe is no reason to end the conversation
    note(f"{conversation.who} answers. /help lists the commands.")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            note(f"\n{HELP}")
            continue
        try:
            if line.split()[:1] == ["/quit"]:
                break
            if line:
                conversation.hear(line)
        except UsageError as error:
            note(str(error))
        except KeyboardInterrupt:  # came just before or after the answer
            note("")


class Turn(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str

    @property
    def messages(self) -> tuple[Message, Message]:
        """Return both as messages."""
        return Message("user", self.prompt), Message("assistant", self.answer)


class Conversation:
    """A conversation: its turns, the adapter that answers, and the commands.

    Attributes:
        turns: the remembered prompts and answers, oldest first.
        who: name of the adapter or base that answers.
    """

    def __init__(self, roster: Roster, config: Config) -> None:
        self.roster, self.config = roster, config
        self.model, self.tokenizer = roster.model, roster.tokenizer
        self.draft = config.load_draft(roster.tokenizer, config.precision)
        self.who = roster.names[-1]
        self.system, self.turns = config.system, list[Turn]()

    def hear(self, line: str) -> None:
        """Carry out a typed line: a command or a prompt.

        Raises:
            UsageError: if it is no command, or does not fit into the model's context.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.startswith("/"):
            self.answer(line)
        elif command == "/help":
            note(HELP)
        elif command == "/reset":
            self.turns.clear()
            self.remember({"role": "reset"})
            note("The conversation is forgotten.")
        elif command == "/system":
            self.system = rest
            self.remember({"role": "system", "content": rest})
            note("The model is told this before all." if rest else "The model is told nothing before all.")
        elif command == "/adapter":
            self.who = self.choose(rest)
            note(f"{self.who} answers from now on.")
        elif command == "/compare":
            self.compare(rest)
        else:
            raise UsageError(f"{command} is not a command.{did_you_mean(command, COMMANDS)} /help lists them all.")

    def choose(self, word: str) -> str:
        """Return the name that /adapter `word` stands for."""
        base, *adapters = self.roster.names
        if word == "off":
            return base
        if word == "on" and adapters:
            return adapters[-1]
        if word in self.roster.names:
            return word
        raise UsageError(f"{word or '/adapter'} names nobody. There are: off ({base}){', '.join(['', *adapters])}.")

    def answer(self, line: str) -> None:
        """Write the answer to `line` to stdout as it comes, and remember both. Ctrl-C ends the answer early.

        Raises:
            UsageError: if `line` alone does not fit into the model's context.
        """
        prompt = self.prompt(self.who, line)
        said = ""
        try:
            for piece in self.pieces(self.who, prompt):
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            pass
        print(flush=True)
        self.turns.append(Turn(line, said))
        self.remember({"role": "user", "content": line}, {"role": "assistant", "content": said, "model": self.who})

    def compare(self, line: str) -> None:
        """Write the answer of each to `line`, side by side where the terminal is wide enough."""
        check(bool(line), "/compare needs a question.")
        answers = {
            name: "".join(self.pieces(name, self.prompt(name, line, forget=False))) for name in self.roster.names
        }
        print(side_by_side(answers, shutil.get_terminal_size((100, 24)).columns), flush=True)

    def pieces(self, name: str, prompt: list[int]) -> Iterator[str]:
        """Yield the pieces of an answer as they come."""
        from lit_qlora.generation import stream, stream_text

        style = self.roster.styles[name]
        gap, tail = (style.gap, style.tail) if style else ("", "")
        room = self.model.config.block_size - len(prompt)
        count = 0

        def counted() -> Iterator[int]:
            nonlocal count
            stops = stop_ids(self.tokenizer, style)
            for token in stream(self.model, prompt, self.config, stops, self.tokenizer.size, self.draft):
                count += 1
                yield token

        with self.roster.answering(name):
            yield from stream_text(self.tokenizer, counted(), gap, tail, self.config.stop)
        if count == room:
            note(f"The answer ends where the model's context of {self.model.config.block_size} tokens is full.")

    def prompt(self, name: str, line: str, forget: bool = True) -> list[int]:
        """Return the ids of the conversation with `line` at its end, without the oldest turns if room is short.

        Args:
            forget: the turns that are left out stay forgotten.
        """
        from lit_qlora.generation import room_for_answer

        block_size = self.model.config.block_size
        # At most half of the context is kept free, or a large max_new_tokens would leave no memory at all.
        free = min(self.config.max_new_tokens, block_size // 2)
        for first in range(len(self.turns) + 1):
            style = self.roster.styles[name]
            past = [message for turn in self.turns[first:] for message in turn.messages]
            ids = encode_prompt(self.tokenizer, style, prompt_of(line, "", self.system or None, past))
            if len(ids) + free <= block_size or first == len(self.turns):
                break
        room_for_answer(self.model, len(ids), wanted=1)  # before anything is forgotten for its sake
        if first and forget:
            del self.turns[:first]
            turns = "oldest turn is" if first == 1 else f"{first} oldest turns are"
            note(f"The {turns} forgotten: the model's context holds {block_size} tokens.")
        return ids

    def remember(self, *messages: dict[str, str]) -> None:
        """Write messages to the history file, if there is one."""
        if self.config.history:
            self.config.history.parent.mkdir(parents=True, exist_ok=True)
            with self.config.history.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(message, ensure_ascii=False) + "\n" for message in messages)

    def resume(self, messages: list[dict[str, str]]) -> None:
        """Resume the conversation that these messages record."""
        asked = ""
        for message in messages:
            if message["role"] == "reset":
                self.turns.clear()
            elif message["role"] == "system":
                self.system = message["content"]
            elif message["role"] == "user":
                asked = message["content"]
            else:
                self.turns.append(Turn(asked, message["content"]))
        self.system = self.config.system or self.system
        if self.turns:
            turns = "turn is" if len(self.turns) == 1 else f"{len(self.turns)} turns are"
            note(f"The last {turns} remembered from {self.config.history}.")


def read_history(path: Path | None) -> list[dict[str, str]]:
    """Return the messages of a history file; none if there is no such file.

    Raises:
        DataError: if it holds something else.
    """
    if path is None or not path.exists():
        return []
    messages: list[dict[str, str]] = []
    for number, line in enumerate(read_bytes(path, DataError).splitlines(), start=1):  # a text knows more ends of lines
        try:
            message: Any = parse_json(line, str(path))
            known = message["role"] in ("user", "assistant", "system") and isinstance(message["content"], str)
            if not known and message["role"] != "reset":
                raise ValueError
        except (CheckpointError, ValueError, KeyError):
            raise DataError(f"{path}:{number}: not a message of a conversation. Give --history another file.") from None
        messages.append(message)
    return messages


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Lay out each text under its name, in columns, or one below the other where columns would be too narrow."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < 24:
        return "\n\n".join(f"{name}:\n{text}" for name, text in texts.items())
    columns = [
        [
            name[:column],
            "-" * column,
            *(part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]),
        ]
        for name, text in texts.items()
    ]
    return "\n".join(
        " | ".join(part.ljust(column) for part in parts).rstrip() for parts in zip_longest(*columns, fillvalue="")
    )


def note(text: str) -> None:
    """Print a message that is no answer of the model on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
