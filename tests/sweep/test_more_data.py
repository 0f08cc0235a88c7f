"""Runs on nested parts of the data tell what twice the data would give, and how sure that is."""

import json
from pathlib import Path

import pytest
import torch

from lit_qlora import cli
from lit_qlora.data.comparisons import Comparisons
from lit_qlora.data.exclude import hash_of
from lit_qlora.data.of_run import read_of_run
from lit_qlora.errors import UsageError
from lit_qlora.settings import AnySweep, FinetuneConfig, PreferenceRunConfig, PreferenceSweepConfig, SweepConfig
from lit_qlora.sweep.conduct import sweep, with_halves
from lit_qlora.sweep.more_data import Forecast, fit
from tests.sweep.conftest import Configure

SIZES = [100, 200, 400, 800]
LABELLED = [3, 5] * 100
MOST, LEAST = "--data.max_samples=8", "--data.max_samples=4"


def losses(a: float, b: float, noise: float) -> Forecast:
    """A fit to losses 0.5 + a n^-b of two repetitions, with noise in each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor(LABELLED, dtype=torch.float64)
    hard = torch.randn(len(tokens), generator=generator, dtype=torch.float64)

    def run(size: int) -> torch.Tensor:
        drawn = torch.randn(2, len(tokens), generator=generator, dtype=torch.float64)
        return (0.5 + a * size**-b + 0.2 * hard + noise * drawn) * tokens

    return fit(SIZES, [run(size) for size in SIZES], LABELLED)


def test_a_power_law_is_found_and_its_forecast_lies_in_a_narrow_interval() -> None:
    found = losses(a=3.0, b=0.6, noise=0.01)
    expected = 3.0 * (1600**-0.6 - 800**-0.6)
    change, low, high = found.gain
    assert low < expected < high < 0
    assert change == pytest.approx(expected, rel=0.1)
    assert found.describe().startswith("More data of this kind would help: twice the 800 samples")
    middle, low, high = found.band(400)
    assert low < found.losses[2] < high
    assert middle == pytest.approx(found.losses[2], abs=0.002)


def test_losses_that_do_not_fall_promise_nothing() -> None:
    assert losses(a=0.0, b=1.0, noise=0.05).describe().startswith("More data of this kind would change little")


def test_halves_are_nested_parts_of_the_training_samples(configure: Configure) -> None:
    config = with_halves(configure("--sweep.data_halvings=2"))
    assert config.sweep.grid["data.max_samples"] == (8, 16, 32)
    assert with_halves(config) is config
    with pytest.raises(UsageError, match=r"data_halvings 9: there are 32 training samples"):
        with_halves(configure("--sweep.data_halvings=9"))
    with pytest.raises(UsageError, match=r"sweep\.data_halvings chooses data\.max_samples"):
        configure("--sweep.data_halvings=1", "--sweep.grid={data.max_samples: [3]}")


@pytest.mark.parametrize("learns", ["to write", "labels", "pairs"])
def test_samples_that_are_left_out_are_none_of_a_part(learns: str, flags: list[str], tmp_path: Path) -> None:
    own = [flag for flag in flags if not flag.startswith(("--data.prompt", "--data.cache_dir"))]
    kind, given = {
        "to write": (FinetuneConfig, flags),
        "labels": (FinetuneConfig, [*own, "--head=classify"]),
        "pairs": (PreferenceRunConfig, flags),
    }[learns]
    rows = {
        "to write": [{"instruction": f"{n}?", "output": f"{n}"} for n in range(20)],
        "labels": [{"text": f"{n}", "label": "ab"[n % 2]} for n in range(20)],
        "pairs": [{"prompt": f"{n}?", "chosen": "1", "rejected": "2"} for n in range(20)],
    }[learns]
    given = [*given, written(tmp_path / "a.jsonl", rows)]

    def trained(*changes: str) -> list[str]:
        train = read_of_run(cli.parse(kind, [*given, *changes])).train
        each = [train[n].answers if isinstance(train, Comparisons) else [train[n]] for n in range(len(train))]
        return [hash_of(*samples) for samples in each]

    every = trained()
    path = tmp_path / "exclude.txt"
    path.write_text("\n".join(every[:6]))
    left, some, fewer = (trained(f"--data.exclude={path}", *more) for more in ([], [MOST], [LEAST]))
    assert (len(left), len(some), len(fewer)) == (len(every) - 6, 8, 4)
    assert set(fewer) < set(some) < set(left)


@pytest.mark.slow
def test_the_page_of_a_sweep_over_halves_answers(configure: Configure) -> None:
    out = sweep(configure("--sweep.data_halvings=2"))
    assert "## Would more data help?" in (out / "sweep.md").read_text()
    assert "twice the 32 samples" in (out / "sweep.html").read_text()
    assert (out / "more_data.png").stat().st_size > 0


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--data.path={path}"


def test_comparisons_and_texts_with_labels_are_halved_too(
    configure: Configure, flags: list[str], tmp_path: Path
) -> None:
    texts = written(tmp_path / "a.jsonl", [{"text": f"{n}", "label": "ab"[n % 2]} for n in range(20)])
    own = [flag for flag in flags if not flag.startswith(("--data.prompt", "--data.cache_dir"))]
    of_labels = cli.parse(SweepConfig, [*own, texts, "--head=classify", "--sweep.data_halvings=2"])
    assert with_halves(of_labels).sweep.grid["data.max_samples"] == (4, 8, 16)
    pairs = written(tmp_path / "b.jsonl", [{"prompt": f"{n}?", "chosen": "1", "rejected": "2"} for n in range(20)])
    of_pairs = cli.parse(PreferenceSweepConfig, [*flags, pairs, "--sweep.data_halvings=2"])
    assert with_halves(of_pairs).sweep.grid["data.max_samples"] == (4, 8, 16)
    single = cli.parse(PreferenceSweepConfig, [*flags, pairs, "--sweep.data_halvings=2", "--preference.loss=kto"])
    with pytest.raises(UsageError, match="By the loss kto an answer has none of its own"):
        with_halves(single)
    with pytest.raises(UsageError, match=r"eval\.train_samples .* By the loss kto an answer has none of its own"):
        cli.parse(PreferenceSweepConfig, [*flags, "--preference.loss=kto", "--eval.train_samples=3"])


@pytest.mark.slow
@pytest.mark.parametrize("learns", ["pairs", "labels"])
def test_the_page_of_a_sweep_over_halves_answers_for_them_too(
    learns: str, flags: list[str], tmp_path: Path, no_pages: None
) -> None:
    if learns == "pairs":
        rows = [{"prompt": f"{n}?", "chosen": f"{n}", "rejected": f"It is {n}."} for n in range(40)]
        settings: AnySweep = cli.parse(
            PreferenceSweepConfig, [*flags, written(tmp_path / "a.jsonl", rows), "--sweep.data_halvings=2"]
        )
    else:
        rows = [{"text": f"{'QA'[n % 2]}: {n}", "label": "ab"[n % 2]} for n in range(40)]
        own = [flag for flag in flags if not flag.startswith(("--data.prompt", "--data.cache_dir"))]
        own += [written(tmp_path / "a.jsonl", rows), "--head=classify", "--sweep.data_halvings=2"]
        settings = cli.parse(SweepConfig, own)
    out = sweep(settings)
    assert "twice the 32 samples" in (out / "sweep.md").read_text()
