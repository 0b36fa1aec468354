"""A checkpoint to a run that goes on from it as if it had not stopped.

In goes `--resume_from_checkpoint`, out comes the checkpoint, whole, and the folder to go on in. A damaged checkpoint is
passed over for the one before, with a warning; settings that changed are said; what the interrupted run wrote after the
checkpoint is cut off its logs, so that nothing stands twice, and later checkpoints are set aside, not deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sftcore.config import TrainConfig
from sftcore.config.checkpoints import CheckpointConfig
from sftcore.config.data import DataConfig
from sftcore.config.evaluation import EvaluationConfig
from sftcore.config.memory import MemoryConfig
from sftcore.config.optimization import OptimizationConfig
from sftcore.config.output import OutputConfig
from sftcore.config.parallel import ParallelConfig
from sftcore.config.tuner import TunerConfig
from sftcore.data.model_names import near_folders
from sftcore.data.run import LEDGER_FILE
from sftcore.errors import ConfigError, first_line
from sftcore.train.checkpoints import (
    LOADER_STATE,
    Manifest,
    find_fault,
    list_checkpoints,
    read_manifest,
    read_object,
)
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.lost import is_of_peers
from sftcore.train.distributed.world import World
from sftcore.train.loaders import say
from sftcore.train.output import ENVIRONMENT_FILE, folder_of_runs, is_of_start_before, read_args

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer

# each line of these has the optimizer step it was written at
_LOGS = ("logging.jsonl", "generations.jsonl")
_SET_ASIDE = "set-aside"
# the data is compared by the state of the loader, which knows it better; the others change no weight,
# or no more than rounding does
_NOT_COMPARED = (
    DataConfig,
    OutputConfig,
    CheckpointConfig,
    EvaluationConfig,
    MemoryConfig,
    ParallelConfig,
)
_MAY_CHANGE = ("lora_dropout",)
# what the groups of an optimizer hold of the settings, beside the rate; some keep counters there too
_OF_A_GROUP = ("weight_decay", "betas", "eps", "momentum")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """Where a run goes on from.

    Attributes:
        checkpoint: The checkpoint folder.
        run_folder: The run folder to go on in; None makes a new one.
        manifest: What the checkpoint says of itself; None where only its weights are taken.
        changed: Settings that are not as they were at the checkpoint, to what they were and are.
    """

    checkpoint: Path
    run_folder: Path | None
    manifest: Manifest | None
    changed: dict[str, tuple[Any, Any]]

    @property
    def step(self) -> int:
        """The optimizer steps that the run has seen; 0 where only weights are taken."""
        return self.manifest.step if self.manifest else 0


def find_resume(config: TrainConfig, engine: Engine) -> Resume | None:
    """Returns where a run goes on from, or None where it begins anew.

    Raises:
        ConfigError: There is no whole checkpoint where `config` says, its settings do not fit those of the run, or the
            run would write among the checkpoints of another one.
    """
    name = config.resume_from_checkpoint or ""
    found = _restarted(config, engine.world)
    if found is not None:
        say("started anew: going on from the last checkpoint of this run")
    elif name in ("last", "true", "auto"):
        parent = folder_of_runs(config)
        runs = sorted(parent.glob("v*-*")) if config.add_version else [parent]
        found = _last_of(runs, config)
        where = str(parent / "v*-*" / "checkpoint-*" if config.add_version else "checkpoint-*")
        if found is None and name != "auto":
            raise ConfigError(
                f"--resume_from_checkpoint {name} found no checkpoint: there is no {where}; pass the --model and "
                "--output_dir of the interrupted run, a checkpoint folder, or auto to begin where there is none"
            )
    elif config.resumes:
        found = _named(Path(name), config)
    _check_folder(config, found)
    if found is not None:
        _check_settings(config, found)
        _check_engine(config, found, engine)
    return found


def _restarted(config: TrainConfig, world: World) -> Resume | None:
    """Returns the last whole checkpoint that this very run wrote before its processes were started anew."""
    if not world.restarts:
        return None
    parent = folder_of_runs(config)
    folders = parent.glob("v*-*") if config.add_version else [parent]
    own = [folder for folder in folders if is_of_start_before(folder, world)]
    found = _last_of([max(own, key=_written)], config) if own else None
    if found is None:
        say("started anew: this run has no checkpoint yet, so it begins as it did at first")
    return found


def _written(folder: Path) -> float:
    """When a run began, or went on, in a folder."""
    return (folder / ENVIRONMENT_FILE).stat().st_mtime


def _last_of(runs: list[Path], config: TrainConfig) -> Resume | None:
    """Returns the newest whole checkpoint of some runs, with a warning for each newer one that is not."""
    steps = {run: list_checkpoints(run) for run in runs}
    newest_first = sorted((run for run in runs if steps[run]), key=_time_of, reverse=True)
    faults: list[str] = []
    for run in newest_first:
        for _, folder in sorted(steps[run].items(), reverse=True):
            fault = find_fault(folder)
            manifest = None if fault else read_manifest(folder)
            if manifest and manifest.only_model and not config.resume_only_model:
                fault = "it was saved with --save_only_model; pass --resume_only_model true to take its weights"
            if fault is None:
                for text in faults:
                    say(f"warning: passed over {text}")
                return _resume(folder, run, config)
            faults.append(f"{folder}: {fault}")
    if faults:
        raise ConfigError(
            f"--resume_from_checkpoint {config.resume_from_checkpoint} found no whole checkpoint: {'; '.join(faults)}"
        )
    return None


def _time_of(run: Path) -> float:
    """When the newest checkpoint of a run was saved."""

    def time_of(folder: Path) -> float:
        try:
            return read_manifest(folder).saved
        except (OSError, ValueError):
            return folder.stat().st_mtime

    return max(time_of(folder) for folder in list_checkpoints(run).values())


def _named(path: Path, config: TrainConfig) -> Resume:
    """Returns the checkpoint in a folder that was named: the folder itself, or the last one in it."""
    asked = f"--resume_from_checkpoint {path}"
    if not path.is_dir():
        near = list_checkpoints(path.parent) if path.parent.is_dir() else {}
        there = f"; {path.parent} has {', '.join(near[step].name for step in sorted(near))}"
        raise ConfigError(
            f"{asked}: there is no such folder{there if near else near_folders(str(path))}"
        )
    path = path.resolve() if path.is_symlink() else path
    if list_checkpoints(path):
        found = _last_of([path], config)
        assert found is not None
        return found
    if config.ignore_data_skip:
        return Resume(checkpoint=path, run_folder=None, manifest=None, changed={})
    if fault := find_fault(path):
        raise ConfigError(
            f"{asked} cannot be gone on from: {fault}; expected a checkpoint-N folder"
        )
    if read_manifest(path).only_model and not config.resume_only_model:
        raise ConfigError(
            f"{asked} was saved with --save_only_model, so no run can go on from it exactly; pass "
            "--resume_only_model true to take its weights"
        )
    goes_on = not config.add_version and _same(path.parent, Path(config.output_dir))
    return _resume(path, Path(config.output_dir) if goes_on else None, config)


def _same(one: Path, other: Path) -> bool:
    return other.is_dir() and one.resolve() == other.resolve()


def _resume(folder: Path, run: Path | None, config: TrainConfig) -> Resume:
    if config.ignore_data_skip:
        return Resume(checkpoint=folder, run_folder=None, manifest=None, changed={})
    then, now = read_args(folder), config.to_dict()
    ignored = {field.name for home in _NOT_COMPARED for field in fields(home)}
    changed = {
        name: (then[name], value)
        for name, value in now.items()
        if name in then and name not in ignored and then[name] != value
    }
    return Resume(
        checkpoint=folder, run_folder=run, manifest=read_manifest(folder), changed=changed
    )


def _check_folder(config: TrainConfig, found: Resume | None) -> None:
    """Keeps a run from writing among the checkpoints of another one."""
    folder = Path(config.output_dir)
    if config.add_version or (found is not None and found.run_folder is not None):
        return
    if there := list_checkpoints(folder):
        raise ConfigError(
            f"--output_dir {folder} has {there[max(there)].name} of an earlier run; go on from it with "
            "--resume_from_checkpoint last, name another folder, leave out --add_version false, or remove it"
        )


def _check_settings(config: TrainConfig, found: Resume) -> None:
    """Says which settings changed since the checkpoint.

    Raises:
        ConfigError: One of them decides what is trained, or how its state is kept.
    """
    tuner = {field.name for field in fields(TunerConfig)} - set(_MAY_CHANGE)
    fixed = tuner if config.resume_only_model else tuner | {"optim"}
    for name, (then, now) in found.changed.items():
        text = f"--{name} is {_shown(now)}, and was {_shown(then)} at {found.checkpoint}"
        if name in fixed:
            way = (
                ""
                if name in tuner
                else ", pass --resume_only_model true to begin with a new state,"
            )
            raise ConfigError(
                f"{text}: the saved state does not fit; restore it{way} or begin a new run"
            )
        say(f"warning: {text}: the run that goes on is not the one that was interrupted")


def _check_engine(config: TrainConfig, found: Resume, engine: Engine) -> None:
    """Says what another engine or another number of processes means for the run.

    Raises:
        ConfigError: The engine cannot take the saved state of the optimizer.
    """
    manifest = found.manifest
    if manifest is None or config.resume_only_model:
        return
    if manifest.state_format != engine.state_format:
        raise ConfigError(
            f"{found.checkpoint} keeps the state of its optimizer as {manifest.state_format}, and {engine.name} takes "
            f"{engine.state_format}; go on with the engine it was saved by, or pass --resume_only_model true to take "
            "its weights and its place in the data"
        )
    if manifest.world_size == engine.world.size:
        return
    if not engine.is_elastic:
        raise ConfigError(
            f"{found.checkpoint} was written by {manifest.world_size} processes, and {engine.name} goes on with as "
            f"many, not with {engine.world.size}; start as many, or pass --resume_only_model true to take its weights "
            "and its place in the data"
        )
    say(
        f"note: {manifest.world_size} processes wrote the checkpoint, now there are {engine.world.size}: the same "
        "rows come in each step, but other dropout"
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def read_loader_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the loader state of a checkpoint.

    Raises:
        FileNotFoundError: It has none.
    """
    return read_object(checkpoint / LOADER_STATE)


