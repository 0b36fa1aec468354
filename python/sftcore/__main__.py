"""`python -m sftcore`."""

from sftcore.cli import run

run()
