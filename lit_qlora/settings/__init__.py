"""The settings: one frozen dataclass per concern, checked on creation.

The docstring under a field is its text in --help. Nothing here imports torch, so that --help and a mistyped flag
are answered at once.
"""

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.data import DataConfig, Finding, Overlong, PromptKnobs
from lit_qlora.settings.distill import DistillConfig
from lit_qlora.settings.eval import EvalConfig
from lit_qlora.settings.generation import GenerationConfig
from lit_qlora.settings.guard import GuardConfig
from lit_qlora.settings.limits import is_pattern
from lit_qlora.settings.log import TRACKERS, LogConfig, Tracker
from lit_qlora.settings.lora import TARGETS, LoRAConfig, Target, first_match
from lit_qlora.settings.optimizer import CLASS_PATH, OPTIMIZERS, OptimizerConfig
from lit_qlora.settings.preference import PUBLISHED, PreferenceConfig, PreferenceLoss, PreferenceRunConfig
from lit_qlora.settings.prepare import PrepareConfig
from lit_qlora.settings.quantization import Budget, Quantization, check_budget
from lit_qlora.settings.run import (
    DEMO_CHECKPOINT,
    FinetuneConfig,
    Precision,
    Strategy,
    why_not_in_parts,
    why_not_sharded,
)
from lit_qlora.settings.schemes import SCHEMES, Scheme
from lit_qlora.settings.sweep import AnySweep, PreferenceSweepConfig, SweepConfig, SweepPart, is_of_preferences
from lit_qlora.settings.train import Recompute, Schedule, TrainConfig

__all__ = [
    "CLASS_PATH",
    "DEMO_CHECKPOINT",
    "OPTIMIZERS",
    "PUBLISHED",
    "SCHEMES",
    "TARGETS",
    "TRACKERS",
    "AnySweep",
    "Budget",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "Finding",
    "FinetuneConfig",
    "GenerationConfig",
    "GuardConfig",
    "LoRAConfig",
    "LogConfig",
    "OptimizerConfig",
    "Overlong",
    "Precision",
    "PreferenceConfig",
    "PreferenceLoss",
    "PreferenceRunConfig",
    "PreferenceSweepConfig",
    "PrepareConfig",
    "PromptKnobs",
    "Quantization",
    "Recompute",
    "Schedule",
    "Scheme",
    "Settings",
    "Strategy",
    "SweepConfig",
    "SweepPart",
    "Target",
    "Tracker",
    "TrainConfig",
    "check",
    "check_budget",
    "first_match",
    "is_of_preferences",
    "is_pattern",
    "why_not_in_parts",
    "why_not_sharded",
]
