"""Claims about interventions: each does what its definition says, they compose, and they undo themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from lens_models import ALL, HEADS, LAYERS, PRE_NORM, WIDTH, make, text

import fastattn
from fastattn import lens, masks
from fastattn.lens import edits, places

CLOSE = {"atol": 1e-11, "rtol": 1e-11}
WITH_MLP = [name for name in ALL if name != "own-attention-only"]
PREVIOUS = masks.window(1, 0) & ~masks.window(0, 0)  # the key before each query


@torch.no_grad()
def logits_of(model, tokens):
    return lens.adapt(model).logits(tokens)


def nothing_is_left(model):
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return not hooks and not places._SLOTS and not places._ATTENTIONS and not edits._EDITED


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_ablating_heads_by_zero_is_taking_their_output_weights_out(name, attention):
    model, tokens = make(name, attention), text()
    without = copy.deepcopy(model)
    for layer, head in [(0, 1), (2, 0), (2, 3)]:
        with torch.no_grad():
            lens.adapt(without).projections(layer).out[head].zero_()
    with lens.ablate(model, heads=[(0, 1), (-1, 0), (2, -1)]):
        ablated = logits_of(model, tokens)
    torch.testing.assert_close(ablated, logits_of(without, tokens), **CLOSE)
    assert not torch.allclose(ablated, logits_of(model, tokens)) and nothing_is_left(model)


@pytest.mark.parametrize("name", WITH_MLP)
def test_ablating_neurons_by_zero_is_taking_their_output_weights_out(name):
    model, tokens = make(name), text()
    without = copy.deepcopy(model)
    for layer, neuron in [(0, 5), (0, 7), (1, 2)]:
        with torch.no_grad():
            lens.adapt(without).neuron_outputs(layer)[0][neuron].zero_()
    with lens.ablate(model, neurons=[(0, 5), (0, 7), (1, 2)]):
        ablated = logits_of(model, tokens)
    torch.testing.assert_close(ablated, logits_of(without, tokens), **CLOSE)


@pytest.mark.parametrize("name", WITH_MLP)
def test_an_ablated_mlp_adds_nothing_and_an_averaged_one_its_mean(name):
    model, tokens = make(name), text()
    with lens.watch(model, "blocks.1.mlp.out") as own:
        logits_of(model, tokens)
    for by, value in (("zero", torch.zeros(WIDTH).double()), ("mean", own["blocks.1.mlp.out"].mean((0, 1)))):
        with lens.ablate(model, mlps=[1], by=by), lens.watch(model, ["blocks.1.mlp.out"]) as seen:
            logits_of(model, tokens)
        torch.testing.assert_close(seen["blocks.1.mlp.out"], value.expand(2, 20, WIDTH), **CLOSE)


@pytest.mark.parametrize("name", ["own", "gemma3"])
def test_means_and_samples_come_from_the_source_or_from_the_batch(name):
    model, tokens, other = make(name), text(3), text(3).flip(1)
    z, neurons = "blocks.1.attention.hook_z", "blocks.1.mlp.hook_post"
    with lens.watch(model, [z, neurons]) as own:
        logits_of(model, tokens)
    with lens.watch(model, [z, neurons]) as theirs:
        logits_of(model, other)
    expected = {
        ("mean", None): (own[z].mean((0, 2), keepdim=True), own[neurons].mean((0, 1), keepdim=True)),
        ("mean", other): (theirs[z].mean((0, 2), keepdim=True), theirs[neurons].mean((0, 1), keepdim=True)),
        ("resample", None): (own[z].roll(1, 0), own[neurons].roll(1, 0)),
        ("resample", other): (theirs[z], theirs[neurons]),
    }
    for (by, source), (of_heads, of_neurons) in expected.items():
        with lens.ablate(model, heads=[(1, 2)], by=by, source=source), lens.watch(model, z) as seen:
            logits_of(model, tokens)
        torch.testing.assert_close(seen[z][:, 2], of_heads.expand_as(own[z])[:, 2], **CLOSE)
        torch.testing.assert_close(seen[z][:, [0, 1, 3]], own[z][:, [0, 1, 3]], **CLOSE)
        with lens.ablate(model, neurons=[(1, 4)], by=by, source=source), lens.watch(model, neurons) as seen:
            logits_of(model, tokens)
        torch.testing.assert_close(seen[neurons][..., 4], of_neurons.expand_as(own[neurons])[..., 4], **CLOSE)
        torch.testing.assert_close(seen[neurons][..., 5:], own[neurons][..., 5:], **CLOSE)


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_the_gradient_of_a_gate_is_how_the_loss_changes_with_it(name, attention):
    model, tokens = make(name, attention), text()
    # Norms of transformers compute in float32, too coarse to see a slope; fused ones in the model's dtype.
    fastattn.patch(model, attention=False, mlp=False, norm=True)

    def loss(gates=None):
        with lens.scale_heads(model, gates) as gates:
            value = torch.nn.functional.cross_entropy(
                lens.adapt(model).logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            )
        return value, gates

    value, gates = loss()
    value.backward()
    assert gates.grad.shape == (LAYERS, HEADS) and nothing_is_left(model)
    for layer, head in [(0, 0), (1, 3), (2, 1)]:
        step = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
        step[layer, head] = 1e-4
        with torch.no_grad():
            slope = (loss(1 + step)[0] - loss(1 - step)[0]) / 2e-4
        torch.testing.assert_close(gates.grad[layer, head], slope, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_a_knocked_out_head_looks_elsewhere_in_the_old_proportions(name, attention):
    model, tokens = make(name, attention), text(length=24)
    asked = [f"blocks.1.attention.{x}" for x in ("pattern", "hook_v", "hook_z")]
    with lens.watch(model, asked) as own:
        logits_of(model, tokens)
    with lens.knock_out(model, [(1, 2), (1, 0)], PREVIOUS), lens.watch(model, asked) as seen:
        logits_of(model, tokens)
    pattern, v, z = (own[name] for name in asked)
    cut = PREVIOUS.dense(1, 1, 24, 24)
    left = pattern.masked_fill(cut, 0)
    left = left / left.sum(-1, keepdim=True)
    expected = left.nan_to_num() @ v.repeat_interleave(HEADS // v.shape[1], 1)
    for head in range(HEADS):
        torch.testing.assert_close(seen[asked[2]][:, head], (expected if head in (0, 2) else z)[:, head], **CLOSE)
    assert nothing_is_left(model)


def test_a_query_whose_every_edge_is_cut_reads_nothing():
    model, tokens = make("llama"), text()
    z = "blocks.0.attention.hook_z"
    with lens.knock_out(model, [(0, 1)], masks.window(None, None)), lens.watch(model, z) as seen:
        assert logits_of(model, tokens).isfinite().all()
    assert seen[z][:, 1].abs().max() == 0 < seen[z][:, 0].abs().min()


def test_edges_are_cut_within_the_models_own_mask_and_padding():
    model, tokens = make("own"), text(length=24)
    z, given = "blocks.0.attention.hook_z", {"key_lengths": [24, 9], "mask": masks.window(6)}
    with torch.no_grad(), lens.watch(model, z) as expected:
        model(tokens, key_lengths=[24, 9], mask=masks.window(6) & ~PREVIOUS)
    with (
        torch.no_grad(),
        lens.knock_out(model, [(0, h) for h in range(HEADS)], PREVIOUS),
        lens.watch(model, z) as seen,
    ):
        model(tokens, **given)
    torch.testing.assert_close(seen[z], expected[z], **CLOSE)
    lowered = masks.window(6).lower(2, HEADS, 24, 24)
    with (
        pytest.raises(ValueError, match="cannot be cut from a mask that is lowered"),
        lens.knock_out(model, [(0, 0)], PREVIOUS),
    ):
        model(tokens, mask=lowered)
    assert nothing_is_left(model)


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_a_patched_pattern_is_the_donors_over_the_values_that_are_here(name, attention):
    model, tokens, other = make(name, attention), text(), text().flip(1)
    asked = ["blocks.2.attention.hook_[qk]", "blocks.2.attention.pattern"]
    with lens.watch(model, asked) as donor:
        logits_of(model, other)
    at = "blocks.2.attention.hook_"
    with lens.watch(model, [f"{at}v", f"{at}z"]) as own:
        logits_of(model, tokens)
    with lens.patch_pattern(model, [(2, 3)], donor), lens.watch(model, f"{at}z") as seen:
        logits_of(model, tokens)
    values = own[f"{at}v"].repeat_interleave(HEADS // own[f"{at}v"].shape[1], 1)
    expected = donor["blocks.2.attention.pattern"] @ values
    torch.testing.assert_close(seen[f"{at}z"][:, 3], expected[:, 3], **CLOSE)
    assert seen[f"{at}z"][:, :3].equal(own[f"{at}z"][:, :3])


@pytest.mark.parametrize("name", ALL)
def test_all_streams_of_a_clean_run_make_a_corrupted_one_clean(name):
    model, tokens, other = make(name), text(), text().flip(1)
    with lens.watch(model, "blocks.1.resid_post") as clean:
        expected = logits_of(model, tokens)
    with lens.patch_activations(model, clean):
        assert logits_of(model, other).equal(expected)
    assert not torch.allclose(logits_of(model, other), expected)


@pytest.mark.parametrize("kind", [kind for kind in places.TENSORS if kind != "resid_mid"])
@pytest.mark.parametrize("name", ["own-gated", "gpt2", "gemma3", "pythia", "bert"])
def test_a_part_is_replaced_and_the_rest_stays(name, kind):
    model, tokens, other = make(name), text(), text().flip(1)
    place = f"blocks.1.{kind}"
    part = f"{place}.head(0).at(3:7)" if "hook_" in kind and "post" not in kind else f"{place}.at(-2)"
    with lens.watch(model, [place, part]) as own:
        logits_of(model, tokens)
    with lens.watch(model, part) as theirs:
        logits_of(model, other)
    with lens.patch_activations(model, theirs), lens.watch(model, [place, part]) as seen:
        patched = logits_of(model, tokens)
    assert seen[part].equal(theirs[part]) and not torch.allclose(own[part], theirs[part])
    with lens.patch_activations(model, {place: seen[place]}):
        assert logits_of(model, tokens).equal(patched)
    with lens.patch_activations(model, {part: own[part]}):
        torch.testing.assert_close(logits_of(model, tokens), logits_of(model, tokens), **CLOSE)
    changed = (seen[place] != own[place]).sum()
    assert 0 < changed <= theirs[part].numel()


def test_steering_adds_a_vector_where_it_is_asked_to():
    model, tokens, vector = make("llama"), text(), torch.randn(WIDTH).double()
    with lens.watch(model, "blocks.0.resid_post") as own:
        logits_of(model, tokens)
    with (
        lens.steer(model, "blocks.0.resid_post.at(2:4)", vector, scale=-2),
        lens.watch(model, "blocks.0.resid_post") as seen,
    ):
        logits_of(model, tokens)
    expected = own["blocks.0.resid_post"].clone()
    expected[:, 2:4] -= 2 * vector
    torch.testing.assert_close(seen["blocks.0.resid_post"], expected, **CLOSE)


@pytest.mark.parametrize("name", ["own", "gemma3"])
def test_interventions_compose_in_the_order_in_which_they_are_entered(name):
    model, tokens, other = make(name), text(), text().flip(1)
    z = "blocks.1.attention.hook_z"
    with lens.watch(model, ["blocks.1.attention.hook_[qkv]", "blocks.1.attention.pattern"]) as donor:
        logits_of(model, other)
    # An edited pattern comes before what is done with what was read, whichever was entered first.
    with (
        lens.ablate(model, heads=[(1, 2)]),
        lens.knock_out(model, [(1, 2), (1, 1)], PREVIOUS),
        lens.watch(model, z) as seen,
    ):
        logits_of(model, tokens)
    assert seen[z][:, 2].abs().max() == 0 < seen[z][:, 1].abs().max()
    # Two cuts of one head are the cut of both.
    first = masks.global_tokens([0])
    with lens.knock_out(model, [(1, 0)], PREVIOUS | first), lens.watch(model, z) as expected:
        logits_of(model, tokens)
    with (
        lens.knock_out(model, [(1, 0)], PREVIOUS),
        lens.knock_out(model, [(1, 0)], first),
        lens.watch(model, z) as seen,
    ):
        logits_of(model, tokens)
    torch.testing.assert_close(seen[z], expected[z], **CLOSE)
    # A cut holds for a pattern from another run, too, in either order.
    both_orders = []
    for cut_first in (True, False):
        edits = [lens.knock_out(model, [(1, 0)], PREVIOUS), lens.patch_pattern(model, [(1, 0)], donor)]
        outer, inner = edits if cut_first else reversed(edits)
        with outer, inner, lens.watch(model, z) as seen:
            logits_of(model, tokens)
        both_orders.append(seen[z])
    assert both_orders[0].equal(both_orders[1]) and not both_orders[0].equal(expected[z])
    # Of two values at one place, the one entered last stays.
    ones = lens.patch_activations(model, {f"{z}.head(0)": torch.ones(())})
    with ones, lens.ablate(model, heads=[(1, 0)]), lens.watch(model, z) as seen:
        logits_of(model, tokens)
    assert seen[z][:, 0].abs().max() == 0
    assert nothing_is_left(model)


def test_an_exception_undoes_all_of_them_and_leaving_restores_every_bit():
    model, tokens, vector = make("llama"), text(), torch.ones(WIDTH).double()
    before = logits_of(model, tokens)
    with (
        pytest.raises(KeyboardInterrupt),
        lens.ablate(model, heads=[(0, 0)], mlps=[1]),
        lens.knock_out(model, [(1, 1)], PREVIOUS),
        lens.steer(model, "blocks.*.resid_pre", vector),
        lens.scale_heads(model),
    ):
        logits_of(model, tokens)
        raise KeyboardInterrupt
    assert nothing_is_left(model) and logits_of(model, tokens).equal(before)


@pytest.mark.parametrize("sender", ["attention.hook_z.head(1)", "attention.out", "mlp.out"])
@pytest.mark.parametrize("name", [name for name in PRE_NORM if name != "own-attention-only"])
def test_the_direct_path_to_the_logits_is_what_the_sender_adds_through_the_final_norm(name, sender):
    model, tokens, other = make(name), text(), text().flip(1)
    adapter = lens.adapt(model)
    patched = lens.path_patch(model, tokens, other, sender=f"blocks.0.{sender}", receiver="logits")
    last, out = f"blocks.{LAYERS - 1}.resid_post", f"blocks.0.{sender.partition('.')[0]}.out"
    with lens.watch(model, [last, out]) as own:
        logits_of(model, tokens)
    with lens.watch(model, f"blocks.0.{sender}") as theirs:
        logits_of(model, other)
    with lens.patch_activations(model, dict(theirs)), lens.watch(model, out) as said:
        logits_of(model, tokens)
    with torch.no_grad():
        expected = adapter.unembed(own[last] + said[out] - own[out])
    torch.testing.assert_close(patched, expected, **CLOSE)


@pytest.mark.parametrize("receiver", ["attention.hook_q.head(2)", "attention.hook_k.head(0)", "mlp.out"])
@pytest.mark.parametrize("name", ["own", "own-gated", "own-encoder"])
def test_the_path_to_a_component_is_its_input_with_what_the_sender_says_more(name, receiver):
    model, tokens, other = make(name), text(), text().flip(1)
    patched = lens.path_patch(model, tokens, other, sender="blocks.0.mlp.out", receiver=f"blocks.2.{receiver}")
    names = ["blocks.0.mlp.out", "blocks.2.resid_pre", "blocks.2.resid_mid"]
    with lens.watch(model, names) as own:
        logits_of(model, tokens)
    with lens.watch(model, names[0]) as theirs:
        logits_of(model, other)
    more, block = theirs[names[0]] - own[names[0]], model.blocks[2]
    with torch.no_grad():
        if receiver == "mlp.out":
            value = block.mlp(block.mlp_norm(own[names[2]] + more))
            point, hook = block.mlp, lambda _m, _i, _o: value
        else:
            q, k, _ = block.attention.project(block.attention_norm(own[names[1]] + more))
            point = block.attention.hook_q if "hook_q" in receiver else block.attention.hook_k
            value, head = (q, 2) if "hook_q" in receiver else (k, 0)

            def hook(_module, _inputs, output):
                output = output.clone()
                output[:, head] = value[:, head]
                return output

        with point.register_forward_hook(hook):
            expected = model(tokens)
    torch.testing.assert_close(patched, expected, **CLOSE)
    assert not torch.allclose(patched, logits_of(model, tokens)) and nothing_is_left(model)


@pytest.mark.parametrize("name", ALL)
def test_a_path_between_equal_runs_changes_nothing(name):
    model, tokens = make(name), text()
    kind = "attention.hook_q.head(1)"
    patched = lens.path_patch(model, tokens, tokens, sender="blocks.0.attention.out", receiver=f"blocks.2.{kind}")
    torch.testing.assert_close(patched, logits_of(model, tokens), **CLOSE)


ONE = torch.ones(1)
WRONG = {
    "head": (lambda m: lens.ablate(m, heads=[(0, 4)]), "with a head below 4, got 4"),
    "layer": (lambda m: lens.ablate(m, heads=[(3, 0)]), "layer must be from 0 to 2, got 3"),
    "neuron": (lambda m: lens.ablate(m, neurons=[(0, 999)]), "with a neuron below"),
    "nothing": (lambda m: lens.ablate(m), "must name what is to be ablated"),
    "way": (lambda m: lens.ablate(m, mlps=[0], by="noise"), "by must be one of zero, mean, resample"),
    "source": (lambda m: lens.ablate(m, mlps=[0], source=text()), "source must be None for by='zero'"),
    "no pairs": (lambda m: lens.ablate(m, heads=[3]), r"heads must be pairs such as .* got 3 in it"),
    "gates": (lambda m: lens.scale_heads(m, torch.ones(2)), r"gates must have shape \(layers, heads\) = \(3, 4\)"),
    "edges": (lambda m: lens.knock_out(m, [(0, 0)], torch.ones(2, 2)), "edges must be a value of fastattn.masks"),
    "donor": (lambda m: lens.patch_pattern(m, [(0, 0)], {}), r"donor must hold blocks.0.attention.hook_q and"),
    "between": (lambda m: lens.patch_activations(m, {"blocks.0.resid_mid": ONE}), "can be read, and not"),
    "statistic": (lambda m: lens.patch_activations(m, {"blocks.0.attention.entropy": ONE}), "names nothing"),
    "reduced": (lambda m: lens.patch_activations(m, {"blocks.0.resid_pre.mean": ONE}), "selects nothing"),
    "no heads": (lambda m: lens.steer(m, "blocks.0.resid_pre.head(1)", torch.ones(1)), "has no heads"),
    "several": (lambda m: lens.patch_activations(m, {"blocks.*.resid_pre": ONE}), "means 3 places"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_done_is_refused_before_anything_runs(wrong):
    model = make("llama")
    make_context, message = WRONG[wrong]
    with pytest.raises((ValueError, TypeError), match=message), make_context(model):
        raise AssertionError("it was entered")
    assert nothing_is_left(model)


@pytest.mark.parametrize(
    ("sender", "receiver", "message"),
    [
        ("blocks.1.mlp.out", "blocks.1.attention.hook_q", "receiver must read after the sender has written"),
        ("blocks.0.attention.hook_q", "logits", "sender must be what adds to the stream"),
        ("blocks.0.resid_post", "logits", "sender must be what adds to the stream"),
        ("blocks.*.mlp.out", "logits", "means 3 places"),
        ("blocks.0.mlp.out", "the logits", "names nothing"),
    ],
)
def test_paths_that_are_none_are_refused(sender, receiver, message):
    with pytest.raises(ValueError, match=message):
        lens.path_patch(make("llama"), text(), text(), sender=sender, receiver=receiver)
    with pytest.raises(ValueError, match="receiver must read after"):
        lens.path_patch(
            make("pythia"), text(), text(), sender="blocks.0.attention.out", receiver="blocks.0.mlp.out"
        )


def test_shapes_that_do_not_fit_are_named():
    model, tokens = make("llama"), text()
    cases = [
        (
            lens.patch_activations(model, {"blocks.0.resid_pre.at(1)": torch.ones(3)}),
            r"must fit \(2, 32\), got \(3,\)",
        ),
        (lens.steer(model, "blocks.0.resid_pre", torch.ones(5, 7)), r"added to blocks.0.resid_pre must fit"),
        (
            lens.patch_activations(model, {"blocks.0.resid_pre.at(20)": torch.ones(1)}),
            "has 20 there, got number 20",
        ),
        (
            lens.ablate(model, mlps=[0], by="resample", source=text(length=9)),
            "source gives blocks.0.mlp.out of shape",
        ),
    ]
    for context, message in cases:
        with pytest.raises(ValueError, match=message), context:
            model(tokens)
    with (
        pytest.raises(ValueError, match="takes the neighbour in the batch"),
        lens.ablate(model, mlps=[0], by="resample"),
    ):
        model(tokens[:1])
    with lens.watch(model, "blocks.0.attention.hook_[qk]") as donor:
        model(text(length=9))
    with (
        pytest.raises(ValueError, match="donor's q of block 0 has shape"),
        lens.patch_pattern(model, [(0, 0)], donor),
    ):
        model(tokens)
    assert nothing_is_left(model)


@pytest.mark.parametrize(("name", "fields"), [("own", {"dropout": 0.1}), ("llama", {"attention_dropout": 0.1})])
def test_dropout_that_is_active_is_refused(name, fields):
    model = make(name, **fields).train()
    with (
        pytest.raises(ValueError, match=r"must not drop anything.*call model.eval"),
        lens.ablate(model, heads=[(0, 0)]),
    ):
        pass
    with lens.ablate(model.eval(), heads=[(0, 0)]):
        model(text())


def test_gradient_checkpointing_is_refused():
    model = make("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="must not checkpoint its gradients"), lens.ablate(model, heads=[(0, 0)]):
        pass


def test_what_was_there_before_a_change_is_not_changed_with_it():
    model, tokens = make("llama"), text()
    names = ["blocks.0.resid_post", "blocks.1.resid_pre"]
    with lens.watch(model, names[0]) as own:
        logits_of(model, tokens)
    with lens.patch_activations(model, {f"{names[1]}.at(3)": ONE}), lens.watch(model, names) as seen:
        logits_of(model, tokens)
    assert seen[names[0]].equal(own[names[0]]) and (seen[names[1]][:, 3] == 1).all()


def test_gradients_flow_through_interventions():
    model, tokens = make("own"), text()
    vector = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    with lens.steer(model, "blocks.1.resid_pre", vector), lens.knock_out(model, [(1, 0)], PREVIOUS):
        lens.adapt(model).logits(tokens)[0, -1, 7].backward()
    step = torch.randn(WIDTH).double() * 1e-5

    def logit(added):
        with lens.steer(model, "blocks.1.resid_pre", added), lens.knock_out(model, [(1, 0)], PREVIOUS):
            return logits_of(model, tokens)[0, -1, 7]

    torch.testing.assert_close(vector.grad @ step, (logit(step) - logit(-step)) / 2, atol=1e-12, rtol=1e-5)
