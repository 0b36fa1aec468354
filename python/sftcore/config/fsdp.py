"""`--fsdp` and `--fsdp_config`, read into what FSDP is told.

Names are those of accelerate's plugin. A name that would do nothing here is an error that says what does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError

# names of accelerate and Transformers that mean something else here, or nothing
_REFUSED = {
    "activation_checkpointing": "--gradient_checkpointing true does it",
    "auto_wrap_policy": "each layer of the decoder is a unit; transformer_cls_names_to_wrap names others",
    "backward_prefetch": "FSDP2 orders its transfers itself",
    "cpu_ram_efficient_loading": "each process loads the model, tries it, and then takes it apart",
    "forward_prefetch": "FSDP2 orders its transfers itself",
    "fsdp_version": "FSDP2 is the one that runs",
    "limit_all_gathers": "FSDP2 needs no limit",
    "min_num_params": "each layer of the decoder is a unit; transformer_cls_names_to_wrap names others",
    "mixed_precision_policy": "--torch_dtype decides it",
    "sharding_strategy": "--fsdp names it",
    "sync_module_states": "all processes load the same files",
    "use_orig_params": "FSDP2 keeps the parameters as they are",
    "version": "FSDP2 is the one that runs",
}
_ALIASES = {
    "offload_params": "cpu_offload",
    "transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap",
}
_KNOWN = (
    "cpu_offload",
    "reshard_after_forward",
    "shard_size",
    "state_dict_type",
    "transformer_cls_names_to_wrap",
)
_STATES = {"full": False, "sharded": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpOptions:
    """What FSDP is told.

    Attributes:
        is_hybrid: Whether there are several whole copies of the model.
        reshard_after_forward: Whether the parameters of a unit are freed between forward and backward pass.
        cpu_offload: Whether parameters, gradients and optimizer lie in the memory of the host.
        shard_size: The processes that share a copy; None for those of a node.
        shards_state: Whether a checkpoint has the optimizer in a file for each process.
        layers: The classes whose modules are units; empty for the layers of the decoder.
    """

    is_hybrid: bool = False
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    shard_size: int | None = None
    shards_state: bool = False
    layers: tuple[str, ...] = ()


def read_fsdp_options(kind: str, given: dict[str, Any]) -> FsdpOptions:
    """Returns what FSDP is told.

    Args:
        kind: `--fsdp`.
        given: `--fsdp_config`, whose names may begin with `fsdp_`.

    Raises:
        ConfigError: A name is unknown or has no effect, or a value is wrong.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        plain = name if name in _REFUSED else name.removeprefix("fsdp_")
        plain = _ALIASES.get(plain, plain)
        if plain in _REFUSED:
            raise ConfigError(f"--fsdp_config {name} has no effect: {_REFUSED[plain]}")
        if plain not in _KNOWN:
            raise ConfigError(
                f"--fsdp_config {name} is unknown; expected some of {', '.join(_KNOWN)}{did_you_mean(plain, _KNOWN)}"
            )
        values[plain] = value
    for name in ("cpu_offload", "reshard_after_forward"):
        if not isinstance(values.get(name, False), bool):
            raise ConfigError(f"--fsdp_config {name}={values[name]}: expected true or false")
    size = values.get("shard_size")
    if size is not None:
        if kind != "hybrid_shard":
            raise ConfigError("--fsdp_config shard_size has no effect without --fsdp hybrid_shard")
        if not isinstance(size, int) or isinstance(size, bool) or size < 2:
            raise ConfigError(f"--fsdp_config shard_size={size}: expected a whole number from 2 on")
    if kind == "shard_grad_op" and values.get("reshard_after_forward"):
        raise ConfigError(
            "--fsdp_config reshard_after_forward=true contradicts --fsdp shard_grad_op; take --fsdp full_shard"
        )
    state = str(values.get("state_dict_type", "full")).lower().removesuffix("_state_dict")
    if state not in _STATES:
        raise ConfigError(
            f"--fsdp_config state_dict_type={values['state_dict_type']}: expected full or sharded"
        )
    layers = values.get("transformer_cls_names_to_wrap", [])
    layers = layers.split(",") if isinstance(layers, str) else layers
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ConfigError(
            f"--fsdp_config transformer_cls_names_to_wrap={layers}: expected names of classes, as LlamaDecoderLayer"
        )
    return FsdpOptions(
        is_hybrid=kind == "hybrid_shard",
        reshard_after_forward=values.get("reshard_after_forward", kind != "shard_grad_op"),
        cpu_offload=values.get("cpu_offload", False),
        shard_size=size,
        shards_state=_STATES[state],
        layers=tuple(layer.strip() for layer in layers),
    )
