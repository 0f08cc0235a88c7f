"""Samples that a file names are left out of training; a name without effect is an error."""

from pathlib import Path

import pytest

from lit_qlora.data.exclude import hash_of, leave_out, read_hashes
from lit_qlora.data.samples import Sample, Samples
from lit_qlora.errors import DataError

SAMPLES = Samples.of([Sample.of([number, 7, 8], 1) for number in range(4)])
HASHES = [hash_of(SAMPLES[number]) for number in range(4)]


def test_named_samples_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text(f"# comment\n\n{HASHES[1]}  repeats another\n{HASHES[3]}\n")
    assert set(read_hashes(path)) == {HASHES[1], HASHES[3]}
    assert leave_out(path, [HASHES], [[0, 1, 2]]) == [[0, 2]]  # 3 is a validation sample


def test_the_first_of_equal_samples_stays_unless_it_is_named_for_something_else(tmp_path: Path) -> None:
    path, own = tmp_path / "exclude.txt", [[HASHES[1], HASHES[2], HASHES[1]], [HASHES[1], HASHES[0]]]
    path.write_text(f"{HASHES[1]}  repeats {HASHES[1]}: a -> b\n{HASHES[0]}  repeats {HASHES[2]}: a -> b\n")
    assert leave_out(path, own, [[0, 1, 2], [0, 1]]) == [[0, 1], []]
    assert leave_out(path, own, [[1, 2], [0, 1]]) == [[1, 2], []]  # the first in training
    path.write_text(path.read_text() + f"{HASHES[1]}  not learnt: a -> b\n")
    assert leave_out(path, own, [[0, 1, 2], [0, 1]]) == [[1], []]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0123456789abcdef", "1 of 1 samples are not in the training data"),
        ("nonsense", "exclude.txt:1: the line must begin with the hash"),
        ("\n".join(HASHES), "leaves no sample"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "exclude.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        leave_out(tmp_path / "exclude.txt", [HASHES], [[0, 1, 2, 3]])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt"):
        read_hashes(tmp_path / "gone.txt")
