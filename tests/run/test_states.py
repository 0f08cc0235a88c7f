"""The state of a run lies beside its adapter, and neither is taken for another's."""

import shutil
from pathlib import Path

import pytest

from lit_qlora.errors import CheckpointError
from lit_qlora.files.hashing import hash_file
from lit_qlora.files.manifest import read_manifest, save_directory
from lit_qlora.run.resume import newest
from lit_qlora.run.states import adapter_of, beside, find, read, remove_alone, saved, step_of


def save_pair(adapter: Path, step: int) -> Path:
    """Save a checkpoint after so many steps; returns the adapter."""
    counters = f'{{"format": 1, "step": {step}, "of": "{adapter.name}"}}'
    with saved(adapter, {"state.json": lambda path: path.write_text(counters)}) as state:
        save_directory(adapter, {}, {"step": step, "state": state})
    return adapter


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_adapter_and_its_state_are_read_together(tmp_path: Path) -> None:
    adapter = save_pair(tmp_path / "step-000004", 4)
    state, counters = read(adapter)
    assert (state, counters["step"], step_of(adapter)) == (beside(adapter), 4, 4)
    assert adapter_of(state) == adapter_of(adapter) == adapter
    assert names(adapter) == ["manifest.json"]


def test_a_link_to_an_adapter_has_its_state(tmp_path: Path) -> None:
    adapter = save_pair(tmp_path / "step-000004", 4)
    (tmp_path / "best").symlink_to("step-000004")
    assert find(tmp_path / "best") == beside(adapter)


@pytest.mark.parametrize("renamed", ["step-000004", "step-000004.state"])
def test_a_renamed_one_is_found_by_its_hash(tmp_path: Path, renamed: str) -> None:
    adapter = save_pair(tmp_path / "step-000004", 4)
    save_pair(tmp_path / "step-000005", 5)
    new = (tmp_path / renamed).rename(tmp_path / f"mine{Path(renamed).suffix}")
    state = new if new.suffix else beside(adapter)
    assert read(adapter if new.suffix else new)[0] == state


def test_the_state_of_an_adapter_that_was_renamed_stays_with_it_when_its_name_is_used_again(tmp_path: Path) -> None:
    mine = save_pair(tmp_path / "step-000004", 4).rename(tmp_path / "mine")
    remove_alone(tmp_path)
    save_pair(tmp_path / "step-000004", 4)
    assert names(tmp_path) == ["mine", "mine.state", "step-000004", "step-000004.state"]
    assert read(mine)[0] == tmp_path / "mine.state"


def test_the_state_of_a_copy_is_found_when_the_first_is_replaced(tmp_path: Path) -> None:
    final = save_pair(tmp_path / "final", 8)
    copy = shutil.copytree(final, tmp_path / "step-000008")
    save_pair(final, 11)
    assert read(copy) == (beside(copy), {"format": 1, "step": 8, "of": "final"})
    assert read(final)[1]["step"] == 11


def test_only_a_state_that_no_adapter_names_is_removed(tmp_path: Path) -> None:
    for step in (4, 5, 6):
        save_pair(tmp_path / f"step-{step:06d}", step)
    save_pair(tmp_path / "final", 7)
    shutil.rmtree(tmp_path / "step-000004")  # as when a program is killed while it removes a checkpoint
    shutil.rmtree(tmp_path / "final")
    (tmp_path / "step-000005").rename(tmp_path / "aside-step-000005.1")
    (tmp_path / "step-000006/manifest.json").write_text('{"state": ["not", "a", "hash"]}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/manifest.json").write_text("")
    with saved(tmp_path / "mine", {}):  # no name of ours
        pass
    (tmp_path / "step-000001.state").mkdir()  # nothing of ours
    kept = ["aside-step-000005.1", "damaged", "mine.state", "step-000001.state"]
    remove_alone(tmp_path)
    assert names(tmp_path) == [*kept, "step-000005.state", "step-000006", "step-000006.state"]


def test_the_state_of_an_adapter_that_cannot_be_saved_is_removed_and_the_one_before_stays(tmp_path: Path) -> None:
    final = save_pair(tmp_path / "final", 8)
    copy = shutil.copytree(final, tmp_path / "step-000008")
    for adapter in (tmp_path / "step-000011", final):
        with pytest.raises(OSError, match="full"), saved(adapter, {}):
            raise OSError("full")
    assert names(tmp_path) == ["final", "step-000008", "step-000008.state"]
    assert read(final) == read(copy)


def test_a_state_in_the_folder_of_its_adapter_is_read_as_earlier_versions_wrote_it(tmp_path: Path) -> None:
    counters = '{"format": 1, "step": 4}'
    old = tmp_path / "final.state"  # whatever it is called
    save_directory(old, {"state.json": lambda path: path.write_text(counters), "adapter_config.json": Path.touch}, {})
    assert read(old) == (old, {"format": 1, "step": 4})
    assert step_of(old) == 4
    assert adapter_of(old) == old


def test_an_adapter_without_its_state_or_with_a_damaged_one_is_named(tmp_path: Path) -> None:
    adapter, other = save_pair(tmp_path / "step-000004", 4), save_pair(tmp_path / "step-000005", 5)
    (beside(adapter) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-000004\.state/state\.json is damaged"):
        read(adapter)
    shutil.rmtree(beside(adapter))
    with pytest.raises(CheckpointError, match=r"step-000004 is an adapter alone: .*step-000004\.state, is not beside"):
        read(adapter)
    shutil.copytree(beside(other), beside(adapter))
    with pytest.raises(CheckpointError, match=r"step-000004\.state, is another's"):
        read(adapter)
    assert read_manifest(adapter)
    assert hash_file(beside(adapter) / "manifest.json") == read_manifest(other)["state"]


def test_a_run_whose_states_are_gone_says_how_to_begin_another_from_its_adapter(tmp_path: Path) -> None:
    for step in (4, 5):
        shutil.rmtree(beside(save_pair(tmp_path / f"step-{step:06d}", step)))
    with pytest.raises(CheckpointError, match=r"step-000004\.state, is not(.|\n)*--lora\.start \S+step-000005 begins"):
        newest(tmp_path)


def test_a_link_in_the_place_of_a_state_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "final.state").symlink_to("mine")
    remove_alone(tmp_path)
    save_pair(tmp_path / "final", 1)
    assert names(tmp_path / "mine") == []
    assert read(tmp_path / "final")[0] == tmp_path / "final.state"


def test_a_file_in_the_place_of_a_state_gets_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        (tmp_path / "final.state").write_text("precious")
        save_pair(tmp_path / "final", number)
        aside = tmp_path / f"aside-final.state.{number}"
        assert aside.read_text() == "precious"
        assert f"final.state was a file, and is now {aside}" in capsys.readouterr().err
        assert read(tmp_path / "final")[1]["step"] == number
        shutil.rmtree(tmp_path / "final.state")


def test_a_state_alone_names_its_adapter_and_finds_a_renamed_one(tmp_path: Path) -> None:
    state = beside(save_pair(tmp_path / "foo", 4))
    (tmp_path / "foo").rename(tmp_path / "mine")
    assert adapter_of(state) == tmp_path / "mine"
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"foo\.state is the state of the adapter foo, which is not beside it"):
        adapter_of(state)
