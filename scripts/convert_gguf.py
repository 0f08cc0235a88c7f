"""Convert a checkpoint into one GGUF file, for llama.cpp and programs built on it.

python scripts/convert_gguf.py --checkpoint_dir out/lora/Llama-2-7b-hf/merged --out_file my-model.gguf
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_qlora import cli


@dataclass(frozen=True, kw_only=True)
class GgufConfig:
    """Convert a checkpoint into one GGUF file for llama.cpp. Models that llama.cpp computes otherwise are refused."""

    checkpoint_dir: Path
    """The checkpoint: a converted or merged model."""
    out_file: Path
    """File to write; NAME.Modelfile beside it is for Ollama."""
    dtype: Literal["f16", "q8_0", "bf16", "f32"] = "q8_0"
    """Storage of the matrices: 16 bits, 32 bits, or 8 bits with a 16-bit scale for each 32 weights."""


def main(config: GgufConfig) -> None:
    """Convert, and print a summary."""
    from lit_qlora.convert.gguf_vocabulary import differences
    from lit_qlora.convert.to_gguf import export_gguf, modelfile_of, rope_difference

    model = export_gguf(config.checkpoint_dir, config.out_file, config.dtype)
    size = config.out_file.stat().st_size
    if model.ffn == "gelu":
        print("llama.cpp computes GELU by its approximation with tanh: log-probabilities differ by some 0.001.")
    if difference := rope_difference(model):
        print(f"llama.cpp rounds the ends of YaRN's ramp, this model does not: a frequency is off by {difference:.0%}.")
    for texts in differences(config.checkpoint_dir):
        print(f"llama.cpp makes other tokens than this tokenizer of {texts}.")
    beside = modelfile_of(config.out_file)
    print(
        f"exported {model.name} as {config.dtype}, {size / 1e9:.2f} GB: {config.out_file}\n"
        f"for Ollama: ollama create {beside.name.removesuffix('.Modelfile')} -f {beside}"
    )


if __name__ == "__main__":
    cli.run(main, GgufConfig)
