"""What a `TransformerModel` is made of, said in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.nn.attention import head_layout, rotary_for
from fastattn.nn.checks import check_choice, check_count
from fastattn.nn.rotary import Rotary
from fastattn.spec import ACTIVATIONS, Window, check_window

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
        rotary_width: how many leading components of a head turn, None for all; only with "rotary".
        rotary_base: as for `Rotary`; only with "rotary".
        qk_norm: as for `SelfAttention`.
        mlp: "plain", "gated", or None for an attention-only model.
        hidden_dim: neurons of each MLP, None for the module's default, 0 for an attention-only model.
        activation: of the MLPs; None for "gelu_tanh" if plain, "silu" if gated.
        norm: "layer" or "rms".
        norm_eps: added to the variance or mean square.
        bias: whether linear layers and layer norms have biases.
        dropout: probability with which embeddings and what layers add to the residual stream are dropped.
        tied: whether the unembedding is the token embedding, else a table of its own.
        embedding_std: standard deviation of the token embedding at initialisation; near 1 it wants
            tied=False, or the first logits are as large as embed_dim.
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
        for name in ("vocab_size", "embed_dim", "num_heads", "num_layers"):
            check_count(name, getattr(self, name))
        check_choice("positions", self.positions, POSITIONS)
        check_choice("mlp", self.mlp, MLPS)
        check_choice("norm", self.norm, NORMS)
        if self.max_length is not None:
            check_count("max_length", self.max_length)
        elif self.positions in ("learned", "zero"):
            raise ValueError(f"max_length must be given for positions={self.positions!r}, got None")
        if self.hidden_dim is not None:
            check_count("hidden_dim", self.hidden_dim, least=0)
        if self.activation is not None:
            check_choice("activation", self.activation, ACTIVATIONS)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.embedding_std >= 0:
            raise ValueError(f"embedding_std must not be negative, got {self.embedding_std}")
        # A tuple, also if a number or a list came, as from JSON.
        object.__setattr__(self, "window", check_window(self.window))
        self._check_heads()

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
