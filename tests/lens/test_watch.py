"""Claims about `watch`: what was asked for is recorded as the model computed it, and a model that is not watched
knows nothing of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lens_models import ALL, HEADS, LAYERS, OWN, WIDTH, make, text
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import lens
from fastattn.lens import places, watching
from fastattn.lens.watching import STATISTICS

CLOSE = {"atol": 1e-12, "rtol": 1e-12}


class Operators(TorchDispatchMode):
    """The names of all operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def logits_and_operators(model, tokens):
    with torch.no_grad(), Operators() as operators:
        logits = lens.adapt(model).logits(tokens)
    return logits, operators.names


def hooks_in(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_what_is_recorded_is_what_the_model_computes_with(name, attention):
    model, tokens = make(name, attention), text()
    adapter = lens.adapt(model)
    with torch.no_grad():
        expected = adapter.logits(tokens)
        with lens.watch(model, ["blocks.*.resid_*", "blocks.*.attention.*", *mlps(adapter)]) as seen:
            logits = adapter.logits(tokens)
    torch.testing.assert_close(logits, expected, **CLOSE)
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        pre, post = seen[f"{at}.resid_pre"], seen[f"{at}.resid_post"]
        if layer:
            assert pre.equal(seen[f"blocks.{layer - 1}.resid_post"])
        torch.testing.assert_close(post, rebuilt(adapter, layer, seen), **CLOSE)
        q, k, v, z = (seen[f"{at}.attention.hook_{x}"] for x in "qkvz")
        assert q.shape[:3] == z.shape[:3] == (2, HEADS, tokens.shape[1])
        assert k.shape[:3] == v.shape[:3] == (2, adapter.num_kv_heads, tokens.shape[1])
        weights = adapter.projections(layer)
        out = torch.einsum("bhle,hed->bld", z, weights.out) + (0 if weights.out_bias is None else weights.out_bias)
        if adapter.norm_after("attention", layer) is not None:
            out = adapter.norm_after("attention", layer)(out)
        torch.testing.assert_close(seen[f"{at}.attention.out"], out, **CLOSE)
        if adapter.part("mlp", layer) is not None:
            rows, bias = adapter.neuron_outputs(layer)
            out = seen[f"{at}.mlp.hook_post"] @ rows + (0 if bias is None else bias)
            if adapter.norm_after("mlp", layer) is not None:
                out = adapter.norm_after("mlp", layer)(out)
            torch.testing.assert_close(seen[f"{at}.mlp.out"], out, **CLOSE)
    torch.testing.assert_close(adapter.unembed(seen[f"blocks.{LAYERS - 1}.resid_post"]), logits, **CLOSE)


def mlps(adapter):
    return [] if adapter.part("mlp", 0) is None else ["blocks.*.mlp.*"]


def rebuilt(adapter, layer, seen):
    """resid_post of what was recorded before it."""
    at = f"blocks.{layer}"
    attended = seen[f"{at}.attention.out"]
    written = seen[f"{at}.mlp.out"] if mlps(adapter) else 0
    if adapter.post_norm:
        mid = adapter.part("attention_norm", layer)(seen[f"{at}.resid_pre"] + attended)
        torch.testing.assert_close(seen[f"{at}.resid_mid"], mid, **CLOSE)
        return adapter.part("mlp_norm", layer)(mid + written)
    mid = seen[f"{at}.resid_pre"] + attended
    if mlps(adapter) and not adapter.parallel:
        torch.testing.assert_close(seen[f"{at}.resid_mid"], mid, **CLOSE)
    return mid + written


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_the_pattern_times_the_values_is_what_the_heads_read(name, attention):
    model, tokens = make(name, attention), text(length=24)
    with lens.watch(model, ["blocks.*.attn.hook_[vz]", "blocks.*.attn.hook_pattern"]) as seen, torch.no_grad():
        model(tokens)
    for layer in range(LAYERS):
        v, z, pattern = (seen[f"blocks.{layer}.attention.{x}"] for x in ("hook_v", "hook_z", "pattern"))
        v = v.repeat_interleave(z.shape[1] // v.shape[1], 1)
        torch.testing.assert_close(pattern @ v, z, **CLOSE)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, HEADS, 24, dtype=torch.float64))


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
def test_patterns_of_a_padded_batch_hide_the_padding(attention):
    model, tokens = make("llama", attention), text(length=24)
    real = torch.ones_like(tokens)
    real[0, :5] = 0
    with lens.watch(model, "blocks.1.attention.pattern") as seen, torch.no_grad():
        model(tokens, attention_mask=real)
    assert seen["blocks.1.attention.pattern"][0, :, 5:, :5].abs().max() == 0
    model = make("own")
    with lens.watch(model, "blocks.1.attention.pattern") as seen, torch.no_grad():
        model(tokens, key_lengths=[24, 7], mask=fastattn.masks.window(4))
    pattern = seen["blocks.1.attention.pattern"]
    assert pattern[1, :, :, 7:].abs().max() == 0 and pattern[0, :, 20, :16].abs().max() == 0
    torch.testing.assert_close(pattern[0].sum(-1), torch.ones(HEADS, 24, dtype=torch.float64))


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ["own", "gemma3", "pythia", "bert"])
def test_a_model_that_is_not_watched_runs_the_same_operators_to_the_same_bits(name, attention):
    model, tokens = make(name, attention), text()
    logits, operators = logits_and_operators(model, tokens)
    everything = ["blocks.*.resid_*", "blocks.*.attention.*", "blocks.*.mlp.*", "blocks.*.attention.pattern"]
    with pytest.raises(KeyboardInterrupt), lens.watch(model, everything) as seen, torch.no_grad():
        model(tokens)
        raise KeyboardInterrupt
    assert len(seen) == len(seen._asked) and not any(t.requires_grad for t in seen.values())
    after, operators_after = logits_and_operators(model, tokens)
    assert after.equal(logits) and operators_after == operators
    assert not hooks_in(model) and not places._SLOTS and not places._ATTENTIONS
    if name not in OWN:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert not ALL_ATTENTION_FUNCTIONS._local_mapping.keys() & {"fastattn", "sdpa"}


