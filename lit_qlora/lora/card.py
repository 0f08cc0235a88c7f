"""The model card of an adapter: README.md with the front matter that the hub reads."""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lit_qlora.convert.to_hugging_face import scaling_table, their_context
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.rope_scaling import scaled
from lit_qlora.prompts.style import Style
from lit_qlora.settings import LoRAConfig, Quantization

CARD = "README.md"
SCALED = """\
config = AutoConfig.from_pretrained({base})
config.rope_parameters |= {table}
config.update({context})
"""
PYTHON = """\
```python
from peft import PeftModel
from transformers import {config}AutoModelForCausalLM, AutoTokenizer

{scaled}model = AutoModelForCausalLM.from_pretrained({base}, dtype="auto"{given}){resized}
model = PeftModel.from_pretrained(model, ".")
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
```
"""


def adapter_card(config: LoRAConfig, model: ModelConfig, style: Style | None, facts: Mapping[str, Any]) -> str:
    """Describe an adapter by its settings and the facts of its manifest; no path of this machine is named."""
    base = json.dumps(facts.get("base", {}).get("name") or model.name)
    head = facts.get("head")
    pipeline = "text-classification" if head else "text-generation"
    front = f"base_model: {base}\nlibrary_name: peft\npipeline_tag: {pipeline}\ntags:\n"
    tags = "".join(f"- {tag}\n" for tag in ("lora", "lit_qlora", model.family))
    rows = {
        "base": base.strip('"'),
        "rank, alpha": f"{config.r}, {config.alpha:g}",
        "layers": ", ".join(config.targets),
        "base during training": Quantization.of(facts).describe() if "quantize" in facts else "",
        "data": ", ".join(map(_short, facts.get("data", ()))),
        "prompt style": style.name if style else "",
        "steps": str(facts.get("step", "")),
    }
    new, is_scaled = facts.get("new_tokens"), config.rope_scaling != "none"
    model = scaled(model, *config.rope) if model.rope_scaling == "none" else model
    longer = f"{model.block_size} tokens ({config.rope_scaling}, {config.rope_factor:g} times)"
    rows["context"] = longer if is_scaled else ""
    rows["new tokens"] = ", ".join(f"`{name}`" for name in new or ()).replace("|", "\\|")
    python = PYTHON.format(
        base=base,
        config="AutoConfig, " if is_scaled else "",
        scaled=SCALED.format(base=base, table=scaling_table(model), context=their_context(model)) if is_scaled else "",
        given=(", config=config" if is_scaled else "") + (_given(head) if head else ""),
        resized=f"\nmodel.resize_token_embeddings({model.vocab_size})" if new else "",
        tokenizer='"."' if new else base,
    )
    python = python.replace("AutoModelForCausalLM", "AutoModelForSequenceClassification") if head else python
    rows["classes"] = ", ".join(head["classes"]).replace("|", "\\|") if head else ""
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    return (
        f"---\n{front}{tags}---\n\n# Adapter of {model.name}\n\nTrained by lit_qlora, which reads this folder as it is "
        f"(`--lora_path`), as does PEFT.\n\n| | |\n|---|---|\n{table}\n{python}"
    )


def _given(head: Mapping[str, Any]) -> str:
    """The arguments that give a base the head of an adapter."""
    classes = dict(enumerate(head["classes"]))
    return f", num_labels={max(1, len(classes))}" + (f", id2label={classes}" if classes else "")


def _short(source: str) -> str:
    """The name of a data set of the hub, or of a file without its folder."""
    return source if "hf:" in source else PurePath(source).name
