"""Requests and answers in the form of OpenAI's API: every field is honoured or refused by name, none is ignored."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lit_qlora.data.messages import text_of_parts
from lit_qlora.errors import DataError, UserError
from lit_qlora.files import reading
from lit_qlora.prompts.answer_parts import Answer
from lit_qlora.prompts.calls import Call
from lit_qlora.prompts.conversation import REASONING, Conversation, Message
from lit_qlora.settings import GenerationConfig

MOST_CHOICES = 8
MOST_STOPS = 4


class ApiError(Exception):
    """An answer that says what is wrong.

    Args:
        param: the field of the request that is wrong.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Order:
    """A request that has been understood.

    Attributes:
        texts: prompts of a completion; empty for a chat.
        max_tokens: None for as many as there is room for.
        settings: what GenerationConfig is made of; the choices count seeds up from its own.
    """

    model: str
    texts: tuple[str, ...]
    conversation: Conversation
    max_tokens: int | None
    min_tokens: int
    choices: int
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool
    settings: dict[str, Any]

    @property
    def tools(self) -> Sequence[Any]:
        """The tools that the answer may call."""
        tools: Sequence[Any] = self.conversation.variables.get("tools", ())
        return tools

    def config(self, room: int, choice: int) -> GenerationConfig:
        """The settings by which a choice is generated.

        Raises:
            ApiError: if the settings contradict each other.
        """
        settings = {**self.settings, "seed": (self.settings["seed"] + choice) % 2**32}
        try:
            return GenerationConfig(max_new_tokens=room, min_new_tokens=min(self.min_tokens, room), **settings)
        except UserError as error:
            raise ApiError(400, str(error)) from None


@dataclass(frozen=True)
class Comparison:
    """A request to compare two models at each token of an answer."""

    model: str
    other: str
    conversation: Conversation
    answer: str


def read_comparison(body: dict[str, Any]) -> Comparison:
    """Understand a request to /compare: model, with, messages, answer.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    fields = _Fields(body)
    comparison = Comparison(
        model=fields.text("model"),
        other=fields.text("with"),
        conversation=Conversation(_messages(fields.take("messages"))),
        answer=fields.text("answer"),
    )
    fields.finish()
    if not comparison.answer:
        raise ApiError(400, "answer is empty, so there is nothing to compare.", "answer")
    return comparison


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        ApiError: if it is no JSON object; NaN and Infinity are no JSON.
    """
    try:
        content: dict[str, Any] = reading.parse_json(body, "The JSON body", strict=True)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    return content


def read_order(body: dict[str, Any], *, chat: bool) -> Order:
    """Understand a request to /v1/chat/completions, or to /v1/completions.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    fields = _Fields(body)
    model = fields.text("model")
    conversation = Conversation(())
    texts: tuple[str, ...] = ()
    if chat:
        conversation = Conversation(_messages(fields.take("messages")), variables=_variables(fields))
    else:
        texts = _prompts(fields.take("prompt"))
    most = fields.whole("max_completion_tokens", 1) if chat else None
    plain_most = fields.whole("max_tokens", 1)
    if most is not None and plain_most is not None:
        raise ApiError(400, "Give max_completion_tokens or max_tokens, not both.", "max_tokens")
    seed = fields.whole("seed", -(2**63))
    settings = {
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_p": fields.number("top_p", 0, 1, 1.0),
        "top_k": fields.whole("top_k", 1),
        "min_p": fields.number("min_p", 0, 1, 0.0),
        "typical_p": fields.number("typical_p", 0, 1, 1.0),
        "repetition_penalty": fields.number("repetition_penalty", 0, 10, 1.0),
        "no_repeat_ngram_size": fields.whole("no_repeat_ngram_size", 0) or 0,
        "seed": secrets.randbits(32) if seed is None else seed % 2**32,
    }
    stream = fields.truth("stream")
    order = Order(
        model=model,
        texts=texts,
        conversation=conversation,
        max_tokens=plain_most if most is None else most,
        min_tokens=fields.whole("min_tokens", 0) or 0,
        choices=fields.whole("n", 1, MOST_CHOICES) or 1,
        stop=_stops(fields.take("stop", None)),
        stream=stream,
        stream_usage=_usage_wanted(fields.take("stream_options", None), stream),
        settings=settings,
    )
    fields.finish()
    return order


class _Fields:
    """The fields of a request; finish refuses the fields that nobody has taken."""

    without_effect = {"user": str, "store": bool, "metadata": dict}  # noqa: RUF012 - never changed
    """Fields that clients send for their own logs; no answer depends on them anywhere."""
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "logit_bias": {}, "echo": False}  # noqa: RUF012
    """Fields that are not offered here -> the value that asks for nothing."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.left = dict(body)

    def take(self, name: str, *default: Any) -> Any:
        if self.left.get(name) is None:
            self.left.pop(name, None)
            if not default:
                raise ApiError(400, f"{name} is missing.", name)
            return default[0]
        return self.left.pop(name)

    def text(self, name: str) -> str:
        value = self.take(name)
        return value if isinstance(value, str) else _wrong(name, "a text", value)

    def truth(self, name: str) -> bool:
        value = self.take(name, False)
        return value if isinstance(value, bool) else _wrong(name, "true or false", value)

    def whole(self, name: str, least: int, most: int = 2**63 - 1) -> int | None:
        value = self.take(name, None)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            _wrong(name, f"a whole number of at least {least} and at most {most}", value)
        return int(value)

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.take(name, default)
        if type(value) not in (int, float) or not least <= value <= most:
            _wrong(name, f"a number from {least} to {most}", value)
        return float(value)

    def finish(self) -> None:
        """Refuse the fields that nobody took, unless they ask for nothing."""
        for name, value in self.left.items():
            if isinstance(value, self.without_effect.get(name, ())) or value is None:
                continue
            asks_for_nothing = self.neutral.get(name)  # 0 and false are not the same here: "logprobs": 0 asks for some
            if value == asks_for_nothing and isinstance(value, bool) == isinstance(asks_for_nothing, bool):
                continue
            raise ApiError(400, f"{name} is not offered by this server.", name)


