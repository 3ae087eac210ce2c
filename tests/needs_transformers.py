"""transformers, for tests. Who imports this is skipped where there is none, or one that we do not serve."""

import pytest

try:
    import fastattn.integrations  # noqa: F401
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

transformers = pytest.importorskip("transformers")
