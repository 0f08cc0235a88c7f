"""A checkpoint into one GGUF file, for llama.cpp and what is built on it, a tensor at a time.

llama.cpp computes with the file as model/gpt.py does; a model that it would compute otherwise is refused by name.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_qlora.checkpoint import checkpoint, score
from lit_qlora.convert.ending import read_ending
from lit_qlora.convert.families import Fused, their_tensors
from lit_qlora.convert.gguf_architectures import (
    GEMMA4,
    LATENT,
    Architecture,
    check_supported,
    graph_of,
    interval,
    mixed_interval,
)
from lit_qlora.convert.gguf_vocabulary import read_vocabulary
from lit_qlora.convert.modelfile import modelfile
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files import atomic
from lit_qlora.files.reading import reason
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.mlp import XIELU_EPS, XIELU_SLOPE
from lit_qlora.model.rope import scaled_frequency

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

PARTS = re.compile(r"\.(experts|shared|router|shared_gate|sinks|delta)\b|^blocks\.\d+\.scale$")
KEYS_VALUES = re.compile(r"\.attn\.(key|value)\.")
NAMES_OF_PARTS = {
    "attn.key.weight": "attn_k_b.weight",
    "attn.value.weight": "attn_v_b.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.router.correction": "exp_probs_b.bias",
    "mlp.shared_gate.weight": "ffn_gate_inp_shexp.weight",
    "attn.sinks": "attn_sinks.weight",
    "scale": "layer_output_scale.weight",
    "beside.mlp.router.weight": "ffn_gate_inp.weight",
    "beside.mlp.router.scale": "ffn_gate_inp.scale",
    "beside.mlp.router.expert_scale": "ffn_down_exps.scale",
    **dict.fromkeys(("delta.query.weight", "delta.key.weight", "delta.value.weight"), "attn_qkv.weight"),
    "delta.output_gate.weight": "attn_gate.weight",
    "delta.beta.weight": "ssm_beta.weight",
    "delta.decay.weight": "ssm_alpha.weight",
    "delta.conv": "ssm_conv1d.weight",
    "delta.decay_rate": "ssm_a",
    "delta.decay_bias": "ssm_dt.bias",
    "delta.norm.weight": "ssm_norm.weight",
    "delta.projection.weight": "ssm_out.weight",
    "delta.skip": "ssm_d",
    "delta.conv_bias": "ssm_conv1d.bias",
}
"""Our name in a block -> theirs, for what Hugging Face's families call by many names."""
STILL = 1e30
"""A wavelength times this is longer than any text."""
STATES = ("ssm_conv1d.weight", "shortconv.conv.weight", "ssm_a", "ssm_d", "ssm_norm.weight")
"""Endings of the names of what has to be float32 beside vectors."""
OF_STATE_SPACE = dict.fromkeys(
    (f"delta.{part}.weight" for part in ("output_gate", "value", "key", "query", "decay")), "ssm_in.weight"
)
"""The same of what a state space reads its input by, in the order of its rows."""
Kind = Literal["f16", "q8_0", "bf16", "f32"]


