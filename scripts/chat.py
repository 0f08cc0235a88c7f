"""Talk to a model, and compare what its adapters say.

python scripts/chat.py --lora_path out/lora/tiny-world
"""

import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lit_qlora import cli
from lit_qlora.errors import CheckpointError, DataError, UsageError, did_you_mean
from lit_qlora.files.reading import parse_json, read_bytes
from lit_qlora.inference import (
    DraftConfig,
    Roster,
    RosterConfig,
    ToolsConfig,
    check_style,
    decoder_of,
    encode_prompt,
    load_roster,
    reader_of,
    stop_ids,
)
from lit_qlora.prompts.answer_parts import Answer, Part
from lit_qlora.prompts.calls import Call, as_line
from lit_qlora.prompts.conversation import Conversation as Said
from lit_qlora.prompts.conversation import Message
from lit_qlora.settings import GenerationConfig, check
from lit_qlora.signals import left_to

HELP = """\
/compare QUESTION    show the answers of base and adapters, side by side, and do not remember them
/adapter NAME        choose the adapter that answers: its name, on, or off for the base
/tool TEXT           give the model the result of the tool that it calls
/system TEXT         set the system message; without a text there is none
/reset               forget the conversation
/quit or Ctrl-D      leave; Ctrl-C stops an answer"""
COMMANDS = ["/compare", "/adapter", "/tool", "/system", "/reset", "/help", "/quit"]


@dataclass(frozen=True, kw_only=True)
class Config(GenerationConfig, DraftConfig, ToolsConfig, RosterConfig):
    """Talk to a model. It remembers as much of the conversation as fits into its context. Thoughts go to stderr."""

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
    config.variables()  # refuses what is no list of tools before the model is loaded
    conversation = Conversation(load_roster(config, config.adapters, config.style, config.template_variables), config)
    conversation.resume(past)
    with left_to(signal.default_int_handler, signal.SIGINT):
        talk(conversation)


def talk(conversation: "Conversation") -> None:
    """Answer line after line; Ctrl-C ends an answer."""
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
    """A prompt and all that was said to it: calls of tools, their results, and answers."""

    messages: tuple[Message, ...]

    @staticmethod
    def of(prompt: str, *answer: str) -> "Turn":
        """Return a turn of words alone, with an answer or without."""
        return Turn((Message("user", prompt), *(Message("assistant", text) for text in answer)))

    @property
    def prompt(self) -> str:
        """Return the prompt."""
        return self.messages[0].text

    @property
    def answer(self) -> str:
        """Return the last answer, '' if there is none."""
        return next((message.text for message in reversed(self.messages) if message.is_answer), "")

    @property
    def waiting(self) -> list[Call]:
        """Return the calls that wait for their results."""
        last = max((i for i, message in enumerate(self.messages) if message.is_answer), default=0)
        calls: list[Call] = self.messages[last].keys.get("tool_calls", [])
        return calls[len(self.messages) - 1 - last :]


