"""Damaged and unfitting checkpoints: each is refused with one message that names the place and the fault."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import WEIGHTS, load_model
from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import FILE_NAME
from lit_qlora.model.gpt import GPT
from tests.conftest import tiny_model, write_checkpoint

QUERY, UP = "blocks.0.attn.query.weight", "blocks.1.mlp.up.weight"
Weights = dict[str, Tensor]


@pytest.fixture
def directory(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "org" / "model"))


def refusal(directory: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory, **options)  # type: ignore[arg-type]
    assert caught.value.status == 4
    return str(caught.value)


def change(directory: Path, change_weights: Callable[[Weights], object]) -> None:
    weights = load_file(directory / WEIGHTS)
    change_weights(weights)
    save_file(weights, directory / WEIGHTS)


def damage(directory: Path, change_bytes: Callable[[bytes], bytes]) -> None:
    (directory / WEIGHTS).write_bytes(change_bytes((directory / WEIGHTS).read_bytes()))


def test_an_undamaged_checkpoint_is_loaded(directory: Path) -> None:
    assert isinstance(load_model(directory), GPT)


@pytest.mark.parametrize(
    ("change_weights", "complaint"),
    [
        (lambda weights: weights.pop(QUERY), f"{QUERY} is missing"),
        (lambda weights: weights.update(extra=torch.zeros(2)), "extra is not part of this model"),
        (lambda weights: weights.update({UP: torch.zeros(128, 63)}), f"{UP} has shape (128, 63), expected (128, 64)"),
        (lambda weights: weights.update({UP: torch.zeros(64)}), f"{UP} has shape (64,), expected (128, 64)"),
        (
            lambda weights: weights.update({UP: torch.zeros(128, 64, dtype=torch.int8)}),
            f"{UP} is of type torch.int8, which is no weight",
        ),
    ],
    ids=["missing", "extra", "mis-shaped", "flat", "int8"],
)
@pytest.mark.parametrize("quantize", ["none", "bnb.nf4"])
def test_weights_that_do_not_fit_are_named_quantised_or_not(
    directory: Path, change_weights: Callable[[Weights], object], complaint: str, quantize: str
) -> None:
    change(directory, change_weights)
    message = refusal(directory, quantize=quantize)
    assert message.splitlines() == [
        f"{directory / WEIGHTS} does not hold the weights that its configuration describes:",
        f"  {complaint}",
    ]


def test_many_faults_are_ten_lines_and_a_count(directory: Path) -> None:
    change(directory, lambda weights: [weights.pop(name) for name in list(weights) if "blocks.0" in name])
    change(directory, lambda weights: [weights.update({f"extra.{i}": torch.zeros(1)}) for i in range(8)])
    lines = refusal(directory).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  ... and 7 more"


def test_a_type_that_torch_code_here_does_not_know_is_named(directory: Path) -> None:
    change(directory, lambda weights: weights.update({UP: torch.zeros(128, 64).to(torch.complex64)}))
    assert f"{directory / WEIGHTS} holds tensors of type C64" in refusal(directory)


@pytest.mark.parametrize(
    "change_bytes",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: (2**60).to_bytes(8, "little") + content[8:],
        lambda content: content[:8] + b"x" + content[9:],
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
    ids=["empty", "5 bytes", "100 bytes", "a byte short", "longer", "huge header", "not JSON", "a pointer of git lfs"],
)
def test_a_damaged_file_is_named(directory: Path, change_bytes: Callable[[bytes], bytes]) -> None:
    damage(directory, change_bytes)
    assert refusal(directory).startswith(f"{directory / WEIGHTS} is not a complete safetensors file: ")


def test_a_pickle_under_the_name_of_safetensors_is_not_opened_as_one(directory: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "marker",)

    damage(directory, lambda content: pickle.dumps(Trap()))
    assert "is not a complete safetensors file" in refusal(directory)
    assert not (tmp_path / "marker").exists()


def test_a_tied_head_needs_no_weights_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_model(tied_head=True))
    assert "head.weight" not in load_file(tmp_path / WEIGHTS)
    model = load_model(tmp_path)
    assert model.head.weight is model.embed.weight


def test_a_directory_that_does_not_exist_is_answered_with_the_nearest(directory: Path) -> None:
    assert (
        refusal(directory.with_name("modle")) == f"{directory.with_name('modle')} does not exist. Did you mean model?"
    )


def test_without_a_near_name_the_checkpoints_that_there_are_are_listed(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(directory, tmp_path / "checkpoints" / "org" / "model")
    monkeypatch.chdir(tmp_path)
    for absent in (Path("elsewhere/x"), tmp_path / "checkpoints" / "org"):
        assert refusal(absent).splitlines()[1] == "Checkpoints here: checkpoints/org/model"


def test_a_model_of_the_hub_is_answered_with_the_command_that_downloads_it(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for absent in ("meta-llama/Llama-2-7b-hf", "checkpoints/meta-llama/Llama-2-7b-hf"):
        assert "python scripts/download.py --repo_id meta-llama/Llama-2-7b-hf" in refusal(Path(absent))
    assert "download" not in refusal(tmp_path / "a/b")
    shutil.copytree(directory, tmp_path / "checkpoints/acme/mini")
    assert refusal(Path("acme/mini")) == "acme/mini does not exist. Did you mean checkpoints/acme/mini?"


def test_a_hugging_face_folder_is_answered_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "holds a Hugging Face model that is not converted yet" in message
    assert f"scripts/convert_hf_checkpoint.py --checkpoint_dir {tmp_path}" in message


def test_a_checkpoint_without_weights_or_configuration_is_answered_with_what_is_absent(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    assert refusal(directory).startswith(f"{directory} has no {WEIGHTS}.")
    (directory / FILE_NAME).unlink()
    assert refusal(directory).startswith(f"{directory} has no {FILE_NAME}, so it is not a checkpoint.")


def test_a_message_shows_a_long_value_by_its_beginning_and_end() -> None:
    message = str(CheckpointError(f"config.json: {'x' * 10_000} is no number.\nMend it."))
    assert message.startswith("config.json: xxx")
    assert message.endswith("x is no number.\nMend it.")
    assert len(message) < 1600
    assert str(CheckpointError("y" * 2000)) == "y" * 2000
