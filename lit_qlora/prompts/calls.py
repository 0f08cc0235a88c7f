"""Calls of tools as models write them, read into OpenAI's form.

A text is calls only if it holds nothing else, if each call is complete, and if each names a tool. Nothing here goes
back over what it has read, for an answer may be anything: the time is linear in its length.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from lit_qlora.files.reading import check_depth

Tool = Mapping[str, Any]
"""In OpenAI's form: {"type": "function", "function": {"name": ..., "parameters": ...}}."""
Call = dict[str, Any]
"""In OpenAI's form: {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{}"}}."""
Functions = Mapping[str, Tool]
"""Name -> function, of the tools that may be called."""
Found = list[Call | None]
"""Calls, None for what is none."""

MISTRAL = ("[TOOL_CALLS]", "[ARGS]")
PHI = ("<|tool_call|>", "<|/tool_call|>")
DEEPSEEK = tuple(f"<\uff5ctool▁{name}\uff5c>" for name in ("calls▁begin", "calls▁end", "call▁begin", "sep", "call▁end"))
KIMI = (
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
GEMMA_QUOTE, FUNCTION_GEMMA_QUOTE = '<|"|>', "<escape>"
# *+ keeps what it took.
_ARGUMENT = re.compile(
    r"<arg_key>((?:(?!</arg_key>).)*+)</arg_key>\s*+<arg_value>((?:(?!</arg_value>).)*+)</arg_value>\s*+", re.DOTALL
)
_NAMED = re.compile(rf"([\w.-]++)\s*+((?:{_ARGUMENT.pattern})*+)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter(?:=| name=\")([^\">\n]++)\"?+>((?:(?!</parameter>).)*+)</parameter>\s*+", re.DOTALL
)
_FUNCTION = re.compile(
    rf"<(?:function=|invoke name=\")([\w.-]++)\"?+>\s*+((?:{_PARAMETER.pattern})*+)</(?:function|invoke)>\s*+",
    re.DOTALL,
)
_GEMMA = re.compile(r"\s*+call:\s*+([\w.-]++)\s*+(\{.*\})\s*+", re.DOTALL)
_GEMMA_TOKEN = re.compile(r'[{}\[\],:]|"(?:[^"\\]|\\.)*+"|[^{}\[\],:"]++|"')
_JSON_ATOM = re.compile(r"-?+(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?+\d++)?+|true|false")
_DECODER = json.JSONDecoder()


def read_calls(text: str, tools: Functions) -> list[Call]:
    """The calls that a text consists of; none if it holds anything else.

    The mark that it begins with tells the notation, see BETWEEN and BEHIND. Llama 3 writes no mark but JSON objects
    alone, with "parameters" for the arguments.
    """
    found = _found(text.strip(), tools)
    complete = [call for call in found if call]
    return complete if len(complete) == len(found) else []


def _found(text: str, tools: Functions) -> Found:
    for (opens, closes), read in BETWEEN.items():
        if text.startswith(opens):
            bodies = _between(text, opens, closes)
            return [call for body in bodies for call in (read(body, tools) if body is not None else [None])]
    for opens, read in BEHIND.items():
        if text.startswith(opens):
            return read(text, tools)
    return _json_calls(text, tools)


def call_of(name: str, arguments: Sequence[Any], tools: Functions, id: str = "") -> Call | None:
    """A call of a tool with an object of arguments, or with nothing; None if it is anything else.

    Args:
        id: that the model itself gave it.
    """
    given = arguments[0] if arguments else {}
    if name not in tools or len(arguments) > 1 or not isinstance(given, dict):
        return None
    function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
    # Nine letters and digits, for Mistral's templates take no other.
    return {"id": id or secrets.token_hex(5)[:9], "type": "function", "function": function}


def values_of(text: str) -> list[Any]:
    """The JSON values that the text consists of; [None] if it holds anything else."""
    values: list[Any] = []
    text = text.strip()
    at = 0
    while at < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
            _check_sendable(value)
        except (ValueError, RecursionError):
            return [None]
        values += value if isinstance(value, list) else [value]
        while at < len(text) and text[at] in " \n;,":
            at += 1
    return values


def as_line(call: Call) -> str:
    """A call as a line of JSON."""
    function = call["function"]
    return f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}'


