"""Good files of each kind, made once."""

from collections.abc import Mapping

import pytest

from tests.fuzz.targets import Target, make_targets


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Target]:
    """Files that commands read, by the names of their kinds."""
    return make_targets(tmp_path_factory.mktemp("targets"))
