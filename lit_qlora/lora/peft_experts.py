"""PEFT's layout of adapters on parameters (target_parameters), which is how it adapts experts that are stacked.

transformers holds the weights of a block's experts in two parameters, gate_up_proj and down_proj. For each, PEFT has an
A of shape (n_expert r, in), expert after expert, and a B of shape (out, r n_expert). The columns of B are the experts
of the first rank, then those of the next. Gate and up share an A. Adapters of ours that do not share it are stacked
along the rank, with a block-diagonal B, which is the same function exactly. With lora.tied they share it too.

A tensor's name tells the module alone: what is nested in a wrapper (base_layer) is the module's first parameter.
PEFT 0.18 has input and output of a parameter (n_expert, out, in) the other way round: there B^T is A and A^T is B.
Source: peft/tuners/lora/layer.py, ParamWrapper.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.convert.families import family_of, fill, template
from lit_qlora.convert.families.rules import Fused, Stacked, Transposed, parts_of
from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import ModelConfig
from lit_qlora.settings import LoRAConfig

PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Parameters of a module of experts, in their order, and our layers that each one holds."""
UNCONVERTED = {"qwen3_5_moe_text"}
"""Families whose single experts PEFT 0.21 does not stack when it loads them, nor mistakes their other MLPs for them."""
UNMARKED = {"llama4_text"}
"""Families whose parameters are (n_expert, in, out) in transformers, without the mark by which PEFT 0.21 knows it."""
LINEAR = "1.0"
"""A version of PEFT that has A and B of parameters as those of linear layers."""
_MODULE = ".experts"
_INNER = ".base_layer"
_ROUTER = (".mlp.router.linear.", ".mlp.router.")
"""Unsloth's name of gpt-oss's router, and that of transformers."""
_EXPERT = ".mlp.experts."
_SINGLE = re.compile(r"(.*\.experts\.(?:gate_up|down))_projs\.(\d+)")


def is_expert(layer: str) -> bool:
    """Tell whether our layer of this name is one of an expert."""
    return _EXPERT in layer


def is_understood(target: str) -> bool:
    """Tell whether an entry of target_parameters is one of PARAMETERS, or the weight of a linear layer."""
    return target.rpartition(".")[2] in (*PARAMETERS, "weight")


def is_targeted(parameter: str, targets: Iterable[str]) -> bool:
    """Tell whether PEFT adapts the parameter of this name."""
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def is_stacked(module: str) -> bool:
    """Tell whether a module, as `named` calls it, is a parameter of all experts."""
    module, _, leaf = module.rpartition(".")
    return leaf in PARAMETERS and module.endswith(_MODULE)


def named(tensors: Mapping[str, Tensor], targets: Iterable[str], location: str) -> dict[str, Tensor]:
    """The tensors of an adapter, with the name of the parameter in the names of those of stacked experts.

    Raises:
        CheckpointError: for a tensor that target_parameters does not explain.
    """
    targets = tuple(targets)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        wrapper, dot, rest = name.replace(*_ROUTER).partition(".lora_")
        module = wrapper.removesuffix(_INNER)
        if not dot or not module.endswith(_MODULE):
            found[f"{wrapper}{dot}{rest}"] = tensor
            continue
        adapted = [parameter for parameter in PARAMETERS if is_targeted(f"{module}.{parameter}", targets)]
        depth = len(adapted) - 1 - wrapper.count(_INNER)
        if not 0 <= depth < len(adapted):
            raise CheckpointError(
                f"{location}: {name} adapts experts, but target_parameters in adapter_config.json names "
                f"{' and '.join(adapted) or 'none of their parameters'}."
            )
        found[f"{module}.{adapted[depth]}.lora_{rest}"] = tensor
    return found


def is_single(module: str) -> bool:
    """Tell whether a module is a linear layer of one expert, gate and up in one, as Unsloth has gpt-oss in 4 bit."""
    return _SINGLE.fullmatch(module) is not None


