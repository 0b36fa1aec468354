"""The names that users of ms-swift know, of its first versions and of today's, as tables.

A name is a setting of this project by another name, a value by another name, something that needs nothing here, or
something that is to come. `sftcore.config.translate` applies them; `docs/flags.md` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftcore.config import training_arguments as transformers

_DTYPES = {"AUTO": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_HUB = "sending models to a hub"


def is_true(value: Any) -> bool:
    """Whether a value of a flag or a file says yes."""
    return str(value).lower() in ("true", "yes", "1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What a command takes besides its settings.

    Attributes:
        renamed: The old name to the setting.
        values: The setting to old values and what they are now; compared without case.
        converted: The old name to a function of its value that gives settings; none where nothing is needed.
        combined: Old names that depend on other settings.
        needless: The old name to why nothing is needed.
        refused: The old name to why it is refused.
        not_yet: The old name to the feature that is to come, and the values that ask for nothing.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    converted: Mapping[str, Callable[[Any], dict[str, Any]]] = field(default_factory=dict)
    combined: frozenset[str] = frozenset()
    needless: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    not_yet: Mapping[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)

    def all(self) -> set[str]:
        """All old names."""
        return {
            *self.renamed,
            *self.converted,
            *self.combined,
            *self.needless,
            *self.refused,
            *self.not_yet,
        }


def _quantization(value: Any) -> dict[str, Any]:
    if str(value) == "0":
        return {}
    return {"quant_method": "bnb", "quant_bits": value}


def _checkpoint(value: Any) -> dict[str, Any]:
    # a checkpoint of a full run is a model; one that is not there yet is most likely an adapter's
    folder = Path(str(value)).expanduser()
    is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    return {"model" if is_model else "adapters": value}


def _when(name: str, setting: Any) -> Callable[[Any], dict[str, Any]]:
    """A flag that, where true, stands for one value of a setting."""
    return lambda value: {name: setting} if is_true(value) else {}


_FLASH = _when("attn_impl", "flash_attention_2")
_ONE_PROCESS = "batches are prepared by threads of the data engine (--num_threads)"
_NO_CACHE = "rows are encoded as they are trained; there is no token cache"

TRAIN = Names(
    renamed={
        **transformers.RENAMED,
        "model_id_or_path": "model",
        "sft_type": "tuner_type",
        "train_type": "tuner_type",
        "additional_trainable_parameters": "trainable_parameters",
        "template_type": "template",
        "add_output_dir_suffix": "add_version",
        "dataset_seed": "data_seed",
        "dtype": "torch_dtype",
        "dataset_test_ratio": "split_dataset_ratio",
        "check_dataset_strategy": "on_bad_row",
        "bnb_4bit_comp_dtype": "bnb_4bit_compute_dtype",
        "lora_target_modules": "target_modules",
        "lora_dropout_p": "lora_dropout",
        "lora_bias_trainable": "lora_bias",
        "lora_modules_to_save": "modules_to_save",
        "lora_lr_ratio": "lorap_lr_ratio",
        "galore_target_modules": "optim_target_modules",
        "batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "test_oom_error": "test_oom",
        "custom_dataset_info": "dataset_info",
        "interleave_prob": "mix",
    },
    values={
        "torch_dtype": _DTYPES,
        "lora_dtype": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "AUTO": None},
        "bnb_4bit_compute_dtype": {**_DTYPES, "AUTO": None},
        "template": {"AUTO": "auto"},
        "attn_impl": {
            "flash_attn": "flash_attention_2",
            "flash_attention": "flash_attention_2",
            "flash_attn_2": "flash_attention_2",
            "flash_attn_3": "flash_attention_3",
            "flex_attn": "flex_attention",
        },
        "truncation_strategy": {"truncation_left": "left", "truncation_right": "right"},
        "on_bad_row": {
            "none": "raise",
            "error": "raise",
            "discard": "skip",
            "warning": "skip",
        },
        "fsdp": {"full_shard auto_wrap": "full_shard", "true": "fsdp2", "false": None, "": None},
        "deepspeed": {"default-zero2": "zero2", "default-zero3": "zero3"},
        "target_modules": {"ALL": "all-linear", "AUTO": "DEFAULT"},
        "acc_strategy": {"sentence": "seq"},
        "lr_scheduler_type": {
            "wsd": "warmup_stable_decay",
            "cosine_with_hard_restarts": "cosine_with_restarts",
        },
    },
    converted={
        "use_flash_attn": _FLASH,
        "use_loss_scale": _when("loss_scale", "react"),
        "quantization_bit": _quantization,
        "bf16": _when("torch_dtype", "bfloat16"),
        "fp16": _when("torch_dtype", "float16"),
        "no_cuda": _when("use_cpu", True),
        "adafactor": _when("optim", "adafactor"),
        "strict": lambda value: {"on_bad_row": "raise" if is_true(value) else "skip"},
        "adapters": lambda value: {"resume_from_checkpoint": value, "resume_only_model": True},
    },
    combined=frozenset(
        {
            "model_type",
            "freeze_parameters",
            "custom_train_dataset_path",
            "custom_val_dataset_path",
            "train_dataset_sample",
            "val_dataset_sample",
            "self_cognition_sample",
            "train_dataset_mix_ratio",
            "train_dataset_mix_ds",
            "use_galore",
            "galore_rank",
            "galore_update_proj_gap",
            "galore_scale",
            "galore_proj_type",
            "enable_thinking",
        }
    ),
    needless={
        **transformers.NEEDLESS,
        "tuner_backend": "adapters are PEFT's",
        "preprocess_num_proc": _ONE_PROCESS,
        "dataset_num_proc": _ONE_PROCESS,
        "packing_num_proc": _ONE_PROCESS,
        "lazy_tokenize": _NO_CACHE,
        "load_from_cache_file": _NO_CACHE,
        "packing_strategy": "packs are filled by best fit over the whole epoch, anew each epoch",
        "val_dataset_shuffle": "evaluation takes its rows in the order of the files",
        "ignore_args_error": "an unknown flag is an error, also in a notebook",
        "ddp_backend": "torch takes nccl on GPUs and gloo elsewhere",
    },
    refused={
        **transformers.REFUSED,
        "cached_dataset": "there is no token cache; name the files themselves with --dataset",
        "galore_optim_per_parameter": "it updates weights inside the backward pass, where accumulated micro-batches, "
        "clipping and an exact resume do not hold",
        "galore_with_embedding": "name the layers with --optim_target_modules",
        "galore_quantization": "galore-torch has no Q-GaLore; --optim galore_adamw_8bit has 8-bit states",
    },
    not_yet={
        **{name: (feature, (None, False, "")) for name, feature in transformers.NOT_YET.items()},
        "hub_private_repo": (_HUB, (None, False, "")),
        "hub_strategy": (_HUB, (None, "every_save")),
        "push_hub_strategy": (_HUB, (None, "push_best")),
        "model_revision": ("a revision of a model", (None, "", "master", "main")),
        "external_plugins": ("plug-ins", (None, "", [])),
        "custom_register_path": ("plug-ins", (None, "", [])),
        "loss_scale": ("weights by rules for parts of an answer", (None, "default")),
        "dataset_shuffle": ("an order that is not shuffled", (None, True)),
        "train_dataloader_shuffle": ("an order that is not shuffled", (None, True)),
    },
)

_BACKENDS = (None, "", "AUTO", "auto", "pt", "transformers")

INFER = Names(
    renamed={
        "model_id_or_path": "model",
        "template_type": "template",
        "dtype": "torch_dtype",
        "custom_val_dataset_path": "prompts",
        "val_dataset": "prompts",
        "result_path": "output",
    },
    values={"torch_dtype": _DTYPES, "template": {"AUTO": "auto"}},
    converted={
        "ckpt_dir": _checkpoint,
        "quantization_bit": _quantization,
    },
    combined=frozenset({"model_type", "do_sample"}),
    needless={
        "sft_type": "the checkpoint says what kind of tuner it is",
        "train_type": "the checkpoint says what kind of tuner it is",
        "tuner_type": "the checkpoint says what kind of tuner it is",
        "tuner_backend": "adapters are PEFT's",
        "eval_human": "a chat starts where no prompts are given",
        "stream": "a chat streams, and a file of answers is written line by line",
        "merge_lora": "an adapter answers as its merged model does; sftcore merge writes that",
        "ignore_args_error": "an unknown flag is an error, also in a notebook",
        "max_length": "a prompt is never cut",
        "truncation_strategy": "a prompt is never cut",
        "check_dataset_strategy": "prompts are checked as they are read",
        "use_hf": "a model id is looked for on the Hugging Face hub",
        "use_flash_attn": "answers are those of any kernel, and Transformers chooses one",
        "attn_impl": "answers are those of any kernel, and Transformers chooses one",
    },
    not_yet={
        "infer_backend": ("another engine than Transformers", _BACKENDS),
        "load_dataset_config": ("answering the evaluation rows of a run", (None, False)),
        "show_dataset_sample": ("answering the evaluation rows of a run", (None, -1)),
        "val_dataset_sample": ("answering a part of the prompts", (None, -1)),
        "model_revision": ("a revision of a model", (None, "", "master", "main")),
    },
)

MERGE = Names(
    renamed={
        "model_id_or_path": "model",
        "dtype": "torch_dtype",
        "ckpt_dir": "adapters",
        "replace_if_exists": "overwrite",
        "exist_ok": "overwrite",
    },
    values={"torch_dtype": _DTYPES},
    combined=frozenset({"model_type"}),
    needless={
        "sft_type": "the checkpoint says what kind of tuner it is",
        "train_type": "the checkpoint says what kind of tuner it is",
        "template_type": "the checkpoint holds its template",
        "template": "the checkpoint holds its template",
        "merge_lora": "it is what sftcore merge does",
        "merge_device_map": "weights are merged where there is room for them",
        "device_map": "weights are merged where there is room for them",
        "safe_serialization": "weights are saved as safetensors",
        "ignore_args_error": "an unknown flag is an error, also in a notebook",
        "use_hf": "a model id is looked for on the Hugging Face hub",
    },
    not_yet={"model_revision": ("a revision of a model", (None, "", "master", "main"))},
)

# by the name of the dataclass of settings, which this module does not import
COMMANDS = {"TrainConfig": TRAIN, "InferConfig": INFER, "MergeConfig": MERGE}