def export_gguf(checkpoint_dir: Path, out_file: Path, kind: Kind = "q8_0") -> ModelConfig:
    """Write the GGUF file of a checkpoint, atomically, and a Modelfile for Ollama beside it.

    Host memory holds a tensor in float32 and as it is written.

    Args:
        kind: storage of the matrices; vectors are float32. q8_0 has blocks of 32 bytes that share a float16 scale.

    Raises:
        CheckpointError: if the checkpoint is damaged, or is none that llama.cpp computes as we do.
        UsageError: if `out_file` exists, or the gguf package is not installed.
        ResourceError: if the disk is full or may not be written.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UsageError('GGUF files need the gguf package: pip install "lit_qlora[gguf]"') from None
    beside = modelfile_of(out_file)
    _check_new(out_file)
    config = ModelConfig.load(checkpoint_dir)
    if score.read(checkpoint_dir):
        raise UsageError(
            f"{checkpoint_dir} has a head that reads labels, which GGUF has no place for.\n"
            "scripts/convert_lit_checkpoint.py writes it for transformers."
        )
    weights = checkpoint.open_weights(checkpoint_dir)
    checkpoint.check_weights(weights.specs, config, location=str(weights.location))
    architecture = check_supported(config)
    ending = read_ending(checkpoint_dir)
    if ending is None:
        raise CheckpointError(f"{checkpoint_dir} has no tokenizer, which a GGUF file holds.")
    vocabulary = read_vocabulary(checkpoint_dir, ending, config.vocab_size)
    plan = plan_tensors(weights.specs, config)
    text = modelfile(out_file.name, ending, checkpoint_dir, read_context(config))
    if not beside.is_file() or beside.read_bytes() != text.encode():  # else an export left it that was killed
        _check_new(beside)

    with atomic.writing(out_file), _both_or_none(out_file, beside), atomic.replacing(out_file) as staged:
        writer = GGUFWriter(staged, architecture.name)
        try:
            _write_settings(writer, config, kind)
            if config.ffn == "xielu":
                _write_activations(writer, config, weights.read)
            vocabulary.write(writer)
            factors = _rope_factors(config)
            for tensor in plan:
                spec = tensor.join(weights.specs.__getitem__, config)
                _announce(writer, tensor.name, spec, _storage(tensor.name, spec, kind))
            for name, factor in factors.items():
                _announce(writer, name, factor, _storage(name, factor, kind))
            writer.write_header_to_file()
            _write_values(writer, checkpoint_dir)
            writer.write_ti_data_to_file()
            for tensor in plan:
                whole = tensor.join(weights.read, config)
                _write(writer, tensor.parts[0], whole, _storage(tensor.name, whole, kind))
                del whole
            for name, factor in factors.items():
                _write(writer, name, factor, _storage(name, factor, kind))
        finally:
            writer.close()
        atomic.write_text(beside, text)
    return config


def _write_values(writer: Any, checkpoint_dir: Path) -> None:
    try:
        writer.write_kv_data_to_file()
    except UnicodeEncodeError as error:  # a name from a path, or a chat template
        raise CheckpointError(f"{checkpoint_dir}: a GGUF file cannot hold a text of it: {reason(error)}.") from None


def modelfile_of(out_file: Path) -> Path:
    """The file for Ollama beside a GGUF file: of model-1.5B.gguf, and of model-1.5B, it is model-1.5B.Modelfile."""
    return out_file.with_name(f"{out_file.name.removesuffix('.gguf')}.Modelfile")


def _check_new(path: Path) -> None:
    """Raise UsageError if `path` exists."""
    if path.exists():
        raise UsageError(f"{path} exists. Give --out_file a new name, or remove it.")


@contextmanager
def _both_or_none(out_file: Path, beside: Path) -> Iterator[None]:
    """Remove the Modelfile if the GGUF file does not follow."""
    try:
        yield
    except BaseException:
        if not out_file.exists():
            beside.unlink(missing_ok=True)
        raise


def read_context(config: ModelConfig) -> int:
    """Most tokens that llama.cpp computes as we do.

    Where it has no window, as many as ours lets a token see. With longrope, as many as the original context: it takes
    the long factors for all texts once its context is longer.
    """
    architecture = _graph(config)
    known = architecture.period or architecture.names_windows or config.chunked_window
    window = None if known else config.sliding_window
    original = config.rope_original_block_size if config.rope_scaling == "longrope" else config.block_size
    return min(config.block_size, window or config.block_size, original)


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of a GGUF file, and ours that it consists of."""

    name: str
    parts: tuple[str, ...]
    """Ours, one below the other."""
    stacked: bool = False
    """One behind the other instead, along a new first dimension."""
    heads: int = 1
    """The rows of a head of each part lie one below the other, then those of the next head."""

    def join(self, read: Callable[[str], Tensor], config: ModelConfig) -> Tensor:
        """Their tensor, from ours."""
        parts = [_ordered(name, read(name), config) for name in self.parts]
        if self.stacked or len(parts) == 1:
            return torch.stack(parts) if self.stacked else parts[0]
        return torch.cat([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).flatten(0, 1)


def _graph(config: ModelConfig) -> Architecture:
    found = graph_of(config)
    assert found is not None, config.family
    return found


def plan_tensors(names: Iterable[str], config: ModelConfig) -> list[GgufTensor]:
    """The tensors of a file, from the names of ours, by the package's own tables of Hugging Face's names."""
    import gguf

    architecture = _graph(config)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[architecture.name], config.n_layer)
    found: dict[str, tuple[list[str], bool]] = {}
    heads: dict[str, int] = {}
    names = [name for name in names if ".activation." not in name]  # which are settings there
    for tensor in their_tensors(names, replace(config, wrapper="")):
        absorbed = architecture.latent_absorbed and config.kv_latent_size and KEYS_VALUES.search(tensor.ours[0])
        if PARTS.search(tensor.ours[0]) or absorbed:  # of which several may be in one tensor of theirs
            for name in tensor.ours:
                part = _name_of_part(name, OF_STATE_SPACE if config.state_space else {})
                if architecture.name == "qwen3next" and part.endswith(("ssm_beta.weight", "ssm_alpha.weight")):
                    part = re.sub("ssm_(beta|alpha)", "ssm_ba", part)
                    heads[part] = config.delta_key_heads
                found.setdefault(part, ([], ".experts." in name))[0].append(name)
            continue
        module, _, kind = tensor.name.rpartition(".")
        name = table.get_name(module)
        assert name or "mlp" in module, f"{architecture.name} has no {module}"
        if name and not config.n_expert:  # an MLP that the package takes for a shared expert
            name = name.removesuffix("_shexp")
        for ours in tensor.ours:  # gate and up, where no name is known for both together
            of_mlp = _name_of_part(ours, {}).replace("_shexp", "")
            found.setdefault(f"{name}.{kind}" if name else of_mlp, ([], False))[0].append(ours)
        by_head = isinstance(tensor.rule, Fused) and (tensor.rule.layout == "query_heads" or config.kv_latent_size)
        if by_head and name:
            heads[f"{name}.{kind}"] = config.n_head
    if config.tied_head and architecture.own_head:
        found["output.weight"] = (["embed.weight"], False)
    order = list(OF_STATE_SPACE)
    for name, (parts, _) in found.items():
        if name.endswith("ssm_in.weight"):
            parts.sort(key=lambda part: order.index(part.split(".", 2)[2]))
    return [
        GgufTensor(name=name, parts=tuple(parts), stacked=stacked, heads=heads.get(name, 1))
        for name, (parts, stacked) in found.items()
    ]


