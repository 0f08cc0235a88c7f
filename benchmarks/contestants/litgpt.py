"""litgpt, with random weights of its own."""

from typing import TYPE_CHECKING

from shapes import SHAPES

from contestants.task import Built, Micro, Task

if TYPE_CHECKING:
    from torch import Tensor


def build(task: Task) -> Built:
    """As its own finetune/lora.py does it."""
    import torch
    from lightning import Fabric
    from lightning.fabric.plugins import BitsandbytesPrecision
    from litgpt.lora import GPT, Block, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    if task.workload == "packed":
        raise NotImplementedError("litgpt packs no examples")
    shape, every = SHAPES[task.shape], task.targets == "all"
    config = Config(
        name=task.shape,
        block_size=shape["block_size"],
        n_layer=shape["n_layer"],
        n_embd=shape["n_embd"],
        n_head=shape["n_head"],
        n_query_groups=shape["n_kv_head"],
        head_size=shape["head_size"],
        intermediate_size=shape["ffn_size"],
        padded_vocab_size=shape["vocab_size"],
        rope_base=int(shape.get("rope_theta", 10_000)),
        rotary_percentage=1.0,
        norm_class_name="RMSNorm",
        norm_eps=shape["norm_eps"],
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        bias=False,
        lora_r=task.r,
        lora_alpha=16,
        lora_dropout=task.dropout,
        lora_query=True,
        lora_key=every,
        lora_value=True,
        lora_projection=every,
        lora_mlp=every,
    )
    storage = {"plugins": BitsandbytesPrecision("nf4-dq", torch.bfloat16)} if task.quantize else {}
    fabric = Fabric(devices=1, **(storage or {"precision": "bf16-true"}))  # the GPU if there is one
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model.max_seq_length = max(task.length, 512)
    if task.checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    model = fabric.setup_module(model)

    def loss(micro: Micro) -> "Tensor":
        logits = model(micro.ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        value: Tensor = chunked_cross_entropy(logits, micro.ids[..., 1:])
        return value

    return Built(model.train(), loss)
