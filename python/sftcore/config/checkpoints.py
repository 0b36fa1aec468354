"""When a run is saved, and from where it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from sftcore.config.ranges import check_effects, check_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints. When a run is saved, and from where it goes on."""

    save_steps: int | None = None
    """Steps between two checkpoints; an epoch, and at most 500, where not given."""
    save_total_limit: int | None = 2
    """Checkpoints that are kept; the best one is always among them."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder to go on from, exactly where it was saved."""
    allow_data_change: bool = False
    """Resumes although the data or the template changed since the checkpoint."""

    def _check_checkpoints(self) -> None:
        check_least(self, 1, "save_steps", "save_total_limit")
        resumes = bool(self.resume_from_checkpoint), "--resume_from_checkpoint"
        check_effects(self, CheckpointConfig, {"allow_data_change": resumes})
