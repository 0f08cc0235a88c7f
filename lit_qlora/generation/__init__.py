"""Answers: the choice of tokens, batches, streams, beam search, and text."""

from lit_qlora.generation.assisted import Draft
from lit_qlora.generation.decode import generate, stream
from lit_qlora.generation.sequences import room_for_answer
from lit_qlora.generation.text import ends_with, stream_text, text_of

__all__ = ["Draft", "ends_with", "generate", "room_for_answer", "stream", "stream_text", "text_of"]
