"""Small models of every sort that fastattn.patch meets, one step of them, and what of them must stay as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from needs_transformers import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH = 64, 32
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48}  # fmt: skip


class Residual(nn.Module):
    """A user's block: MLPs in sequences, one of them with two in a row and things between."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Dropout(dropout), nn.Linear(48, WIDTH))
        self.two = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40, bias=False), nn.SiLU(), nn.Linear(40, WIDTH),
            nn.Dropout(0.0), nn.Linear(WIDTH, 24), nn.GELU("tanh"),
            nn.Linear(24, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(WIDTH, 4, 2, 2, 48, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(1), tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x[:, :3], x[:, :3])
        return out + weights.sum(-1, keepdim=True)


class Logits(nn.Module):
    """A Hugging Face model as a function of embeddings."""

    def __init__(self, model: str, config: str, **options: Any) -> None:
        super().__init__()
        self.inner = getattr(transformers, model)(getattr(transformers, config)(**options))
        self.decoder = self.inner.config.is_encoder_decoder

    def forward(self, x: Tensor) -> Tensor:
        decoder = {"decoder_inputs_embeds": x.flip(1)} if self.decoder else {}
        return self.inner(inputs_embeds=x, **decoder)[0]


T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequences": Residual,
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True, norm_first=True), 2,
        enable_nested_tensor=False,
    ),
    "encoder and decoder": Seq2Seq,
    "cross-attention": Cross,
    "gpt2": lambda: Logits("GPT2Model", "GPT2Config", vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH,
                           n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": lambda: Logits("LlamaModel", "LlamaConfig", **SIZES, num_key_value_heads=2),
    "gemma3": lambda: Logits("Gemma3TextModel", "Gemma3TextConfig", **SIZES, head_dim=8, sliding_window=4),
    "bert": lambda: Logits("BertModel", "BertConfig", **SIZES, hidden_dropout_prob=0.0,
                           attention_probs_dropout_prob=0.0),
    "vit": lambda: nn.Sequential(transformers.ViTModel(transformers.ViTConfig(
        **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=8, patch_size=2)).layers[0].mlp),
    "t5": lambda: Logits("T5Model", "T5Config", **T5, dropout_rate=0.0),
    "gated t5": lambda: Logits("T5Model", "T5Config", **T5, dropout_rate=0.0, feed_forward_proj="gated-gelu"),
}  # fmt: skip
# How many MLPs and attentions one forward of each must hand to the fused functions.
FUSED = {"sequences": (3, 0), "encoder": (2, 2), "encoder and decoder": (4, 6), "cross-attention": (0, 1),
         "gpt2": (2, 2), "llama": (2, 2), "gemma3": (2, 2), "bert": (2, 2), "vit": (1, 0), "t5": (4, 6),
         "gated t5": (4, 6)}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch() -> Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    out = model(x)
    reached = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out.float().sin().sum(), [x, *reached], allow_unused=True)
    return out.detach(), [g for g in gradients if g is not None]


def assert_same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert len(actual[1]) == len(expected[1])
    for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert (a - e).abs().max() <= 3e-5 * e.abs().max() + 1e-6


def anatomy(model: nn.Module) -> list:
    """All that `unpatch` must restore: classes, what instances hold, parameters, implementations."""
    return [
        (name, type(module), sorted(module.__dict__), [id(p) for p in module.parameters()],
         getattr(getattr(module, "config", None), "_attn_implementation", None))
        for name, module in model.named_modules()
    ]  # fmt: skip


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


class Doubled(nn.Module):
    """The names of a gated MLP, and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Noisy(Doubled):
    """A gated MLP in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y + torch.randn_like(y) if self.training else y


class PackedLinear(nn.Linear):
    """Derived from Linear with another formula, like the quantised layers of other libraries."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class PackedWeight(Tensor):
    pass


def sequence(*middle: nn.Module, first: nn.Module | None = None, **options: Any) -> nn.Sequential:
    return nn.Sequential(first or nn.Linear(8, 8, **options), *(middle or [nn.GELU()]), nn.Linear(8, 8, **options))


def replaced(model: nn.Module) -> nn.Module:
    model.forward = model.forward
    return model


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def report_of_nothing(model: nn.Module, patch: Callable) -> Any:
    """The report of a patch that must swap nothing and change nothing."""
    before = anatomy(model)
    report = patch(model)
    assert anatomy(model) == before
    assert not report.swapped
    return report
