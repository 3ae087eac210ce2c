"""The way from a spec to the statistics kernels' launchers."""

from __future__ import annotations
