"""The arguments of Transformers' Trainer: what there are, and which of them this project decides itself.

In comes the source of the installed version, read and not run, so that no flag loads torch; out go names, types and
defaults. Every argument is a setting of this project, handed on, not needed (a note), or refused with its reason.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sftcore.config.pairs import read_word
from sftcore.errors import ConfigError

# what another name says here
RENAMED = {
    "label_smoothing_factor": "label_smoothing",
    "activation_checkpointing": "gradient_checkpointing",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "torchdynamo": "torch_compile",
}

_LOADER = "the data engine prepares batches in threads of its own (--num_threads)"
_LOOP = "evaluation sums over trained tokens and keeps no predictions"

# accepted with a note that says why nothing is needed
NEEDLESS = {
    "do_train": "sftcore train trains, whatever it says",
    "do_eval": "evaluation follows --val_dataset and --split_dataset_ratio",
    "do_predict": "sftcore infer answers prompts",
    "remove_unused_columns": "a batch holds just what the model takes",
    "dataloader_num_workers": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "dataloader_pin_memory": "memory is pinned where there is a GPU",
    "dataloader_drop_last": "every row is trained once an epoch, the last ones too",
    "group_by_length": "batches are of like lengths, and all rows are drawn",
    "length_column_name": "lengths are measured, not read",
    "train_sampling_strategy": "batches are of like lengths, and all rows are drawn",
    "prediction_loss_only": _LOOP,
    "eval_do_concat_batches": _LOOP,
    "eval_use_gather_object": _LOOP,
    "eval_accumulation_steps": _LOOP,
    "batch_eval_metrics": _LOOP,
    "local_rank": "torchrun says it in LOCAL_RANK",
    "overwrite_output_dir": "a run writes into a folder of its own (--add_version)",
    "logging_dir": "TensorBoard writes into runs in the folder of the run",
    "save_safetensors": "weights are saved as safetensors",
    "include_tokens_per_second": "tokens per second are shown",
    "fp16_backend": "torch has one",
    "half_precision_backend": "torch has one",
    "use_mps_device": "the device is found",
    "dispatch_batches": "each rank prepares its own batches",
    "split_batches": "each rank prepares its own batches",
}

# these would change the run behind the back of the plan, the loss or the settings
REFUSED = {
    "auto_find_batch_size": "the plan of a run, its steps and its resume depend on the batch size; --test_oom runs the "
    "largest batch first",
    "label_names": "the loss is over labels",
    "logging_strategy": "losses are logged every --logging_steps",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint and ends the run, without it",
    "include_for_metrics": "metrics are counted over trained tokens as they pass; they take no arrays",
    "use_cache": "a cache of keys and values makes packed batches wrong",
    "accelerator_config": "batches come ready for each rank and accelerate prepares none",
    "bf16_full_eval": "evaluation is in the dtype of training, so that losses compare (--torch_dtype)",
    "fp16_full_eval": "evaluation is in the dtype of training, so that losses compare (--torch_dtype)",
    "activation_checkpointing_kwargs": "--gradient_checkpointing_kind says how activations are computed again",
    "gradient_checkpointing_kwargs": "--gradient_checkpointing_kind says how activations are computed again",
    "liger_kernel_config": "the loss is computed here, a chunk at a time, and Liger's other kernels are all on",
    "average_tokens_across_devices": "the loss is the mean over the trained tokens of all ranks",
    "parallelism_config": "--tensor_parallel_size and --sequence_parallel_size say it",
    "past_index": "Transformers dropped it",
    "jit_mode_eval": "Transformers dropped it; --torch_compile compiles",
    "ray_scope": "Transformers dropped it",
    "tpu_num_cores": "Transformers dropped it",
}

# what is to come: refused, unless it is off
NOT_YET = {
    "push_to_hub": "sending models to a hub",
    "hub_model_id": "sending models to a hub",
    "hub_token": "sending models to a hub",
    "hub_private_repo": "sending models to a hub",
    "hub_strategy": "sending models to a hub",
    "hub_always_push": "sending models to a hub",
    "hub_revision": "sending models to a hub",
    "push_to_hub_token": "sending models to a hub",
    "push_to_hub_model_id": "sending models to a hub",
    "push_to_hub_organization": "sending models to a hub",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """One argument of `TrainingArguments`.

    Attributes:
        name: Its name.
        kinds: What it may be, as the annotation writes it: `int`, `float`, `None`, `dict`, `list[str]`, ...
        default: The value where none is given; None also where the source computes it.
    """

    name: str
    kinds: tuple[str, ...]
    default: Any


@cache
def read_training_arguments() -> dict[str, Argument]:
    """Returns the arguments of the installed Transformers by name; none where it is not installed."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
    arguments = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    kinds = tuple(part.strip() for part in ast.unparse(line.annotation).split("|"))
                    name = line.target.id
                    arguments[name] = Argument(name=name, kinds=kinds, default=_default(line.value))
    return arguments


def _default(value: ast.expr | None) -> Any:
    if not isinstance(value, ast.Call):
        return None
    for keyword in value.keywords:
        if keyword.arg == "default" and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
        if keyword.arg == "default_factory":
            return []
    return None


def convert(argument: Argument, value: Any) -> Any:
    """Returns a value of a flag, a file or code as the argument takes it.

    Raises:
        ConfigError: It is of none of the kinds.
    """
    kinds = argument.kinds
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ConfigError(f"--{argument.name} {value} is no JSON: {error}") from error
        elif value.lower() in ("yes", "no") and "bool" in kinds and "str" not in kinds:
            value = value.lower() == "yes"
        else:
            word = read_word(value)
            # a word that reads as a number stays one where a string is wanted
            # `--report_to none` is a word too
            is_word = word is None and "str" in kinds and value.lower() == "none"
            value = word if _fits(word, kinds) and not is_word else value
    has_list = any(kind.startswith("list") for kind in kinds)
    if has_list and isinstance(value, str) and "str" not in kinds:
        value = [part for part in value.split(",") if part]
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and "int" not in kinds
        and "float" in kinds
    ):
        value = float(value)
    if not _fits(value, kinds):
        raise ConfigError(f"--{argument.name} is {value!r}; expected {' or '.join(kinds)}")
    return value


def _fits(value: Any, kinds: tuple[str, ...]) -> bool:
    if value is None:
        return "None" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, int):
        return "int" in kinds or "float" in kinds
    if isinstance(value, float):
        return "float" in kinds
    if isinstance(value, dict):
        return any(kind.startswith("dict") for kind in kinds)
    if isinstance(value, list):
        return any(kind.startswith("list") for kind in kinds)
    # enumerations of Transformers are written as their values
    return isinstance(value, str) and any(
        kind == "str" or (kind[0].isupper() and kind != "None" and not kind.startswith("Literal"))
        for kind in kinds
    )