def test_only_what_was_asked_for_is_recorded_and_hooked():
    model = make("llama")
    with lens.watch(model, ["blocks.1.resid_post", "layers.-1.mlp.neurons.top(5)"]) as seen, torch.no_grad():
        assert len(hooks_in(model)) == 2
        model(text())
    assert list(seen) == ["blocks.1.resid_post", "blocks.2.mlp.hook_post.top(5)"]


def test_watching_streams_and_heads_changes_no_bit_and_no_operator_of_the_model():
    model, tokens = make("own"), text()
    logits, operators = logits_and_operators(model, tokens)
    with lens.watch(model, ["blocks.*.resid_*", "blocks.*.attention.hook_[qkv]"]):
        watched, operators_watched = logits_and_operators(model, tokens)
    assert watched.equal(logits)
    assert [name for name in operators_watched if "detach" not in name] == operators


@pytest.mark.parametrize("options", [{"norm": True}, {"norm": False}])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "pythia", "bert"])
def test_patched_models_are_watched_as_they_were_before(name, options):
    tokens, asked = text(), ["blocks.*.resid_*", "blocks.*.attention.*", "blocks.*.mlp.*"]
    model = make(name, "sdpa")
    with lens.watch(model, asked) as expected, torch.no_grad():
        model(tokens)
    fastattn.patch(model, **options)
    with lens.watch(model, asked) as seen, torch.no_grad():
        model(tokens)
    assert list(seen) == list(expected)
    # Llama's and Gemma's own norms compute in float32, whatever they are given.
    close = {"atol": 1e-4, "rtol": 1e-4} if options["norm"] and name in ("llama", "gemma3") else CLOSE
    for key, value in expected.items():
        torch.testing.assert_close(seen[key], value, **close, msg=lambda m, key=key: f"{key}: {m}")


def test_reductions_are_those_of_the_whole_tensor():
    model, tokens = make("own"), text()
    names = ["resid_post", "attention.hook_z", "mlp.hook_post"]
    reduced = [
        "resid_post.mean", "resid_post.at(-1)", "resid_post.at(2:5).mean", "attention.hook_z.head(3).at(0)",
        "mlp.hook_post.top(4)", "attention.hook_z.head(-1)",
    ]  # fmt: skip
    with lens.watch(model, [f"blocks.1.{name}" for name in (*names, *reduced)]) as seen, torch.no_grad():
        model(tokens)
    stream, z, neurons = (seen[f"blocks.1.{name}"] for name in names)
    expected = [
        stream.mean(0), stream[:, -1], stream[:, 2:5].mean(0), z[:, 3, 0], neurons.topk(4), z[:, -1],
    ]  # fmt: skip
    for name, value in zip(reduced, expected, strict=True):
        got = seen[f"layers.1.{name}"]
        if name.endswith("top(4)"):
            assert got.values.equal(value.values) and got.indices.equal(value.indices)
        else:
            assert got.equal(value)
            # Only the result is kept, not the tensor that it was taken from.
            assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


