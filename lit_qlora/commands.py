"""The commands, and the scripts that they start.

`lit-qlora merge` and `python -m lit_qlora merge` run scripts/merge_lora.py, as `python scripts/merge_lora.py` does.
"""

from pathlib import Path

GROUPS = {
    "look": {"demo": "scripts/demo.py", "demo-preference": "scripts/demo_preference.py", "fits": "scripts/fits.py"},
    "model": {
        "download": "scripts/download.py",
        "add-tokens": "scripts/add_tokens.py",
        "convert": "scripts/convert_hf_checkpoint.py",
        "export": "scripts/convert_lit_checkpoint.py",
        "gguf": "scripts/convert_gguf.py",
        "plan-quantization": "scripts/plan_quantization.py",
        "push": "scripts/push.py",
    },
    "data": {
        "inspect": "scripts/inspect_data.py",
        "review": "scripts/review_data.py",
        "prepare": "scripts/prepare_alpaca.py",
        "prepare-csv": "scripts/prepare_csv.py",
    },
    "train": {
        "finetune": "finetune/lora.py",
        "preference": "finetune/preference.py",
        "sweep": "finetune/sweep.py",
    },
    "adapter": {"merge": "scripts/merge_lora.py", "shrink": "scripts/shrink_lora.py", "weigh": "scripts/weigh_lora.py"},
    "answer": {
        "generate": "scripts/generate.py",
        "chat": "scripts/chat.py",
        "serve": "scripts/serve.py",
        "classify": "scripts/classify.py",
    },
    "measure": {
        "eval": "eval/lm_eval_harness.py",
        "answers": "eval/answers.py",
        "perplexity": "eval/perplexity.py",
    },
}
"""Groups of commands: name -> script."""
COMMANDS = {name: script for group in GROUPS.values() for name, script in group.items()}
INSTALLED = Path(__file__).parent / "installed"
"""Folder of a wheel with the folders of the repository that the package needs; see pyproject.toml."""


def find(path: str) -> Path:
    """A file or folder of the repository: in the wheel if this is one, else as it is, from the working directory."""
    return INSTALLED / path if INSTALLED.is_dir() else Path(path)


def spell(script: str) -> str:
    """The command of a script as a user types it here: 'python scripts/chat.py', or 'lit-qlora chat' in a wheel."""
    if not INSTALLED.is_dir():
        return f"python {script}"
    return f"lit-qlora {next(name for name, other in COMMANDS.items() if other == script)}"
