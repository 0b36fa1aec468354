"""When a run is saved, and from where it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftcore.config.ranges import check_effects, check_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints. When a run is saved, and from where it goes on."""

    save_strategy: Literal["steps", "epoch", "best", "no"] = "steps"
    """Saves each --save_steps, each epoch, or when the evaluation is the best so far; always at the end."""
    save_steps: int | None = None
    """Steps between two checkpoints; an epoch, and at most 500, where not given."""
    save_total_limit: int | None = 2
    """Checkpoints that are kept, the best and the last always among them; 0 keeps all."""
    save_only_model: bool = False
    """Leaves out the optimizer and the random state: small checkpoints that no run can go on from exactly."""
    create_checkpoint_symlink: bool = True
    """Keeps links named best and last in the run folder."""
    resume_from_checkpoint: str | None = None
    """Goes on exactly: from a checkpoint or run folder, the last one (last, true), or auto: last or a new run."""
    resume_only_model: bool = False
    """Takes from the checkpoint the weights, the step and the place in the data; optimizer and random state are new."""
    ignore_data_skip: bool = False
    """With --resume_only_model: takes the weights alone, and begins at step 0 with the first row."""
    allow_data_change: bool = False
    """Resumes although the data or the template changed since the checkpoint."""

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint; with `auto`, where there is one."""
        return self.resume_from_checkpoint not in (None, "", "false")

    def _check_checkpoints(self) -> None:
        check_least(self, 1, "save_steps")
        check_least(self, 0, "save_total_limit")
        resumes = self.resumes, "--resume_from_checkpoint"
        needed = {
            "save_steps": (self.save_strategy == "steps", "--save_strategy steps"),
            "save_total_limit": (self.save_strategy != "no", "a --save_strategy other than no"),
            "resume_only_model": resumes,
            "ignore_data_skip": (self.resume_only_model, "--resume_only_model true"),
            "allow_data_change": resumes,
        }
        check_effects(self, CheckpointConfig, needed)
