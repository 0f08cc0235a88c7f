"""The data of a run, whatever it learns from."""

from dataclasses import replace

from lit_qlora.data.load import RunData, read_data
from lit_qlora.data.preferences import read_preferences
from lit_qlora.data.prepared import choose_data
from lit_qlora.data.scoring import read_scored
from lit_qlora.settings import FinetuneConfig, PreferenceRunConfig


def read_of_run(config: FinetuneConfig) -> RunData:
    """Read samples, texts with labels, or comparisons, as the settings say.

    Raises:
        UsageError, DataError, CheckpointError: for everything that can be known before a weight is loaded.
    """
    config = replace(config, data=choose_data(config.data, config.checkpoint_dir))
    if isinstance(config, PreferenceRunConfig):
        return read_preferences(config, config.preference)
    return read_data(config) if config.head == "none" else read_scored(config)