def _name_of_part(name: str, first: Mapping[str, str]) -> str:
    """Their name of a tensor of a router, of experts or of attention sinks; `first` comes before NAMES_OF_PARTS."""
    _, block, *_ = name.split(".")
    part = name.partition(f"{block}.")[2]
    layer, _, kind = part.rpartition(".")
    layer = layer.rpartition(".")[2]
    if known := first.get(part) or NAMES_OF_PARTS.get(part):
        return f"blk.{block}.{known}"
    return f"blk.{block}.ffn_{layer}_{'exps' if '.experts.' in name else 'shexp'}.{kind}"


def _write_settings(writer: "GGUFWriter", config: ModelConfig, kind: Kind) -> None:
    import gguf

    files = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(config.name)
    writer.add_file_type(files[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(read_context(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    inside = [config.shared_kv_ffn_size if config.reuses(i) else config.ffn_size for i in range(config.n_layer)]
    writer.add_feed_forward_length(inside if config.shared_kv_ffn_size else config.ffn_size)
    writer.add_head_count(config.n_head)
    _write_heads(writer, config)
    (writer.add_layer_norm_rms_eps if config.norm.startswith("rms") else writer.add_layer_norm_eps)(config.norm_eps)
    if config.positions == "rope":
        writer.add_rope_dimension_count(config.latent_rope_size or config.full_head_size or config.rotated)
        writer.add_rope_freq_base(config.rope_theta)
    _write_scaling(writer, config)
    if "parallel_residual" in _graph(config).reads:
        writer.add_parallel_residual(config.parallel_residual)
    if config.rope_local_theta is not None:
        writer.add_rope_freq_base_swa(config.rope_local_theta)
    if _graph(config).period and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if _graph(config).names_windows:
        _write_two_kinds(writer, config)
    if config.n_expert or _graph(config).name == LATENT.name:
        _write_experts(writer, config)
    if config.delta_layers:
        _write_delta_net(writer, config)
    if config.conv_layers:
        writer.add_shortconv_l_cache(config.conv_size)
    if config.query_scale_beta:
        writer.add_attn_temperature_scale(config.query_scale_beta)
        writer.add_attn_temperature_length(config.rope_original_block_size)
    _write_scales(writer, config)


def _write_two_kinds(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write which blocks of Gemma 4 have a window and the size of their heads, and which use earlier keys."""
    assert config.sliding_window is not None
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([config.windowed(i) for i in range(config.n_layer)])
    writer.add_key_length_swa(config.head_size)
    writer.add_value_length_swa(config.head_size)
    writer.add_rope_dimension_count_swa(config.rotated)
    writer.add_shared_kv_layers(config.shared_kv_layers)
    writer.add_embedding_length_per_layer_input(config.per_layer_size)


def _write_delta_net(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write the sizes of gated delta nets, and which blocks have attention instead."""
    writer.add_ssm_conv_kernel(config.delta_conv_size)
    writer.add_ssm_state_size(config.delta_key_size)
    writer.add_ssm_group_count(config.delta_key_heads)
    writer.add_ssm_time_step_rank(config.delta_value_heads)
    writer.add_ssm_inner_size(config.delta_value_heads * config.delta_value_size)
    if config.state_space:
        writer.add_rope_scaling_finetuned(not config.no_rope_layers)  # by which its graph tells if it rotates
        return
    writer.add_full_attention_interval(interval(config))
    if _graph(config).value_heads_tiled:  # the features of a token's three positions, which are one
        writer.add_rope_dimension_sections([*(len(range(i, config.rotated // 2, 3)) for i in range(3)), 0])


def _write_activations(writer: "GGUFWriter", config: ModelConfig, read: Callable[[str], Tensor]) -> None:
    """Write the learnt strengths of xIELU, which its graph reads as settings."""
    for name, write in (("positive", writer.add_xielu_alpha_p), ("negative", writer.add_xielu_alpha_n)):
        write([read(f"blocks.{i}.mlp.activation.{name}").item() for i in range(config.n_layer)])
    writer.add_xielu_beta([XIELU_SLOPE] * config.n_layer)
    writer.add_xielu_eps([XIELU_EPS] * config.n_layer)


def _write_heads(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write the sizes of keys and values; a graph for latent attention has one key for all heads, the latent."""
    if not (config.kv_latent_size and _graph(config).latent_absorbed):
        blocks, stateful = range(config.n_layer), config.delta_layers if config.state_space else config.conv_layers
        counts = [0 if i in stateful else config.kv_heads_of(config.windowed(i)) for i in blocks]
        writer.add_head_count_kv(counts if len(set(counts)) > 1 else counts[0])
        writer.add_key_length(config.full_head_size or config.head_size)
        writer.add_value_length(config.full_head_size or config.value_size)
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_latent_size + config.latent_rope_size)
        writer.add_value_length(config.kv_latent_size)
        writer.add_key_length_mla(config.head_size)
        writer.add_value_length_mla(config.value_size)
    if config.kv_latent_size:
        writer.add_kv_lora_rank(config.kv_latent_size)
    if config.q_latent_size:
        writer.add_q_lora_rank(config.q_latent_size)


def _write_experts(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write sizes of experts, and how a graph that can do it in several ways chooses and weighs them."""
    from gguf import ExpertGatingFuncType

    architecture = _graph(config)
    reads = architecture.reads
    writer.add_expert_count(config.n_expert)
    writer.add_expert_used_count(config.n_expert_per_token)
    writer.add_expert_feed_forward_length(config.expert_size or config.ffn_size)
    if "router" in reads:
        writer.add_expert_gating_func(ExpertGatingFuncType[config.router.upper()])
        writer.add_expert_weights_norm(config.router_normalized)
        writer.add_expert_weights_scale(config.router_scale)
    if "router_groups" in reads and config.router_groups > 1:
        writer.add_expert_group_count(config.router_groups)
        writer.add_expert_group_used_count(config.router_groups_kept)
    if architecture.dense_first:
        writer.add_leading_dense_block_count(len(config.dense_layers) if config.n_expert else config.n_layer)
    if architecture.shared_multiple:
        writer.add_expert_shared_count(config.shared_expert_size // (config.expert_size or 1))
    if "shared_expert_size" in reads:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_size)
    if architecture.name in ("ernie4_5-moe", "llama4"):
        writer.add_interleave_moe_layer_step(mixed_interval(config) if architecture.name == "llama4" else 1)


def _write_scaling(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write how RoPE is scaled; llama3's scaling is a tensor."""
    import gguf

    if config.rope_scaling in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[config.rope_scaling.upper()])
    if config.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_factor(config.rope_factor)
    if config.rope_scaling in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_block_size)
    if config.rope_scaling == "longrope":
        writer.add_rope_scaling_attn_factors(config.rope_attention_factor)
    if config.rope_scaling == "yarn" and config.kv_latent_size:  # whose graph scales scores by a factor of its own
        scale = (config.attention_scale or config.head_size**-0.5) * config.head_size**0.5
        writer.add_rope_scaling_yarn_log_mul((scale**0.5 - 1) / math.log(config.rope_factor))
        writer.add_rope_scaling_yarn_beta_fast(config.rope_beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(config.rope_beta_slow)
    elif config.rope_scaling == "yarn":  # whose graph multiplies by the published factor of YaRN itself
        writer.add_rope_scaling_attn_factors(config.rope_attention_factor / (1 + 0.1 * math.log(config.rope_factor)))
        writer.add_rope_scaling_yarn_beta_fast(config.rope_beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(config.rope_beta_slow)


def _write_scales(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write the multipliers and limits of scores, logits and the residual stream that a graph reads."""
    writers = {
        "attention_softcap": writer.add_attn_logit_softcapping,
        "logit_softcap": writer.add_final_logit_softcapping,
        "attention_scale": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "clip_qkv": writer.add_clamp_kqv,
    }
    reads = _graph(config).reads
    for name, write in writers.items():
        if name in reads and getattr(config, name) is not None:
            write(getattr(config, name))
    if config.logit_softcap is None and _graph(config) is GEMMA4:  # whose graph takes 30 otherwise
        writer.add_final_logit_softcapping(0.0)
    if "logit_multiplier" in reads:  # Granite's graph divides by it, Cohere's multiplies
        writer.add_logit_scale(
            1 / config.logit_multiplier if config.family.startswith("granite") else config.logit_multiplier
        )


def rope_difference(config: ModelConfig) -> float:
    """The largest relative difference of a frequency, where llama.cpp rounds the ends of YaRN's ramp and we do not."""
    if config.rope_scaling != "yarn" or config.rope_truncate:
        return 0.0
    exponent = torch.arange(0, config.rotated, 2).float() / config.rotated
    ours, theirs = (
        scaled_frequency(replace(config, rope_truncate=rounds), exponent, torch.ones(1, 1, 1, 1))
        for rounds in (False, True)
    )
    return float((theirs / ours - 1).abs().max())


def _rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """Name -> (R/2,) float32: what scaling multiplies each wavelength by, where llama.cpp reads that as a tensor."""
    if config.rope_scaling == "longrope":
        found = {"long": config.rope_long_factors, "short": config.rope_short_factors}
        return {f"rope_factors_{name}.weight": torch.tensor(factors) for name, factors in found.items()}
    if config.rope_scaling not in ("llama3", "proportional"):
        return {}
    size = config.full_head_size or config.rotated
    exponent = torch.arange(0, size, 2).float() / size
    whole = 1.0 / config.rope_theta**exponent
    factors = whole / scaled_frequency(config, exponent, torch.ones(1, 1, 1, 1))
    return {"rope_freqs.weight": factors.clamp(max=STILL)}


def _ordered(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Arrange a tensor as llama.cpp's graph takes it.

    Its norms hold the one in their weight. Where its RoPE turns neighbours and ours does not, the rows of each head
    follow its order: feature i beside feature i + half.
    """
    layer = ".".join(name.split(".")[2:4])
    if layer.startswith("delta."):
        return _of_delta_net(layer, tensor, config)
    if layer == "conv.conv":
        return tensor.squeeze(1)
    if config.norm in ("rms_plus_one", "layer_plus_one") and "norm" in name and not name.endswith("bias"):
        return tensor.float() + 1
    if layer == "mlp.shared_gate":
        return tensor[0]
    if config.kv_latent_size and _graph(config).latent_absorbed and KEYS_VALUES.search(name):
        of_heads = tensor.unflatten(0, (config.n_head, -1))
        return of_heads.transpose(1, 2) if layer == "attn.key" else of_heads
    heads = {"attn.query": config.n_head, "attn.key": config.n_kv_head}
    if not _graph(config).neighbours or config.rope_interleaved or layer not in heads:
        return tensor
    by_head = tensor.unflatten(0, (heads[layer], -1))
    turned, rest = by_head.split((config.rotated, by_head.size(1) - config.rotated), dim=1)
    return torch.cat((turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), rest), dim=1).flatten(0, 1)


def _of_delta_net(layer: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A tensor of a gated delta net, with the heads of values in their order, or of a state space."""
    if config.state_space:
        tensor = -tensor.float().exp() if layer == "delta.decay_rate" else tensor
        rows = {"delta.decay_rate": -1, "delta.skip": -1, "delta.norm": config.delta_key_heads}.get(layer)
        return tensor.squeeze(1) if layer == "delta.conv" else tensor if rows is None else _as_rows(tensor, rows)
    if layer == "delta.conv":
        keys = 2 * config.delta_key_heads * config.delta_key_size
        of_keys, of_values = tensor.squeeze(1).split((keys, len(tensor) - keys))
        return torch.cat((of_keys, _tiled(of_values, config)))
    if layer == "delta.projection":
        return _tiled(tensor.T, config).T
    if layer in ("delta.query", "delta.key", "delta.norm"):
        return tensor
    return _tiled(-tensor.float().exp() if layer == "delta.decay_rate" else tensor, config)


def _as_rows(vector: Tensor, rows: int) -> Tensor:
    """(size,) -> (rows, size / rows); -1 for as many rows as numbers."""
    return vector.unflatten(0, (len(vector) if rows < 0 else rows, -1))


def _tiled(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows of all value heads in the order of Architecture.value_heads_tiled."""
    if not _graph(config).value_heads_tiled:
        return tensor
    return (
        tensor.unflatten(0, (config.delta_key_heads, config.delta_value_heads // config.delta_key_heads, -1))
        .transpose(0, 1)
        .flatten(0, 2)
    )


def _storage(name: str, spec: Tensor, kind: Kind) -> "GGMLQuantizationType":
    """The storage of a tensor: float32 for vectors, biases and routers, float16 where q8_0's blocks do not fit."""
    from gguf import GGMLQuantizationType

    if spec.ndim == 1 or name.endswith(".bias") or ".ffn_gate_inp" in name or name.endswith(STATES):
        return GGMLQuantizationType.F32
    if kind == "q8_0" and spec.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind.upper()]


def _announce(writer: "GGUFWriter", name: str, spec: Tensor, storage: "GGMLQuantizationType") -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    block, size = GGML_QUANT_SIZES[storage]
    plain: dict[Any, Any] = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    shape = tuple(spec.shape) if storage in plain else quant_shape_to_byte_shape(tuple(spec.shape), storage)
    dtype = np.dtype(plain.get(storage, np.uint8))
    writer.add_tensor_info(name, shape, dtype, spec.numel() // block * size, raw_dtype=storage)


def _write(writer: "GGUFWriter", name: str, tensor: Tensor, storage: "GGMLQuantizationType") -> None:
    from gguf.quants import quantize

    array = tensor.float().contiguous().numpy()
    largest = float(tensor.abs().max())
    if storage.name in ("F16", "Q8_0") and not largest < 65_504 * (127 if storage.name == "Q8_0" else 1):
        raise CheckpointError(
            f"{name} has values up to {largest:g}, which {storage.name.lower()} cannot hold. Use bf16."
        )
    writer.write_tensor_data(quantize(array, storage))