class Conversation:
    """A conversation: its turns, the adapter that answers, and the commands.

    Attributes:
        turns: the remembered prompts and answers, oldest first.
        variables: what the chat template has besides messages, such as tools.
        who: name of the adapter or base that answers.
    """

    def __init__(self, roster: Roster, config: Config) -> None:
        self.roster, self.config = roster, config
        self.model, self.tokenizer = roster.model, roster.tokenizer
        self.draft = config.load_draft(roster.tokenizer, roster.model.config, config.precision)
        self.who = roster.names[-1]
        self.system, self.turns = config.system, list[Turn]()
        self.variables = config.variables()

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
        elif command == "/tool":
            self.hand_in(rest)
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
        """Answer a prompt; see speak."""
        turn = Turn.of(line)
        said = self.speak(self.turns, turn)
        self.remember(*turn.messages, said)

    def hand_in(self, text: str) -> None:
        """Give the model the result of the first call that waits; once all have theirs, it answers; see speak."""
        waiting = self.turns[-1].waiting if self.turns else []
        check(bool(waiting), "No call of a tool waits for a result.")
        called = waiting[0]
        keys = {"name": called["function"]["name"], "tool_call_id": called["id"]}
        result = Message("tool", text, keys)
        *past, last = self.turns
        turn = Turn((*last.messages, result))
        if turn.waiting:
            self.turns[-1] = turn
            self.remember(result)
            note_waiting(turn)
        else:
            self.remember(result, self.speak(past, turn))

    def speak(self, past: list[Turn], turn: Turn) -> Message:
        """Write the answer to `turn`, behind `past`, as it comes, and remember all of it. Ctrl-C ends the answer early.

        Raises:
            UsageError: if `turn` alone does not fit into the model's context.
        """
        prompt, past = self.prompt(self.who, turn, past)
        said = Answer()
        try:
            for kind, piece in self.parts(self.who, prompt, said):
                file = sys.stdout if kind == "content" else sys.stderr
                print(
                    piece if file is sys.stdout or not file.isatty() else f"\x1b[2m{piece}\x1b[0m",
                    end="",
                    file=file,
                    flush=True,
                )
        except KeyboardInterrupt:
            pass
        if said.reasoning:
            note("")
        lines = ([""] if said.content else []) + [as_line(call) for call in said.calls]
        print("\n".join(lines), flush=True)
        keys = {"reasoning_content": said.reasoning, "tool_calls": said.calls}
        message = Message("assistant", said.content, {name: value for name, value in keys.items() if value})
        self.turns = [*past, Turn((*turn.messages, message))]
        note_waiting(self.turns[-1])
        return message

    def compare(self, line: str) -> None:
        """Write the answer of each to `line`, side by side where the terminal is wide enough."""
        check(bool(line), "/compare needs a question.")
        answers = {}
        for name in self.roster.names:
            said = Answer()
            prompt, _ = self.prompt(name, Turn.of(line), self.turns, forget=False)
            for _ in self.parts(name, prompt, said):
                pass
            answers[name] = "\n".join(filter(None, (said.content, *map(as_line, said.calls))))
        print(side_by_side(answers, shutil.get_terminal_size((100, 24)).columns), flush=True)

    def parts(self, name: str, prompt: list[int], said: Answer) -> Iterator[Part]:
        """Yield the parts of an answer as they come, and keep them in `said`."""
        reader = reader_of(self.tokenizer, self.roster.styles[name], prompt, self.variables.get("tools", ()))
        try:
            for piece in self.pieces(name, prompt):
                yield from said.add(reader.push(piece))
        finally:
            rest = said.add(reader.end())
            said.calls = reader.calls
        yield from rest

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
            yield from stream_text(decoder_of(self.tokenizer, style), counted(), gap, tail, self.config.stop)
        if count == room:
            note(f"The answer ends where the model's context of {self.model.config.block_size} tokens is full.")

    def prompt(self, name: str, turn: Turn, past: list[Turn], forget: bool = True) -> tuple[list[int], list[Turn]]:
        """Return the ids of the conversation with `turn` at its end, and the turns of `past` that they hold.

        Args:
            past: the oldest turns are left out if room is short.
            forget: say so.
        """
        from lit_qlora.generation import room_for_answer

        block_size = self.model.config.block_size
        # At most half of the context is kept free, or a large max_new_tokens would leave no memory at all.
        free = min(self.config.max_new_tokens, block_size // 2)
        opening = (Message("system", self.system),) if self.system else ()
        for first in range(len(past) + 1):
            messages = (message for held in (*past[first:], turn) for message in held.messages)
            said = Said((*opening, *messages), variables=self.variables)
            ids = encode_prompt(self.tokenizer, self.roster.styles[name], said)
            if len(ids) + free <= block_size or first == len(past):
                break
        room_for_answer(self.model, len(ids), wanted=1)  # before anything is forgotten for its sake
        if first and forget:
            turns = "oldest turn is" if first == 1 else f"{first} oldest turns are"
            note(f"The {turns} forgotten: the model's context holds {block_size} tokens.")
        return ids, past[first:]

    def remember(self, *messages: Message | dict[str, Any]) -> None:
        """Write messages to the history file, if there is one."""
        if self.config.history:
            self.config.history.parent.mkdir(parents=True, exist_ok=True)
            with self.config.history.open("a+b") as file:
                cut_off = "\n" if ends_within_a_line(file) else ""
                lines = [json.dumps(self._record(message), ensure_ascii=False) + "\n" for message in messages]
                file.write("".join([cut_off, *lines]).encode(errors="replace"))

    def _record(self, message: Message | dict[str, Any]) -> dict[str, Any]:
        if isinstance(message, dict):
            return message
        said_by = {"model": self.who} if message.is_answer else {}
        return {"role": message.role, "content": message.content, **message.keys, **said_by}

    def resume(self, messages: list[dict[str, Any]]) -> None:
        """Resume the conversation that these messages record."""
        for record in messages:
            role, content = record["role"], record.get("content", "")
            keys = {name: record[name] for name in record if name not in ("role", "content", "model")}
            if role == "reset":
                self.turns.clear()
            elif role == "system":
                self.system = content
            elif role == "user" or not self.turns:
                self.turns.append(Turn((Message("user", content if role == "user" else ""),)))
            if role in ("assistant", "tool"):
                self.turns[-1] = Turn((*self.turns[-1].messages, Message(role, content, keys)))
        self.turns = [turn for turn in self.turns if any(message.is_answer for message in turn.messages)]
        self.system = self.config.system or self.system
        if self.turns:
            turns = "turn is" if len(self.turns) == 1 else f"{len(self.turns)} turns are"
            note(f"The last {turns} remembered from {self.config.history}.")
            note_waiting(self.turns[-1])


def read_history(path: Path | None) -> list[dict[str, Any]]:
    """Return the messages of a history file, without one that was cut off; none if there is no such file.

    Raises:
        DataError: if it holds something else.
    """
    if path is None or not path.exists():
        return []
    messages: list[dict[str, Any]] = []
    for number, line in enumerate(read_bytes(path, DataError).splitlines(), start=1):  # a text knows more ends of lines
        if not line.endswith(b"}") and line.startswith(b'{"role": '):
            note(f"{path}:{number}: half a message, as a full disk or a power cut leaves it, is left out.")
            continue
        try:
            message: Any = parse_json(line, str(path), strict=True)
            known = message["role"] in ("user", "assistant", "system", "tool") and isinstance(message["content"], str)
            known = known and all(map(is_call, message.get("tool_calls", [])))
            if not known and message["role"] != "reset":
                raise ValueError
        except (CheckpointError, ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: not a message of a conversation. Give --history another file.") from None
        messages.append(message)
    return messages


def ends_within_a_line(file: BinaryIO) -> bool:
    """Tell if the last line of a file has no end."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def is_call(call: Any) -> bool:
    """Tell if a value is a call as the history holds it."""
    return isinstance(call["id"], str) and isinstance(call["function"]["name"], str)


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


def note_waiting(turn: Turn) -> None:
    """Say which call waits for its result, if one does."""
    if waiting := turn.waiting:
        note(f"{waiting[0]['function']['name']} waits for its result: /tool TEXT gives it.")


def note(text: str) -> None:
    """Print a message that is no answer of the model on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