def _check_sendable(value: Any) -> None:
    """Raise ValueError for a value that others could not read: too deep, not finite, or half of a surrogate pair."""
    check_depth(value)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _between(text: str, opens: str, closes: str) -> Iterator[str | None]:
    """Yield what stands between each pair of marks, None for anything outside."""
    text, at = text.strip(), 0
    while at < len(text):
        start = text.find(opens, at)
        end = text.find(closes, start + len(opens)) if start >= 0 else -1
        if end < 0 or text[at:start].strip():
            yield None
            return
        yield text[start + len(opens) : end]
        at = end + len(closes)


def _json_calls(text: str, tools: Functions) -> Found:
    """JSON objects with a name, and with "arguments" or "parameters"."""
    return [_json_call(value, tools) for value in values_of(text)] or [None]


def _json_call(value: Any, tools: Functions) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    return call_of(value["name"], [value.get("arguments", value.get("parameters", {}))], tools)


def _tagged(body: str, tools: Functions) -> Found:
    """JSON objects, or a name with <arg_key> and <arg_value>, or functions with parameters."""
    body = body.strip()
    if named := _NAMED.fullmatch(body):
        return [_typed_call(named[1], _ARGUMENT.findall(named[2]), tools)]
    return _functions(body, tools) if body.startswith("<") else _json_calls(body, tools)


def _functions(body: str, tools: Functions) -> Found:
    """<function=NAME> with a <parameter=KEY> for each argument, or <invoke name="NAME"> with <parameter name="KEY">."""
    found: Found = []
    body, at = body.strip(), 0
    while at < len(body):
        called = _FUNCTION.match(body, at)
        if not called:
            return [None]
        pairs = [(key, value.removeprefix("\n").removesuffix("\n")) for key, value in _PARAMETER.findall(called[2])]
        found.append(_typed_call(called[1], pairs, tools))
        at = called.end()
    return found


def _typed_call(name: str, pairs: Sequence[tuple[str, str]], tools: Functions) -> Call | None:
    """A call whose arguments are texts, each to be read as the tool describes it."""
    properties: Any = tools.get(name, {})
    for key in ("parameters", "properties"):  # a client wrote them
        properties = properties.get(key) if isinstance(properties, Mapping) else None
    properties = properties if isinstance(properties, Mapping) else {}
    return call_of(name, [{key.strip(): _argument(text, properties.get(key.strip())) for key, text in pairs}], tools)


