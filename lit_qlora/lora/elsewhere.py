"""Names the programs that will not take a saved adapter as it is; merged into its base, each takes any."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_qlora.files.manifest import MANIFEST
from lit_qlora.files.reading import read_json
from lit_qlora.lora.adapter import PEFT_CONFIG

VLLM_RANK, VLLM_MOST = 16, 512
"""Most that vLLM takes unless --max-lora-rank says more, and most that this may say."""
HEADS = ("lm_head", "embed_out")


def read_caveats(folder: Path, tied_head: bool) -> list[str]:
    """The caveats of the adapter that is saved in `folder`."""
    lora = read_json(folder / MANIFEST).get("lora", {}) if (folder / MANIFEST).is_file() else {}
    alone = "No other program knows this adapter's context without the lines in its README.md. Merge it first."
    context = [alone] if lora.get("rope_scaling", "none") != "none" else []
    return context + caveats(read_json(folder / PEFT_CONFIG), tied_head)


def caveats(adapter_config: Mapping[str, Any], tied_head: bool) -> list[str]:
    """A sentence for each program that would refuse the adapter, or compute something else with it.

    Args:
        adapter_config: PEFT's, as it is saved.
        tied_head: whether the model's head is its embedding.

    vLLM 0.22, vllm/lora/peft_helper.py; llama.cpp, convert_lora_to_gguf.py.
    """
    get = adapter_config.get
    if get("task_type") == "SEQ_CLS":
        return ["PEFT takes this adapter onto AutoModelForSequenceClassification; programs that write texts do not."]
    ranks, alphas = (get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    rank = max([get("r", 0), *ranks.values()])
    trained = {
        "DoRA": get("use_dora"),
        "trained embeddings": get("modules_to_save"),
        "trained tokens": get("trainable_token_indices"),
    }
    both = [what for what, used in trained.items() if used]
    head = any(str(name).rpartition(".")[2] in HEADS for name in get("target_modules") or ())
    vllm = [*both, *(["an adapter of the head"] if head else []), *(["ranks of layers"] if ranks or alphas else [])]
    vllm += [f"rank {rank}, above {VLLM_MOST}"] if rank > VLLM_MOST else []
    cpp = [*both, *(["an adapter of a head that is the embedding"] if head and tied_head else [])]
    cpp += [what for what, used in (("alphas of layers", alphas), ("rsLoRA", get("use_rslora"))) if used]
    said = [
        f"{name} does not take this adapter: it has {', '.join(reasons)}. Merge it first."
        for name, reasons in (("vLLM", vllm), ("llama.cpp", cpp))
        if reasons
    ]
    if not vllm and rank > VLLM_RANK:
        fits = next(most for most in (32, 64, 128, 256, 320, VLLM_MOST) if rank <= most)
        said.append(f"vLLM takes this adapter with --max-lora-rank {fits}.")
    return said
