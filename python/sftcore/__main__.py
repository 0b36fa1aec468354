"""`python -m sftcore`."""

from sftcore.cli import main

raise SystemExit(main())
