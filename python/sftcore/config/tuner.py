"""Which parameters are trained."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from sftcore.config.ranges import check_effects, check_least, check_positive, check_share
from sftcore.errors import ConfigError

LOW_RANK = ("lora", "adalora", "sora")
RANKED = ("lora", "sora", "loha", "lokr", "hra", "miss")
WHOLE = ("full", "freeze")
ALL_LINEAR = ("all-linear", "ALL", "all")
_INITS = ("true", "false", "gaussian", "orthogonal", "pissa", "olora", "loftq")
_REFUSED_INITS = {
    "eva": "it reads activations of the training data before the first step",
    "corda": "it reads activations of the training data before the first step",
    "lora-ga": "it reads gradients of the training data before the first step",
}


@dataclass(frozen=True, kw_only=True)
class TunerConfig:
    """Tuner. Which parameters are trained."""

    tuner_type: Literal[
        "lora",
        "adalora",
        "sora",
        "ia3",
        "vera",
        "oft",
        "boft",
        "loha",
        "lokr",
        "hra",
        "miss",
        "fourierft",
        "full",
        "freeze",
    ] = "lora"
    """lora and its kin train a small adapter beside frozen weights; full trains all weights, freeze some of them."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """What an adapter is put on: all-linear (every linear layer but the head), DEFAULT (what PEFT takes for this kind
    of model), names of modules, EMBEDDING, or LN (norms, which are trained whole)."""
    target_regex: str | None = None
    """In place of --target_modules, a regular expression that whole names of modules match."""
    exclude_modules: list[str] = field(default_factory=list)
    """Names of modules that --target_modules would name, and that stay without an adapter."""
    layers_to_transform: list[int] = field(default_factory=list)
    """Numbers of the layers that get an adapter; all of them where not given."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained whole beside the adapter and saved in it: names, EMBEDDING (with the head, where they are
    tied), or LN (all norms)."""
    new_special_tokens: list[str] = field(default_factory=list)
    """Tokens to add to the tokenizer: names, or template for the control tokens of the chat template that the tokenizer
    does not know. Their rows of embedding and head start at the mean of the others and are trained, with an adapter
    these rows alone."""
    lora_rank: int = 8
    """The rank of the matrices of an adapter."""
    lora_alpha: float = 32.0
    """The update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA matrices."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the model are trained: none, all, or those of modules with an adapter."""
    lora_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of the adapter; float32 where not given, also beside half-precision weights."""
    use_rslora: bool = False
    """Scales by lora_alpha / sqrt(lora_rank), which suits high ranks (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Trains the norm of each column of a weight apart from its direction (Liu et al. 2024)."""
    lorap_lr_ratio: float | None = None
    """LoRA+: the learning rate of B matrices over that of A matrices, usually 10 to 16 (Hayou et al. 2024)."""
    init_weights: str = "true"
    """Where a LoRA starts: true (B is 0), gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq (quantized
    weights), false (no start at 0)."""
    adalora_target_r: int = 8
    """AdaLoRA: the mean rank at the end (Zhang et al. 2023)."""
    adalora_init_r: int = 12
    """AdaLoRA: the rank of every module at the start."""
    adalora_tinit: int = 0
    """AdaLoRA: steps before ranks begin to fall."""
    adalora_tfinal: int = 0
    """AdaLoRA: steps at the end in which ranks stay as they are."""
    adalora_deltaT: int = 1  # noqa: N815  users know it so
    """AdaLoRA: steps between two allocations of ranks."""
    adalora_beta1: float = 0.85
    """AdaLoRA: the decay of the mean of sensitivities."""
    adalora_beta2: float = 0.85
    """AdaLoRA: the decay of the mean of their uncertainty."""
    adalora_orth_reg_weight: float = 0.5
    """AdaLoRA: the weight of the loss that keeps singular vectors orthogonal."""
    sora_lambda: float = 0.4
    """SoRA: each step moves every gate by its learning rate times this towards 0; more prunes more ranks
    (Ding et al. 2023)."""
    sora_lr: float | None = None
    """SoRA: the learning rate of the gates; 100 times --learning_rate where not given, as a gate has a way of about
    1 to go."""
    vera_rank: int = 256
    """VeRA: the rank of the frozen random matrices, which all modules share (Kopiczko et al. 2024)."""
    vera_projection_prng_key: int = 0
    """VeRA: the seed of these matrices."""
    vera_dropout: float = 0.0
    """VeRA: dropout on the input."""
    vera_d_initial: float = 0.1
    """VeRA: the value that trained vectors start from."""
    oft_block_size: int = 32
    """OFT: the size of the orthogonal blocks that turn a weight (Qiu et al. 2023)."""
    boft_block_size: int = 4
    """BOFT: the size of the orthogonal blocks (Liu et al. 2024)."""
    boft_n_butterfly_factor: int = 1
    """BOFT: how many butterfly factors a turn is made of."""
    boft_dropout: float = 0.0
    """BOFT: the share of blocks that stay as they are in a step."""
    fourier_n_frequency: int = 2000
    """FourierFT: the trained frequencies of the update of each weight (Gao et al. 2024)."""
    fourier_scaling: float = 300.0
    """FourierFT: what the update is scaled by."""
    freeze_parameters: list[str] = field(default_factory=list)
    """Beginnings of names of parameters that are not trained."""
    freeze_parameters_regex: str | None = None
    """A regular expression found in the names of parameters that are not trained."""
    freeze_parameters_ratio: float = 0.0
    """This share of all parameters, counted from the embedding up, is not trained."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Beginnings of names of parameters that are trained whatever the three settings above say; without any of
    these, nothing else is trained."""
    trainable_parameters_regex: str | None = None
    """A regular expression found in the names of parameters that are trained, as --trainable_parameters."""

    @property
    def trains_weights(self) -> bool:
        """Whether weights of the model itself are trained, not an adapter beside them."""
        return self.tuner_type in WHOLE

    def _check_tuner(self) -> None:
        check_least(self, 1, "lora_rank", "adalora_target_r", "adalora_init_r", "adalora_deltaT")
        check_least(self, 1, "vera_rank", "boft_block_size", "boft_n_butterfly_factor")
        check_least(self, 2, "oft_block_size")
        check_least(self, 1, "fourier_n_frequency")
        check_least(self, 0, "adalora_tinit", "adalora_tfinal", "adalora_orth_reg_weight")
        check_least(self, 0, "sora_lambda")
        check_positive(self, "lora_alpha", "sora_lr", "lorap_lr_ratio", "vera_d_initial")
        check_positive(self, "adalora_beta1", "adalora_beta2", "fourier_scaling")
        check_share(self, "lora_dropout", "vera_dropout", "boft_dropout", "adalora_beta1")
        check_share(self, "adalora_beta2", "freeze_parameters_ratio")
        self._check_tuner_effects()
        self._check_init()
        self._check_new_tokens()
        for name in ("target_regex", "freeze_parameters_regex", "trainable_parameters_regex"):
            _check_regex(name, getattr(self, name))
        if self.target_regex and self.target_modules != ["all-linear"]:
            raise ConfigError("--target_regex and --target_modules exclude each other")
        if self.tuner_type == "adalora" and self.adalora_target_r > self.adalora_init_r:
            raise ConfigError(
                f"--adalora_target_r {self.adalora_target_r} is out of range: expected at most --adalora_init_r "
                f"{self.adalora_init_r}, where ranks start"
            )
        if self.tuner_type == "freeze" and not self.names_frozen_parameters:
            raise ConfigError(
                "--tuner_type freeze freezes nothing yet; name what is frozen (--freeze_parameters, "
                "--freeze_parameters_regex, --freeze_parameters_ratio) or what alone is trained "
                "(--trainable_parameters, --trainable_parameters_regex)"
            )

    @property
    def names_frozen_parameters(self) -> bool:
        """Whether a setting says which parameters are trained and which are not."""
        return bool(
            self.freeze_parameters
            or self.freeze_parameters_regex
            or self.freeze_parameters_ratio
            or self.trainable_parameters
            or self.trainable_parameters_regex
        )

    def _check_tuner_effects(self) -> None:
        tuner = self.tuner_type
        adapter = tuner not in WHOLE, "an adapter (--tuner_type lora or its kin)"
        whole = tuner in WHOLE, "--tuner_type full or freeze"
        needed = dict.fromkeys(
            (
                "target_modules",
                "target_regex",
                "exclude_modules",
                "layers_to_transform",
                "modules_to_save",
                "lora_dtype",
            ),
            adapter,
        )
        needed["new_special_tokens"] = (
            tuner in (*LOW_RANK, *WHOLE),
            _tuner_types((*LOW_RANK, *WHOLE)),
        )
        needed |= {
            name: (tuner in kinds, _tuner_types(kinds))
            for kinds, names in {
                RANKED: ("lora_rank",),
                (*LOW_RANK, "loha", "lokr"): ("lora_alpha",),
                LOW_RANK: ("lora_dropout", "lora_bias"),
                ("lora", "sora"): ("use_rslora", "init_weights"),
                ("lora",): ("use_dora", "lorap_lr_ratio"),
            }.items()
            for name in names
        }
        for name in TunerConfig.__dataclass_fields__:
            owner = {"fourier": "fourierft"}.get(name.split("_")[0], name.split("_")[0])
            if owner in ("adalora", "sora", "vera", "oft", "boft", "fourierft"):
                needed[name] = (tuner == owner, f"--tuner_type {owner}")
            elif "_parameters" in name:
                needed[name] = whole
        check_effects(self, TunerConfig, needed)

    def _check_init(self) -> None:
        name = self.init_weights
        if name in _REFUSED_INITS:
            raise ConfigError(
                f"--init_weights {name} is not supported, as {_REFUSED_INITS[name]}; expected one of "
                f"{', '.join(_INITS)} or pissa_niter_N"
            )
        if name not in _INITS and not re.fullmatch(r"pissa_niter_\d+", name):
            raise ConfigError(
                f"--init_weights {name} is unknown; expected one of {', '.join(_INITS)} or pissa_niter_N"
            )
        if self.tuner_type == "sora" and name not in ("true", "gaussian"):
            raise ConfigError(f"--init_weights {name} has no effect with --tuner_type sora")
        if self.changes_base and self.use_dora:
            raise ConfigError(
                f"--init_weights {name} and --use_dora exclude each other: one takes a part out of the weight, whose "
                "norm the other trains"
            )
        if name == "orthogonal" and self.lora_rank % 2:
            raise ConfigError(
                f"--lora_rank {self.lora_rank} is odd; --init_weights orthogonal needs an even one"
            )

    def _check_new_tokens(self) -> None:
        for name in self.new_special_tokens:
            if not name.strip() or name != name.strip():
                raise ConfigError(
                    f'--new_special_tokens "{name}" begins or ends with white space, which a token to be added may not'
                )
        twice = [name for name, count in Counter(self.new_special_tokens).items() if count > 1]
        if twice:
            raise ConfigError(f"--new_special_tokens names {twice[0]} twice")

    @property
    def changes_base(self) -> bool:
        """Whether the start of the adapter is taken out of the weights of the model."""
        return self.init_weights.startswith("pissa") or self.init_weights == "olora"


def _tuner_types(kinds: tuple[str, ...]) -> str:
    head = ", ".join(kinds[:-1])
    return f"--tuner_type {head} or {kinds[-1]}" if head else f"--tuner_type {kinds[-1]}"


def _check_regex(name: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"--{name} {pattern} is no regular expression: {error}") from error
