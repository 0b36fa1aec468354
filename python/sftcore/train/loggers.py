"""Who gets the numbers of a run beside its own files: TensorBoard, Weights & Biases, MLflow, SwanLab, Trackio.

Each is the callback that Transformers has for it; here a run is begun under the settings of this project, in the
run folder where the logger keeps files, and ended, so that the next run of the same process begins its own. What a
logger reads from the environment (its server, its mode, its login) stays as its users know it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from transformers.integrations import (
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from sftcore.config import TrainConfig
from sftcore.config.output import LOGGERS
from sftcore.errors import ConfigError, SftcoreError

_LEAVE_OUT = "or choose another --report_to (none keeps logging.jsonl alone)"
_LOG_IN = {
    "wandb": "run wandb login, set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a server or to sqlite:///mlflow.db",
    "swanlab": "run swanlab login, set SWANLAB_MODE=offline",
    "trackio": "set TRACKIO_DIR to a folder that can be written",
    "tensorboard": "see that the run folder can be written",
}


def choose_loggers(config: TrainConfig) -> tuple[list[str], str | None]:
    """Returns the loggers of a run, and a note where the usual one is not installed.

    Raises:
        ConfigError: One that is named is not installed.
    """
    if config.report_to == ["none"]:
        return [], None
    if config.report_to == ["all"]:
        return [name for name in LOGGERS if is_installed(name)], None
    if config.report_to == ["auto"]:
        if is_installed("tensorboard"):
            return ["tensorboard"], None
        return [], "note: no TensorBoard, as it is not installed; run pip install tensorboard"
    for name in config.report_to:
        if not is_installed(name):
            raise ConfigError(
                f"--report_to {name} needs the package {name}; run pip install {name}, {_LEAVE_OUT}"
            )
    return list(dict.fromkeys(config.report_to)), None


def is_installed(name: str) -> bool:
    """Returns whether the package of a logger is there."""
    return importlib.util.find_spec(name) is not None


def make_loggers(names: list[str], config: TrainConfig, run_folder: Path) -> list[Logger]:
    """Returns the callbacks of loggers that `choose_loggers` gave."""
    kinds: dict[str, Callable[[TrainConfig, Path], Logger]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "mlflow": _MLflow,
        "swanlab": _SwanLab,
        "trackio": _Trackio,
    }
    return [kinds[name](config, run_folder) for name in names]


class Logger:
    """Begins the run of a logger where the Trainer first speaks to it, on one rank.

    Attributes:
        logger: Its name, and that of its package.
        is_begun: Whether the logger has a run that is to be ended.
    """

    logger = ""

    def __init__(self, config: TrainConfig, run_folder: Path) -> None:
        super().__init__()
        self.run_settings = config
        self.run_folder = run_folder
        self.run_name = config.run_name or run_folder.name
        self.is_begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins a run of the logger, then lets Transformers set it up."""
        try:
            if state.is_world_process_zero:
                self.begin(importlib.import_module(self.logger), state.global_step)
                self.is_begun = True
            super().on_train_begin(args, state, control, **kwargs)  # type: ignore[misc]
        except Exception as error:
            raise SftcoreError(
                f"--report_to {self.logger} could not start ({type(error).__name__}: {error}); {_LOG_IN[self.logger]}, "
                f"{_LEAVE_OUT}"
            ) from error

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets Transformers finish, then ends the run of the logger."""
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[misc]
        self._end(failed=False)

    def stop(self) -> None:
        """Ends the run of the logger as a failed one, where it has not ended."""
        self._end(failed=True)

    def _end(self, *, failed: bool) -> None:
        if self.is_begun:
            self.is_begun = False
            self.end(importlib.import_module(self.logger), failed=failed)

    def begin(self, package: Any, step: int) -> None:
        """Begins a run after `step` optimizer steps."""

    def end(self, package: Any, *, failed: bool) -> None:
        """Ends it."""


class _TensorBoard(Logger, TensorBoardCallback):  # type: ignore[misc, unused-ignore]
    logger = "tensorboard"

    def begin(self, package: Any, step: int) -> None:  # noqa: ARG002
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # of steps that are run again after a checkpoint, the new numbers are shown
        self.tb_writer = writer(
            log_dir=str(self.run_folder / "runs"), purge_step=step + 1 if step else None
        )
        settings = yaml.safe_dump(self.run_settings.to_dict(), allow_unicode=True, sort_keys=False)
        self.tb_writer.add_text("settings", f"```yaml\n{settings}```")


class _Wandb(Logger, WandbCallback):  # type: ignore[misc, unused-ignore]
    logger = "wandb"

    def begin(self, package: Any, step: int) -> None:  # noqa: ARG002
        package.init(
            project=os.environ.get("WANDB_PROJECT", self.run_settings.project),
            name=self.run_name,
            dir=str(self.run_folder),
            config={"settings": self.run_settings.to_dict()},
        )

    def end(self, package: Any, *, failed: bool) -> None:
        package.finish(exit_code=int(failed))


class _MLflow(Logger, MLflowCallback):  # type: ignore[misc, unused-ignore]
    logger = "mlflow"

    def begin(self, package: Any, step: int) -> None:  # noqa: ARG002
        package.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", self.run_settings.project))
        if "MLFLOW_RUN_ID" in os.environ:
            return  # the callback goes on with that run
        package.start_run(run_name=self.run_name)
        # MLflow refuses longer values
        settings = {
            f"settings/{name}": str(value)[:6000]
            for name, value in self.run_settings.to_dict().items()
        }
        package.log_params(settings)

    def end(self, package: Any, *, failed: bool) -> None:
        package.end_run("FAILED" if failed else "FINISHED")


class _SwanLab(Logger, SwanLabCallback):  # type: ignore[misc, unused-ignore]
    logger = "swanlab"

    def begin(self, package: Any, step: int) -> None:  # noqa: ARG002
        # the callback of Transformers 5.23 asks for a run before it makes one, which SwanLab 0.10 refuses
        package.init(
            project=os.environ.get("SWANLAB_PROJECT", self.run_settings.project),
            name=self.run_name,
            log_dir=os.environ.get("SWANLAB_LOG_DIR", str(self.run_folder / "swanlog")),
            mode=os.environ.get("SWANLAB_MODE"),
            config={"settings": self.run_settings.to_dict()},
        )

    def end(self, package: Any, *, failed: bool) -> None:
        package.finish("aborted" if failed else "success")


class _Trackio(Logger, TrackioCallback):  # type: ignore[misc, unused-ignore]
    # Transformers begins a run of the project and name in its arguments, and ends it where all goes well
    logger = "trackio"

    def end(self, package: Any, *, failed: bool) -> None:
        if failed:
            package.finish()
