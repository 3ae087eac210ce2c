"""PyTorch's own samples: the calls by which it tests its modules and functions, to run against ours."""

from __future__ import annotations

import sys
import types
import unittest

# PyTorch's tables are next to a test case that derives from expecttest's; nothing here needs it to be more.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
