"""Models from the Hugging Face hub and to it; each file that comes is checked against the hub's own sums."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from lit_qlora.checkpoint import shards
from lit_qlora.convert.families import check_rules, read_config
from lit_qlora.convert.known_models import MODELS
from lit_qlora.errors import CheckpointError, ResourceError, UsageError, did_you_mean
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.prompts.tokenizer import FILES

SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
SOURCE = "source.json"
"""Origin of a model: repository, commit, and files with their checksums. It travels with all checkpoints made of it."""
OTHERS = ("config.json", "LICENSE*", "NOTICE*", "USE_POLICY*", *FILES)
MESSAGE = "Upload with lit_qlora"
TOKENS = "make one at https://huggingface.co/settings/tokens, and give it as HF_TOKEN or --access_token."
FIRST = ("config.json", SAFETENSORS[-1], PICKLES[-1])
"""Small files that describe a model and name its tensors."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository as the hub describes it."""

    name: str
    bytes: int
    sha256: str | None
    """Of large files, which lie in LFS."""
    git_sha1: str | None
    """Of the small ones."""


def download(
    repo_id: str,
    checkpoints_dir: Path,
    revision: str = "main",
    token: str | None = None,
    endpoint: str | None = None,
    convertible: bool = True,
) -> Path:
    """Bring a model to checkpoints_dir/ORG/NAME, as the hub has it, and say in source.json where it came from.

    A connection that is cut is taken up again where it was cut; files that are complete are not fetched again.

    Args:
        token: an access token of the hub, for models that ask for one; by default HF_TOKEN. It is kept nowhere.
        endpoint: address of the hub; by default HF_ENDPOINT, else https://huggingface.co.
        convertible: refuse a model that cannot be converted before its weights are fetched.

    Raises:
        UsageError: if repo_id, revision or token cannot be one.
        CheckpointError: if the hub does not have the model, does not give it to us, or gave something else; or if its
            configuration or its index is of a model that cannot be converted.
        ResourceError: if the hub cannot be reached, or there is not enough room.
    """
    check_arguments(repo_id, token)
    commit, listed = _list_files(repo_id, revision, token, endpoint)
    files = choose_files(listed, repo_id)
    folder = checkpoints_dir / repo_id
    _forget_other_commit(folder, commit, {file.name for file in files})
    missing = sum(file.bytes for file in files if not (folder / file.name).is_file())
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(checkpoints_dir).free
    if missing > free:
        raise ResourceError(
            f"{repo_id} needs {missing / 1e9:.1f} GB in {checkpoints_dir}; {free / 1e9:.1f} GB are free."
        )
    first = [file for file in files if file.name in FIRST]
    for some in (first, files):
        _fetch(repo_id, commit, some, folder, token, endpoint)
        for file in some:
            _check(folder / file.name, file)
        if convertible and some is first:
            _check_convertible(folder, repo_id)
    facts = {file.name: {"bytes": file.bytes, "sha256": file.sha256, "git_sha1": file.git_sha1} for file in files}
    content = {"repo_id": repo_id, "revision": revision, "commit": commit, "files": facts}
    write_text(folder / SOURCE, json.dumps(content, indent=2) + "\n")
    return folder


def choose_files(files: Iterable[RemoteFile], repo_id: str) -> list[RemoteFile]:
    """Choose the files that are needed: safetensors if there are any, else .bin files, and configuration and tokenizer.

    Raises:
        CheckpointError: if a name would leave the folder, or there are no weights or no configuration.
    """
    files = list(files)
    for file in files:
        path = PurePosixPath(file.name)
        if path.is_absolute() or ".." in path.parts or "\\" in file.name or "\0" in file.name:
            raise CheckpointError(
                f"{repo_id} has a file called {file.name!r}, which leaves its folder. Do not trust it."
            )
    kinds = (SAFETENSORS, PICKLES)
    found = [[file for file in files if any(fnmatch(file.name, pattern) for pattern in kind)] for kind in kinds]
    weights = found[0] or found[1]
    if not weights:
        raise CheckpointError(f"{repo_id} has no {SAFETENSORS[0]} and no {PICKLES[0]}, so no weights that can be read.")
    if not any(file.name == "config.json" for file in files):
        raise CheckpointError(f"{repo_id} has no config.json, so it is no model of transformers.")
    others = [file for file in files if any(fnmatch(file.name, pattern) for pattern in OTHERS)]
    return weights + others


def list_models(words: str = "") -> str:
    """List well-known models by family, with their sizes; family and name together hold each of `words`."""
    lines = []
    for family, models in MODELS.items():
        shown = [
            f"  {name:<58} {size:>7g} B"
            for name, size in models.items()
            if all(word in f"{family} {name}".lower() for word in words.lower().split())
        ]
        if shown:
            lines += [family, *shown]
    return "\n".join(lines)


