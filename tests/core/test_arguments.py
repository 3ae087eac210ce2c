"""What users may pass where a number is meant; whatever else they pass is refused by the argument's name."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastattn
from fastattn import flash_attn, lens, masks, nn
from fastattn.nn.norm import NORMS
from fastattn.nn.torch_layers import COUNTERPARTS

X = torch.randn(1, 8, 2, 16)
Q = X.transpose(1, 2)
OUT, LSE = fastattn.attention(Q, Q, Q, return_lse=True)
PACKED = torch.randn(8, 2, 16)
STARTS = torch.tensor([0, 3, 8])


@pytest.mark.parametrize(
    "three", [np.int64(3), np.int8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)]
)
def test_integers_of_any_library_are_integers(three: Any) -> None:
    expected = fastattn.attention(Q, Q, Q, window=(3, 0))
    for window in ((three, 0), [three, np.int64(0)]):
        assert torch.equal(fastattn.attention(Q, Q, Q, window=window), expected)
    assert torch.equal(fastattn.attention(Q, Q, Q, window=three), fastattn.attention(Q, Q, Q, window=(3, 3)))
    assert masks.window(three, 0) == masks.window(3, 0) and masks.dilated(three) == masks.dilated(3)
    assert masks.prefix(three) == masks.prefix(3) and masks.key_lengths([three]) == masks.key_lengths([3])
    assert masks.bigbird(three, three) == masks.bigbird(3, 3)
    assert fastattn.dropout_state(three).shape == (3, 2)
    assert fastattn.attention_varlen(PACKED, PACKED, PACKED, STARTS, STARTS, three, three).shape == PACKED.shape
    angles = torch.outer(torch.arange(20.0), torch.ones(8))
    turned = fastattn.prepare_heads(Q, cos=angles.cos(), sin=angles.sin(), offsets=three)
    assert torch.equal(turned, fastattn.prepare_heads(Q, cos=angles.cos(), sin=angles.sin(), offsets=3))


@pytest.mark.parametrize(
    "half", [np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).half()]
)
def test_real_numbers_of_any_library_are_numbers(half: Any) -> None:
    for name in ("scale", "softcap"):
        torch.testing.assert_close(
            fastattn.attention(Q, Q, Q, **{name: half}), fastattn.attention(Q, Q, Q, **{name: 0.5})
        )
    state = fastattn.dropout_state(1)
    dropped = fastattn.attention(Q, Q, Q, dropout_p=half, dropout_state=state)
    assert torch.equal(dropped, fastattn.attention(Q, Q, Q, dropout_p=0.5, dropout_state=state))
    assert torch.equal(fastattn.rms_norm(X, eps=half), fastattn.rms_norm(X, eps=0.5))
    assert torch.equal(fastattn.prepare_heads(Q, head_scale=half), fastattn.prepare_heads(Q, head_scale=0.5))
    assert torch.equal(
        flash_attn.flash_attn_func(X, X, X, 0.0, half), flash_attn.flash_attn_func(X, X, X, 0.0, 0.5)
    )


def test_flags_may_be_numpys_or_tensors_and_windows_arrays() -> None:
    expected = fastattn.attention(Q, Q, Q, causal=True)
    for true in (np.bool_(True), torch.tensor(True)):
        assert torch.equal(fastattn.attention(Q, Q, Q, causal=true), expected)
    local = flash_attn.flash_attn_func(X, X, X, window_size=(3, 0))
    for window in ([3, 0], torch.tensor([3, 0]), np.array([3, 0]), (np.int64(3), torch.tensor(0))):
        assert torch.equal(flash_attn.flash_attn_func(X, X, X, window_size=window), local)
    assert torch.equal(fastattn.attention(Q, Q, Q, causal=True, window=3), local.transpose(1, 2))
    ragged = fastattn.attention(Q, Q, Q, key_lengths=torch.tensor([5]))
    for lengths in ([5], (np.int64(5),), np.array([5])):
        assert torch.equal(fastattn.attention(Q, Q, Q, key_lengths=lengths), ragged)


def test_a_scale_without_dimensions_keeps_its_gradient() -> None:
    scale = torch.tensor(0.3, requires_grad=True)
    fastattn.attention(Q, Q, Q, scale=scale).square().sum().backward()
    each = torch.full((2,), 0.3, requires_grad=True)
    fastattn.attention(Q, Q, Q, scale=each).square().sum().backward()
    torch.testing.assert_close(scale.grad, each.grad.sum())
    with pytest.raises(TypeError, match=r"softcap must be a number or None: .* cannot have a gradient"):
        fastattn.attention(Q, Q, Q, softcap=scale)


LONGEST = {"max_seqlen_q": 5, "max_seqlen_k": 5}
SMALL: dict[str, Any] = dict(vocab_size=9, embed_dim=8, num_heads=2, num_layers=1, max_length=8)
# Every public function and module, with arguments that it takes.
CALLS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "attention": (fastattn.attention, dict(q=Q, k=Q, v=Q)),
    "attention with dropout": (fastattn.attention, dict(q=Q, k=Q, v=Q, dropout_p=0.1)),
    "attention of nothing": (fastattn.attention, dict(q=Q[:, :, :0], k=Q, v=Q)),
    "attention_backward": (fastattn.attention_backward, dict(dout=OUT, q=Q, k=Q, v=Q, out=OUT, lse=LSE)),
    "attention_varlen": (
        fastattn.attention_varlen,
        dict(q=PACKED, k=PACKED, v=PACKED, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS),
    ),
    "merge_states": (fastattn.merge_states, dict(out_a=OUT, lse_a=LSE, out_b=OUT, lse_b=LSE)),
    "mlp": (fastattn.mlp, dict(x=X, w1=torch.ones(4, 16), b1=None, w2=torch.ones(3, 4), b2=None)),
    "gated_mlp": (
        fastattn.gated_mlp,
        dict(x=X, w_gate=torch.ones(4, 16), w_up=torch.ones(4, 16), w_down=torch.ones(3, 4)),
    ),
    "by_rows": (fastattn.by_rows, dict(function=torch.nn.Linear(16, 2), x=X)),
    "rms_norm": (fastattn.rms_norm, dict(x=X)),
    "layer_norm": (fastattn.layer_norm, dict(x=X)),
    "prepare_heads": (fastattn.prepare_heads, dict(x=Q)),
    "t5_relative_bias": (fastattn.t5_relative_bias, dict(table=torch.ones(32, 2))),
    "dropout_state": (fastattn.dropout_state, dict(batch=2)),
    "dropout_mask": (
        fastattn.dropout_mask,
        dict(state=fastattn.dropout_state(1), dropout_p=0.1, heads=1, queries=3, keys=4),
    ),
    "flash_attn_func": (flash_attn.flash_attn_func, dict(q=X, k=X, v=X)),
    "linear_cross_entropy": (
        fastattn.linear_cross_entropy,
        dict(input=torch.ones(5, 16), linear_weight=torch.ones(7, 16), target=torch.zeros(5, dtype=torch.int64)),
    ),
    "attention_with_cache": (
        fastattn.attention_with_cache,
        dict(q=Q, k_cache=Q.clone(), v_cache=Q.clone(), cache_lengths=3),
    ),
    "attention_with_shared_prefix": (
        fastattn.attention_with_shared_prefix,
        dict(q=Q, k_prefix=Q[0], v_prefix=Q[0], k_cache=Q.clone(), v_cache=Q.clone(), cache_lengths=3),
    ),
    "flash_attn_with_kvcache": (
        flash_attn.flash_attn_with_kvcache,
        dict(q=X, k_cache=X.clone(), v_cache=X.clone(), cache_seqlens=3),
    ),
    "flash_attn_kvpacked_func": (flash_attn.flash_attn_kvpacked_func, dict(q=X, kv=torch.stack((X, X), 2))),
    "flash_attn_qkvpacked_func": (flash_attn.flash_attn_qkvpacked_func, dict(qkv=torch.stack((X, X, X), 2))),
    "flash_attn_varlen_func": (
        flash_attn.flash_attn_varlen_func,
        dict(q=PACKED, k=PACKED, v=PACKED, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, **LONGEST),
    ),
    "flash_attn_varlen_kvpacked_func": (
        flash_attn.flash_attn_varlen_kvpacked_func,
        dict(
            q=PACKED, kv=torch.stack((PACKED, PACKED), 1), cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, **LONGEST,
        ),
    ),
    "flash_attn_varlen_qkvpacked_func": (
        flash_attn.flash_attn_varlen_qkvpacked_func,
        dict(qkv=torch.stack((PACKED, PACKED, PACKED), 1), cu_seqlens=STARTS, max_seqlen=5),
    ),
    "mask.dense": (masks.causal().dense, dict(batch=1, heads=1, queries=3, keys=4)),
    "mask.lower": (masks.causal().lower, dict(batch=1, heads=1, queries=3, keys=4)),
    "masks.causal": (masks.causal, {}),
    "masks.window": (masks.window, {}),
    "masks.key_lengths": (masks.key_lengths, dict(lengths=[3])),
    "masks.prefix": (masks.prefix, dict(lengths=3)),
    "masks.documents by ids": (masks.documents, dict(ids=[0, 1])),
    "masks.documents": (masks.documents, dict(cu_seqlens=[0, 1])),
    "masks.packed_sequences": (masks.packed_sequences, dict(cu_seqlens_q=STARTS, cu_seqlens_k=STARTS)),
    "masks.global_tokens": (masks.global_tokens, dict(positions=[1])),
    "masks.dilated": (masks.dilated, dict(step=2)),
    "masks.blocks": (masks.blocks, dict(grid=torch.ones(1, 1, dtype=torch.bool))),
    "masks.bigbird": (masks.bigbird, {}),
    "masks.longformer": (masks.longformer, dict(window=2)),
    "masks.from_function": (masks.from_function, dict(function=print)),
    "masks.from_dense": (masks.from_dense, dict(seen=torch.ones(1, 1, dtype=torch.bool))),
    "scaled_dot_product_attention": (fastattn.scaled_dot_product_attention, dict(query=Q, key=Q, value=Q)),
    "nn.SelfAttention": (nn.SelfAttention, dict(embed_dim=8, num_heads=2)),
    "nn.SelfAttention of x": (nn.SelfAttention(16, 2), dict(x=PACKED)),
    "nn.CrossAttention": (nn.CrossAttention, dict(embed_dim=8, num_heads=2)),
    "nn.CrossAttention of x": (nn.CrossAttention(16, 2), dict(x=PACKED, context=PACKED)),
    "nn.MLP": (nn.MLP, dict(embed_dim=8)),
    "nn.MLP of x": (nn.MLP(16), dict(x=PACKED)),
    "nn.GatedMLP": (nn.GatedMLP, dict(embed_dim=8)),
    "nn.GatedMLP of x": (nn.GatedMLP(16), dict(x=PACKED)),
    "nn.LinearCrossEntropyLoss": (nn.LinearCrossEntropyLoss, dict(in_features=16, num_classes=7)),
    "nn.LinearCrossEntropyLoss of input": (
        nn.LinearCrossEntropyLoss(16, 7),
        dict(input=torch.ones(5, 16), target=torch.zeros(5, dtype=torch.int64)),
    ),
    "nn.DecodingCache": (nn.DecodingCache, dict(batch=1, capacity=3, num_layers=1, device=torch.device("cpu"))),
    "nn.Rotary": (nn.Rotary, dict(width=8)),
    "nn.Rotary of x": (nn.Rotary(8), dict(x=Q)),
    "nn.TransformerConfig": (nn.TransformerConfig, SMALL),
    "nn.TransformerConfig that turns": (nn.TransformerConfig, {**SMALL, "positions": "rotary"}),
    "nn.TransformerBlock": (nn.TransformerBlock, dict(attention=nn.SelfAttention(8, 2))),
    "nn.TransformerBlock of x": (
        nn.TransformerBlock(nn.SelfAttention(16, 2), cross_attention=nn.CrossAttention(16, 2)),
        dict(x=PACKED, context=PACKED),
    ),
    "nn.TransformerModel": (nn.TransformerModel, dict(config=nn.TransformerConfig(**SMALL))),
    "nn.TransformerModel of tokens": (nn.TransformerModel(**SMALL), dict(tokens=torch.zeros(1, 8).long())),
    "lens.head_scores": (lens.head_scores, dict(q=Q, k=Q, lse=LSE, tokens=torch.zeros(1, 8).long())),
}  # fmt: skip
JUNK = {
    "an object": object(),
    "a word": "junk",
    "a dictionary": {"junk": 1},
    "complex numbers": torch.zeros(1, 2, 8, 16, dtype=torch.complex64),
    "six dimensions": torch.zeros(2, 3, 2, 3, 2, 3),
    "a sparse tensor": torch.ones(1, 2, 8, 16).to_sparse(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(2, 16)], layout=torch.jagged),
    "a list of objects": [object()],
    "NaN": float("nan"),
}
# Where scaled_dot_product_attention leaves the error to torch, which raises RuntimeError.
TORCHS_WORDS = ("query", "key", "value", "attn_mask")
# (function, argument): wrong values that this argument may be.
NO_JUNK = {
    ("by_rows", "x"): {"six dimensions"},  # its function names what does not fit
    ("rms_norm", "x"): {"six dimensions"},
    ("layer_norm", "x"): {"six dimensions"},
    ("linear_cross_entropy", "input"): {"six dimensions"},  # the widths do not fit, and the weight is named
    ("nn.LinearCrossEntropyLoss of input", "input"): {"six dimensions"},
}


def arguments_of(function: Callable) -> list[str]:
    """The names of a function's parameters, or of those of a module's forward."""
    function = function.forward if isinstance(function, torch.nn.Module) else function
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


TAKES_IT = [(name, argument) for name, (function, _) in CALLS.items() for argument in arguments_of(function)]


@pytest.mark.parametrize("junk", JUNK)
def test_whatever_is_passed_wrongly_is_refused_by_the_name_of_the_argument(junk: str) -> None:
    problems = []
    for name, argument in TAKES_IT:
        if junk in NO_JUNK.get((name, argument), ()):
            continue
        function, given = CALLS[name]
        try:
            function(**{**given, argument: JUNK[junk]})
            problems.append(f"{name}({argument}={junk}) is taken")
        except (TypeError, ValueError) as problem:
            if not re.search(rf"\b{argument}\b", str(problem)):
                problems.append(f"{name}({argument}={junk}): {problem}")
        except Exception as problem:
            if name == "scaled_dot_product_attention" and argument in TORCHS_WORDS:
                continue
            problems.append(f"{name}({argument}={junk}): {type(problem).__name__}: {problem}")
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("eight", [np.int64(8), np.array(8), torch.tensor(8)])
def test_modules_take_integers_of_any_library_as_pythons(eight: Any) -> None:
    true = np.bool_(True)
    made = {
        "rotary": nn.SelfAttention(eight, eight // 4, head_dim=eight, causal=true, rotary=true, qk_norm=true),
        "context": nn.CrossAttention(eight, eight // 4, context_dim=eight, bias=true),
        "mlp": nn.MLP(eight, eight),
        "gated": nn.GatedMLP(eight, bias=true),
        "turn": nn.Rotary(eight, base=np.float32(100.0)),
        "model": nn.TransformerModel(vocab_size=eight, embed_dim=eight, num_heads=eight // 4, num_layers=1,
                                     max_length=eight, dropout=np.float32(0.1), causal=true),
    }  # fmt: skip
    for module in made.values():
        for part in module.modules():
            kept = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "config"}
            assert not [k for k, v in kept.items() if isinstance(v, np.generic | np.ndarray | torch.Tensor)]
    config = made["model"].config
    assert type(config.embed_dim) is int and type(config.causal) is bool
    assert hash(config) == hash(nn.TransformerConfig(**dict(SMALL, vocab_size=8, dropout=float(np.float32(0.1)))))


def test_modules_take_floating_dtypes_only() -> None:
    for make in (nn.SelfAttention, nn.CrossAttention):
        with pytest.raises(ValueError, match="dtype must be a floating dtype"):
            make(8, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="dtype must be a floating dtype"):
        nn.MLP(8, dtype=torch.complex64)


def test_scaled_dot_product_attention_names_what_is_wrong_as_the_caller_does() -> None:
    with pytest.raises(ValueError, match=r"^attn_mask must be on query's device cpu, got meta"):
        fastattn.scaled_dot_product_attention(Q, Q, Q, torch.ones(8, 8, device="meta"))
    with pytest.raises(TypeError, match=r"^dropout_p must be a number, got str"):
        fastattn.scaled_dot_product_attention(Q, Q, Q, dropout_p="0.1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^scale must be a number or None, got str"):
        fastattn.scaled_dot_product_attention(Q, Q, Q, scale="0.1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (torch.ones(2, 8, 2, 2, 16), "^kv must have q's batch size 1, got 2"),
        (torch.ones(1, 8, 2, 3, 16), "^q's heads must be a multiple of kv's heads 3, got 2"),
        (torch.ones(1, 8, 2, 2, 8), "^kv must have q's head width 16, got 8"),
        (torch.ones(1, 8, 2, 0, 16), "^q's heads must be a multiple of kv's heads 0, got 2"),
        (torch.ones(1, 8, 2, 2, 16).double(), "^kv must "),
        (torch.ones(1, 8, 2, 2, 16, device="meta"), "^kv must be on "),
    ],
)
def test_keys_and_values_in_one_tensor_are_named_as_the_caller_has_them(kv: torch.Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        flash_attn.flash_attn_kvpacked_func(X, kv)
    if "batch" not in message:
        with pytest.raises((TypeError, ValueError), match=message):
            flash_attn.flash_attn_varlen_kvpacked_func(X[0], kv[0], STARTS, STARTS, 5, 5)


def test_every_public_function_is_tried() -> None:
    functions = {n for n in fastattn.__all__ if inspect.isfunction(getattr(fastattn, n))}
    assert functions - {"patch", "unpatch", "prove", "invariant"} <= set(CALLS)
    ours = {n for n in nn.__all__ if not issubclass(getattr(nn, n), tuple(COUNTERPARTS | NORMS))} - {"Generation"}
    assert {f"nn.{n}" for n in ours} <= set(CALLS)
    kinds = {n for n in masks.__all__ if inspect.isfunction(getattr(masks, n))} - {"decode"}
    assert {f"masks.{n}" for n in kinds} <= set(CALLS)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_mask": Q}, "attention.. got an unexpected keyword argument 'attn_mask'; it is called bias="),
        ({"is_causal": True}, "it is called causal= here"),
        ({"softmax_scale": 1.0}, "it is called scale= here"),
        ({"window_size": (1, 1)}, "it is called window= here"),
        ({"logits_soft_cap": 1.0}, "it is called softcap= here"),
        ({"block_mask": None}, "it is called mask= "),
        ({"score_mod": None}, "it is called bias=, relative_bias="),
        ({"dropout": 0.1}, "it is called dropout_p= here"),
        ({"enable_gqa": True}, "are always grouped"),
        ({"made_up": 1}, "unexpected keyword argument 'made_up'$"),
        ({"mask": torch.ones(8, 8, dtype=torch.bool)}, "a tensor is given as bias= .* or as masks.from_dense"),
    ],
)
def test_other_libraries_words_are_told_ours(keywords: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fastattn.attention(Q, Q, Q, **keywords)


def test_a_tensor_where_a_batch_size_is_meant_is_told_so() -> None:
    with pytest.raises(
        TypeError, match="batch must be an integer, the number of batch entries, got a Tensor of shape"
    ):
        fastattn.dropout_state(Q)


def test_a_nested_tensor_is_told_of_attention_varlen() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 8, 16)] * 2)
    with pytest.raises(TypeError, match=r"q must be a plain tensor, got a nested one .*attention_varlen"):
        fastattn.attention(nested, Q, Q)
    with pytest.raises(TypeError, match=r"k must be a dense tensor .*, got one of layout torch.sparse_coo"):
        fastattn.attention(Q, Q.to_sparse(), Q)


def test_flash_attns_functions_are_there_without_an_import_of_their_own() -> None:
    code = "import fastattn; fastattn.flash_attn.flash_attn_func"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
