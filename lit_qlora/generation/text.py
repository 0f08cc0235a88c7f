"""Ids to text as they are generated: whole characters only, up to a stop string."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol


class Decodes(Protocol):
    """A tokenizer: turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """As lit_qlora.prompts.tokenizer.Tokenizer.decode."""
        ...


WINDOW, CONTEXT = 64, 8
"""Ids that are decoded together, and ids left of them when the oldest are dropped: a token's text depends on its
neighbours at most."""


class TextStream:
    """The text of ids that come one by one, each piece as soon as it is certain.

    A token may be part of a character, and its text may depend on its position (SentencePiece drops a leading space).
    So ids are decoded together with earlier ones. An unfinished character at the end is held back, and so is a
    possible beginning of a stop string.

    Args:
        gap, tail: removed where the text begins or ends with them, see lit_qlora.prompts.style.Style.
        stop: strings that end the text; it is cut before the first of them.

    Attributes:
        stopped: a stop string was found.
    """

    def __init__(self, tokenizer: Decodes, gap: str = "", tail: str = "", stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.gap, self.tail, self.stop = tokenizer, gap, tail, tuple(stop)
        self.stopped = False
        self._endings = (*self.stop, tail, *(tail + ending for ending in self.stop))
        self._window: list[int] = []
        self._before = ""  # text of the window that was returned already
        self._withheld = ""  # certain, but perhaps part of the gap, of the tail or of a stop string
        self._at_start = bool(gap)

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self.tokenizer.decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._before) :]
        self._before = text
        if len(self._window) > WINDOW:
            last, self._before = _last(self.tokenizer, self._window, CONTEXT)
            self._window = list(last)
        return self._release(new, final=False)

    def end(self) -> str:
        """The rest, after the last id."""
        if self.stopped:
            return ""
        return self._release(self.tokenizer.decode(self._window)[len(self._before) :], final=True)

    def _release(self, new: str, final: bool) -> str:
        self._withheld += new
        if self._at_start:
            if not final and self._withheld != self.gap and self.gap.startswith(self._withheld):
                return ""
            self._withheld = self._withheld.removeprefix(self.gap)
            self._at_start = False
        at = min((at for ending in self.stop if (at := self._withheld.find(ending)) >= 0), default=-1)
        if at >= 0:
            self.stopped, final = True, True
            self._withheld = self._withheld[:at]
        if final:
            self._withheld = self._withheld.removesuffix(self.tail)
        withhold = 0 if final else max(_overlap(self._withheld, ending) for ending in self._endings)
        out, self._withheld = (
            self._withheld[: len(self._withheld) - withhold],
            self._withheld[len(self._withheld) - withhold :],
        )
        return out


def _last(tokenizer: Decodes, ids: Sequence[int], count: int) -> tuple[Sequence[int], str]:
    """The last `count` ids, or a few more, so that they begin with a whole character, and their text.

    Some tokenizers cannot decode bytes that begin within a character, whatever follows. A character is at most four
    tokens; if none of them begins one, no id is left out.
    """
    for more in range(4):
        last = ids[-count - more :]
        text = tokenizer.decode(last)
        if not text.startswith("\ufffd"):
            return last, text
    return ids, tokenizer.decode(ids)


def _overlap(text: str, ending: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `ending`."""
    return next((n for n in range(min(len(text), len(ending)), 0, -1) if text.endswith(ending[:n])), 0)


def stream_text(
    tokenizer: Decodes, ids: Iterable[int], gap: str = "", tail: str = "", stop: Sequence[str] = ()
) -> Iterator[str]:
    """The text of `ids` in pieces, each as soon as it is certain; joined they equal text_of.

    Args:
        ids: consumed one by one, up to a stop string.
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
    """A function that tells whether an answer has a stop string, for `generate`; None without stop strings.

    Args:
        stop: strings, none of them empty.
        gap: see text_of.
    """
    if not stop:
        return None
    # A character is at most four tokens, so the last ids hold any stop string that was just completed.
    count = 4 * max(map(len, (gap, *stop))) + CONTEXT

    def ended(answer: Sequence[int]) -> bool:
        last, text = _last(tokenizer, answer, count)
        if len(last) == len(answer):
            text = text.removeprefix(gap)
        return any(ending in text for ending in stop)

    return ended