_AFTER = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool", "user"),
    "tool": ("assistant", "tool", "user"),
}
"""Role -> the roles that may speak next; "": at the start; "call": an assistant that calls tools."""
_KEYS = {"assistant": ("tool_calls", *REASONING), "tool": ("tool_call_id",)}
"""Keys of messages besides role, content and name."""


def _messages(messages: Any) -> tuple[Message, ...]:
    """Read the messages of a conversation that is to be answered."""
    if not isinstance(messages, list) or not messages:
        _wrong("messages", "a list of messages", messages)
    said = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    opening = said[0].role in ("system", "developer")
    before = ""
    for i, (role, *_) in enumerate(said[opening:]):
        expected = _AFTER[before]
        if role not in expected:
            raise ApiError(
                400,
                f"messages: user and assistant must take turns, and only the first message may be of the system; "
                f"after {i} of them expected {' or '.join(expected)}, got {role}.",
                "messages",
            )
        before = role if role != "assistant" or "tool_calls" not in said[opening + i].keys else "call"
    if said[-1].role not in ("user", "tool"):
        raise ApiError(400, "messages must end with one of the user or of a tool, which is answered.", "messages")
    return tuple(said)


def _message(message: Any, place: str) -> Message:
    """A message; nothing is ever fetched."""
    if not isinstance(message, dict):
        _wrong(place, "an object", message)
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        _wrong(f"{place}.role", "system, user, assistant or tool", role)
    known = ("role", "content", "name", *_KEYS.get(role, ()))
    extra = [name for name in message if name not in known and message[name] not in (None, [])]
    if extra:
        raise ApiError(400, f"{place}.{extra[0]} is not offered by this server.", "messages")
    if isinstance(content, list):
        try:
            content = text_of_parts(content)
        except DataError as error:
            raise ApiError(400, f"{place}: {error}.", "messages") from None
    keys = {name: message[name] for name in ("name", *_KEYS.get(role, ())) if message.get(name)}
    if not isinstance(content, str) and not (content is None and "tool_calls" in keys):
        _wrong(f"{place}.content", "a text", content)
    for key in ("name", *REASONING):
        if not isinstance(keys.get(key, ""), str):
            _wrong(f"{place}.{key}", "a text", keys[key])
    for call in keys.get("tool_calls", ()):
        if not isinstance(call, dict) or not _is_function(call.get("function"), "arguments"):
            _wrong(f"{place}.tool_calls", 'calls such as {"function": {"name": "f", "arguments": "{}"}}', call)
    if role == "tool" and not isinstance(keys.get("tool_call_id"), str):
        _wrong(f"{place}.tool_call_id", "the id of the call", keys.get("tool_call_id"))
    return Message(role, content, keys)