def check_arguments(repo_id: str, token: str | None) -> None:
    """Raise UsageError for what cannot be the name of a repository, or a token."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id) or ".." in repo_id or len(repo_id) > 120:
        raise UsageError(f"--repo_id {repo_id!r} is not ORG/NAME as the hub writes it, e.g. Qwen/Qwen2.5-0.5B.")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError("--access_token has a space or a character that no token has. Copy it again.")


def _list_files(repo_id: str, revision: str, token: str | None, endpoint: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit that `revision` stands for, and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"https://huggingface.co/{repo_id}"
    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(repo_id, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise _gated(repo_id) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{repo_id} has no revision {revision!r}. {page}/commits lists them; a branch, a tag or a commit will do."
        ) from None
    except RepositoryNotFoundError:
        hint = did_you_mean(repo_id, [name for models in MODELS.values() for name in models])
        raise CheckpointError(
            f"The hub has no model {repo_id}, or does not show it without a token.{hint}\n"
            "Check the spelling (--list WORDS shows known names); a private model needs --access_token or HF_TOKEN."
        ) from None
    except HfHubHTTPError as error:
        raise _refused(error, repo_id) from None
    except Exception as error:
        raise _unreachable(error) from None
    described = info.siblings or []
    return str(info.sha), [
        RemoteFile(
            name=file.rfilename,
            bytes=file.size or 0,
            sha256=file.lfs.sha256 if file.lfs else None,
            git_sha1=None if file.lfs else file.blob_id,
        )
        for file in described
    ]


def _fetch(
    repo_id: str, commit: str, files: list[RemoteFile], folder: Path, token: str | None, endpoint: str | None
) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        snapshot_download(
            repo_id,
            revision=commit,
            local_dir=folder,
            allow_patterns=[re.sub(r"([*?[])", r"[\1]", file.name) for file in files],
            token=token,
            endpoint=endpoint,
        )
    except GatedRepoError:
        raise _gated(repo_id) from None
    except HfHubHTTPError as error:
        raise _refused(error, repo_id) from None
    except OSError as error:
        if error.errno is None and "Consistency check failed" in str(error):
            raise CheckpointError(f"{repo_id}: {str(error).partition(chr(10))[0]}\nRun the command again.") from None
        if error.errno is not None:
            raise ResourceError(f"Cannot write {folder}: {error.strerror}.") from None
        raise _unreachable(error) from None
    except Exception as error:
        raise _unreachable(error) from None


def _check(path: Path, file: RemoteFile) -> None:
    """Raise CheckpointError, and remove the file, unless it is what the hub says."""
    size = path.stat().st_size if path.is_file() else 0
    right = path.is_file() and size == file.bytes
    if right and (file.sha256 or file.git_sha1):
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with open(path, "rb") as content:
            while part := content.read(2**22):
                digest.update(part)
        right = digest.hexdigest() == (file.sha256 or file.git_sha1)
    if not right:
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} is not the file that the hub describes (its size or checksum differs); it is removed.\n"
            "Run the command again. If it happens again, the mirror or proxy between you and the hub changes files."
        )


def _check_convertible(folder: Path, repo_id: str) -> None:
    """Raise CheckpointError for a model that cannot be converted, as far as its small files say so."""
    config = read_config(read_json(folder / "config.json"), repo_id)
    for name in FIRST[1:]:
        if (folder / name).is_file():
            check_rules(shards.read_index(folder / name), config)


def _forget_other_commit(folder: Path, commit: str, names: set[str]) -> None:
    """Remove what an earlier commit had and this one has not: an old index would be read instead of the new file."""
    try:
        before: dict[str, Any] = read_json(folder / SOURCE)
    except (OSError, CheckpointError):
        return
    if before.get("commit") != commit:
        known = before.get("files")
        for name in (known.keys() if isinstance(known, dict) else set()) - names:
            if PurePosixPath(name).name == name and (folder / name).is_file():
                (folder / name).unlink()
        (folder / SOURCE).unlink()


def _gated(repo_id: str) -> CheckpointError:
    return CheckpointError(
        f"{repo_id} is given only to those who accepted its licence: https://huggingface.co/{repo_id}\n"
        "Accept it there, make a token at https://huggingface.co/settings/tokens, and give it as HF_TOKEN or "
        "--access_token."
    )


def _refused(error: Any, repo_id: str) -> CheckpointError:
    status: int = error.response.status_code
    advice = {
        401: "The token is not valid. Make one at https://huggingface.co/settings/tokens, or leave it out.",
        403: f"The token may not read {repo_id}. Give one that may, from https://huggingface.co/settings/tokens.",
        429: "Too many requests. Wait some minutes; with a token the limit is higher.",
    }
    return CheckpointError(f"The hub answers {status} for {repo_id}. {advice.get(status, 'Try again later.')}")


def _unreachable(error: Exception, kept: str = ": complete files are kept") -> ResourceError:
    reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    return ResourceError(
        f"The hub cannot be reached ({reason}).\n"
        f"Check the connection, HF_ENDPOINT and the proxy, and run the command again{kept}."
    )


def upload(folder: Path, repo_id: str, private: bool, token: str | None = None, endpoint: str | None = None) -> str:
    """Put the files of a folder into a model repository, and make the repository if it is not there.

    Args:
        private: the repository is one that only its owners see; one that is there already must be so too.
        token: an access token of the hub that may write; by default HF_TOKEN. It is kept nowhere.
        endpoint: see download.

    Returns:
        The address of the repository.

    Raises:
        UsageError: if repo_id or token cannot be one, or the repository is public and `private` is asked for.
        CheckpointError: if the hub refuses.
        ResourceError: if the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    check_arguments(repo_id, token)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UsageError(
                f"{repo_id} is there already and everybody sees it. --private false uploads to it, another --repo_id "
                "makes a private one."
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=MESSAGE)
        return f"{api.endpoint}/{repo_id}"
    except HfHubHTTPError as error:
        status: int = error.response.status_code
        writers = f"It needs a token that may write to {repo_id.split('/')[0]}: {TOKENS}"
        advice = writers if status in (401, 403, 404) else "Try again later."
        raise CheckpointError(f"The hub answers {status} for {repo_id}. {advice}") from None
    except (UsageError, CheckpointError):
        raise
    except Exception as error:
        raise _unreachable(error, kept="") from None
