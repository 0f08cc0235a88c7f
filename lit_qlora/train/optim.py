"""Optimizers as a table of classes; learning rates as pure functions of the step."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.device import on_default_stream
from lit_qlora.errors import UsageError
from lit_qlora.quantize import bitsandbytes
from lit_qlora.settings import OPTIMIZERS, OptimizerConfig, TrainConfig, first_match
from lit_qlora.train.flat import BLOCK, flattened

FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Classes with a single CUDA kernel for the whole update, of each element by itself."""
BY_ELEMENT = re.compile(r"(Paged)?(Adam|AdamW|Lion)(8bit|32bit)?")
"""Classes of bitsandbytes that update each element, or each block of 256, by itself."""
Flatten = Callable[[Callable[[nn.Parameter], Any]], Sequence[nn.Parameter]]
"""Returns tensors that hold several parameters each, see train.flat, all of one group, which its argument tells."""


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    train: TrainConfig,
    *,
    scaled: bool = False,
    flatten: Flatten | None = None,
) -> torch.optim.Optimizer:
    """Make the optimizer that the settings name.

    A group of its parameters may have a "factor", by which its learning rate is multiplied.

    Args:
        parameters: with their names; frozen ones are skipped.
        scaled: True if the gradients come through a GradScaler. A fused optimizer would remove the scale itself, after
            Fabric has clipped the gradients.
        flatten: called only if the optimizer updates elements independently. From then on the tensors that it returns
            must have the gradients.

    Raises:
        UsageError: for a class that does not exist, or a setting that the class does not have.
    """
    learners = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    _check_rates(config, [name.rpartition(".")[0] for name, _ in learners])
    cuda = learners[0][1].is_cuda
    kind: Any = _find_class(OPTIMIZERS.get(config.name, config.name), cuda)
    arguments = _arguments(kind, config, train)
    if cuda and kind in FUSED and not scaled:
        arguments["fused"] = True
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    keys: dict[int, tuple[float, bool]] = {}
    for name, parameter in learners:
        factor, decays = keys[id(parameter)] = _group_of(name, parameter, config)
        group = {"params": [], "factor": factor, **({} if decays or not train.weight_decay else {"weight_decay": 0.0})}
        groups.setdefault((factor, decays), group)["params"].append(parameter)
    takes_any = flatten and _takes_any_tensor(kind, arguments, [parameter for _, parameter in learners])
    kind = _in_order(kind)
    if flatten and takes_any and (flat := flatten(lambda parameter: keys[id(parameter)])):
        return flattened(kind, list(groups.values()), flat, lr=train.learning_rate, **arguments)
    return kind(list(groups.values()), lr=train.learning_rate, **arguments)


def _in_order(kind: Any) -> Any:
    """The class, but of bitsandbytes' a subclass whose steps are in the order of the current stream and wait for none.

    bitsandbytes 0.50 waits for the device after each parameter for the sake of paged state, also where none is paged.
    Then the device idles until the host has launched the next update, hundreds of times a step.
    """
    if not kind.__module__.startswith("bitsandbytes"):
        return kind
    waits = kind.step.__qualname__ == "Optimizer8bit.step"

    class InOrder(kind):
        """See above."""

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """See Optimizer."""
            with on_default_stream():
                if not waits or self.is_paged or closure or not self.initialized:
                    return super().step(closure)
                for i, group in enumerate(self.param_groups):
                    for j, parameter in enumerate(group["params"]):
                        if parameter.grad is not None:
                            if not self.state[parameter]:
                                self.init_state(group, parameter, i, j)
                            self.update_step(group, parameter, i, j)
            return None

    return InOrder


def _group_of(name: str, parameter: nn.Parameter, config: OptimizerConfig) -> tuple[float, bool]:
    """The factor of a parameter's learning rate, and True if its weights decay."""
    factor = config.lora_plus if name.endswith(".lora_b") else 1.0
    return factor * first_match(config.rate_pattern, name.rpartition(".")[0], 1.0), parameter.ndim > 1