def prepare_folder(found: Resume | None, run_folder: Path) -> None:
    """Makes the logs of the run folder end at the step that the run goes on from.

    They come from the folder of the checkpoint, and the ledger from the checkpoint itself.
    """
    source = found.checkpoint.parent if found and found.manifest else run_folder
    for name in _LOGS:
        if (source / name).is_file():
            lines = _kept_lines(source / name, found)
            _replace(run_folder / name, "".join(lines))
    ledger = run_folder / LEDGER_FILE
    if found is None or found.manifest is None:
        ledger.unlink(missing_ok=True)
        return
    if (found.checkpoint / LEDGER_FILE).is_file():
        _replace(ledger, (found.checkpoint / LEDGER_FILE).read_text(encoding="utf-8"))
    for step, folder in sorted(list_checkpoints(run_folder).items()):
        if step > found.step:
            _set_aside(folder, found.step)


def _kept_lines(path: Path, found: Resume | None) -> list[str]:
    """Returns the lines up to the checkpoint, without those that it will write again and a torn one at the end."""
    if found is None or found.manifest is None:
        return []
    kept = []
    # a generated text may hold the other characters that splitlines() takes for ends of lines
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a kill in the middle of a write
        step = entry.get("step", 0)
        is_again = "train_runtime" in entry or (
            step == found.step
            and found.manifest.evaluation_due
            and any(name.startswith("eval_") for name in entry)
        )
        if step <= found.step and not is_again:
            kept.append(f"{line}\n")
    return kept


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _set_aside(folder: Path, step: int) -> None:
    home = folder.parent / _SET_ASIDE
    home.mkdir(exist_ok=True)
    target, number = home / folder.name, 1
    while target.exists():
        number += 1
        target = home / f"{folder.name}.{number}"
    shutil.move(folder, target)
    say(f"note: {folder.name} is after step {step}, from which the run goes on: moved to {target}")