def _variables(fields: "_Fields") -> dict[str, Any]:
    """Read the variables that a template has besides messages."""
    documents, others = fields.take("documents", None), fields.take("chat_template_kwargs", None)
    effort = fields.take("reasoning_effort", None)
    if documents is not None and not (isinstance(documents, list) and all(isinstance(one, dict) for one in documents)):
        _wrong("documents", "a list of objects", documents)
    if others is not None and not isinstance(others, dict):
        _wrong("chat_template_kwargs", "an object", others)
    if effort is not None and not isinstance(effort, str):
        _wrong("reasoning_effort", "a text", effort)
    given = {"documents": documents, "reasoning_effort": effort}
    found = {name: value for name, value in given.items() if value}
    return _tools(fields) | found | {name: value for name, value in (others or {}).items() if value is not None}


def _tools(fields: "_Fields") -> dict[str, Any]:
    """Read the tools that may be called."""
    tools, choice = fields.take("tools", None), fields.take("tool_choice", "auto")
    if not fields.take("parallel_tool_calls", True):
        raise ApiError(400, "parallel_tool_calls false is not offered by this server.", "parallel_tool_calls")
    if choice not in ("auto", "none"):
        raise ApiError(400, f"tool_choice {json.dumps(choice)} is not offered by this server.", "tool_choice")
    if tools is None or tools == []:
        return {}
    if not isinstance(tools, list):
        _wrong("tools", "a list of functions", tools)
    for tool in tools:
        if not isinstance(tool, dict) or tool.get("type") != "function" or not _is_function(tool.get("function")):
            _wrong("tools", 'functions such as {"type": "function", "function": {"name": "f"}}', tool)
    return {"tools": tools} if choice == "auto" else {}


def _is_function(value: Any, text: str = "name") -> bool:
    """Tell if a value is an object with a name, and with a text under the key `text`."""
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get(text), str)


def _prompts(prompt: Any) -> tuple[str, ...]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
        _wrong("prompt", "a text, or a list of texts, none of them empty", prompt)
    if len(prompts) > MOST_CHOICES:
        _wrong("prompt", f"at most {MOST_CHOICES} texts", len(prompts))
    return tuple(prompts)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        _wrong("stop", f"a text, or up to {MOST_STOPS} texts, none of them empty", stop)
    return tuple(stops)


def _usage_wanted(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options has no effect without stream.", "stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        _wrong("stream_options", '{"include_usage": true}', options)
    return bool(options.get("include_usage"))


def _wrong(name: str, expected: str, value: Any) -> NoReturn:
    shown = json.dumps(value, default=str)
    raise ApiError(400, f"{name} must be {expected}, got {shown[:80]}.", name.split("[")[0].split(".")[0])


def completion(
    order: Order, answers: Sequence[Answer], reasons: Sequence[str], usage: dict[str, int], *, chat: bool
) -> Any:
    """The whole answer to a request."""
    choices = [
        {"index": i, "logprobs": None}
        | (_message_of(answer, reason) if chat else {"text": answer.content, "finish_reason": reason})
        for i, (answer, reason) in enumerate(zip(answers, reasons, strict=True))
    ]
    return envelope(order, "chat.completion" if chat else "text_completion") | {"choices": choices, "usage": usage}


def _message_of(answer: Answer, reason: str) -> dict[str, Any]:
    """Message and finish_reason of a choice."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message |= {"content": answer.content or None, "tool_calls": answer.calls}
    return {"message": message, "finish_reason": finish_reason(answer.calls, reason)}


def finish_reason(calls: Sequence[Call], reason: str) -> str:
    """The reason why an answer with these calls ended."""
    return "tool_calls" if calls and reason == "stop" else reason


def chunk(head: dict[str, Any], index: int, piece: str, reason: str | None, *, chat: bool, key: str = "content") -> Any:
    """A piece of a choice, as it is streamed.

    Args:
        key: the field of the message that the piece belongs to.
    """
    if not chat:
        return head | {"choices": [{"index": index, "text": piece, "finish_reason": reason, "logprobs": None}]}
    return _delta(head, index, {key: piece} if piece else {}, reason)


def first_chunk(head: dict[str, Any], index: int) -> Any:
    """The beginning of a choice of a chat."""
    return _delta(head, index, {"role": "assistant", "content": ""})


def call_chunk(head: dict[str, Any], index: int, calls: Sequence[Call]) -> Any:
    """The calls of a choice, which come together at its end: before that nothing tells a call from words."""
    return _delta(head, index, {"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]})


def _delta(head: dict[str, Any], index: int, delta: dict[str, Any], reason: str | None = None) -> Any:
    return head | {"choices": [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}]}


def envelope(order: Order, kind: str) -> dict[str, Any]:
    """The fields that every answer begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": order.model,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Count the tokens that were read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
