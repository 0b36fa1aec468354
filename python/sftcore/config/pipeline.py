"""What cannot be trained in a pipeline of stages, said before anything is read."""

from __future__ import annotations

from typing import Any

from sftcore.config.tuner import WHOLE
from sftcore.errors import ConfigError

_TUNERS = (*WHOLE, "lora")
# these starts of a LoRA need no weights of the layers that another process has
_STARTS = ("true", "false", "gaussian")


def check_pipeline(config: Any) -> None:
    """Raises a ConfigError where a setting does not go with `--pipeline_parallel_size` above 1.

    Args:
        config: The settings of a run.
    """
    if config.pipeline_parallel_size == 1:
        return
    refused = {
        f"--tuner_type {config.tuner_type}": (
            config.tuner_type not in _TUNERS,
            f"stages train {', '.join(_TUNERS)}; take one of these",
        ),
        "--use_dora true": (
            config.use_dora,
            "the start of its norms needs the weights of all layers; leave it out",
        ),
        f"--init_weights {config.init_weights}": (
            config.init_weights not in _STARTS,
            f"it starts from the weights of all layers; expected one of {', '.join(_STARTS)}",
        ),
        f"--quant_bits {config.weight_bits}": (
            config.weight_bits is not None,
            "quantized layers cannot be left out when a model is loaded; leave one of them out",
        ),
        "--predict_with_generate true or --num_sample_generations": (
            config.generates,
            "no process has the whole model to answer with; ask the saved checkpoint with sftcore infer",
        ),
        "--torch_compile true": (
            config.torch_compile,
            "a stage is no whole model; leave it out",
        ),
        "--use_liger_kernel true": (
            config.use_liger_kernel,
            "it looks for all layers of the model; leave it out",
        ),
        "--torch_dtype float16": (
            config.torch_dtype == "float16",
            "stages would scale their losses apart; take bfloat16 or float32",
        ),
    }
    for setting, (is_asked, reason) in refused.items():
        if is_asked:
            raise ConfigError(
                f"{setting} cannot be used with --pipeline_parallel_size {config.pipeline_parallel_size}: {reason}"
            )
