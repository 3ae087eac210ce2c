"""Plans: a call that was seen before goes past its operator, and nothing but the time shows it."""

from __future__ import annotations

import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from attention_problems import without_plans
from hardware import DEVICE
from plan_calls import CALLS, UNKEPT, results
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
import fastattn.flops  # registers the formulas
from fastattn.core import plans
from fastattn.core.attention.operators import AttentionPlan

EVERY_CALL = pytest.mark.parametrize("name", CALLS)
EVERY_KEPT_CALL = pytest.mark.parametrize("name", [name for name in CALLS if name not in UNKEPT])


@pytest.fixture(autouse=True)
def _afresh() -> None:
    plans.forget()
    torch.manual_seed(0)


def hits() -> int:
    return sum(p.hits for p in plans.EVERY)


def asked() -> int:
    return hits() + sum(p.misses for p in plans.EVERY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", [0, 1])
@EVERY_CALL
def test_both_ways_give_the_same_bits_and_the_same_layout(name: str, order: int, dtype: torch.dtype) -> None:
    call = CALLS[name]
    inputs = call.inputs(dtype)
    with without_plans():
        expected = results(call, *inputs, order)
    first = results(call, *inputs, order)
    before = hits()
    again = results(call, *inputs, order)
    assert (hits() > before) == (name not in UNKEPT)
    for found in (first, again):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def test_tensors_that_lie_otherwise_have_a_plan_of_their_own() -> None:
    q, k, v = CALLS["attention"].inputs()[0]
    fastattn.attention(q, k, v)
    q, k, v = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v))
    with without_plans():
        expected = fastattn.attention(q, k, v)
    before = hits()
    assert torch.equal(fastattn.attention(q, k, v), expected) and hits() == before


@EVERY_CALL
def test_both_ways_give_the_same_second_derivatives(name: str) -> None:
    call = CALLS[name]
    inputs = call.inputs()
    with without_plans():
        expected = results(call, *inputs, 2)
    results(call, *inputs, 2)
    # Autograd differentiates the MLP's operations, the operator its definition: they sum in another order.
    units = 8 * torch.finfo(torch.float32).eps if "mlp" in name else 0.0
    for a, b in zip(results(call, *inputs, 2), expected, strict=True):
        assert (a - b).abs().max() <= units * b.abs().max()


# Who must see the operator.


