"""What keys of LLaMA-Factory, Axolotl and PEFT are called in a recipe, for who brings them along."""

from __future__ import annotations

from collections.abc import Mapping

_TRAINING = (
    "bf16", "deepspeed", "eval_steps", "eval_strategy", "fp16", "gradient_accumulation_steps", "gradient_checkpointing",
    "hub_model_id", "learning_rate", "load_best_model_at_end", "logging_steps", "lr_scheduler_type", "max_grad_norm",
    "max_length", "max_steps", "neftune_noise_alpha", "num_train_epochs", "optim", "packing",
    "per_device_train_batch_size", "push_to_hub", "report_to", "save_steps", "save_total_limit", "use_liger_kernel",
    "warmup_steps", "weight_decay",
)  # fmt: skip

_OPPOSITE = "training.completion_only_loss, which is its opposite (of chats training.assistant_only_loss)"

HERE: Mapping[str, str] = {key: f"training.{key}" for key in _TRAINING} | {
    "base_model": "model",
    "model_name_or_path": "model",
    "model_revision": "revision",
    "revision_of_model": "revision",
    "torch_dtype": "dtype",
    "attn_implementation": "model_options.attn_implementation",
    "flash_attn": "model_options.attn_implementation",
    "flash_attention": "model_options.attn_implementation",
    "sdp_attention": "model_options.attn_implementation",
    "rope_scaling": "model_options.rope_parameters",
    "trust_remote_code": "model_options.trust_remote_code",
    "enable_liger_kernel": "training.use_liger_kernel",
    "output_dir": "output",
    "adapter": "method",
    "finetuning_type": "method",
    "load_in_4bit": "method: qlora",
    "quantization_bit": "method: qlora",
    "use_apollo": "method: apollo",
    "use_galore": "method: galore",
    "dataset": "data.train",
    "datasets": "data.train",
    "path": "source",
    "eval_dataset": "data.evaluation",
    "test_datasets": "data.evaluation",
    "val_set_size": "data.evaluation_share",
    "val_size": "data.evaluation_share",
    "max_samples": "data.limit, of all sources together",
    "chat_template": "training.chat_template_path",
    "template": "training.chat_template_path",
    "train_on_inputs": _OPPOSITE,
    "train_on_prompt": _OPPOSITE,
    "cutoff_len": "training.max_length",
    "max_seq_length": "training.max_length",
    "sequence_len": "training.max_length",
    "neat_packing": "training.packing",
    "sample_packing": "training.packing",
    "batch_size": "training.per_device_train_batch_size, of one step on one device",
    "micro_batch_size": "training.per_device_train_batch_size",
    "num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "warmup_ratio": "training.warmup_steps, a share where it is below 1",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_steps": "early_stopping.patience",
    "wandb_project": "training.report_to",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "alpha": "lora.scaling, lora_alpha/r",
    "lora_alpha": "lora.scaling, lora_alpha/r",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "lora_target_linear": "lora.targets",
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "additional_target": "lora.modules_to_save",
    "lora_modules_to_save": "lora.modules_to_save",
    "init_lora_weights": "lora.options.init_lora_weights",
    "peft_init_lora_weights": "lora.options.init_lora_weights",
    "pissa_init": "lora.options.init_lora_weights: pissa",
    "peft_use_dora": "lora.options.use_dora",
    "use_dora": "lora.options.use_dora",
    "peft_use_rslora": "lora.options.use_rslora",
    "use_rslora": "lora.options.use_rslora",
    "loraplus_lr_ratio": 'layerwise: {"*.lora_B": 16}',
    "galore_rank": "low_rank.rank",
    "apollo_rank": "low_rank.rank",
    "lisa_activated_layers": "sampling.active",
    "lisa_n_layers": "sampling.active",
    "lisa_interval_steps": "sampling.interval",
    "lisa_step_interval": "sampling.interval",
}
"""Our key, dotted, by theirs; where the value would mean something else here, that is said, too."""

LEAVE_OUT: Mapping[str, str] = {
    "type": "the form of records is told by their fields",
    "stage": "a recipe is of supervised fine-tuning",
    "do_train": "a recipe trains",
    "do_eval": "held-out records are asked for by data.evaluation",
    "overwrite_cache": "prepared data are not taken from another run",
    "overwrite_output_dir": "no folder is written over",
    "preprocessing_num_workers": "training.dataset_num_proc says how many processes prepare the data",
    "plot_loss": "the losses are in results.json, and their course is told at the end",
}
"""Why a key of theirs has no place here."""


def told(key: object) -> str:
    """What there is in place of an unknown `key`, in a few words; empty where it is none of theirs.

    Examples:
        >>> from htsr.finetuning.other_names import told
        >>> told("lora_r"), told("plot_loss").partition(":")[0], told("modell")
        ('here it is lora.rank', 'leave it out', '')
    """
    if not isinstance(key, str):
        return ""
    return f"here it is {HERE[key]}" if key in HERE else f"leave it out: {LEAVE_OUT[key]}" if key in LEAVE_OUT else ""
