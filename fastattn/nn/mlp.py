"""Two-layer perceptrons around the fused `fastattn.mlp` and `fastattn.gated_mlp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastattn.core.capabilities import check_backend
from fastattn.core.intact import alteration
from fastattn.core.mlp import functional as mlp_functional
from fastattn.core.mlp.definition import activate
from fastattn.ground.arguments import choice, flag, integer
from fastattn.ground.checks import ACTIVATIONS
from fastattn.nn.checks import check_placed, check_width


class MLP(nn.Module):
    """act(x W_up^T + b_up) W_down^T + b_down, (..., embed_dim) -> (..., embed_dim).

    Args:
        embed_dim: width of the input and output.
        hidden_dim: number of neurons; None for 4 * embed_dim.
        activation: "gelu" (exact), "gelu_tanh" (GPT-2's), "relu", "relu_squared" or "silu".
        bias: whether both layers have biases.
        backend: "triton", "portable", "reference", or None for the best that fits.

    Parameters: up, down, laid out as torch.nn.Linear's.

    Raises:
        ValueError, TypeError: sizes below one, an unknown activation, or x of another width.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim = integer("embed_dim", embed_dim, least=1)
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        hidden_dim = integer("hidden_dim", hidden_dim, least=1)
        choice("activation", activation, ACTIVATIONS)
        placed = {"bias": flag("bias", bias), **check_placed(device, dtype)}
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.backend = check_backend(backend)
        self.up = nn.Linear(embed_dim, hidden_dim, **placed)
        self.down = nn.Linear(hidden_dim, embed_dim, **placed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., embed_dim); same shape."""
        check_width("x", x, self.embed_dim)
        if _altered(x, self.up, self.down):
            return self.down(activate(self.up(x), self.activation))
        return mlp_functional.mlp(
            x,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, backend={self.backend!r}"


class GatedMLP(nn.Module):
    """(act(x W_gate^T) * (x W_up^T)) W_down^T, (..., embed_dim) -> (..., embed_dim).

    Args:
        embed_dim: width of the input and output.
        hidden_dim: number of neurons; None for as many weights as `MLP` has by default: 8/3 embed_dim,
            rounded up to a multiple of 64.
        activation: of the gate, as for `MLP`; "silu" makes it SwiGLU.
        bias: whether the three layers have biases.
        backend: as for `MLP`.

    Parameters: gate, up, down, laid out as torch.nn.Linear's.

    Raises:
        ValueError, TypeError: as `MLP`.

    Source: Shazeer, GLU Variants Improve Transformer, 2020, section 2.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        activation: str = "silu",
        bias: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim = integer("embed_dim", embed_dim, least=1)
        hidden_dim = -(-8 * embed_dim // 192) * 64 if hidden_dim is None else hidden_dim
        hidden_dim = integer("hidden_dim", hidden_dim, least=1)
        choice("activation", activation, ACTIVATIONS)
        placed = {"bias": flag("bias", bias), **check_placed(device, dtype)}
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.backend = check_backend(backend)
        self.gate = nn.Linear(embed_dim, hidden_dim, **placed)
        self.up = nn.Linear(embed_dim, hidden_dim, **placed)
        self.down = nn.Linear(hidden_dim, embed_dim, **placed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., embed_dim); same shape."""
        check_width("x", x, self.embed_dim)
        if _altered(x, self.gate, self.up, self.down):
            return self.down(activate(self.gate(x), self.activation) * self.up(x))
        return mlp_functional.gated_mlp(
            x,
            self.gate.weight,
            self.up.weight,
            self.down.weight,
            activation=self.activation,
            b_gate=self.gate.bias,
            b_up=self.up.bias,
            b_down=self.down.bias,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, backend={self.backend!r}"


def _altered(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether one of the layers must be called: then it may do more than multiply by its weight."""
    return any(alteration(layer, nn.Linear, x) for layer in layers)