class Seeing(TorchDispatchMode):
    """Notes our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {func.name()} if func.namespace == "fastattn" else set()
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Derived(Tensor):
    pass


def tracing(run: Callable[[], Any], q: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda t: fastattn.attention(t, t, t), (q,), check_trace=False)


def differentiating(run: Callable[[], Any], q: Tensor) -> None:
    torch.func.grad(lambda t: fastattn.attention(t, t, t).sum())(q)


def mapping(run: Callable[[], Any], q: Tensor) -> None:
    torch.func.vmap(lambda t: fastattn.attention(t, t, t))(torch.stack((q, q)))


def pushing(run: Callable[[], Any], q: Tensor) -> None:
    with forward_ad.dual_level():
        t = forward_ad.make_dual(q, torch.ones_like(q))
        assert forward_ad.unpack_dual(fastattn.attention(t, t, t)).tangent is not None


def pretending(run: Callable[[], Any], q: Tensor) -> None:
    with FakeTensorMode() as mode:
        t = mode.from_tensor(q)
        assert type(fastattn.attention(t, t, t)) is type(t)


def deriving(run: Callable[[], Any], q: Tensor) -> None:
    t = q.as_subclass(Derived)
    assert type(fastattn.attention(t, t, t)) is Derived


def making_a_graph(run: Callable[[], Any], q: Tensor) -> None:
    for pre_dispatch in (False, True):
        graph = make_fx(lambda t: fastattn.attention(t, t, t), pre_dispatch=pre_dispatch)(q)
        assert "fastattn.attention_forward" in graph.code


def exporting(run: Callable[[], Any], q: Tensor) -> None:
    class Model(torch.nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return fastattn.attention(t, t, t)

    assert "fastattn.attention_forward" in torch.export.export(Model(), (q,), strict=False).graph_module.code


def compiling(run: Callable[[], Any], q: Tensor) -> None:
    torch.compiler.reset()
    graphs = []
    torch.compile(
        lambda t: fastattn.attention(t, t, t),
        backend=lambda g, _: graphs.append(g.code) or g.forward,
        fullgraph=True,
    )(q)
    assert "attention_forward" in graphs[0]


def profiling(run: Callable[[], Any], q: Tensor) -> None:
    with torch.profiler.profile() as profile:
        run()
    assert any(event.key == "fastattn::attention_forward" for event in profile.key_averages())


def counting(run: Callable[[], Any], q: Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() > 0


def dispatching(run: Callable[[], Any], q: Tensor) -> None:
    with Seeing() as mode:
        run()
    assert mode.seen == {"fastattn::attention_forward"}


def within(context: Callable[[], AbstractContextManager]) -> Callable[[Callable[[], Any], Tensor], None]:
    def enter(run: Callable[[], Any], q: Tensor) -> None:
        with context():
            run()

    return enter


@pytest.mark.parametrize(
    "watch",
    [
        compiling, exporting, making_a_graph, tracing, differentiating, mapping, pushing, pretending, deriving,
        profiling, counting, dispatching,
        pytest.param(within(Functions), id="torch function"),
        pytest.param(within(lambda: torch.autocast(DEVICE, torch.bfloat16)), id="autocast"),
        pytest.param(within(lambda: torch.device(DEVICE)), id="default device"),
    ],
)  # fmt: skip
def test_whoever_watches_sees_the_operator_though_a_plan_is_there(watch: Any) -> None:
    q = CALLS["attention"].inputs()[0][0]
    run = lambda: fastattn.attention(q, q, q)  # noqa: E731
    run()
    before, seen = hits(), asked()
    run()
    assert hits() == before + 1
    watch(run, q)
    assert asked() == seen + 1
    run()
    assert hits() == before + 2


@EVERY_CALL
def test_on_the_meta_device_every_call_takes_its_operator(name: str) -> None:
    call = CALLS[name]
    tensors, beside = call.inputs()
    expected = call(tensors, beside)
    options = {key: t.to("meta") if isinstance(t, Tensor) else t for key, t in call.options.items()}
    before = asked()
    found = replace(call, options=options)(*_on_meta(tensors, beside))
    assert asked() == before
    assert [(t.shape, t.dtype, t.device.type) for t in found] == [(t.shape, t.dtype, "meta") for t in expected]


def _on_meta(tensors: list[Tensor], beside: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    return [t.to("meta") for t in tensors], {name: t.to("meta") for name, t in beside.items()}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "rms norm"])
def test_a_dispatch_mode_sees_one_operator_of_every_family_in_both_directions(name: str) -> None:
    call = CALLS[name]
    inputs = call.inputs()
    results(call, *inputs, 1)
    with Seeing() as mode:
        results(call, *inputs, 1)
    assert len(mode.seen) == 2, mode.seen


def test_a_backward_that_is_watched_takes_the_operator() -> None:
    q = CALLS["attention"].inputs()[0][0].requires_grad_()
    out = fastattn.attention(q, q, q)
    with Seeing() as mode:
        out.sum().backward()
    assert "fastattn::attention_backward" in mode.seen


@pytest.mark.parametrize("special", [torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)])
def test_views_that_only_torch_reads_rightly_take_the_operator_in_both_directions(special: Any) -> None:
    q = CALLS["attention"].inputs()[0][0]
    plain = special(q).clone()
    expected = fastattn.attention(q, q, plain)
    fastattn.attention(q, q, q)
    before = asked()
    assert torch.equal(fastattn.attention(q, q, special(q)), expected) and asked() == before
    leaf = q.clone().requires_grad_()
    out = fastattn.attention(leaf, q, q)
    with mock.patch.object(
        AttentionPlan, "gradients", autospec=True, side_effect=AttentionPlan.gradients
    ) as calls:
        found = torch.autograd.grad(out, leaf, special(q), retain_graph=True)[0]
        assert torch.equal(found, torch.autograd.grad(out, leaf, plain)[0])
    assert [call.args[-1] for call in calls.call_args_list] == [False, True]


def test_gradients_of_a_plan_can_be_mapped() -> None:
    q = CALLS["attention"].inputs()[0][0].requires_grad_()
    out = fastattn.attention(q, q, q)
    upstream = torch.randn(3, *out.shape)
    mapped = torch.autograd.grad(out, q, upstream, is_grads_batched=True, retain_graph=True)[0]
    for one, dout in zip(mapped, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, q, dout, retain_graph=True)[0])


@pytest.mark.parametrize("name", ["attention", "float bias", "mlp", "rms norm, residual", "heads, weights"])
@pytest.mark.parametrize("watched", ["forward", "recomputation"])
def test_a_checkpoint_may_repeat_a_call_the_other_way(watched: str, name: str) -> None:
    call = CALLS[name]
    tensors, beside = call.inputs()
    leaves = [t.requires_grad_() for t in tensors]
    modes = {watched: without_plans()}
    with modes.get("forward", nullcontext()):
        out = checkpoint(lambda *t: call(list(t), beside), *leaves, use_reentrant=False)
    with modes.get("recomputation", nullcontext()):
        found = torch.autograd.grad(out[0].sum(), leaves)
    expected = torch.autograd.grad(call(leaves, beside)[0].sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Errors.


def _attention(**wrong: Any) -> Callable[[], Any]:
    tensors = dict(zip("qkv", CALLS["attention"].inputs()[0], strict=True))
    return lambda: fastattn.attention(**{**tensors, **wrong})


def _mlp(**wrong: Any) -> Callable[[], Any]:
    tensors = dict(zip(("x", "w1", "b1", "w2", "b2"), CALLS["mlp"].inputs()[0], strict=True))
    return lambda: fastattn.mlp(**{**tensors, **wrong})


def _heads(**wrong: Any) -> Callable[[], Any]:
    return lambda: fastattn.prepare_heads(CALLS["heads"].inputs()[0][0], **wrong)


LONG = {"cos": torch.randn(12, 8), "sin": torch.randn(12, 8)}
# Calls that are right, and calls whose arguments are equal or of the same shape, and wrong.
LOOKALIKES = {
    "a number for a flag": (_attention(causal=True), _attention(causal=1)),
    "a flag for a number": (_attention(scale=1.0), _attention(scale=True)),
    "a flag in a pair": (_attention(window=(1, 1)), _attention(window=(1, True))),
    "a flag for a flag's number": (_attention(return_lse=False), _attention(return_lse=0)),
    "a number for no cap": (_attention(softcap=0.0), _attention(softcap=False)),
    "an unknown backend": (_attention(backend="portable"), _attention(backend="fast")),
    "another head": (_attention(), _attention(k=torch.randn(2, 3, 11, 16))),
    "another dtype": (_attention(), _attention(v=torch.randn(2, 2, 11, 16).half())),
    "integers": (_attention(), _attention(q=torch.ones(2, 4, 9, 16, dtype=torch.int64))),
    "no tensor": (_attention(), _attention(k=None)),
    "a sparse tensor": (
        _attention(q=torch.randn(1).expand(2, 2, 11, 16)), _attention(q=torch.randn(2, 2, 11, 16).to_sparse()),
    ),
    "lengths of floats": (
        _attention(key_lengths=torch.tensor([3, 4])), _attention(key_lengths=torch.tensor([3.0, 4.0])),
    ),
    "slopes with a gradient": (
        _attention(alibi_slopes=torch.ones(4)), _attention(alibi_slopes=torch.ones(4, requires_grad=True)),
    ),
    "an unknown keyword": (_attention(), _attention(is_causal=True)),
    "another width": (_mlp(), _mlp(x=torch.randn(2, 5, 13))),
    "a flag for an MLP's number": (_mlp(chunk=1), _mlp(chunk=True)),
    "a number for an MLP's flag": (_mlp(match_eager=True), _mlp(match_eager=1)),
    "no weight": (_mlp(), _mlp(w1=None)),
    "a bias too many": (_mlp(), _mlp(norm_bias=torch.ones(12))),
    "an array": (_mlp(), _mlp(norm_weight=numpy.ones(12))),
    "a weight of another dtype": (_mlp(), _mlp(w2=torch.randn(12, 20).double())),
    "another activation": (_mlp(activation="relu"), _mlp(activation="tanh")),
    "an offset too far": (_heads(**LONG, offsets=3), _heads(**LONG, offsets=4)),
    "offsets too far": (
        _heads(**LONG, offsets=torch.tensor([0, 3])), _heads(**LONG, offsets=torch.tensor([0, 4])),
    ),
    "a flag for an offset": (_heads(**LONG, offsets=1), _heads(**LONG, offsets=True)),
    "an epsilon of zero": (_heads(norm=True, eps=1.0), _heads(norm=True, eps=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOKALIKES)
def test_a_wrong_call_raises_the_same_error_before_and_after_a_right_one(case: str) -> None:
    right, wrong = LOOKALIKES[case]

    def error() -> tuple[type, str]:
        with pytest.raises((TypeError, ValueError)) as raised:
            wrong()
        return raised.type, str(raised.value)

    with without_plans():
        expected = error()
    first = error()
    for _ in range(4):
        right()
    assert expected == first == error() == error()


# The call that comes again and again, which is known without a key.

OPTIONS = "gelu", "auto", 1, True, None, 0.0, None
CHANGED: dict[str, Callable[[list[Any]], Any]] = {
    "nothing": lambda t: t,
    "values": lambda t: [one.clone() if type(one) is Tensor else one for one in t],
    "another shape": lambda t: [t[0][:2], *t[1:]],
    "other strides": lambda t: [t[0], t[1].t().contiguous().t(), *t[2:]],
    "another dtype": lambda t: [t[0].double(), *t[1:]],
    "a gradient": lambda t: [t[0], t[1].detach().requires_grad_(), *t[2:]],
    "another place": lambda t: [t[0], t[2], t[1], *t[3:]],
    "one more": lambda t: [*t[:2], t[1], *t[3:]],
    "one less": lambda t: [t[0], None, *t[2:]],
    "no tensor": lambda t: [[1.0], *t[1:]],
    "none at all": lambda t: [None, *t[1:]],
    "a tensor of another class": lambda t: [t[0].as_subclass(Derived), *t[1:]],
    "sparse": lambda t: [t[0].to_sparse(), *t[1:]],
    "negated": lambda t: [torch._neg_view(t[0]), *t[1:]],
    "zeros of a derivative": lambda t: [torch._efficientzerotensor(t[0].shape), *t[1:]],
    "meta": lambda t: [None if one is None else one.to("meta") for one in t],
}
IN: dict[str, Callable[[], AbstractContextManager]] = {
    "no context": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a default device": lambda: torch.device("cpu"),
    "a dispatch mode": Seeing,
    "a backend": lambda: mock.patch.dict(os.environ, FASTATTN_BACKEND="portable"),
}


@pytest.mark.parametrize(
    "options", [OPTIONS, ("gelu", "auto", True, *OPTIONS[3:]), ("relu", *OPTIONS[1:])], ids=str
)
@pytest.mark.parametrize("context", IN)
@pytest.mark.parametrize("what", CHANGED)
def test_a_call_is_known_without_a_key_only_if_its_key_is_the_same(
    what: str, context: str, options: tuple
) -> None:
    known: plans.Plans[Any] = plans.Plans("tried")
    plans.EVERY.remove(known)
    tensors = [torch.randn(3, 4), torch.randn(4, 4), None, torch.nn.Parameter(torch.randn(4, 4)), None]
    key, plan = plans.key(tensors, OPTIONS), object()
    known.keep(key, plan)
    for _ in range(2):
        assert known.latest(tensors, OPTIONS) is None
        known.again(tensors, OPTIONS, known.find(key))
    changed = CHANGED[what](tensors)
    with IN[context]():
        found = known.latest(changed, options)
        expected = None if what in ("no tensor", "none at all") else known.find(plans.key(changed, options))
    assert found is expected
    known.forget()
    assert known.latest(tensors, OPTIONS) is None


def test_a_backend_that_cannot_run_here_is_refused_after_it_could(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 4, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for _ in range(2):
        fastattn.attention(q, q, q, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="need a GPU"):
        fastattn.attention(q, q, q, backend="triton")


def test_the_environment_variable_is_read_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 4, 16, requires_grad=True)
    out = fastattn.attention(q, q, q)
    monkeypatch.setenv("FASTATTN_BACKEND", "slow")
    for run in (lambda: fastattn.attention(q, q, q), lambda: out.sum().backward()):
        with pytest.raises(ValueError, match="FASTATTN_BACKEND must be one of"):
            run()


# What a plan keeps, and what it does not.


def held_by(root: object) -> list[object]:
    """All that can be reached from an object, but not through modules, classes and functions."""
    found, ahead = {}, [root]
    while ahead:
        one = ahead.pop()
        if id(one) not in found and not isinstance(one, ModuleType | type | FunctionType):
            found[id(one)] = one
            ahead += gc.get_referents(one)
    return list(found.values())


@pytest.mark.parametrize("order", [0, 1])
@EVERY_KEPT_CALL
def test_a_plan_holds_no_tensor_and_those_of_the_call_are_freed(name: str, order: int) -> None:
    call = CALLS[name]
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            tensors, beside = call.inputs()
            leaves = [t.requires_grad_(order == 1) for t in tensors]
            found = call(leaves, beside)
            gradients = torch.autograd.grad(found[0].sum(), leaves) if order else ()
            alive = [weakref.ref(t) for t in (*leaves, *beside.values(), *found, *gradients)]
            del tensors, leaves, beside, found, gradients
            assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
    kept = [p._plans for p in plans.EVERY]
    assert any(kept) and not any(isinstance(one, Tensor) for one in held_by(kept))


def test_the_oldest_plans_are_dropped() -> None:
    kept = fastattn.core.attention.functional.PLANS
    with mock.patch.object(plans, "MOST", 3):
        for length in (3, 4, 5, 6, 7):
            q = torch.randn(1, 1, length, 4)
            fastattn.attention(q, q, q)
            assert len(kept) <= 3
        before = kept.hits
        fastattn.attention(q, q, q)
        q = torch.randn(1, 1, 3, 4)
        fastattn.attention(q, q, q)
    assert kept.hits == before + 1


def test_a_plan_serves_every_grad_mode() -> None:
    q, k, v = CALLS["attention"].inputs()[0]
    with torch.inference_mode():
        assert fastattn.attention(q, k, v).is_inference()
    assert not fastattn.attention(q, k, v).is_inference()
    q.requires_grad_()
    with torch.no_grad():
        assert not fastattn.attention(q, k, v).requires_grad
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert type(out.grad_fn).__name__ == type(lse.grad_fn).__name__ == "PlannedBackward"
    out = fastattn.attention(q, k, v)
    with torch.inference_mode():
        assert not fastattn.attention(q, k, v).requires_grad
    assert type(out.grad_fn).__name__ == "PlannedBackward"
    out.sum().backward()
    assert q.grad is not None and q.grad.any()


@pytest.mark.parametrize(
    ("name", "argument", "change"),
    [
        ("key lengths", "key_lengths", lambda t: t.fill_(1)),
        ("float bias", "bias", lambda t: t[..., 2:].fill_(float("-inf"))),
        ("bool bias", "bias", lambda t: t[..., 1:].fill_(False)),
        ("relative bias", "relative_bias", lambda t: t.neg_()),
        ("dropout", "dropout_state", lambda t: t[:, 0].add_(1)),
        ("heads, offsets", "offsets", lambda t: t.add_(1)),
    ],
)
def test_what_is_changed_in_place_is_read_again(name: str, argument: str, change: Callable[[Tensor], Any]) -> None:
    call = CALLS[name]
    tensors, beside = call.inputs()
    before = call(tensors, beside)[0]
    change(beside[argument])
    after = call(tensors, beside)[0]
    with without_plans():
        assert torch.equal(after, call(tensors, beside)[0]) and not torch.equal(after, before)


def test_dropout_draws_anew_and_follows_the_seed() -> None:
    q, k, v = CALLS["attention"].inputs()[0]

    def drawn() -> list[Tensor]:
        torch.manual_seed(3)
        return [fastattn.attention(q, k, v, dropout_p=0.5) for _ in range(3)]

    with without_plans():
        expected = drawn()
    found = drawn()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[1], found[2])


def test_threads_share_plans_and_keep_their_own_modes() -> None:
    q, k, v = (t.requires_grad_() for t in CALLS["attention"].inputs()[0])
    expected = fastattn.attention(q, k, v)
    wrong: list[str] = []

    def work(grad: bool) -> None:
        for length in range(1, 9):
            out = fastattn.attention(q, k, v)
            with torch.set_grad_enabled(grad):
                other = fastattn.attention(q[:, :, :length], k, v)
            if not torch.equal(out, expected) or other.requires_grad != grad:
                wrong.append(f"length {length}, grad {grad}")

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    with mock.patch.object(plans, "MOST", 4):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
