"""What is written and shown, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

from sftcore.config.ranges import check_effects, check_least
from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError

LOGGERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output. What is written and shown, and when."""

    output_dir: str = "output"
    """Holds a folder for each model and run."""
    add_version: bool = True
    """Writes into output_dir/MODEL/vN-TIME; otherwise into output_dir itself."""
    logging_steps: int = 5
    """Steps between two logged losses."""
    logging_first_step: bool = True
    """Logs the first step too."""
    disable_tqdm: bool = False
    """Prints lines in place of a progress bar."""
    report_to: list[str] = field(default_factory=lambda: ["auto"])
    """Who gets the numbers beside logging.jsonl: tensorboard, wandb, mlflow, swanlab, trackio, several of these, all
    that are installed, or none; auto is tensorboard where it is installed."""
    project: str = "sftcore"
    """The project of the run with wandb, mlflow (the experiment), swanlab and trackio."""
    run_name: str | None = None
    """The name of the run with these; that of its folder where not given."""
    dry_run: bool = False
    """Prints what the run would do, with its steps, tokens, memory and time, and stops; nothing is written."""
    dry_run_json: str | None = None
    """The file that a dry run writes its plan to as JSON; - is the standard output."""
    test_oom: bool = False
    """Runs the largest micro-batch of the plan before the first step, so that memory that does not suffice shows at
    once; the run itself stays the same."""

    def _check_output(self) -> None:
        check_least(self, 1, "logging_steps")
        words = (*LOGGERS, "auto", "all", "none")
        for name in self.report_to:
            if name not in words:
                raise ConfigError(
                    f"--report_to {name} is unknown; expected {', '.join(LOGGERS)}, all, none or auto"
                    f"{did_you_mean(name, words)}"
                )
        for word in ("auto", "all", "none"):
            if word in self.report_to and len(self.report_to) > 1:
                raise ConfigError(
                    f"--report_to {word} stands alone; found {', '.join(self.report_to)}"
                )
        is_named = any(name not in ("auto", "none", "tensorboard") for name in self.report_to)
        names = is_named, "--report_to wandb, mlflow, swanlab or trackio"
        check_effects(
            self,
            OutputConfig,
            {
                "project": names,
                "run_name": names,
                "dry_run_json": (self.dry_run, "--dry_run true"),
                "test_oom": (not self.dry_run, "a run; leave out --dry_run"),
            },
        )
