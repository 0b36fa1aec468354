"""DeepSpeed's ZeRO: data parallelism whose ranks keep a share each of what plain data parallelism keeps on all.

In come the settings; out go DeepSpeed's own, the model loaded in shares where parameters are sharded (stage 3), and the
environment that DeepSpeed wants also of a single process. What its sharding would change without a word (optimizers
that look at whole matrices, tuners that look at weights or gradients) is refused here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from sftcore.config import TrainConfig
from sftcore.config.zero import fill_sizes
from sftcore.errors import ConfigError, SftcoreError
from sftcore.models import load_settings, resolve_model
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.partitioned import gather_for_calls
from sftcore.train.distributed.world import World
from sftcore.train.distributed.zero import deepspeed_settings, lowered_dtype
from sftcore.tuners import check_engine

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer

# their update of a number depends on that number and its own history alone, so that flat shards may have them
_ELEMENTWISE = (
    "auto",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw",
    "adam",
    "adagrad",
    "adamax",
    "nadam",
    "radam",
    "rmsprop",
    "sgd",
    "lion_32bit",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "lion_8bit",
    "paged_adamw",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
)
_ADAMW = ("auto", "adamw_torch", "adamw_torch_fused", "adamw")


class DeepSpeedEngine(Engine):
    """ZeRO of a stage: 0 shards nothing, 1 the optimizer, 2 gradients too, 3 parameters too."""

    is_elastic = False
    shares_weights = True
    distributed_types = ("DEEPSPEED",)
    has_master_weights = True

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        require_deepspeed(config)
        self.settings, self.lines = deepspeed_settings(config, world)
        zero = self.settings["zero_optimization"]
        self.stage: int = zero["stage"]
        self.offloads = any(
            zero.get(part, {}).get("device", "none") != "none"
            for part in ("offload_optimizer", "offload_param")
        )
        self.name = f"DeepSpeed ZeRO-{self.stage}{' with offloading' if self.offloads else ''}"
        self.state_format = f"deepspeed-zero{self.stage}"
        self.scales_loss = bool(self.settings["fp16"]["enabled"])
        # a dry run runs the whole model on one rank, to measure its time
        self.is_partitioned = self.stage == 3 and not config.dry_run
        self.calls_head_once = self.is_partitioned
        self._check_run(config)
        self._environment: dict[str, str | None] = {}
        self._loading: Any = (
            None  # Transformers keeps but a weak reference to what it reads while it loads
        )
        self._gathering: list[Any] = []

    def _check_run(self, config: TrainConfig) -> None:
        check_engine(config, "deepspeed")
        asked = f"--deepspeed {config.deepspeed}"
        name = config.optim.removeprefix("torch.optim.").lower()
        if name not in _ELEMENTWISE:
            raise ConfigError(
                f"--optim {config.optim} cannot be used with {asked}, which hands the optimizer flat shards of the "
                f"parameters; expected one of {', '.join(_ELEMENTWISE)}"
            )
        if self.offloads and name not in _ADAMW:
            raise ConfigError(
                f"--optim {config.optim} cannot be used with {asked}: on the host DeepSpeed runs AdamW alone; take "
                "--optim auto, or do not offload the optimizer"
            )
        if config.test_oom:
            raise ConfigError(
                f"--test_oom cannot be used with {asked}, which counts each batch as one of the run; leave it out"
            )
        if config.torch_compile:
            raise ConfigError(f"--torch_compile cannot be used with {asked}; leave out one of them")
        if self.stage == 3:
            self._check_partitioned(config, asked)

    def _check_partitioned(self, config: TrainConfig, asked: str) -> None:
        instead = "take --deepspeed zero2"
        if config.weight_bits is not None:
            raise ConfigError(
                f"--quant_bits {config.weight_bits} cannot be used with {asked}: quantized weights are not "
                f"sharded; {instead}"
            )
        if config.tuner_type not in ("full", "freeze", "lora"):
            raise ConfigError(
                f"--tuner_type {config.tuner_type} cannot be used with {asked}: it reads weights that are spread over "
                f"ranks; {instead}, or --tuner_type lora"
            )
        asks = {
            f"--init_weights {config.init_weights}": config.tuner_type == "lora"
            and (config.changes_base or config.init_weights == "loftq"),
            "--use_dora": config.use_dora,
            "--modules_to_save": bool(config.modules_to_save),
        }
        for setting, is_asked in asks.items():
            if is_asked:
                raise ConfigError(
                    f"{setting} cannot be used with {asked}: it reads or copies weights that are spread over ranks; "
                    f"{instead}"
                )

    def __enter__(self) -> Engine:
        """Joins the other ranks; a single process makes a group of itself."""
        if not self.world.is_launched:
            self._set(
                RANK="0",
                WORLD_SIZE="1",
                LOCAL_RANK="0",
                LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=_free_port(),
            )
        self._set(LOCAL_RANK=str(self.world.local_rank))
        _find_ninja()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the other ranks, and no trace for a run that comes after in this process."""
        from deepspeed import comm  # slow to import, and not installed everywhere
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        self._loading = None
        unset_hf_deepspeed_config()
        # accelerate leaves it set, and would take the next run for one of DeepSpeed
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        super().__exit__(kind, error, trace)
        if self._opened and comm.is_initialized():
            comm.destroy_process_group()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _set(self, **variables: str) -> None:
        for name, value in variables.items():
            self._environment.setdefault(name, os.environ.get(name))
            os.environ[name] = value

    @property
    def is_distributed(self) -> bool:
        """DeepSpeed needs a process group also of one process."""
        return True

    def check_new_tokens(self) -> None:
        """Refuses rows of an embedding that is spread over ranks as it is loaded."""
        if self.stage == 3:
            raise ConfigError(
                f"--new_special_tokens cannot be used with --deepspeed {self.config.deepspeed}: it reads and copies "
                "rows of weights that are spread over ranks; take --deepspeed zero2, or --fsdp"
            )

    def load_arguments(self) -> dict[str, Any]:
        """The dtype of the weights; with stage 3 each layer is spread over ranks as soon as it is made."""
        folder = resolve_model(self.config.model, weights=True)
        settings = load_settings(folder, trust_remote_code=self.config.trust_remote_code)
        fill_sizes(self.settings, _hidden_size(settings))
        if self.is_partitioned:
            from transformers.integrations import HfDeepSpeedConfig  # imports DeepSpeed

            self._loading = HfDeepSpeedConfig(self.settings)
        return {"dtype": lowered_dtype(self.config)}

    def place(self, model: Any) -> Any:
        """Lets a model that is spread over ranks be called before DeepSpeed has it."""
        if not self.is_partitioned:
            return super().place(model)
        # a model that is made in shares has drawn random numbers that a plain one has not
        set_seed(self.config.seed)
        self._gathering = gather_for_calls(model)
        return model

    def hand_over(self) -> None:
        """Takes back what `place` put on the model, as DeepSpeed is to gather from now on."""
        for handle in self._gathering:
            handle.remove()
        self._gathering = []

    def training_arguments(self) -> dict[str, Any]:
        """DeepSpeed's settings, and the precision that they say."""
        return {
            "deepspeed": self.settings,
            "bf16": self.settings["bf16"]["enabled"],
            "fp16": self.settings["fp16"]["enabled"],
        }

    def trainer_class(self) -> type[SftTrainer]:
        """The Trainer that runs this engine."""
        from sftcore.train.distributed.deepspeed_trainer import DeepSpeedTrainer

        return DeepSpeedTrainer

    def check(self, trainer: SftTrainer) -> None:
        """Holds what runs to what was asked for."""
        super().check(trainer)
        found = trainer.accelerator.state.deepspeed_plugin.zero_stage
        if found != self.stage:
            raise SftcoreError(f"asked for {self.name}, but accelerate runs ZeRO-{found}")

    def describe(self) -> str | None:
        """Lines on how the ranks share the run."""
        return "\n".join([str(super().describe()), *self.lines])


def require_deepspeed(config: TrainConfig) -> None:
    """Raises a ConfigError where the package is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"--deepspeed {config.deepspeed} needs the package deepspeed, which is not installed; run pip install "
            "'sftcore[deepspeed]'"
        )


def _hidden_size(settings: Any) -> int:
    text = settings.get_text_config()
    size = getattr(text, "hidden_size", None)
    return int(max(text.hidden_sizes) if size is None else size)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _find_ninja() -> None:
    """Lets DeepSpeed find the ninja beside this Python, with which it builds its parts."""
    folder = Path(sys.executable).parent
    if shutil.which("ninja") is None and (folder / "ninja").is_file():
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