def stack_singles(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Tensors by their names in `named`, where those of such layers are as if PEFT had adapted stacked parameters.

    Args:
        experts: their number; one without an adapter gets a zero one.
    """
    found: dict[str, Tensor] = {}
    singles: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.partition(".lora_")
        match = _SINGLE.fullmatch(module)
        if match:
            singles.setdefault(f"{match[1]}_proj.lora_{part}", {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    for name, own in singles.items():
        a = ".lora_A." in name
        each = [tensor if a else tensor.T for tensor in own.values()]
        rank, width = max(map(len, each)), each[0].size(1)
        whole = each[0].new_zeros(max(experts, 1 + max(own)), rank, width)
        for expert, rows in zip(own, each, strict=True):
            whole[expert, : len(rows)] = rows
        found[name] = whole.flatten(0, 1) if a else whole.permute(2, 1, 0).flatten(1)
    return found


def peft_names(parameters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `named`: tensors by the names of their parameter and their part, under PEFT's names."""
    found: dict[str, Tensor] = {}
    for parameter, parts in parameters.items():
        module, _, leaf = parameter.rpartition(".")
        inner = leaf == "gate_up_proj" and f"{module}.down_proj" in parameters
        found |= {f"{module}{_INNER if inner else ''}.{part}": tensor for part, tensor in parts.items()}
    return found


@dataclass(frozen=True)
class Stacks:
    """The stacked experts of a model in transformers' memory, and the settings of their adapters.

    Attributes:
        module: names of the module that has the parameters, with {i} for the block; the first one is that of today.
        gate_up: how rows of gate and of up follow each other.
        transposed: the parameters are (n_expert, in, out).
        swapped: PEFT takes them for (n_expert, out, in), so that its B^T is our A and its A^T our B.
        only: files stack them as well, or PEFT does not, so there are no names of single experts.
    """

    model: ModelConfig
    config: LoRAConfig
    module: tuple[str, ...]
    gate_up: Fused
    transposed: bool = False
    only: bool = False
    swapped: bool = False

    @staticmethod
    def of(model: ModelConfig, config: LoRAConfig) -> "Stacks | None":
        """None for a family without experts."""
        home = "blocks.{i}.beside" if model.experts_beside else "blocks.{i}"
        gate, up = (f"{home}{_EXPERT}{{e}}.{name}.weight" for name in PARAMETERS["gate_up_proj"])
        for theirs, rule in family_of(model).weights.items():
            if isinstance(rule, Stacked) and gate in parts_of(rule):
                inner = rule.rule
                transposed = isinstance(inner, Transposed)
                fused = inner.rule if isinstance(inner, Transposed) else inner
                assert isinstance(fused, Fused)
                path, _, leaf = theirs.removesuffix(".weight").rpartition(".")
                module = path if leaf in PARAMETERS else f"{path}{_MODULE}"  # Granite's files have other names
                swapped = model.family in UNMARKED
                return Stacks(model, config, (module,), fused, transposed, only=True, swapped=swapped)
            if rule == gate:
                module = theirs.partition(".{e}")[0]
                names = (module.replace("block_sparse_moe", "mlp"), module)  # Mixtral's, in transformers 5 and before
                only = model.family in UNCONVERTED
                return Stacks(model, config, tuple(dict.fromkeys(names)), Fused((gate, up), "blocks"), only=only)
        return None

    def parameter(self, block: str, name: str, known: Iterable[str] = ()) -> str:
        """The full name of a parameter of a block, see by_block, as in `known` or as today."""
        options = [f"{fill(module, template(block)[1])}.{name}" for module in self.module]
        return next((option for option in options if option in known), options[0])

    def are_needed(self, layers: Sequence[str]) -> bool:
        """Tell whether PEFT takes the adapters of these layers of experts as stacks alone.

        Otherwise it stacks adapters of single experts itself when it loads them, and these fit more programs. But it
        takes each to have the rank r, gives gate and up together the alpha of plain LoRA, wants both, and all blocks.
        """
        config = self.config
        everywhere = config.first_layers is None and config.last_layers is None
        both = {layer.rpartition(".")[2] for layer in layers}.issuperset(PARAMETERS["gate_up_proj"])
        alike = all(config.rank(x) == config.r and config.scale(x) == config.alpha / config.r for x in layers)
        return self.only or config.tied or not (both and alike and everywhere)

    def size(self, block: str, name: str, layers: Sequence[str]) -> tuple[int, float]:
        """Rank and alpha of a parameter of a block, some of whose experts' adapted layers are its own.

        Raises:
            CheckpointError: if these have several scales, where PEFT has one.
        """
        own = [layer for layer in layers if layer.rpartition(".")[2] in PARAMETERS[name]]
        scales = {self.config.scale(layer) for layer in own}
        if len(scales) > 1:
            raise CheckpointError(
                f"The {' and '.join(PARAMETERS[name])} of the experts of {block} are one parameter in Hugging Face's "
                f"model ({name}), with one scale.\n"
                "Choose lora.rank_pattern and lora.alpha_pattern such that alpha / r is the same for them."
            )
        ranks = self._ranks(name, own).values()
        rank = max(ranks) if self.config.tied else sum(ranks)
        return rank, scales.pop() * (rank**0.5 if self.config.rslora else rank)

    def _ranks(self, name: str, layers: Sequence[str]) -> dict[str, int]:
        """Of each kind of layer in a parameter that has adapters, the largest rank among the experts."""
        ranks = {kind: [self.config.rank(x) for x in layers if x.endswith(f".{kind}")] for kind in PARAMETERS[name]}
        return {kind: max(own) for kind, own in ranks.items() if own}

    def join(self, block: str, name: str, layers: Sequence[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's A and B of a parameter of a block, from those of its experts."""
        ranks, all_a, all_b = self._ranks(name, layers), [], []
        tied = self.config.tied and len(ranks) > 1
        width = max(ranks.values()) if tied else sum(ranks.values())
        for e in range(self.model.n_expert):
            parts: dict[str, Tensor] = {}
            a: list[Tensor] = []
            first = 0
            for kind in PARAMETERS[name]:
                path, rank = f"{block}{_EXPERT}{e}.{kind}", ranks.get(kind, 0)
                rows = self.model.n_embd if kind == "down" else self.model.expert_size
                b = torch.zeros(rows, width)
                if rank:
                    own_a, own_b = state[f"{path}.lora_a"], state[f"{path}.lora_b"]
                    if not (tied and a):
                        a.append(torch.cat([own_a, own_a.new_zeros(rank - len(own_a), own_a.size(1))]))
                    b[:, first : first + own_b.size(1)] = own_b
                parts[kind], first = b, first + (0 if tied else rank)
            factors = torch.cat(a), self._joined(parts)
            its_a, its_b = (factors[1].T, factors[0].T) if self.swapped else factors
            all_a.append(its_a)
            all_b.append(its_b)
        return {
            "lora_A.weight": torch.cat(all_a).cpu(),
            "lora_B.weight": torch.stack(all_b).permute(1, 2, 0).flatten(1).contiguous().cpu(),
        }

    def _joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        if "down" in parts:
            return parts["down"]
        return self.gate_up.join(dict(zip(self.gate_up.parts, parts.values(), strict=True)), self.model)

    def split(
        self, block: str, name: str, a: Tensor, b: Tensor, ours: Sequence[str] | None, version: str, location: str
    ) -> dict[str, Tensor]:
        """A and B of each layer of a block's experts, by our names, from those of a parameter.

        Args:
            ours: layers that have adapters, if `join` made a and b; None if PEFT did, whose gate and up share an A.
            version: of the PEFT that made them, "" if it is not known.

        Raises:
            CheckpointError: if their shapes are those of no parameter of this model.
        """
        count, size = self.model.n_expert, self.model.expert_size
        inputs, outputs = (size, self.model.n_embd) if name == "down_proj" else (self.model.n_embd, 2 * size)
        rank = len(a) // count
        if {a.size(1), len(b)} != {inputs, outputs} or len(a) != rank * count or b.size(1) != len(a):
            raise CheckpointError(
                f"{location}: the adapter of {name} in {block} has shapes {tuple(a.shape)} and {tuple(b.shape)}, which "
                f"{count} experts of {self.model.name} do not have."
            )
        of_a, of_b = a.unflatten(0, (count, rank)), b.unflatten(1, (rank, count)).permute(2, 0, 1)
        swapped = a.size(1) != inputs
        if inputs == outputs and (ours is not None or (self.transposed and not self.swapped)):
            swapped = self.swapped
        elif inputs == outputs:
            swapped = self.swapped != is_old(version, f"{location}: the adapter of {name}")
        if swapped:
            of_a, of_b = of_b.mT, of_a.mT
        ranks = None if ours is None else self._ranks(name, ours)
        shared = self.config.tied and ranks is not None and len(ranks) > 1
        state = {}
        for e in range(count):
            rows = {"down": of_b[e]}
            if name != "down_proj":
                rows = dict(zip(PARAMETERS[name], self.gate_up.split(of_b[e], self.model).values(), strict=True))
            first = 0
            for kind in PARAMETERS[name] if ranks is None else ranks:
                path = f"{block}{_EXPERT}{e}.{kind}"
                columns = slice(None) if ranks is None else slice(first, first + self.config.rank(path))
                state[f"{path}.lora_a"] = of_a[e][columns].contiguous()
                state[f"{path}.lora_b"] = rows[kind][:, columns].contiguous()
                first += 0 if ranks is None or shared else ranks[kind]
        return state


@dataclass(frozen=True)
class Place:
    """A parameter of the stacked experts of a block.

    Attributes:
        layers: those of the block's experts that have adapters; some of them are the parameter's own.
    """

    stacks: Stacks
    block: str
    name: str
    layers: Sequence[str]

    def size(self) -> tuple[int, float]:
        """See Stacks.size."""
        return self.stacks.size(self.block, self.name, self.layers)

    def join(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See Stacks.join."""
        return self.stacks.join(self.block, self.name, self.layers, state)


def by_block(layers: Iterable[str]) -> dict[str, list[str]]:
    """Layers of experts by their block, "blocks.3", or what is beside its MLP, "blocks.3.beside"."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer.partition(_EXPERT)[0], []).append(layer)
    return found


def is_old(version: str, what: str) -> bool:
    """Tell whether a version of PEFT has input and output of stacked experts the other way round.

    Raises:
        CheckpointError: if the version is not known.
    """
    numbers = version.split(".")
    if len(numbers) < 2 or not all(number.isdecimal() for number in numbers[:2]):
        raise CheckpointError(
            f"{what} has as many inputs as outputs, and adapter_config.json lacks peft_version, which tells them "
            "apart.\nMerge it with the PEFT that made it, and convert the model that comes out."
        )
    return (int(numbers[0]), int(numbers[1])) < (0, 19)
