"""Two-layer perceptrons around the fused `fastattn.mlp` and `fastattn.gated_mlp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastattn.core.capabilities import check_backend
from fastattn.core.intact import alteration
from fastattn.core.mlp import functional as mlp_functional
from fastattn.core.mlp.definition import activate
from fastattn.core.mlp.spec import SAVES, MLPSpec, checked_chunk
from fastattn.core.rows import rows_of_layers
from fastattn.ground.arguments import choice, flag, integer
from fastattn.ground.checks import ACTIVATIONS
from fastattn.nn.checks import check_width, factory_options


class _MLP(nn.Module):
    """What both kinds share: their sizes, their activation and how they compute."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None,
        activation: str,
        save: str,
        chunk: int | str,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.embed_dim = integer("embed_dim", embed_dim, least=1)
        hidden_dim = self._default_hidden_dim() if hidden_dim is None else hidden_dim
        self.hidden_dim = integer("hidden_dim", hidden_dim, least=1)
        choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        choice("save", save, SAVES)
        self.save, self.chunk = save, checked_chunk(chunk)
        self.backend = check_backend(backend)

    def _default_hidden_dim(self) -> int:
        raise NotImplementedError

    @property
    def _layers(self) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def _is_altered(self, x: torch.Tensor) -> bool:
        """Whether a user has changed one of the layers (see `alteration`), so that it must be called as a
        module."""
        return any(alteration(layer, nn.Linear, x) for layer in self._layers)

    @property
    def _spec(self) -> MLPSpec:
        """What is asked of an MLP, without what depends on an input."""
        return MLPSpec(self.activation, isinstance(self, GatedMLP), save=self.save)

    def extra_repr(self) -> str:
        asked = "" if self.save == "auto" else f"save={self.save!r}, "
        asked += "" if self.chunk == "auto" else f"chunk={self.chunk}, "
        return f"activation={self.activation!r}, {asked}backend={self.backend!r}"


class MLP(_MLP):
    """act(x W_up^T + b_up) W_down^T + b_down, (..., embed_dim) -> (..., embed_dim).

    Args:
        embed_dim: width of the input and output.
        hidden_dim: number of neurons; None for 4 * embed_dim.
        activation: "gelu" (exact), "gelu_tanh" (GPT-2's), "relu", "relu_squared" or "silu".
        bias: whether both layers have biases.
        save, chunk: what is kept for the backward, and how many tokens are computed at a time: see `fastattn.mlp`.
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
        save: str = "auto",
        chunk: int | str = "auto",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, activation, save, chunk, backend)
        factory = {"bias": flag("bias", bias), **factory_options(device, dtype)}
        self.up = nn.Linear(self.embed_dim, self.hidden_dim, **factory)
        self.down = nn.Linear(self.hidden_dim, self.embed_dim, **factory)

    def _default_hidden_dim(self) -> int:
        return 4 * self.embed_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., embed_dim); same shape."""
        check_width("x", x, self.embed_dim)
        if self._is_altered(x):
            return rows_of_layers(lambda x: self.down(activate(self.up(x), self.activation)), x, self.hidden_dim)
        return self._fused(x)

    @property
    def _layers(self) -> tuple[nn.Module, ...]:
        return self.up, self.down

    def _fused(self, x: torch.Tensor, **branch: Any) -> torch.Tensor:
        """`fastattn.mlp` of the weights as they are; branch: its arguments for norm, residual and dropout."""
        return mlp_functional.mlp(
            x,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            activation=self.activation,
            save=self.save,
            chunk=self.chunk,
            backend=self.backend,
            **branch,
        )


class GatedMLP(_MLP):
    """(act(x W_gate^T) * (x W_up^T)) W_down^T, (..., embed_dim) -> (..., embed_dim).

    Args:
        embed_dim: width of the input and output.
        hidden_dim: number of neurons; None for 8/3 embed_dim, rounded up to a multiple of 64: about as many
            weights as `MLP` has by default.
        activation: of the gate, as for `MLP`; "silu" makes it SwiGLU.
        bias: whether the three layers have biases.
        save, chunk: as for `MLP`.
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
        save: str = "auto",
        chunk: int | str = "auto",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, activation, save, chunk, backend)
        factory = {"bias": flag("bias", bias), **factory_options(device, dtype)}
        self.gate = nn.Linear(self.embed_dim, self.hidden_dim, **factory)
        self.up = nn.Linear(self.embed_dim, self.hidden_dim, **factory)
        self.down = nn.Linear(self.hidden_dim, self.embed_dim, **factory)

    def _default_hidden_dim(self) -> int:
        return -(-8 * self.embed_dim // 192) * 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., embed_dim); same shape."""
        check_width("x", x, self.embed_dim)
        if self._is_altered(x):
            return rows_of_layers(
                lambda x: self.down(activate(self.gate(x), self.activation) * self.up(x)), x, self.hidden_dim
            )
        return self._fused(x)

    @property
    def _layers(self) -> tuple[nn.Module, ...]:
        return self.gate, self.up, self.down

    def _fused(self, x: torch.Tensor, **branch: Any) -> torch.Tensor:
        """`fastattn.gated_mlp` of the weights as they are, as `MLP._fused`."""
        return mlp_functional.gated_mlp(
            x,
            self.gate.weight,
            self.up.weight,
            self.down.weight,
            activation=self.activation,
            b_gate=self.gate.bias,
            b_up=self.up.bias,
            b_down=self.down.bias,
            save=self.save,
            chunk=self.chunk,
            backend=self.backend,
            **branch,
        )
