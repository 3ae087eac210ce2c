"""How often a patched model calls the fused functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.dropin import mlp_forms


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the fused functions were called, counted in the modules that call them."""
    counts = {"mlp": 0, "attention": 0}

    def counted(kind: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[kind] += 1
            return function(*arguments, **options)

        return call

    from fastattn.core.attention import sdpa as torch_sdpa
    from fastattn.integrations import huggingface

    monkeypatch.setattr(mlp_forms, "mlp", counted("mlp", mlp_forms.mlp))
    monkeypatch.setattr(mlp_forms, "gated_mlp", counted("mlp", mlp_forms.gated_mlp))
    for place in (torch_sdpa, huggingface):
        monkeypatch.setattr(place, "attention", counted("attention", place.attention))
    return counts
