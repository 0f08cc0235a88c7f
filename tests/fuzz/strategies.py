"""Strategies that break a good input: a value of JSON, a text, or bytes."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 5, 2**31, 2**63, 10**6, 10**9, 10**30, 0.5, -5.5, 1e308, -1e30, float("nan")),
    *(float("inf"), "", "x", " ", "none", "null", "\0", "\ud800", "\udcff", "\u2028", "../x", "/dev/zero", "{{ x }}"),
    *("a" * 5000, [], {}, [[]], [None], [{}], {"a": 1}, {"": ""}, [1, "x"], [0] * 3000, "9" * 5000, {"type": "x"}),
]
SNIPPETS = [
    *(
        b"\xff",
        b"\x00",
        b'"',
        b"\\",
        b"\n",
        b"\r",
        b",",
        b":",
        b"{",
        b"}",
        b"[",
        b"]",
        b"-",
        b"#",
        b"'",
        b"\xef\xbb\xbf",
    ),
    *(b"\\ud800", b"\xed\xa0\x80", b"1e400", b"NaN", b"null", b"true", b"7" * 5000, b"[" * 3000, b'{"a":' * 3000),
    *(b"&a [*a, *a]", b"!!python/name:os.system ", b"<<: ", b"---\n", b"|\n", b"? ", b"\x1f\x8b", b"\t", b" " * 3000),
    *(b"{{ 'a' * 9 }}", b"{% for i in range(9) %}", b"{% endfor %}", b"PAR1", b"0", b"1", b"</s>", b"<|im_end|>"),
]
NUMBERS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """`value`, which JSON can hold, with one thing in it changed."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(HOSTILE))
    how = draw(st.integers(0, 5))
    if isinstance(value, list):
        i = draw(st.integers(0, len(value) - 1))
        if how == 0:
            return value[:i] + value[i + 1 :]
        if how == 1:
            return value + value[i : i + 1]
        return [*value[:i], draw(changed(value[i])), *value[i + 1 :]]
    key = draw(st.sampled_from(sorted(value)))
    if how == 0:
        return {name: one for name, one in value.items() if name != key}
    if how == 1:
        return {**value, draw(st.sampled_from(["", "x", f"{key}x", "\ud800", "__class__"])): value[key]}
    return {**value, key: draw(changed(value[key]))}


@st.composite
def changed_often(draw: st.DrawFn, value: Any) -> Any:
    """`value` changed in one to three places."""
    for _ in range(draw(st.integers(1, 3))):
        value = draw(changed(value))
    return value


@st.composite
def spoilt(draw: st.DrawFn, content: bytes, snippets: Sequence[bytes] = SNIPPETS) -> bytes:
    """`content` with bytes in one to four places changed, taken out, put in, repeated or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.integers(0, 6))
        count = draw(st.integers(1, 40))
        if how == 0:
            content = content[:at] + content[at + count :]
        elif how == 1:
            content = content[:at] + content[at : at + count] + content[at:]
        elif how == 2:
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif how == 3:
            content = content[:at] + draw(st.sampled_from(NUMBERS)).to_bytes(8, "little") + content[at + 8 :]
        elif how == 4:
            content = content[:at]
        else:
            content = content[:at] + draw(st.sampled_from(snippets)) + content[at:]
    return content


def spoilt_json(content: bytes) -> st.SearchStrategy[bytes]:
    """A JSON text with values, or bytes, changed."""
    value = json.loads(content)
    return st.one_of(changed_often(value).map(lambda new: json.dumps(new).encode()), spoilt(content))


def spoilt_lines(content: bytes) -> st.SearchStrategy[bytes]:
    """Lines of JSON, with values or bytes changed."""
    rows = [json.loads(line) for line in content.splitlines()]
    return st.one_of(
        changed_often(rows)
        .filter(lambda new: isinstance(new, list))
        .map(lambda new: "".join(json.dumps(row) + "\n" for row in new).encode()),
        spoilt(content),
    )


def spoilt_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with values of its header, or bytes, changed."""
    size = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]

    def with_header(new: Any) -> bytes:
        head = json.dumps(new).encode()
        return len(head).to_bytes(8, "little") + head + tensors

    return st.one_of(changed_often(header).map(with_header), spoilt(content))