def in_groups(learners: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[str]:
    """The names of trained parameters in the order in which the state of make_optimizer's optimizer has them."""
    groups: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in learners:
        groups.setdefault(_group_of(name, parameter, config), []).append(name)
    return [name for group in groups.values() for name in group]


def _takes_any_tensor(kind: Any, arguments: dict[str, Any], parameters: Sequence[nn.Parameter]) -> bool:
    """Tell whether the optimizer does the same with parameters that lie in one tensor as with each by itself."""
    if kind in FUSED:
        return True
    independent = kind.__module__.startswith("bitsandbytes") and BY_ELEMENT.fullmatch(kind.__name__)
    coupled = {"percentile_clipping", "max_unorm", "block_wise", "args", "optim_bits", "min_8bit_size"}
    whole_blocks = all(parameter.numel() % BLOCK == 0 for parameter in parameters)
    return bool(independent) and not coupled.intersection(arguments) and (whole_blocks or "8bit" not in kind.__name__)


def _check_rates(config: OptimizerConfig, layers: Sequence[str]) -> None:
    """Raise UsageError for a pattern of other learning rates that matches no layer."""
    for pattern in config.rate_pattern:
        if not any(first_match({pattern: 1.0}, layer, 0.0) for layer in layers):
            raise UsageError(f"optimizer.rate_pattern: {pattern} matches no trained layer, so it would have no effect.")


def _find_class(path: str, cuda: bool) -> type[torch.optim.Optimizer]:
    module, _, name = path.rpartition(".")
    home: ModuleType = torch.optim if module == "torch.optim" else bitsandbytes().optim
    if not cuda and module == "bitsandbytes.optim":
        name = name.removeprefix("Paged")  # bitsandbytes warns that paged state is in host memory there
    kind = getattr(home, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer):
        raise UsageError(f"optimizer.name: there is no optimizer {path} in the installed version.")
    return kind


def _arguments(kind: type[torch.optim.Optimizer], config: OptimizerConfig, train: TrainConfig) -> dict[str, Any]:
    """Collect the settings that were given, as arguments of the class."""
    arguments: dict[str, Any] = {**config.options}
    for name in ("betas", "eps", "momentum"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    if config.nesterov:
        arguments["nesterov"] = True
    if kind is torch.optim.SGD:
        arguments.setdefault("momentum", 0.9)
    has = inspect.signature(kind).parameters
    if "weight_decay" in has or train.weight_decay:
        arguments["weight_decay"] = train.weight_decay
    if unknown := sorted(set(arguments) - set(has)):
        homes = {"weight_decay": "train.", **dict.fromkeys(config.options, "optimizer.options: ")}
        names = ", ".join(f"{homes.get(name, 'optimizer.')}{name}" for name in unknown)
        advice = "Set --train.weight_decay 0." if unknown == ["weight_decay"] else "Leave it out."
        raise UsageError(f"{names} would have no effect: {config.name} has no such setting.\n{advice}")
    return arguments


def measure_state_bytes(
    config: OptimizerConfig, train: TrainConfig, device: torch.device, vectors: bool = False
) -> float:
    """Take two steps on a small adapter, so that an optimizer that fails is refused before weights are loaded.

    Args:
        vectors: True if the adapter has vectors too, such as DoRA's magnitudes.

    Returns:
        Bytes of state for each parameter.

    Raises:
        UsageError: with the optimizer's own message.
    """
    shapes = {"layer.lora_a": (16, 4096), "layer.lora_b": (4096, 16), **({"layer.magnitude": (64,)} if vectors else {})}
    adapter = [(name, nn.Parameter(torch.full(shape, 0.01, device=device))) for name, shape in shapes.items()]
    try:
        optimizer = make_optimizer(adapter, replace(config, rate_pattern={}), train)
        for _ in range(2):
            for _, parameter in adapter:
                parameter.grad = torch.full_like(parameter, 0.01)
            optimizer.step()
    except UsageError:
        raise
    except Exception as error:  # a class of another library may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"optimizer.name: {config.name} with these settings fails on its first steps ({device.type}).\n"
            f"{type(error).__name__}: {reason}\nThese work: {', '.join(OPTIMIZERS)}."
        ) from None
    return count_state_bytes(optimizer) / sum(parameter.numel() for _, parameter in adapter)


def repage(optimizer: torch.optim.Optimizer) -> None:
    """Page the state of a paged optimizer again, which load_state_dict of bitsandbytes 0.50 forgets."""
    other: Any = optimizer
    if not getattr(other, "is_paged", False):
        return
    for parameter, state in other.state.items():
        for name in {"state1", "state2"}.intersection(state):
            buffer = other.get_state_buffer(parameter, dtype=state[name].dtype)
            buffer.copy_(state[name])
            state[name] = buffer


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of the optimizer's state; a tensor that several parameters share counts once."""
    tensors = {id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def progress(step: int, total: int, config: TrainConfig) -> float:
    """Return the share of the steps after the warm-up that come before `step`, in [0, 1)."""
    rise = warmup_steps(config, total)
    return (step - rise) / max(1, total - rise)


def constant(step: int, total: int, config: TrainConfig) -> float:
    """Stay at the peak."""
    return 1.0


def linear(step: int, total: int, config: TrainConfig) -> float:
    """Fall from the peak to zero along a line."""
    return 1.0 - progress(step, total, config)


def cosine(step: int, total: int, config: TrainConfig) -> float:
    """Fall from the peak to zero along half a cosine. Loshchilov & Hutter 2017, without restarts."""
    return 0.5 * (1 + math.cos(math.pi * progress(step, total, config)))


def cosine_restarts(step: int, total: int, config: TrainConfig) -> float:
    """Fall as cosine several times, over equally long parts of the run. Loshchilov & Hutter 2017."""
    cycles = config.cycles or 3
    rise = warmup_steps(config, total)
    span = max(1, total - rise)
    return 0.5 * (1 + math.cos(math.pi * ((step - rise) * cycles % span) / span))  # integers: exact at a restart


def polynomial(step: int, total: int, config: TrainConfig) -> float:
    """Fall from the peak to zero as a power of the remaining share of the run."""
    return (1.0 - progress(step, total, config)) ** (config.power or 2.0)


def inverse_sqrt(step: int, total: int, config: TrainConfig) -> float:
    """Fall as the inverse root of the number of steps, whatever the length of the run. Vaswani et al. 2017."""
    return math.sqrt(max(1, warmup_steps(config, total)) / (step + 1))


def wsd(step: int, total: int, config: TrainConfig) -> float:
    """Stay at the peak, then fall to zero along a line: warm-up, stable, decay. Hu et al. 2024 (MiniCPM)."""
    fall = steps_of(0.1 if config.decay is None else config.decay, total)
    return min(1.0, (total - step) / max(1, fall))


SCHEDULES: dict[str, Callable[[int, int, TrainConfig], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine-restarts": cosine_restarts,
    "polynomial": polynomial,
    "inverse-sqrt": inverse_sqrt,
    "wsd": wsd,
}
"""(step, total, settings) -> share of the peak, for the steps after the warm-up."""


def steps_of(amount: float, total: int) -> int:
    """Count steps: a share of the run if `amount` is below 1, else `amount` itself."""
    return round(amount * total) if amount < 1 else round(amount)


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Return the number of steps of the warm-up."""
    if config.warmup_from_zero and config.warmup < 1:
        return math.ceil(config.warmup * total)  # transformers' rounding
    return steps_of(config.warmup, total)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Compute the learning rate of a step: a line up to the peak at the end of the warm-up, then the schedule.

    Args:
        step: counts from 0; the last one is total - 1.

    Returns:
        A rate above zero, so that no step is wasted, but for the first step with train.warmup_from_zero.
    """
    rise = warmup_steps(config, total)
    if step < rise:
        return config.learning_rate * (step if config.warmup_from_zero else step + 1) / rise
    share = SCHEDULES[config.schedule](step, total, config)
    return config.learning_rate * (config.floor + (1 - config.floor) * share)


def check_schedule(config: TrainConfig, total: int) -> None:
    """Raise UsageError if the schedule does not fit into a run of `total` steps."""
    if total == 0:
        return
    rise = warmup_steps(config, total)
    if rise > total:
        raise UsageError(f"train.warmup is {rise} steps, but the run has only {total}. A share such as 0.03 adapts.")
    if config.schedule == "wsd" and (fall := steps_of(config.decay or 0.1, total)) > total - rise:
        raise UsageError(
            f"train.warmup ({rise} steps) and train.decay ({fall}) do not fit into a run of {total} steps."
        )
    if config.schedule == "cosine-restarts" and (config.cycles or 3) > max(1, total - rise):
        raise UsageError(
            f"train.cycles is {config.cycles or 3}, but after the warm-up the run has only {total - rise} steps."
        )
