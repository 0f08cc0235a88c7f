"""`lit-qlora COMMAND ...`: start the script of a command in this process's place, as if it had been named itself."""

import os
import subprocess
import sys
from pathlib import Path

from lit_qlora import __version__
from lit_qlora.commands import COMMANDS, GROUPS, INSTALLED
from lit_qlora.errors import UsageError, did_you_mean


def main() -> None:
    """Print the commands, or become one."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(__version__)
    elif script := COMMANDS.get(name.replace("_", "-")):
        _become(script, flags)
    else:
        hint = did_you_mean(name, list(COMMANDS))
        print(f"error: {name} is no command.{hint} lit-qlora lists them.", file=sys.stderr)
        raise SystemExit(UsageError.status)


def overview() -> str:
    """All commands in ten lines."""
    lines = [f"  {group:<8} {', '.join(commands)}" for group, commands in GROUPS.items()]
    return "\n".join(
        ["lit-qlora COMMAND ...   fine-tunes models with LoRA. --help after a command says more.", "", *lines]
    )


def _become(script: str, flags: list[str]) -> None:
    checkout = Path(__file__).parents[1]
    if not INSTALLED.is_dir():  # a script finds the package of its checkout, whether that is installed or not
        os.environ["PYTHONPATH"] = os.pathsep.join([str(checkout), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    root = INSTALLED if INSTALLED.is_dir() else checkout
    argv = [sys.executable, str(root / script), *flags]
    if os.name == "nt":  # there the shell would not wait for a process that took another's place
        raise SystemExit(subprocess.call(argv))
    os.execv(sys.executable, argv)


if __name__ == "__main__":
    main()
