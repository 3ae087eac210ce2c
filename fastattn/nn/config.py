"""The sizes and parts of a `TransformerModel`, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastattn.core.capabilities import check_backend
from fastattn.ground.arguments import choice, flag, integer
from fastattn.ground.checks import ACTIVATIONS, Window, check_window
from fastattn.nn.attention import head_layout, rotary_for
from fastattn.nn.checks import check_dropout, check_not_negative
from fastattn.nn.rotary import Rotary, check_base

POSITIONS = ("learned", "zero", "rotary", None)
MLPS = ("plain", "gated", None)
NORMS = ("layer", "rms")
GPT2_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and parts of a `TransformerModel`; the defaults are GPT-2's.

    Args:
        vocab_size, embed_dim, num_heads, num_layers: positive.
        max_length: the longest sequence; required by learned and zero positions, no limit otherwise.
        positions: "learned"; "zero", learned and initialised at zero; "rotary"; None, no positions.
        causal: True for a decoder, False for an encoder.
        window: of every layer, as for `SelfAttention`.
        num_kv_heads, head_dim: as for `SelfAttention`.
        rotary_width: how many leading components of each head are rotated, None for all; only with "rotary".
        rotary_base: as for `Rotary`; only with "rotary".
        qk_norm: as for `SelfAttention`.
        mlp: "plain", "gated", or None for an attention-only model.
        hidden_dim: neurons of each MLP, None for the module's default, 0 for an attention-only model.
        activation: of the MLPs; None for "gelu_tanh" if plain, "silu" if gated.
        norm: "layer" or "rms".
        norm_eps: added to the variance or mean square.
        bias: whether linear layers and layer norms have biases.
        dropout: probability of dropping an element of the embeddings, or of what a layer adds to the residual
            stream.
        tied: whether the unembedding shares the token embedding's weights.
        embedding_std: standard deviation of the token embedding at initialisation. If it is near 1,
            set tied=False: tied, the first logits would be as large as embed_dim.
        backend: "triton", "portable", "reference", or None for the best that fits.

    Raises:
        ValueError, TypeError: a choice that does not exist, or sizes that do not fit together.
    """

    vocab_size: int
    embed_dim: int
    num_heads: int
    num_layers: int
    max_length: int | None = None
    positions: str | None = "learned"
    causal: bool = True
    window: Window = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotary_width: int | None = None
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    mlp: str | None = "plain"
    hidden_dim: int | None = None
    activation: str | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    bias: bool = True
    dropout: float = 0.0
    tied: bool = True
    embedding_std: float = GPT2_STD
    backend: str | None = None

    def __post_init__(self) -> None:
        # Convert numbers of NumPy and torch to Python's and the window to a pair, so that the configuration can be
        # hashed and saved.
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        if self.max_length is None and self.positions in ("learned", "zero"):
            raise ValueError(f"max_length must be given for positions={self.positions!r}, got None")
        self._check_heads()

    def _checked(self) -> dict[str, Any]:
        """The fields that are numbers, flags or a window, converted to Python's types. Checks the others, too."""
        choice("positions", self.positions, [p for p in POSITIONS if p], or_none=True)
        choice("mlp", self.mlp, [m for m in MLPS if m], or_none=True)
        choice("norm", self.norm, NORMS)
        choice("activation", self.activation, ACTIVATIONS, or_none=True)
        check_backend(self.backend)
        counts = {name: 1 for name in ("vocab_size", "embed_dim", "num_heads", "num_layers")}
        optional = {"max_length": 1, "num_kv_heads": 1, "head_dim": 1, "rotary_width": 2, "hidden_dim": 0}
        counts |= {name: least for name, least in optional.items() if getattr(self, name) is not None}
        return {
            **{name: integer(name, getattr(self, name), least=least) for name, least in counts.items()},
            **{name: flag(name, getattr(self, name)) for name in ("causal", "qk_norm", "bias", "tied")},
            "window": check_window(self.window),
            "rotary_base": check_base("rotary_base", self.rotary_base),
            "norm_eps": check_not_negative("norm_eps", self.norm_eps),
            "embedding_std": check_not_negative("embedding_std", self.embedding_std),
            "dropout": check_dropout(self.dropout),
        }

    def _check_heads(self) -> None:
        _, head_dim = head_layout(self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim)
        if self.positions == "rotary":
            rotary_for(head_dim, self.rotary())
        elif self.rotary_width is not None:
            raise ValueError(
                f"rotary_width must be None unless positions='rotary'; "
                f"got {self.rotary_width} with positions={self.positions!r}"
            )

    def rotary(self) -> Rotary | None:
        """A new rotation for one layer, or None where positions are not rotary."""
        if self.positions != "rotary":
            return None
        _, head_dim = head_layout(self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim)
        return Rotary(head_dim if self.rotary_width is None else self.rotary_width, base=self.rotary_base)

    @property
    def attention_only(self) -> bool:
        """Whether blocks have no MLP."""
        return self.mlp is None or self.hidden_dim == 0
