"""Which checkpoint of a run is the best, and by what.

In come the settings and the evaluation rows, out come the arguments of the Trainer that decide when it evaluates and
what it compares. The best checkpoint is the best of those that were both evaluated and saved, so that its number
is always that of its weights.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from sftcore.config import TrainConfig
from sftcore.config.schema import did_you_mean
from sftcore.data import BatchLoader
from sftcore.errors import ConfigError
from sftcore.train.data_sets import shown_names
from sftcore.train.metrics import TEXT_METRICS, require_packages

# what only training needs of a checkpoint
_TRAINING_ONLY = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "training_args")
_LOADER_ONLY = ("loader_state.json", "ledger", "checkpoint.json", "args.yaml")


def known_metrics(config: TrainConfig, loader: BatchLoader) -> dict[str, bool]:
    """Returns the metrics of an evaluation, without `eval_`, each with whether higher is better."""
    metrics = {"loss": False, "perplexity": False, "token_acc": True}
    if config.acc_strategy == "seq":
        metrics["seq_acc"] = True
    shown = shown_names(loader)
    if len(shown) > 1:
        trained = {part["name"] for part in loader.report["epoch"] if part["trained_tokens"]}
        metrics |= {f"loss/{label}": False for name, label in shown.items() if name in trained}
    if config.predict_with_generate:
        metrics |= dict.fromkeys(TEXT_METRICS, True)
    return metrics


def check_evaluation(config: TrainConfig, loader: BatchLoader | None) -> None:
    """Checks the settings of the evaluation against its rows, before anything is written.

    Raises:
        ConfigError: The metric for the best model is unknown or contradicts `--greater_is_better`, evaluation is
            counted on and there are no rows, or a package is missing.
    """
    if loader is None:
        for name in ("predict_with_generate", "load_best_model_at_end", "early_stop_interval"):
            if getattr(config, name):
                raise ConfigError(
                    f"--{name} needs evaluation rows, and none were held out; pass --val_dataset"
                )
        return
    metrics = known_metrics(config, loader)
    name = config.best_metric_name
    if name not in metrics:
        raise ConfigError(
            f"--metric_for_best_model {name} is unknown; expected one of {', '.join(metrics)}"
            f"{did_you_mean(name, metrics)}"
        )
    if config.greater_is_better not in (None, metrics[name]):
        raise ConfigError(
            f"--greater_is_better {str(config.greater_is_better).lower()} contradicts --metric_for_best_model "
            f"{name}, of which {'higher' if metrics[name] else 'lower'} is better; leave it out"
        )
    if config.predict_with_generate:
        require_packages()


def evaluation_arguments(
    config: TrainConfig, loader: BatchLoader | None, save_steps: int
) -> dict[str, Any]:
    """Returns the arguments of `TrainingArguments` that decide when it evaluates and what is best.

    Args:
        config: The settings, which `check_evaluation` has seen.
        loader: The evaluation rows, if there are any.
        save_steps: The steps between two checkpoints.
    """
    if loader is None:
        return {"eval_strategy": "no"}
    name = config.best_metric_name
    return {
        "eval_strategy": config.eval_strategy,
        "eval_steps": config.eval_steps or save_steps,
        "eval_on_start": config.eval_on_start,
        "eval_delay": config.eval_delay,
        "metric_for_best_model": f"eval_{name}",
        "greater_is_better": known_metrics(config, loader)[name],
    }


def meeting_note(config: TrainConfig, save_steps: int, max_steps: int) -> str | None:
    """Returns a line on evaluations and checkpoints that seldom meet; None where each checkpoint is evaluated.

    Args:
        config: The settings of the run.
        save_steps: The steps between two checkpoints.
        max_steps: All steps of the run.
    """
    eval_steps = config.eval_steps
    if eval_steps is None or save_steps % eval_steps == 0:
        return None
    meeting = math.lcm(eval_steps, save_steps)
    where = f"every {meeting} steps and at the end" if meeting < max_steps else "at the end alone"
    return (
        f"note: evaluations (--eval_steps {eval_steps}) and checkpoints (--save_steps {save_steps}) meet {where}; the "
        "best checkpoint is chosen among those that are evaluated"
    )


def copy_best(best: Path, run_folder: Path) -> None:
    """Copies the model of a checkpoint, with tokenizer and template, into the run folder."""
    for path in sorted(best.iterdir()):
        if path.is_file() and not path.name.startswith((*_TRAINING_ONLY, *_LOADER_ONLY)):
            temporary = run_folder / f".{path.name}.tmp"
            shutil.copyfile(path, temporary)
            temporary.replace(run_folder / path.name)