def test_a_wildcard_takes_the_layers_as_one_tensor():
    model = make("own")
    with lens.watch(model, ["blocks.*.resid_post", "blocks.[02].mlp.neurons.top(3)"]) as seen, torch.no_grad():
        model(text())
    stacked = seen["blocks.*.resid_post"]
    assert stacked.shape == (LAYERS, 2, 20, WIDTH)
    assert stacked[1].equal(seen["blocks.1.hook_resid_post"])
    assert seen["layers.*.mlp.neurons.top(3)"].indices.shape == (2, 2, 20, 3)
    with pytest.raises(KeyError, match="was not asked for"):
        seen["blocks.0.resid_pre"]
    assert "blocks.0.resid_pre" not in seen and "nonsense" not in seen and "blocks.0.resid_post" in seen


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.0.hook_resid_pre", "resid_pre"),
        ("blocks.0.hook_resid_mid", "resid_mid"),
        ("blocks.0.hook_resid_post", "resid_post"),
        ("blocks.0.hook_attn_out", "attention.out"),
        ("blocks.0.hook_mlp_out", "mlp.out"),
        ("blocks.0.mlp.hook_post", "mlp.hook_post"),
        ("blocks.0.attn.hook_pattern", "attention.pattern"),
        *((f"blocks.0.attn.hook_{x}", f"attention.hook_{x}") for x in "qkvz"),
    ],
)
def test_the_names_of_transformer_lens_are_known(theirs, ours):
    model = make("llama")
    with lens.watch(model, theirs) as seen, torch.no_grad():
        model(text())
    assert list(seen) == [f"blocks.0.{ours}"] and seen[theirs] is seen[f"blocks.0.{ours}"]


def test_each_forward_replaces_what_the_one_before_recorded():
    model = make("own")
    with lens.watch(model, "blocks.0.resid_pre") as seen, torch.no_grad():
        model(text(length=5))
        model(text(length=7))
    assert seen["blocks.0.resid_pre"].shape == (2, 7, WIDTH)


def test_two_watches_at_once_both_see_and_leave_nothing():
    model = make("llama")
    with torch.no_grad(), lens.watch(model, "blocks.0.attn.hook_q") as one:
        with lens.watch(model, ["blocks.0.attn.hook_q", "blocks.1.attn.hook_q"]) as two:
            model(text())
        assert one["blocks.0.attn.hook_q"].equal(two["blocks.0.attn.hook_q"])
        model(text(length=3))
    assert one["blocks.0.attn.hook_q"].shape[2] == 3 and two["blocks.1.attn.hook_q"].shape[2] == 20
    assert not hooks_in(model) and not places._ATTENTIONS


def test_a_pattern_is_computed_whatever_backend_the_model_asks_for():
    # Its values are as wide as there are keys, wider than the kernels compute.
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 600, 8)
    call, observed = places.Call(q, k, k, {"causal": True, "backend": "triton"}), []
    with pytest.raises(ValueError, match="triton"):
        call.attend(v=torch.eye(600).expand(1, 2, 600, 600))
    observer = watching._Observer.__new__(watching._Observer)
    observer.layer, observer.pattern_limit, observer.records = 0, 10**6, [("pattern", observed.append)]
    observer(call)
    hidden = ~torch.ones(4, 600, dtype=torch.bool).tril(596)
    torch.testing.assert_close(observed[0], (q @ k.mT * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1))


