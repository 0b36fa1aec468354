"""What is written and shown, and when."""

from __future__ import annotations

from dataclasses import dataclass

from sftcore.config.ranges import check_least


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output. What is written and shown, and when."""

    output_dir: str = "output"
    """Holds a folder for each model and run."""
    add_version: bool = True
    """Writes into output_dir/MODEL/vN-TIME; otherwise into output_dir itself."""
    logging_steps: int = 5
    """Steps between two logged losses."""
    disable_tqdm: bool = False
    """Prints lines in place of a progress bar."""

    def _check_output(self) -> None:
        check_least(self, 1, "logging_steps")
