"""The configuration of a model: sizes and choices that a checkpoint fixes, with no code attached."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lit_qlora.commands import spell
from lit_qlora.errors import CheckpointError, did_you_mean
from lit_qlora.files.atomic import recover_files
from lit_qlora.files.reading import read_json

FILE_NAME = "model_config.json"
WEIGHT_FILES = ("lit_model*.safetensors*",)
"""Patterns of the files of a checkpoint that are replaced together with its configuration."""
MOST = {
    "n_layer": 2**12,
    "n_expert": 2**12,
    "n_embd": 2**20,
    "n_head": 2**16,
    "head_size": 2**16,
    "ffn_size": 2**24,
    "vocab_size": 2**26,
    "block_size": 2**28,
}
"""Sizes beyond these are damage: the skeleton of such a model alone would take minutes."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    Every field is a fact that a checkpoint fixes; nothing here can be tuned.
    Shapes are written with these letters throughout the package:
    B batch, T tokens, E n_embd, H n_head, K n_kv_head, D head_size, F ffn_size, V vocab_size.
    """

    name: str
    """Name of the model, e.g. meta-llama/Llama-2-7b-hf."""
    family: str = "llama"
    """The row of lit_qlora.convert.families that it was converted with."""
    wrapper: str = ""
    """The model of text and images that this is the language model of; "": it is a model of its own."""
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_size: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding; can exceed the number of tokens that the tokenizer knows."""
    block_size: int
    """Most tokens the model has been made for."""
    norm: Literal[
        "rms", "rms_plus_one", "rms_no_weight", "layer", "layer_plus_one", "layer_no_bias", "layer_no_weight"
    ] = "rms"
    """rms_plus_one and layer_plus_one store what their weight exceeds one by (Gemma, Nemotron)."""
    norm_eps: float = 1e-5
    norm_position: Literal["before", "after", "both"] = "before"
    """The norm of attention and MLP acts on their input, on their output before it is added, or on both."""
    shared_norm: bool = False
    """With parallel_residual: attention and MLP read one norm instead of one each."""
    qk_norm: Literal["none", "head", "each_head", "full", "rotated"] = "none"
    """Norm of queries and keys. head: over each head, with one weight for all heads. each_head: over each head, with a
    weight of its own (a layer norm without bias). full: over all heads at once. rotated: over each head of the blocks
    that rotate, without a weight (Llama 4)."""
    qk_norm_after_rope: bool = False
    value_norm: bool = False
    """Values are normed over each head, without a weight (Gemma 4)."""
    ffn: Literal["swiglu", "geglu", "geglu_tanh", "swiglu_clamped", "gelu", "gelu_tanh", "relu2", "xielu"] = "swiglu"
    qkv_bias: bool = False
    projection_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (GPT-NeoX), instead of one after the other."""
    embedding_norm: bool = False
    """Embeddings are normed too, before the first block (nanochat)."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Attention and MLP count this much in the residual stream."""
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    """Logits x become cap * tanh(x / cap)."""
    clip_qkv: float | None = None
    """Queries, keys and values are limited to this magnitude."""
    attention_scale: float | None = None
    """Factor of the scores; None: 1 / sqrt(head_size)."""
    attention_gate: bool = False
    """What attention finds is multiplied by the sigmoid of one more projection of its input (Qwen3-Next)."""
    attention_softcap: float | None = None
    attention_sinks: bool = False
    """Each head has one more score, a parameter, that takes its share of the softmax and gives nothing (gpt-oss)."""
    query_scale_beta: float = 0.0
    """Queries at position p are multiplied by 1 + beta log(1 + floor(p / rope_original_block_size)) (Ministral 3)."""
    unrotated_scale_beta: float = 0.0
    """In no_rope_layers alone they are multiplied by 1 + beta log(1 + floor((p + 1) / unrotated_scale_size)) (Llama 4).
    """
    unrotated_scale_size: int = 8192
    kv_latent_size: int = 0
    """Keys and values come from a vector of this size (DeepSeek's latent attention); 0: from the token itself."""
    q_latent_size: int = 0
    """With kv_latent_size: queries pass through this many features; 0: they do not."""
    latent_rope_size: int = 0
    """With kv_latent_size: how many of head_size features are rotated, of queries and of the key that heads share."""
    latent_value_size: int = 0
    """With kv_latent_size: features of a head's value."""
    delta_layers: tuple[int, ...] = ()
    """Blocks with a gated delta net instead of attention, see lit_qlora.model.delta_net."""
    state_space: bool = False
    """They have a state space instead, see lit_qlora.model.state_space: its C, B and x are query, key and value."""
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    """Heads of a gated delta net: those of queries and keys (a state space's groups), each of which serves as many of
    the values."""
    delta_key_size: int = 0
    delta_value_size: int = 0
    """Features of such a head."""
    delta_conv_size: int = 4
    """Tokens that its convolution sees, the newest included."""
    conv_layers: tuple[int, ...] = ()
    """Blocks with a short convolution instead of attention, see lit_qlora.model.short_conv."""
    conv_size: int = 3
    """Tokens that it sees, the newest included."""
    conv_bias: bool = False
    """A short convolution and its projections have biases; of a state space, its convolution alone."""
    sliding_window: int | None = None
    """A token attends to this many tokens, itself included; None: to all before it."""
    chunked_window: bool = False
    """Every sliding_window tokens a chunk begins, and a token attends to its own chunk alone (Llama 4)."""
    full_attention_layers: tuple[int, ...] = ()
    """Blocks that sliding_window does not hold for."""
    full_head_size: int = 0
    """Another head_size in the blocks without a window; 0: the same."""
    full_kv_heads: int = 0
    """Another n_kv_head there; 0: the same."""
    key_is_value: bool = False
    """Values there are the keys as they are projected, before norm and rotation."""
    shared_kv_layers: int = 0
    """The last so many blocks use the keys and values of the last one before them with the same window, or none."""
    shared_kv_ffn_size: int = 0
    """Another ffn_size in those blocks; 0: the same."""
    positions: Literal["rope", "learned"] = "rope"
    no_rope_layers: tuple[int, ...] = ()
    """Blocks that rotate nothing, so that only the causal mask tells them about order."""
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    """Base in the blocks with a sliding window, which are then not scaled; None: as in the others."""
    rope_fraction: float = 1.0
    """Share of head_size that is rotated; the rest carries no position. With proportional scaling, in the blocks
    without a window alone."""
    rope_interleaved: bool = False
    """Feature 2 i turns with feature 2 i + 1, instead of i with i + half."""
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"] = "none"
    rope_factor: float = 1.0
    """With linear scaling, a negative factor turns features the other way (nanochat)."""
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_block_size: int = 8192
    """Context of the pre-training that dynamic, llama3, yarn and longrope scaling start from."""
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True
    """yarn: round the bounds between which features pass from unscaled to scaled to whole features."""
    rope_attention_factor: float = 1.0
    """yarn, longrope: cosines and sines are multiplied by this."""
    rope_short_factors: tuple[float, ...] = ()
    """longrope: what each wavelength is multiplied by within the original context."""
    rope_long_factors: tuple[float, ...] = ()
    """longrope: the same, once a text is longer than that."""
    block_scale: bool = False
    """What leaves a block is multiplied by a number of its own."""
    per_layer_size: int = 0
    """Features of one more embedding for each block, see lit_qlora.model.per_layer; 0: there is none."""
    per_layer_vocab: int = 0
    """With per_layer_size: rows of those embeddings."""
    tied_head: bool = False
    """The output head is the embedding."""
    n_expert: int = 0
    """Experts of a block's mixture; 0: a plain MLP."""
    n_expert_per_token: int = 0
    expert_size: int = 0
    """The ffn_size of one expert."""
    shared_expert_size: int = 0
    """The ffn_size of the expert that every token goes to; 0: there is none."""
    shared_expert_gate: bool = False
    """What that expert gives is multiplied by the sigmoid of a learnt score of the token (Qwen2-MoE)."""
    experts_beside: bool = False
    """A block has its mixture of experts beside an MLP, both with norms of their own (Gemma 4)."""
    dense_layers: tuple[int, ...] = ()
    """Blocks with a plain MLP in a model of experts."""
    router: Literal["softmax", "softmax_chosen", "sigmoid", "softmax_near"] = "softmax"
    """Function from a token's scores to the weights of its experts: softmax over all experts or over the chosen ones,
    or a sigmoid for each expert. softmax_near: for each chosen one a softmax over those near it (Phi-3.5-MoE)."""
    router_tolerance: float = 0.0
    """softmax_near: far is behind by more than this share of the score."""
    router_normalized: bool = False
    """Divide the weights of the chosen experts by their sum."""
    router_bias: bool = False
    router_correction: bool = False
    """A parameter for each expert helps to choose it, without counting in its weight (DeepSeek-V3)."""
    router_scale: float = 1.0
    router_before: bool = False
    """An expert reads its tokens times their weights, instead of having what it gives multiplied by them (Llama 4)."""
    router_norm: bool = False
    """The router reads what it is given normed and scaled, and experts have learnt factors (Gemma 4)."""
    router_groups: int = 1
    """Number of groups of experts; a token chooses among the experts of its best router_groups_kept groups."""
    router_groups_kept: int = 1

    def __post_init__(self) -> None:
        """Refuse values of the wrong type and sizes that cannot belong together."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not _fits(value, field.type):
                kinds = [getattr(kind, "__name__", str(kind)) for kind in get_args(field.type) or [field.type]]
                raise CheckpointError(f"{self.name}: {field.name} must be {' or '.join(kinds)}, got {value!r}.")
        for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "head_size", "ffn_size", "vocab_size", "block_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{self.name}: {name} must be at least 1, got {getattr(self, name)}.")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise CheckpointError(f"{self.name}: {name} must be at most {most:,}, got {getattr(self, name)}.")
        for name in ("sliding_window", "attention_softcap", "logit_softcap", "unrotated_scale_size"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise CheckpointError(f"{self.name}: {name} must be above 0, got {getattr(self, name)}.")
        if self.n_head % self.n_kv_head:
            raise CheckpointError(
                f"{self.name}: n_head must be a multiple of n_kv_head, got {self.n_head} and {self.n_kv_head}."
            )
        for name in ("full_attention_layers", "no_rope_layers", "dense_layers", "delta_layers", "conv_layers"):
            if outside := [i for i in getattr(self, name) if not 0 <= i < self.n_layer]:
                raise CheckpointError(f"{self.name}: {name} names blocks {outside}, the model has {self.n_layer}.")
        if self.n_expert and not (0 < self.n_expert_per_token <= self.n_expert and self.expert_size > 0):
            raise CheckpointError(
                f"{self.name}: with n_expert {self.n_expert}, n_expert_per_token must be from 1 to it and expert_size "
                f"positive, got {self.n_expert_per_token} and {self.expert_size}."
            )
        groups = self.router_groups
        if groups < 1 or self.n_expert % groups or not 0 < self.router_groups_kept <= groups:
            raise CheckpointError(
                f"{self.name}: {self.n_expert} experts cannot stand in {groups} groups of which "
                f"{self.router_groups_kept} are kept."
            )
        if self.experts_beside and (self.parallel_residual or self.shared_expert_size):
            raise CheckpointError(
                f"{self.name}: experts_beside is for blocks without parallel_residual, and without shared_expert_size."
            )
        if self.shared_norm and not self.parallel_residual:
            raise CheckpointError(f"{self.name}: shared_norm needs parallel_residual.")
        if self.kv_latent_size and not (0 < self.latent_rope_size < self.head_size and self.latent_value_size > 0):
            raise CheckpointError(
                f"{self.name}: with kv_latent_size, latent_rope_size must be from 1 to below head_size "
                f"{self.head_size} and latent_value_size positive, got {self.latent_rope_size} and "
                f"{self.latent_value_size}."
            )
        if self.kv_latent_size and self.n_kv_head != self.n_head:
            raise CheckpointError(f"{self.name}: with kv_latent_size every head has a key: n_kv_head must be n_head.")
        heads, sizes = (self.delta_key_heads, self.delta_value_heads), (self.delta_key_size, self.delta_value_size)
        if self.delta_layers and (min(*heads, *sizes) < 1 or heads[1] % heads[0] or self.delta_conv_size < 2):
            raise CheckpointError(
                f"{self.name}: with delta_layers, heads must be at least 1, those of values a multiple of those of "
                f"keys, sizes at least 1 and delta_conv_size at least 2, got {heads}, {sizes}, {self.delta_conv_size}."
            )
        if self.conv_layers and (self.conv_size < 2 or set(self.conv_layers) & set(self.delta_layers)):
            raise CheckpointError(f"{self.name}: a short convolution sees at least 2 tokens, in blocks of its own.")
        factors = (len(self.rope_short_factors), len(self.rope_long_factors))
        if self.rope_scaling == "longrope" and factors != (self.rotated // 2,) * 2:
            raise CheckpointError(f"{self.name}: longrope needs {self.rotated // 2} factors twice, got {factors}.")
        for name in ("full_head_size", "full_kv_heads", "shared_kv_ffn_size", "per_layer_size", "per_layer_vocab"):
            if getattr(self, name) < 0 or (name == "full_head_size" and self.full_head_size % 2):
                raise CheckpointError(f"{self.name}: {name} cannot be {getattr(self, name)}.")
        if self.full_kv_heads and self.n_head % self.full_kv_heads:
            raise CheckpointError(
                f"{self.name}: n_head must be a multiple of full_kv_heads, got {self.n_head} and {self.full_kv_heads}."
            )
        own, reusing = ({self.windowed(i) for i in range(self.n_layer) if self.reuses(i) == which} for which in (0, 1))
        if not 0 <= self.shared_kv_layers < self.n_layer or reusing - own:
            raise CheckpointError(
                f"{self.name}: with shared_kv_layers {self.shared_kv_layers} a block has no other one whose keys and "
                "values it could use."
            )
        if self.per_layer_size and self.per_layer_vocab < self.vocab_size:
            raise CheckpointError(
                f"{self.name}: per_layer_vocab {self.per_layer_vocab} is less than vocab_size {self.vocab_size}."
            )
        if not 0 < self.rope_fraction <= 1 or self.rotated % 2:
            raise CheckpointError(
                f"{self.name}: rope_fraction {self.rope_fraction} of head_size {self.head_size} is not an even size."
            )

    @property
    def shares_beginnings(self) -> bool:
        """True if what two texts begin with alike is the same in both, so that it can be read once."""
        return self.rope_scaling not in ("dynamic", "longrope") and not self.state_layers

    @property
    def rotated(self) -> int:
        """Number of the head_size features that carry position."""
        if self.rope_scaling == "proportional":
            return self.head_size
        return self.latent_rope_size if self.kv_latent_size else int(self.rope_fraction * self.head_size)

    def head_size_of(self, windowed: bool) -> int:
        """Features of a head in the blocks with or without a window."""
        return self.head_size if windowed else self.full_head_size or self.head_size

    def kv_heads_of(self, windowed: bool) -> int:
        """Number of heads of keys and values there."""
        return self.n_kv_head if windowed else self.full_kv_heads or self.n_kv_head

    def reuses(self, block: int) -> bool:
        """True if `block` uses the keys and values of another one."""
        return self.n_layer - self.shared_kv_layers <= block < self.n_layer

    def lender(self, block: int) -> int:
        """The block whose keys and values `block` uses: its own, or those of the last one of its kind that has some."""
        if not self.reuses(block):
            return block
        own = (i for i in range(self.n_layer - self.shared_kv_layers) if i not in self.state_layers)
        kind = (self.windowed(block), self.rotates(block))
        return max(i for i in own if (self.windowed(i), self.rotates(i)) == kind)

    def lends(self, block: int) -> bool:
        """True if later blocks use the keys and values of `block`."""
        return any(self.lender(i) == block for i in range(block + 1, self.n_layer))

    @property
    def value_size(self) -> int:
        """Features of a head's value; those of its key are head_size."""
        return self.latent_value_size if self.kv_latent_size else self.head_size

    def is_delta(self, block: int) -> bool:
        """True if `block` has a gated delta net or a state space instead of attention."""
        return block in self.delta_layers

    def is_conv(self, block: int) -> bool:
        """True if `block` has a short convolution instead of attention."""
        return block in self.conv_layers

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Blocks that remember a state instead of keys and values."""
        return (*self.delta_layers, *self.conv_layers)

    def windowed(self, block: int) -> bool:
        """True if the sliding window holds for `block`."""
        return self.sliding_window is not None and block not in self.full_attention_layers

    def rotates(self, block: int) -> bool:
        """True if `block` rotates its queries and keys."""
        return self.positions == "rope" and block not in self.no_rope_layers

    def scales_queries(self, block: int) -> bool:
        """True if `block` multiplies its queries by a factor of their position."""
        return self.query_scale_beta != 0 or (self.unrotated_scale_beta != 0 and not self.rotates(block))

    def has_experts(self, block: int) -> bool:
        """True if `block` has a mixture of experts instead of a plain MLP."""
        return self.n_expert > 0 and block not in self.dense_layers

    def save(self, directory: Path) -> None:
        """Write model_config.json into `directory`."""
        (directory / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read model_config.json. Raises CheckpointError for what is missing, unknown or of the wrong type."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            with suppress(OSError):  # a conversion was killed between the old files and the new
                recover_files(path.parent, FILE_NAME, WEIGHT_FILES)
        if not path.is_file():
            raise CheckpointError(missing_checkpoint(Path(directory)))
        values: dict[str, Any] = read_json(path)
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise CheckpointError(f"{path}: unknown fields {unknown}; written by a newer version?")
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"{path}: {error}.") from None


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_fits(value, choice) for choice in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def missing_checkpoint(directory: Path) -> str:
    """Say why `directory` is no checkpoint, and what to do about it."""
    if not directory.exists():
        parent = directory.parent
        beside = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        name = _hub_name(directory)
        here = Path("checkpoints", name)
        if name and here != directory and (here / FILE_NAME).is_file():
            return f"{directory} does not exist. Did you mean {here}?"
        if hint := did_you_mean(directory.name, beside):
            return f"{directory} does not exist.{hint}"
        hub = f"\nIf it is a model of the hub: {spell('scripts/download.py')} --repo_id {name}" if name else ""
        return f"{directory} does not exist.{_found_checkpoints()}{hub}"
    if (directory / "config.json").is_file():
        return (
            f"{directory} holds a Hugging Face model that is not converted yet.\n"
            f"Convert it: {spell('scripts/convert_hf_checkpoint.py')} --checkpoint_dir {directory}"
        )
    if any((folder / "adapter_config.json").is_file() for folder in (directory, directory / "final")):
        return (
            f"{directory} holds an adapter, not a checkpoint. Commands that take one: --lora_path {directory}\n"
            f"Or merge it into its base first: {spell('scripts/merge_lora.py')} --lora_path {directory}"
        )
    return f"{directory} has no {FILE_NAME}, so it is not a checkpoint.{_found_checkpoints()}"


def _hub_name(directory: Path) -> str:
    """Return ORG/NAME for a path that is that or checkpoints/ORG/NAME, else ''."""
    parts = directory.parts[1:] if directory.parts[:1] == ("checkpoints",) else directory.parts
    fits = len(parts) == 2 and not directory.is_absolute() and not {".", ".."} & set(parts)
    return "/".join(parts) if fits else ""


def _found_checkpoints() -> str:
    found = sorted(str(p.parent) for p in Path("checkpoints").glob(f"*/*/{FILE_NAME}"))
    return f"\nCheckpoints here: {', '.join(found[:5])}" if found else ""