def test_a_pattern_above_the_limit_is_refused_and_the_statistics_are_named():
    model = make("own")
    with (
        pytest.raises(
            ValueError, match=r"2 x 4 x 20 x 20 = 3,200 weights, above pattern_limit=3,199.*attention.entropy"
        ),
        lens.watch(model, "blocks.1.attention.pattern", pattern_limit=3199),
    ):
        model(text())
    assert not hooks_in(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.9.resid_post", r"names nothing.*blocks are 0 to 2.*closest first: blocks\.\*\.resid_post"),
        ("blocks.0.attention.entrpy", r"closest first: blocks\.\*\.attention\.entropy"),
        ("resid_post", "names nothing"),
        ("blocks.0.attention.max_*", "matches statistics alone"),
        ("blocks.0.resid_post.head(1)", "has no dimension of heads"),
        ("blocks.0.attention.hook_z.head(4)", "has 4 there, got number 4"),
        ("blocks.0.resid_post.top(0)", "top.* must hold a number from 1 up, got '0'"),
        ("blocks.0.resid_post.at()", "must hold a position or a slice"),
        ("blocks.0.resid_post.top(3).mean", "top must be the last reduction"),
        ("blocks.0.resid_post.sum(3)", "reductions are"),
        ("blocks.0.attention.induction", "labels must be given for blocks.0.attention.induction"),
    ],
)
def test_names_that_mean_nothing_are_refused_before_anything_runs(name, message):
    model = make("own")
    with pytest.raises(ValueError, match=message), lens.watch(model, name):
        raise AssertionError("it was entered")
    assert not hooks_in(model)


def test_a_position_that_is_not_there_is_refused():
    with (
        pytest.raises(ValueError, match="has 20 there, got number 20"),
        lens.watch(make("own"), "blocks.0.resid_pre.at(20)"),
    ):
        model = make("own")
        with lens.watch(model, "blocks.0.resid_pre.at(20)"):
            model(text())


def test_a_hugging_face_model_that_attends_elsewhere_is_told_what_to_set():
    model = make("llama", "eager")
    with pytest.raises(ValueError, match=r"must have attn_implementation 'sdpa' or 'fastattn'.*got 'eager'"):
        lens.watch(model, "blocks.0.attention.hook_q").__enter__()
    with lens.watch(model, "blocks.0.resid_pre") as seen, torch.no_grad():
        model(text())
    assert seen["blocks.0.resid_pre"].shape == (2, 20, WIDTH)


def test_parallel_blocks_have_no_stream_between_and_attention_only_blocks_no_mlp():
    for model, name in ((make("pythia"), "resid_mid"), (make("own-attention-only"), "mlp.out")):
        with pytest.raises(ValueError, match="names nothing"):
            lens.watch(model, f"blocks.0.{name}").__enter__()


def test_the_table_the_dictionary_and_the_frame_hold_the_recorded_numbers():
    model = make("own")
    names = ["blocks.*.attention.hook_z.at(0)", "blocks.0.mlp.neurons.top(2)"]
    with lens.watch(model, names) as seen, torch.no_grad():
        model(text())
    table = str(seen)
    assert "2 batch x 4 head x 8 width" in table and f"{seen['blocks.0.attn.z.at(0)'].mean().item():.4g}" in table
    assert seen.to_dict().keys() == set(seen)
    pandas = pytest.importorskip("pandas")
    frame = seen.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == LAYERS * 2 * 4 * 8 + 2 * 20 * 2
    row = frame[
        (frame["name"] == "blocks.1.attention.hook_z.at(0)") & (frame["head"] == 3) & (frame["width"] == 5)
    ]
    assert row["value"].tolist() == seen["blocks.1.attention.hook_z.at(0)"][:, 3, 5].tolist()
    assert row["layer"].tolist() == [1, 1] and row["batch"].tolist() == [0, 1]
    top = frame[frame["name"] == "blocks.0.mlp.hook_post.top(2)"]
    assert top["index"].tolist() == seen["blocks.0.mlp.neurons.top(2)"].indices.flatten().tolist()


def test_without_pandas_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with lens.watch(make("own"), "blocks.0.resid_pre") as seen:
        pass
    with pytest.raises(ImportError, match="pip install pandas"):
        seen.to_pandas()


