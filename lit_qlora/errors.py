"""Errors that a user can fix. Any other exception is a bug of ours and keeps its traceback."""

LONGEST_LINE = 2000
"""Characters of a line of a message."""


class UserError(Exception):
    """An error that the user can fix.

    The message has one to three lines: the location, the fault, the remedy. A command prints it without a traceback
    and exits with `status`.
    """

    status = 2
    prefix = "error: "

    def __str__(self) -> str:
        """The message; of a line with a value of thousands of letters, the beginning and the end."""
        lines = super().__str__().split("\n")
        return "\n".join(f"{line[:1000]} ... {line[-500:]}" if len(line) > LONGEST_LINE else line for line in lines)


class UsageError(UserError):
    """A flag, a config file or a combination of settings is wrong."""


class DataError(UserError):
    """The data set cannot be read, or holds nothing to train on."""

    status = 3


class CheckpointError(UserError):
    """A checkpoint, tokenizer or adapter is missing, damaged, or does not fit."""

    status = 4


class NumericalError(UserError):
    """A loss or a gradient is infinite or NaN."""

    status = 5


class ResourceError(UserError):
    """The machine lacks something: disk, memory, a permission."""

    status = 6


OTHER_NAMES = {
    # Flags of qlora.py, PEFT, TRL, transformers, Lit-GPT and H2O LLM Studio.
    "--bits": "--quantize bnb.nf4 (4 bit) or bnb.int8 (8 bit)",
    "--load_in_4bit": "--quantize bnb.nf4",
    "--load_in_8bit": "--quantize bnb.int8",
    "--double_quant": "--quantize bnb.nf4-dq",
    "--quant_type": "--quantize bnb.nf4 or bnb.fp4",
    "--gradient_checkpointing": "--train.recompute full",
    "--model_name_or_path": "--checkpoint_dir",
    "--llm_backbone": "--checkpoint_dir",
    "--output_dir": "--out_dir",
    "--output_directory": "--out_dir",
    "--dataset": "--data.path",
    "--dataset_name": "--data.path",
    "--data_dir": "--data.path",
    "--train_dataframe": "--data.path",
    "--validation_dataframe": "--data.val_path",
    "--max_seq_length": "--data.max_length",
    "--max_length": "--data.max_length",
    "--source_max_len": "--data.max_length_prompt",
    "--target_max_len": "--data.max_length_answer",
    "--train_on_source": "--data.mask_prompt false",
    "--mask_prompt_labels": "--data.mask_prompt",
    "--packing": "--data.packing",
    "--padding_quantile": "--data.length_quantile",
    "--token_mask_probability": "--data.token_dropout",
    "--intermediate_dropout": "--train.hidden_dropout",
    "--hidden_dropout_prob": "--train.hidden_dropout",
    "--group_by_length": "--data.group_by_length",
    "--drop_last_batch": "--data.drop_last",
    "--lora_r": "--lora.r",
    "--lora_alpha": "--lora.alpha",
    "--lora_dropout": "--lora.dropout",
    "--lora_modules": "--lora.targets",
    "--lora_target_modules": "--lora.targets",
    "--target_modules": "--lora.targets",
    **dict.fromkeys(
        (f"--lora_{name}" for name in ("query", "key", "value", "projection", "mlp", "head")), "--lora.targets"
    ),
    "--use_rslora": "--lora.rslora",
    "--use_dora": "--lora.dora",
    "--num_train_epochs": "--train.epochs",
    "--epochs": "--train.epochs",
    "--max_steps": "--train.max_steps",
    "--learning_rate": "--train.learning_rate",
    "--lr_scheduler_type": "--train.schedule",
    "--schedule": "--train.schedule",
    "--warmup_ratio": "--train.warmup",
    "--warmup_steps": "--train.warmup",
    "--warmup_epochs": "--train.warmup_epochs",
    "--weight_decay": "--train.weight_decay",
    "--max_grad_norm": "--train.max_norm",
    "--gradient_clip": "--train.max_norm",
    "--neftune_noise_alpha": "--train.neftune",
    "--router_aux_loss_coef": "--train.router_balance_loss",
    "--router_z_loss_coef": "--train.router_z_loss",
    "--per_device_train_batch_size": "--train.micro_batch_size",
    "--micro_batch_size": "--train.micro_batch_size",
    "--gradient_accumulation_steps": "--train.batch_size, the samples of a whole step",
    "--grad_accumulation": "--train.batch_size, the samples of a whole step",
    "--optim": "--optimizer.name",
    "--rope_scaling": "--lora.rope_scaling",
    "--save_steps": "--train.save_every",
    "--save_total_limit": "--train.keep_last",
    "--eval_steps": "--eval.every",
    "--evaluation_epochs": "--eval.epochs",
    "--evaluate_before_training": "--eval.before_training",
    "--do_mmlu_eval": "--eval.tasks [mmlu]",
    "--metric": "--eval.best",
    "--metric_gpt_model": "--eval.judge_model",
    "--metric_gpt_template": "--eval.judge_prompt",
    "--openai_api_token": "--eval.judge_key_variable, the name of a variable of the environment",
    "--report_to": "--log.to",
    "--bf16": "--precision bf16-true",
    "--fp16": "--precision 16-mixed",
    "--backbone_dtype": "--precision",
    # More of TRL, transformers, axolotl, Unsloth and LitGPT.
    **dict.fromkeys(("--base_model", "--model_name", "--model", "--pretrained_model"), "--checkpoint_dir"),
    **dict.fromkeys(("--load_best_model_at_end", "--metric_for_best_model"), "--eval.best, which OUT/best links to"),
    **dict.fromkeys(("--datasets", "--train_file", "--dataset_path", "--train_data"), "--data.path"),
    **dict.fromkeys(("--validation_file", "--eval_file", "--test_datasets"), "--data.val_path"),
    **dict.fromkeys(("--val_set_size", "--val_split_fraction", "--validation_split_percentage"), "--data.val_fraction"),
    **dict.fromkeys(("--sequence_len", "--cutoff_len", "--block_size", "--model_max_length"), "--data.max_length"),
    **dict.fromkeys(("--sample_packing", "--neat_packing"), "--data.packing"),
    **dict.fromkeys(("--train_on_inputs", "--train_on_prompt"), "--data.mask_prompt false"),
    **dict.fromkeys(
        ("--completion_only_loss", "--assistant_only_loss", "--train_on_responses_only"), "--data.mask_prompt"
    ),
    **dict.fromkeys(("--chat_template", "--prompt_style", "--prompt_template", "--template"), "--data.prompt"),
    **dict.fromkeys(("--dataset_text_field", "--field_messages"), "--data.columns"),
    **dict.fromkeys(("--max_train_samples", "--max_samples"), "--data.max_samples"),
    **dict.fromkeys(("--max_eval_samples", "--max_iters"), "--eval.max_samples"),
    **dict.fromkeys(("--beta", "--dpo_beta", "--pref_beta", "--rl_beta", "--kto_beta"), "--preference.beta"),
    **dict.fromkeys(("--loss_type", "--pref_loss", "--rl"), "--preference.loss"),
    **dict.fromkeys(("--simpo_gamma", "--gamma_beta_ratio"), "--preference.gamma"),
    **dict.fromkeys(("--cpo_alpha", "--rpo_alpha", "--pref_ftx"), "--preference.sft_weight"),
    **{f"--{name}": f"--preference.{name}" for name in ("ld_alpha", "desirable_weight", "undesirable_weight")},
    "--dpo_label_smoothing": "--preference.label_smoothing",
    **dict.fromkeys(("--teacher_model_name_or_path", "--teacher_model", "--teacher"), "--distill.teacher"),
    "--kd_temperature": "--distill.temperature",
    **dict.fromkeys(("--num_labels", "--problem_type"), "--head classify or regress, which counts the labels"),
    "--lora_rank": "--lora.r",
    "--rank": "--lora.r",
    "--lora_target_linear": "--lora.targets all",
    "--lora_target": "--lora.targets",
    "--init_lora_weights": "--lora.init",
    "--loraplus_lr_ratio": "--optimizer.lora_plus",
    "--num_epochs": "--train.epochs",
    "--max_epochs": "--train.epochs",
    "--lr": "--train.learning_rate",
    "--lr_scheduler": "--train.schedule",
    "--lr_warmup_steps": "--train.warmup",
    "--gradient_clip_val": "--train.max_norm",
    "--global_batch_size": "--train.batch_size",
    "--use_gradient_checkpointing": "--train.recompute full",
    "--noisy_embedding_alpha": "--train.neftune",
    "--save_interval": "--train.save_every",
    "--resume_from_checkpoint": "--resume",
    "--auto_resume_from_checkpoints": "--resume",
    "--overwrite_output_dir": "--resume never",
    **dict.fromkeys(("--evaluation_strategy", "--eval_strategy", "--evals_per_epoch", "--interval"), "--eval.every"),
    "--early_stopping_patience": "--eval.patience",
    "--run_name": "--out_dir",
    "--random_state": "--seed",
    "--optimizer": "--optimizer.name",
    **{f"--adam_{name}": "--optimizer.betas" for name in ("beta1", "beta2")},
    "--adam_epsilon": "--optimizer.eps",
    "--full_determinism": "--deterministic",
    **dict.fromkeys(
        ("--context_parallel_size", "--sequence_parallel_size", "--sequence_parallel_degree"), "--sequence_parallel"
    ),
    "--ddp_timeout": "--collective_timeout",
    "--dtype": "--precision",
    # Values of such flags.
    **dict.fromkeys(("q_proj", "wq"), "query"),
    **dict.fromkeys(("k_proj", "wk"), "key"),
    **dict.fromkeys(("v_proj", "wv"), "value"),
    **dict.fromkeys(("o_proj", "wo", "out_proj", "dense"), "projection"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "fc1", "fc2"), "mlp"),
    "lm_head": "head",
    "all-linear": "all",
    **dict.fromkeys(("4", "4bit", "nf4", "bnb"), "bnb.nf4"),
    **dict.fromkeys(("8", "8bit", "int8"), "bnb.int8"),
    "fp4": "bnb.fp4",
    **dict.fromkeys(("bf16", "bfloat16"), "bf16-true"),
    **dict.fromkeys(("fp16", "float16"), "16-mixed"),
    **dict.fromkeys(("fp32", "float32", "32"), "32-true"),
    "cosine_with_restarts": "cosine-restarts",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    "adamw_bnb_8bit": "adamw8bit",
}
"""What other programs call a flag or a value -> what we do."""


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return ' Did you mean X?' for another program's name of X, or for the nearest known word, or ''."""
    from difflib import get_close_matches

    bare = f"--{word.rpartition('.')[2]}" if word.startswith("--") else word  # theirs, in a section of ours
    ours = OTHER_NAMES.get(word.lower()) or OTHER_NAMES.get(bare.lower(), "")
    if ours.split(" ")[0].rstrip(",") in known:
        return f" Did you mean {ours}?"
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
