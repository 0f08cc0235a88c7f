"""Answers: the choice of tokens, batches, streams, searches with beams, and their text."""

from lit_qlora.generate.assisted import Draft
from lit_qlora.generate.decode import generate, stream
from lit_qlora.generate.state import room_for_answer
from lit_qlora.generate.text import ends_with, stream_text, text_of

__all__ = ["Draft", "ends_with", "generate", "room_for_answer", "stream", "stream_text", "text_of"]
