"""The exceptions of sftcore.

Each message says where, what was found, what was expected and what to do. Errors of the operating
system stay Python's own (`FileNotFoundError`, `PermissionError`, `OSError`).
"""

from __future__ import annotations


class SftcoreError(Exception):
    """The base of all errors that sftcore raises itself.

    Attributes:
        path: The file it is about, where there is one.
        line: The line in that file, from 1.
        column: The column in that line, in characters from 1.
        pointer: The JSON pointer into the row (RFC 6901).
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        line: int | None = None,
        column: int | None = None,
        pointer: str | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.line = line
        self.column = column
        self.pointer = pointer


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error of another library says, or its kind where it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class RowError(SftcoreError, ValueError):
    """A row of a data file is wrong."""


class TemplateError(SftcoreError, ValueError):
    """A chat template does not compile, refuses a conversation, or cannot be followed."""


class TokenizerError(SftcoreError, ValueError):
    """A tokenizer file is missing, broken or of an unknown kind."""


class NonFiniteError(SftcoreError, ArithmeticError):
    """A loss or a gradient is NaN or infinite."""


class ConfigError(SftcoreError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class CheckpointError(SftcoreError):
    """A checkpoint could not be written; those before it are as they were."""


class PeerError(SftcoreError):
    """Another process of a run has ended, or does not answer."""


class StoppedError(SftcoreError):
    """A signal ended a run before its last step; it was saved and can go on.

    Attributes:
        signal: The number of the signal.
        checkpoint: The checkpoint folder to go on from.
    """

    def __init__(self, message: str, *, signal: int, checkpoint: str) -> None:
        super().__init__(message)
        self.signal = signal
        self.checkpoint = checkpoint

    @property
    def exit_code(self) -> int:
        """What a command exits with, as a shell shows it: 128 and the signal."""
        return 128 + self.signal
