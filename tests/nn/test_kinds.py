"""As other tools meet modules: traced, exported, on the meta device, under autocast and other dtypes."""

from __future__ import annotations

import pytest
import torch
from eager_models import small_model, some_tokens
from torch import nn

import fastattn
from fastattn import masks
from fastattn.nn import (
    MLP,
    CrossAttention,
    GatedMLP,
    SelfAttention,
    TransformerBlock,
)

# As other tools meet modules: every kind of them, called on a sequence (B, L, 32) of any batch and length.


class OnItself(nn.Module):
    """A module that takes a sequence and a context, or three, given one sequence for all."""

    def __init__(self, module, inputs):
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self, x):
        out = self.module(*[x] * self.inputs)
        return out[0] if isinstance(out, tuple) else out


KINDS = {
    "MLP": lambda: MLP(32),
    "GatedMLP": lambda: GatedMLP(32),
    "SelfAttention": lambda: SelfAttention(32, 4, causal=True),
    "SelfAttention with all": lambda: SelfAttention(32, 4, window=(4, 1), rotary=True, qk_norm=True),
    "CrossAttention": lambda: OnItself(CrossAttention(32, 4), 2),
    "TransformerBlock": lambda: TransformerBlock(SelfAttention(32, 4, causal=True), MLP(32)),
    "MultiheadAttention": lambda: OnItself(fastattn.nn.MultiheadAttention(32, 4, batch_first=True), 3),
    "TransformerEncoderLayer": lambda: fastattn.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True),
    "TransformerDecoderLayer": lambda: OnItself(
        fastattn.nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True), 2
    ),
    "Transformer": lambda: OnItself(fastattn.nn.Transformer(32, 4, 1, 1, 64, 0.0, batch_first=True), 2),
    "RMSNorm": lambda: fastattn.nn.RMSNorm(32),
    "LayerNorm": lambda: fastattn.nn.LayerNorm(32),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traced_and_exported_it_serves_other_batches_and_lengths(kind):
    module, x, other = kind().eval(), torch.randn(2, 8, 32), torch.randn(3, 11, 32)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    dynamic = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(dynamic,)).module()
    for made in (traced, exported):
        torch.testing.assert_close(made(other), module(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_causal_model_is_traced_and_exported_for_other_batches_and_lengths():
    model = small_model(torch.float32, window=(6, None)).eval()
    tokens, other = some_tokens(2, 8), some_tokens(3, 13)
    traced = torch.jit.trace(model, (tokens,), check_trace=False)
    dynamic = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=20)}
    exported = torch.export.export(model, (tokens,), dynamic_shapes=(dynamic,)).module()
    for made in (traced, exported):
        torch.testing.assert_close(made(other), model(other))


def test_made_on_the_meta_device_it_runs_there(kind):
    with torch.device("meta"):
        module, x = kind(), torch.randn(2, 8, 32)
        assert all(p.is_meta for p in module.parameters())
        assert module(x).is_meta and module(x).shape == x.shape


def test_under_another_default_dtype_it_is_made_and_computes_in_it(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = kind()
        assert {p.dtype for p in module.parameters()} == {torch.float64}
        assert module(torch.randn(2, 8, 32)).dtype == torch.float64
        attention = fastattn.nn.MultiheadAttention(32, 4, batch_first=True)
        x = torch.randn(2, 8, 32)
        out, weights = attention(x, x, x, attn_mask=masks.dilated(2))
        assert out.dtype == weights.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_it_trains_after_it_ran_in_inference_mode(kind):
    module, x = kind(), torch.randn(2, 8, 32)
    with torch.inference_mode():
        module(x)
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    model, tokens, mask = small_model(), some_tokens(), masks.dilated(2) | masks.window(1, 1)
    with torch.inference_mode():
        model(tokens, mask=mask)
    model(tokens, mask=mask).sum().backward()


def test_under_autocast_on_a_cpu_it_has_the_dtype_of_torchs_modules():
    halves = {"MLP", "GatedMLP", "SelfAttention", "SelfAttention with all", "CrossAttention", "MultiheadAttention"}
    for name, make in KINDS.items():
        with torch.autocast("cpu", torch.bfloat16):
            dtype = make()(torch.randn(2, 8, 32)).dtype
        assert dtype == (torch.bfloat16 if name in halves else torch.float32), name
