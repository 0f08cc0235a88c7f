"""Modelfiles for Ollama: they tell how it writes conversations for a GGUF file, and where answers end.

Format: https://docs.ollama.com/modelfile
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_qlora.convert.ending import Ending
from lit_qlora.prompts.added_tokens import read_if_there
from lit_qlora.prompts.published import go_template

PARAMETERS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
"""Setting of generation_config.json -> Ollama's name of it."""
CONTEXT = 4096
"""Tokens that Ollama reads at most unless it is told otherwise."""


def modelfile(gguf_name: str, ending: Ending, checkpoint_dir: Path, context: int) -> str:
    """The text of a Modelfile beside the GGUF file.

    Args:
        context: most tokens that the model reads.
    """
    tokenizer, style = ending.tokenizer, ending.style
    lines = [f"FROM ./{gguf_name}"]
    template = go_template(style, tokenizer) if style else None
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# No TEMPLATE: Ollama takes the one that it knows for the chat template in the GGUF file.")
    lines += [f"PARAMETER stop {_quoted(tokenizer.content(i))}" for i in ending.stop_ids if tokenizer.content(i)]
    if style and style.tail.strip():
        lines.append(f"PARAMETER stop {_quoted(style.tail.strip())}")
    settings: Mapping[str, Any] = read_if_there(checkpoint_dir / "generation_config.json")
    if settings.get("do_sample") is False:
        settings = {**settings, "temperature": 0}
    lines += [
        f"PARAMETER {name} {settings[key]:g}" for key, name in PARAMETERS.items() if settings.get(key) is not None
    ]
    lines += [f"PARAMETER num_ctx {context}"] if context < CONTEXT else []
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