def _argument(text: str, schema: Any) -> Any:
    """The value of an argument: the text itself where the tool takes a text, else JSON if it is some."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        value = json.loads(text)
        _check_sendable(value)
    except (ValueError, RecursionError):
        return text
    return value


def _mistral(text: str, tools: Functions) -> Found:
    """[TOOL_CALLS] with a list of objects behind it, or [TOOL_CALLS]NAME[ARGS]{...} for each call."""
    opens, separates = MISTRAL
    if not re.match(r"\s*+[\w.-]++\s*+\[ARGS\]", text[len(opens) :]):
        return _json_calls(text.removeprefix(opens), tools)
    parts = [part.partition(separates) for part in text.split(opens)[1:]]
    return [call_of(name.strip(), values_of(values), tools) for name, _, values in parts]


def _phi(text: str, tools: Functions) -> Found:
    """<|tool_call|> with objects or a list of them behind it, and perhaps <|/tool_call|>."""
    opens, closes = PHI
    bodies = (part.strip().removesuffix(closes) for part in text.split(opens)[1:])
    return [call for body in bodies for call in _json_calls(body, tools)]


def _deepseek(text: str, tools: Functions) -> Found:
    """V3 and R1: TYPE, a mark, NAME, and a fence with the arguments. V3.1: NAME, the mark, the arguments."""
    opens, closes, begins, separates, ends = DEEPSEEK
    found: Found = []
    for body in _between(text.removeprefix(opens).removesuffix(closes), begins, ends):
        name, _, arguments = (body or "").partition(separates)
        if not arguments.lstrip().startswith("{"):
            name, _, arguments = arguments.strip().partition("\n")
            arguments = arguments.strip().removeprefix("```json").removesuffix("```")
        found.append(call_of(name.strip(), values_of(arguments), tools))
    return found or [None]


def _kimi(text: str, tools: Functions) -> Found:
    """functions.NAME:NUMBER, which is the id of the call, a mark, and the arguments."""
    opens, closes, begins, separates, ends = KIMI
    found: Found = []
    for body in _between(text.removeprefix(opens).removesuffix(closes), begins, ends):
        id, mark, arguments = (body or "").partition(separates)
        name = id.strip().removeprefix("functions.").rpartition(":")[0] if mark else ""
        found.append(call_of(name, values_of(arguments), tools, id.strip()))
    return found or [None]


def _gemma(quote: str, body: str, tools: Functions) -> Found:
    """call:NAME{KEY:VALUE,...}, with texts between two quotes and keys as they are."""
    called = _GEMMA.fullmatch(body)
    values = values_of(_gemma_json(called[2], quote)) if called else [None]
    return [call_of(called[1], values, tools) if called else None]


def _gemma_json(text: str, quote: str) -> str:
    """The JSON that an object of Gemma stands for; no JSON if there is a quote too few."""
    pieces = text.split(quote)
    if len(pieces) % 2 == 0:
        return "?"
    tokens: list[str] = []
    for i, piece in enumerate(pieces):
        tokens += [json.dumps(piece)] if i % 2 else filter(None, map(str.strip, _GEMMA_TOKEN.findall(piece)))
    return "".join(_json_token(token, follows) for token, follows in pairwise((*tokens, "")))


def _json_token(token: str, follows: str) -> str:
    """A token as JSON has it: keys in quotes, and all that is no number, true, false or null."""
    if token[0] in '{}[],:"':
        return token
    if token in ("None", "null") and follows != ":":
        return "null"
    return json.dumps(token) if follows == ":" or not _JSON_ATOM.fullmatch(token) else token


BETWEEN: dict[tuple[str, str], Callable[[str, Functions], Found]] = {
    ("<tool_call>", "</tool_call>"): _tagged,
    ("<seed:tool_call>", "</seed:tool_call>"): _functions,
    ("<minimax:tool_call>", "</minimax:tool_call>"): _functions,
    ("<|tool_call>", "<tool_call|>"): partial(_gemma, GEMMA_QUOTE),
    ("<start_function_call>", "<end_function_call>"): partial(_gemma, FUNCTION_GEMMA_QUOTE),
}
"""The two marks around calls -> what reads them.

<tool_call> is Hermes' and Qwen's with JSON objects, GLM-4.5's with <arg_key> and <arg_value>, and Qwen3-Coder's and
Qwen3.5's with <function=NAME>. The others are those of Seed-OSS, MiniMax-M2, Gemma 4 and FunctionGemma.
"""
BEHIND: dict[str, Callable[[str, Functions], Found]] = {
    DEEPSEEK[0]: _deepseek,
    KIMI[0]: _kimi,
    MISTRAL[0]: _mistral,
    PHI[0]: _phi,
}
"""The mark that calls begin with -> what reads all of them: DeepSeek V3, R1 and V3.1; Kimi K2; Mistral; Phi-4-mini."""
BEGINNINGS = (*(opens for opens, _ in BETWEEN), *BEHIND)
MARKS = (
    *(mark for pair in BETWEEN for mark in pair),
    *(GEMMA_QUOTE, FUNCTION_GEMMA_QUOTE, *DEEPSEEK, *KIMI, *MISTRAL, *PHI),
)
"""All marks of calls, some of which may be control tokens."""
