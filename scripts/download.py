"""Download a model from the Hugging Face hub and convert it.

python scripts/download.py --repo_id Qwen/Qwen2.5-0.5B
python scripts/download.py --list "llama 8b"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_qlora import cli
from lit_qlora.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Download a model from the Hugging Face hub and convert it into a checkpoint. Only this command needs the network.

    The same command resumes a download that was cut short.
    """

    repo_id: str | None = None
    """Name of the model on the hub, ORG/NAME."""
    revision: str = "main"
    """Branch, tag or commit."""
    access_token: cli.SecretStr | None = None
    """Token of the hub, for models that need one. Prefer the environment variable HF_TOKEN, which other users of the
    machine cannot see. The token is neither printed nor stored."""
    checkpoints_dir: Path = Path("checkpoints")
    """Folder for checkpoints; the model goes to ORG/NAME in it."""
    convert: bool = True
    """Convert the model; one that cannot be converted is refused before its weights are fetched. False only
    downloads."""
    dtype: Literal["keep", "bf16", "fp32"] = "keep"
    """Dtype of the converted weights; 'keep' leaves each tensor as it is."""
    list: bool | str = False
    """List well-known models and download nothing. Words list the models with all of them in name or family."""


def main(config: DownloadConfig) -> None:
    """Download, convert, and print a summary."""
    from lit_qlora.convert.hub import download, list_models

    if config.list:
        words = config.list if isinstance(config.list, str) else ""
        print(list_models(words) or f"No known model has {words!r} in its name. The hub has many more.")
        return
    if not config.repo_id:
        raise UsageError("Give --repo_id ORG/NAME, or --list WORDS to look for a name.")
    token = config.access_token.get_secret_value() if config.access_token else None
    folder = download(config.repo_id, config.checkpoints_dir, config.revision, token, convertible=config.convert)
    print(f"downloaded {config.repo_id}: {folder}")
    if config.convert:
        from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint, describe

        model = convert_hf_checkpoint(folder, folder, config.dtype, name=config.repo_id)
        print(describe(model, folder))


if __name__ == "__main__":
    cli.run(main, DownloadConfig)