def restore_optimizer(trainer: SftTrainer, found: Resume, load: Callable[[], None]) -> None:
    """Loads optimizer and scheduler, and makes settings that changed count.

    The saved state holds the old learning rate, decay and so on, and Transformers would go on with those.

    Raises:
        ConfigError: The state does not fit the optimizer, or the scheduler cannot change in the middle.
    """
    scheduler, groups = trainer.lr_scheduler, trainer.optimizer.param_groups
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    rates = [group["initial_lr"] for group in fresh]
    changed = [field.name for field in fields(OptimizationConfig) if field.name in found.changed]
    if not trainer.config.resume_only_model:
        fitting(load, found)
        if not changed:
            return
    factors = getattr(scheduler, "lr_lambdas", None)
    if factors is None:
        # the rate depends on what was measured, so it is kept in the state alone
        if changed and not trainer.config.resume_only_model:
            raise ConfigError(
                f"--{changed[0]} changed, which --lr_scheduler_type "
                f"{trainer.config.lr_scheduler_type} cannot follow in the middle of a run; restore it"
            )
        return
    scheduler.base_lrs = rates
    scheduler.last_epoch = found.step
    for group, settings, rate, factor in zip(
        trainer.optimizer.param_groups, fresh, rates, factors, strict=True
    ):
        group.update({name: settings[name] for name in _OF_A_GROUP if name in settings})
        group["initial_lr"] = rate
        group["lr"] = rate * factor(found.step)
    scheduler._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]


