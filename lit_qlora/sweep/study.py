"""A search by Optuna: draws that are chosen from what the draws before them came to.

OUT/study.json holds the draws alone. What they came to is read from their run folders. A sampler begins anew with each
choice, so a search that was stopped goes on as if nothing had happened.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_qlora.errors import UsageError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.settings import SweepPart, check
from lit_qlora.sweep.trials import Changes, key_of, range_of, rounded

STUDY = "study.json"
ASKS = 20
"""Times that Optuna is asked for a draw that it has not chosen before; one of few values may be the last."""


def choose_draws(part: SweepPart, told: Sequence[tuple[Changes, float]], count: int) -> list[Changes]:
    """Let Optuna's TPE sampler choose the next draws of sweep.random, the same ones for the same past.

    Args:
        told: the earlier draws with what they came to, the smaller the better; infinite for draws that failed.
        count: how many to choose at once.

    Raises:
        UsageError: if Optuna is not installed, or a space is not one.
    """
    optuna = import_optuna()
    spaces = {name: distribution(optuna, name, space) for name, space in part.random.items()}
    seed = random.Random(f"{part.draw_seed}/{len(told)}").getrandbits(32)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    states = optuna.trial.TrialState
    for changes, value in told:
        failed = not math.isfinite(value)
        study.add_trial(
            optuna.trial.create_trial(
                params={name: encoded(part.random[name], changes[name]) for name in spaces},
                distributions=spaces,
                value=None if failed else value,
                state=states.FAIL if failed else states.COMPLETE,
            )
        )
    chosen: list[Changes] = []
    taken = [changes for changes, _ in told]
    for _ in range(count):
        for _ in range(ASKS):
            params = study.ask(spaces).params
            draw = {name: decoded(part.random[name], params[name]) for name in spaces}
            if draw not in taken:
                break
        taken.append(draw)
        chosen.append(draw)
    return chosen


def import_optuna() -> ModuleType:
    """Import Optuna, and keep it from reporting each step.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UsageError(
            f'sweep.search optuna: {error.name} is not installed. pip install "lit_qlora[optuna]" installs it.'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    module: ModuleType = optuna
    return module


def distribution(optuna: ModuleType, name: str, space: Any) -> Any:
    """Translate a list or a range of sweep.random; the values of a list become texts, as Optuna wants them."""
    if is_list(space) and space:
        return optuna.distributions.CategoricalDistribution(tuple(dict.fromkeys(map(key_of, space))))
    kind, low, high = range_of(name, space)
    if kind == "integer":
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=kind == "log")


def is_list(space: Any) -> bool:
    """Tell if a space of sweep.random is a list of values, not a range."""
    return not isinstance(space, Mapping)


def encoded(space: Any, value: Any) -> Any:
    """Write the value of a setting as Optuna knows it."""
    return key_of(value) if is_list(space) else value


def decoded(space: Any, value: Any) -> Any:
    """Turn Optuna's value into that of the setting, with digits that a command line can hold."""
    if is_list(space):
        return json.loads(value)
    ((kind, (low, high)),) = space.items()
    return value if kind == "integer" else min(max(rounded(value), low), high)


def read_draws(out_dir: Path, part: SweepPart) -> list[Changes]:
    """Read the draws that earlier calls have chosen.

    Raises:
        UsageError: if the file is damaged, or the draws came from other spaces or another seed.
    """
    path = out_dir / STUDY
    if not path.is_file():
        return []
    facts = read_json(path, UsageError)
    draws = facts.get("draws")
    whole = isinstance(draws, list) and all(isinstance(one, dict) and one.keys() == set(part.random) for one in draws)
    same = key_of(facts.get("space")) == key_of(part.random) and facts.get("draw_seed") == part.draw_seed
    check(same, f"{path} has draws from another sweep.random or sweep.draw_seed. Take another --out_dir.")
    check(whole, f"{path} is damaged. Take another --out_dir.")
    return draws or []


def write_draws(out_dir: Path, part: SweepPart, draws: Sequence[Changes]) -> None:
    """Write the draws that were chosen so far."""
    facts = {"space": part.random, "draw_seed": part.draw_seed, "draws": list(draws)}
    write_text(out_dir / STUDY, json.dumps(facts, indent=1) + "\n")