def test_the_plot_shows_layers_by_heads_or_positions(tmp_path):
    model = make("own")
    names = ["blocks.*.attention.hook_z", "blocks.*.resid_post.mean", "blocks.*.attention.pattern"]
    with lens.watch(model, names) as seen, torch.no_grad():
        model(text())
    figure = seen.plot(tmp_path / "seen.png")
    assert (tmp_path / "seen.png").stat().st_size > 1000
    images = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.get_title()}
    z, stream, pattern = (images[name] for name in ("attention.hook_z", "resid_post.mean", "attention.pattern"))
    assert z.shape == (LAYERS, HEADS) and stream.shape == (LAYERS, 20)
    expected = seen["blocks.*.attn.z"].square().mean((1, 3, 4)).sqrt()
    torch.testing.assert_close(torch.tensor(z.filled()), expected)
    torch.testing.assert_close(torch.tensor(pattern.filled()), seen["blocks.*.attn.pattern"].mean((1, 3, 4)))


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_statistics_of_attention_are_those_of_the_pattern(name, attention):
    model, tokens = make(name, attention), text(length=24)
    names = [f"blocks.*.attention.{x}" for x in (*STATISTICS, "induction", "duplicate", "pattern", "hook_v")]
    with lens.watch(model, names, labels=tokens) as seen, torch.no_grad():
        model(tokens)
    pattern = seen["blocks.*.attention.pattern"]
    query, key = torch.arange(24)[:, None], torch.arange(24)
    same = (tokens[:, :, None] == tokens[:, None]) & (key < query)
    after = F.pad(tokens[:, :, None] == tokens[:, None], (1, 0))[..., :-1] & (key <= query)
    expected = {
        "entropy": -torch.special.xlogy(pattern, pattern).sum(-1),
        "max_weight": pattern.amax(-1),
        "sum_of_squares": pattern.square().sum(-1),
        "mass": pattern.sum(-1),
        "mean_distance": (pattern * (query - key)).sum(-1),
        "received": pattern.sum(-2),
        "max_received": pattern.amax(-2),
        "duplicate": (pattern * same[:, None]).sum(-1),
        "induction": (pattern * after[:, None]).sum(-1),
    }
    for statistic, value in expected.items():
        torch.testing.assert_close(seen[f"blocks.*.attention.{statistic}"], value, atol=1e-9, rtol=1e-9)
    norms = seen["blocks.*.attention.hook_v"].norm(dim=-1).repeat_interleave(HEADS // seen_heads(seen), 2)
    torch.testing.assert_close(seen["blocks.*.attention.value_norm"], (pattern * norms[..., None, :]).sum(-1))
    torch.testing.assert_close(
        seen["blocks.*.attention.received_value_norm"], (pattern * norms[..., None, :]).sum(-2)
    )
    keys, weights = seen["blocks.*.attention.top_keys"]
    torch.testing.assert_close(weights, pattern.topk(8).values)
    assert pattern.gather(-1, keys.clamp(min=0)).masked_fill(keys < 0, 0).allclose(weights)
    lags = seen["blocks.*.attention.lag_profile"]
    torch.testing.assert_close(lags[..., 23 + 2], pattern.diagonal(-2, -2, -1).sum(-1))
    assert seen["blocks.*.attention.thumbnail"].shape[-2:] == (64, 64)
    assert seen["blocks.*.attention.max_logit"].isfinite().all()


def seen_heads(seen):
    return seen["blocks.0.attention.hook_v"].shape[1]


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("way", ["packed", "left padding", "cache"])
def test_what_shapes_a_call_of_attention_shapes_what_is_seen_of_it(attention, way):
    model, tokens = make("llama", attention), text(length=24)
    given = {
        "packed": {
            "position_ids": torch.cat([torch.arange(9), torch.arange(15)])[None].expand(2, -1),
            "use_cache": False,
        },
        "left padding": {"attention_mask": (torch.arange(24) >= torch.tensor([[0], [7]])).long()},
        "cache": {},
    }[way]
    names = [f"blocks.*.attention.{x}" for x in ("pattern", "entropy", "received", "hook_v", "hook_z")]
    with torch.no_grad(), lens.watch(model, names) as seen:
        model(tokens, **given)
        if way == "cache":
            cache = model(tokens[:, :20]).past_key_values
            model(tokens[:, 20:], past_key_values=cache)
    pattern, entropy, received, v, z = (seen[name] for name in names)
    real = (given.get("attention_mask", torch.ones(2, 24)) > 0)[:, None, -z.shape[3] :, None]
    torch.testing.assert_close((pattern @ v.repeat_interleave(2, 2)) * real, z * real, **CLOSE)
    torch.testing.assert_close(entropy, -torch.special.xlogy(pattern, pattern).sum(-1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(received, pattern.sum(-2), atol=1e-9, rtol=1e-9)
    hidden = {
        "packed": pattern[..., 9:, :9],
        "left padding": pattern[:, 1, :, 7:, :7],
        "cache": pattern[..., :3, -1],
    }[way]
    assert hidden.abs().max() == 0 and pattern.shape[-2:] == ((4, 24) if way == "cache" else (24, 24))