def fitting(load: Callable[[], None], found: Resume) -> None:
    """Runs what loads a part of a checkpoint.

    Raises:
        ConfigError: The part is not of this model.
    """
    try:
        load()
    except (RuntimeError, ValueError, KeyError) as error:
        if is_of_peers(error):
            raise
        changed = ", ".join(f"--{name}" for name in found.changed)
        what = f"; changed since: {changed}" if changed else ""
        raise ConfigError(
            f"{found.checkpoint} does not fit this model: {first_line(error)}{what}"
        ) from error


class GoOn(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Gives a resumed run what the Trainer does not restore; the last of the callbacks that begin."""

    def __init__(self, trainer: SftTrainer, found: Resume) -> None:
        self.trainer = trainer
        self.found = found

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restores the loss since the last log, and makes up for an evaluation."""
        manifest = self.found.manifest
        assert manifest is not None
        # the saved state holds the intervals of the interrupted run
        state.compute_steps(args, state.max_steps)
        if not self.trainer.config.resume_only_model:
            self.trainer._tr_loss.fill_(manifest.unlogged_loss)
            self.trainer._globalstep_last_logged = manifest.logged_step
            # the sums are those of all ranks
            if manifest.unlogged_tally and state.is_world_process_zero:
                sums = torch.tensor(
                    manifest.unlogged_tally, dtype=torch.float64, device=args.device
                )
                self.trainer.tally.sums = sums
        restore_best(self.trainer)
        evaluate_due(self.trainer, manifest)


def restore_best(trainer: SftTrainer) -> None:
    """Names the best checkpoint by its place now, as the run folder may have moved."""
    state = trainer.state
    state.best_model_checkpoint = (
        trainer.checkpoints.best_of(state.best_global_step) or state.best_model_checkpoint
    )


def evaluate_due(trainer: SftTrainer, manifest: Manifest) -> None:
    """Makes the evaluation that a signal kept from being made."""
    if manifest.evaluation_due and trainer.eval_loader is not None:
        metrics = trainer._evaluate(None, None)
        if trainer._determine_best_metric(metrics=metrics, trial=None):
            restore_best(trainer)


def finish(trainer: SftTrainer, found: Resume) -> None:
    """Gives a trainer the state of a run whose last step is saved."""
    assert found.manifest is not None
    trainer.state = TrainerState.load_from_json(str(found.checkpoint / TRAINER_STATE_NAME))
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    restore_best(trainer)
    if found.manifest.evaluation_due:
        fitting(lambda: trainer._load_from_checkpoint(str(found.checkpoint)), found)
        evaluate_due(trainer, found.manifest)
    trainer.checkpoints.settle(found.step, trainer.state.best_model_checkpoint)
