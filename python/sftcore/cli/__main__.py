"""`python -m sftcore.cli`, for launchers that start modules."""

from __future__ import annotations

import sys

from sftcore.cli import main

sys.exit(main())
