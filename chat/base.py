"""Lit-GPT's name for scripts/chat.py, with the same flags: python chat/base.py --checkpoint_dir DIR."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "chat.py"), run_name="__main__")
