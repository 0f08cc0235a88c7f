"""Ids to text as they come: whole characters only, up to a stop string."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol


class Decodes(Protocol):
    """What turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """As lit_qlora.prompts.tokenizer.Tokenizer.decode."""
        ...


WINDOW, CONTEXT = 64, 8
"""Ids that are decoded together before the oldest are left behind, and how many of them stay for the sake of the next:
a token's text depends on its neighbours at most."""


class TextStream:
    """The text of ids that come one by one, each piece as soon as it is certain.

    A token may be part of a character, and its text may depend on its place (SentencePiece drops a leading space), so
    ids are decoded together with those before them. An unfinished character at the end is held back, and so is what
    may be the beginning of a stop string.

    Args:
        gap, tail: left out where the text begins or ends with them, see lit_qlora.prompts.style.Style.
        stop: strings that end the text; it is cut before the first of them.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Decodes, gap: str = "", tail: str = "", stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.gap, self.tail, self.stop = tokenizer, gap, tail, tuple(stop)
        self.stopped = False
        self._window: list[int] = []
        self._before = ""  # text of the ids that are in the window for their neighbours' sake
        self._held = ""  # certain, but perhaps part of the gap, of the tail or of a stop string
        self._at_start = bool(gap)

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self.tokenizer.decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._before) :]
        self._before = text
        if len(self._window) > WINDOW:
            kept, self._before = _last(self.tokenizer, self._window, CONTEXT)
            self._window = list(kept)
        return self._release(new, final=False)

    def end(self) -> str:
        """The rest, when no more ids come."""
        if self.stopped:
            return ""
        return self._release(self.tokenizer.decode(self._window)[len(self._before) :], final=True)

    def _release(self, new: str, final: bool) -> str:
        self._held += new
        if self._at_start:
            if not final and self._held != self.gap and self.gap.startswith(self._held):
                return ""
            self._held = self._held.removeprefix(self.gap)
            self._at_start = False
        at = min((at for ending in self.stop if (at := self._held.find(ending)) >= 0), default=-1)
        if at >= 0:
            self.stopped, final = True, True
            self._held = self._held[:at]
        if final:
            self._held = self._held.removesuffix(self.tail)
        endings = [*self.stop, self.tail, *(self.tail + ending for ending in self.stop)]
        keep = 0 if final else max(_overlap(self._held, ending) for ending in endings)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


def _last(tokenizer: Decodes, ids: Sequence[int], count: int) -> tuple[Sequence[int], str]:
    """The last `count` ids, or a few more, so that they begin with a whole character, and their text.

    Some tokenizers make nothing of a run of bytes that begins with a part of a character, however it goes on. A
    character is at most four tokens; where none of them begins one, no id is left out.
    """
    for more in range(4):
        last = ids[-count - more :]
        text = tokenizer.decode(last)
        if not text.startswith("\ufffd"):
            return last, text
    return ids, tokenizer.decode(ids)


def _overlap(text: str, ending: str) -> int:
    """Length of the longest end of `text` that `ending` begins with."""
    return next((n for n in range(min(len(text), len(ending)), 0, -1) if text.endswith(ending[:n])), 0)


def stream_text(
    tokenizer: Decodes, ids: Iterable[int], gap: str = "", tail: str = "", stop: Sequence[str] = ()
) -> Iterator[str]:
    """The text of `ids` in pieces, each as soon as it is certain; together they are what text_of gives.

    Args:
        ids: consumed one by one, and no further when a stop string has come.
        gap, tail, stop: see TextStream.
    """
    stream = TextStream(tokenizer, gap, tail, stop)
    for token in ids:
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
    if rest := stream.end():
        yield rest


def text_of(tokenizer: Decodes, ids: Sequence[int], gap: str = "", tail: str = "", stop: Sequence[str] = ()) -> str:
    """The text of a whole answer up to the first stop string, without the gap before it and the tail behind it."""
    text = tokenizer.decode(ids).removeprefix(gap)
    text = text[: min((at for ending in stop if (at := text.find(ending)) >= 0), default=len(text))]
    return text.removesuffix(tail)


def ends_with(tokenizer: Decodes, stop: Sequence[str], gap: str = "") -> Callable[[Sequence[int]], bool] | None:
    """Whether an answer has come to a stop string, for `generate`; None where there are no stop strings.

    Args:
        stop: strings, none of them empty.
        gap: see text_of.
    """
    if not stop:
        return None
    # A character is at most four tokens, so the last of them hold any stop string that has just been completed.
    count = 4 * max(map(len, (gap, *stop))) + CONTEXT

    def ended(answer: Sequence[int]) -> bool:
        last, text = _last(tokenizer, answer, count)
        if len(last) == len(answer):
            text = text.removeprefix(gap)
        return any(ending in text for ending in stop)

    return ended
