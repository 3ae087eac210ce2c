"""How a command fails in front of its user."""

from __future__ import annotations


class CommandError(Exception):
    """Ends a command with this one sentence on stderr and exit status 1, without a traceback."""
