"""Text as it comes: whole characters, the gap left out, nothing of a stop string."""

import re

import pytest

from lit_qlora.generation import ends_with, stream_text, text_of
from lit_qlora.prompts.tokenizer import Tokenizer


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        """UTF-8."""
        return bytes(ids).decode(errors="replace")


class ByteFallback:
    """A tokenizer of bytes whose runs of bytes above 127 are characters as a whole, or none, as tokenizers' are."""

    def decode(self, ids: list[int]) -> str:
        """UTF-8, or a replacement for each byte of a run that is not."""
        runs = re.findall(rb"[\x80-\xff]+|[\x00-\x7f]+", bytes(ids))
        return "".join(run.decode() if _is_text(run) else "\ufffd" * len(run) for run in runs)


def _is_text(run: bytes) -> bool:
    try:
        run.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", ["plain", "a 🦊 and é", "", " spaced", "\ufffd", "end\ufffd"])
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(text):
    pieces = list(stream_text(Bytes(), text.encode()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def test_a_character_that_was_never_finished_still_shows():
    assert "".join(stream_text(Bytes(), "ab🦊".encode()[:-1])) == "ab\ufffd"


def test_the_gap_before_an_answer_is_left_out_once() -> None:
    assert list(stream_text(Bytes(), b"  hi", gap=" ")) == [" ", "h", "i"]
    assert list(stream_text(Bytes(), b" ", gap=" ")) == []
    assert "".join(stream_text(Bytes(), b"hi", gap=" ")) == "hi"


@pytest.mark.parametrize("stop", [(), ("Q:",), ("\n\n", "Q:"), ("aab",), ("x", "xyz")], ids=str)
@pytest.mark.parametrize("tail", ["", "\n### End", " "])
@pytest.mark.parametrize(
    "text", [" an answer\n\nQ: more", " aaab ends", " xyzzy", " none of them\n### End", "Q:", " \n### E", "a  "]
)
def test_a_stream_ends_before_a_stop_string_and_a_tail_wherever_its_pieces_are_cut(
    text: str, tail: str, stop: tuple[str, ...]
) -> None:
    whole = text_of(Bytes(), list(text.encode()), " ", tail, stop)
    assert "".join(stream_text(Bytes(), text.encode(), " ", tail, stop)) == whole
    assert not any(ending in whole for ending in stop)
    assert text.removeprefix(" ").startswith(whole)


def test_no_more_ids_are_asked_for_once_a_stop_string_has_come() -> None:
    ids = iter(b"one two. three")
    assert "".join(stream_text(Bytes(), ids, stop=["."])) == "one two"
    assert bytes(ids) == b" three"


def test_the_end_at_a_stop_string_is_noticed_with_the_token_that_completes_it() -> None:
    text = "🦊" * 40 + " and so on. More"
    ended = ends_with(Bytes(), ["so on."])
    assert ended is not None
    ends = [n for n in range(1, len(text.encode()) + 1) if ended(list(text.encode()[:n]))]
    assert ends[0] == len(text[: text.index("so on.") + 6].encode())
    assert ends_with(Bytes(), []) is None


def test_long_texts_are_the_same_in_pieces() -> None:
    text = "é🦊 plain " * 100
    assert "".join(stream_text(Bytes(), text.encode())) == text


@pytest.mark.parametrize("character", ["é", "中", "🦊"])
def test_long_runs_of_bytes_that_decode_all_together_or_not_at_all_are_the_same_in_pieces(character: str) -> None:
    text = character * 60 + " and " + character * 60
    assert "".join(stream_text(ByteFallback(), text.encode())) == text
    ended = ends_with(ByteFallback(), [character + "."])
    assert ended is not None
    assert ended(list(f"{character * 60}.".encode()))
    assert not ended(list(f"{character * 60}!".encode()))


def test_a_tail_before_a_stop_string_is_left_out_of_a_stream_too() -> None:
    text = "an answer\n### End\nQ: more"
    whole = text_of(Bytes(), list(text.encode()), tail="\n### End", stop=["\nQ:"])
    assert "".join(stream_text(Bytes(), text.encode(), tail="\n### End", stop=["\nQ:"])) == whole == "an answer"


def test_a_stop_string_in_the_gap_before_an_answer_does_not_end_it() -> None:
    ended = ends_with(Bytes(), [" "], gap=" ")
    assert ended is not None
    assert [ended(list(b" a b"[:n])) for n in range(1, 5)] == [False, False, True, True]
    assert text_of(Bytes(), list(b" a b"), " ", stop=[" "]) == "a"


def test_sentencepiece_streams_what_it_decodes(tiny_checkpoint):
    tokenizer = Tokenizer(tiny_checkpoint)
    ids = tokenizer.encode("What is 3 plus 4?\nA: 7 é🦊", bos=False)
    assert "".join(stream_text(tokenizer, iter(ids))) == tokenizer.decode(ids)
