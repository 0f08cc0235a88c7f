"""Upload an adapter or a model to the Hugging Face hub.

python scripts/push.py --lora_path out/lora/Llama-2-7b-hf --repo_id me/my-adapter
python scripts/push.py --checkpoint_dir out/lora/Llama-2-7b-hf/merged --repo_id me/my-model
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lit_qlora import cli
from lit_qlora.inference import adapter_folder
from lit_qlora.settings import Settings, check


@dataclass(frozen=True, kw_only=True)
class PushConfig(Settings):
    """Upload an adapter or a model to the Hugging Face hub, private unless you say otherwise.

    An adapter goes without the optimizer's state and without paths of this machine; PEFT and --lora_path read it. A
    checkpoint goes as the folder that scripts/convert_lit_checkpoint.py writes.
    """

    repo_id: str
    """Name of the repository, ORG/NAME; it is made if it is not there."""
    lora_path: Path | None = None
    """The adapter, such as OUT/final of finetune/lora.py; a run folder OUT stands for it."""
    checkpoint_dir: Path | None = None
    """The model, such as OUT/merged: a checkpoint, or a Hugging Face folder, which goes as it is."""
    private: bool = True
    """Only you and your organisation see the repository. A public one is left alone unless this is false."""
    access_token: cli.SecretStr | None = None
    """Token of the hub that may write. Prefer the environment variable HF_TOKEN, which other users of the machine
    cannot see. The token is neither printed nor stored."""
    dry_run: bool = False
    """Print what would be uploaded, and upload nothing."""

    def __post_init__(self) -> None:
        """Check that there is one thing to upload."""
        super().__post_init__()
        one = (self.lora_path is None) != (self.checkpoint_dir is None)
        check(one, "Give --lora_path for an adapter or --checkpoint_dir for a model, one of them.")


def main(config: PushConfig) -> None:
    """Collect the files, name them, upload them, and print the address."""
    from lit_qlora.convert.hub import check_arguments, upload
    from lit_qlora.errors import CheckpointError
    from lit_qlora.lora.push import stage_adapter, stage_model
    from lit_qlora.model.config import missing_checkpoint

    token = config.access_token.get_secret_value() if config.access_token else None
    check_arguments(config.repo_id, token)
    beside = None
    if config.checkpoint_dir:
        if not config.checkpoint_dir.is_dir():
            raise CheckpointError(missing_checkpoint(config.checkpoint_dir))
        beside = config.checkpoint_dir.resolve().parent  # where a model has room
    with TemporaryDirectory(prefix=".push-", dir=beside) as temporary:
        folder = Path(temporary)
        if config.lora_path:
            stage_adapter(adapter_folder(config.lora_path), folder)
        else:
            assert config.checkpoint_dir
            folder = stage_model(config.checkpoint_dir, folder)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {file.stat().st_size:>15,} bytes  {file.relative_to(folder)}")
        seen = "private" if config.private else "public"
        if config.dry_run:
            print(f"Nothing is uploaded; without --dry_run these files go to {config.repo_id}, {seen}.")
            return
        print(f"uploaded to {config.repo_id}, {seen}: {upload(folder, config.repo_id, config.private, token)}")


if __name__ == "__main__":
    cli.run(main, PushConfig)
