"""What is cached serves every mode, also if it was made in another one."""

from __future__ import annotations

import ast
import contextlib
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import lens, masks
from fastattn.ground import modes
from fastattn.masks import Mask, algebra, kinds, random_blocks

SOURCE = Path(fastattn.__file__).parent


class Watched(TorchDispatchMode):
    """A user's own mode, which leaves every operation as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "no gradient": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "on meta": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
    "a mode of the user's": Watched,
}
TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x])),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(lambda x: f.lower() or x)(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(torch.stack([x, x])).sum())(x),
}


class Masked:
    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        return fastattn.attention(x, x, x, mask=self.mask)

    def lower(self) -> None:
        """torch's functionalize takes no autograd.Function."""
        self.mask.lower(1, 2, 70, 70)


def every_mask(seed: int) -> list[Mask]:
    """Masks of every kind, for 70 queries and keys; those of one seed are equal, whenever they are made."""
    generator = torch.Generator("cpu").manual_seed(seed)
    grid = torch.rand(2, 2, generator=generator, device="cpu") < 0.9
    return [
        masks.causal() & masks.window(seed + 3),
        masks.key_lengths([60 - seed]),
        masks.causal() | masks.prefix(10 + seed),
        masks.documents([seed] * 30 + [seed + 1] * 40),
        masks.documents(cu_seqlens=[0, 20 + seed, 70]),
        masks.packed_sequences([0, 20 + seed, 70], [0, 10, 70], causal=True),
        masks.global_tokens([seed, 40]) | masks.window(4, 4),
        masks.dilated(2 + seed),
        masks.blocks(grid, 35) | masks.causal(),
        masks.blocks(grid.int() + 1, 35),
        masks.bigbird(7, 1, seed=seed),
        masks.bigbird(7, 1, style="huggingface", seed=seed, training=True),
        masks.from_dense(torch.rand(70, 70, generator=generator, device="cpu") < 0.5) | masks.dilated(1),
        ~masks.documents([seed] * 30 + [seed + 1] * 40),
    ]


def forget() -> None:
    for function in (
        algebra._lower,
        kinds._document_ids,
        kinds._intervals,
        random_blocks.paper_blocks,
        random_blocks.huggingface_blocks,
    ):
        function.forget()


def train(mask: Mask) -> Tensor:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3))
    out = fastattn.attention(q, k, v, mask=mask)
    out.sum().backward()
    return torch.cat([out.flatten(), *(t.grad.flatten() for t in (q, k, v))])


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_lowered_under_a_mode_serves_training_after_it(mode: str) -> None:
    expected = [train(mask) for mask in every_mask(1)]
    forget()
    x = torch.randn(1, 2, 70, 16)
    made = every_mask(1)
    with MODES[mode]() as entered:
        for mask in made if mode == "fake" else every_mask(1):
            lists = mask.lower(1, 2, 70, 70, closed_forms=False)
            if mode == "fake":
                x = entered.from_tensor(x) if not isinstance(x, FakeTensor) else x
                assert isinstance(lists.packed[0], FakeTensor)
            if mode not in ("default dtype",):
                fastattn.attention(x, x, x, mask=mask)
    # Equal by value, and found again.
    for mask, right in zip(every_mask(1), expected, strict=True):
        torch.testing.assert_close(train(mask), right, rtol=0, atol=0, msg=repr(mask))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_mask_lowered_within_a_transform_serves_training_after_it(transform: str) -> None:
    expected = [train(mask) for mask in every_mask(1)]
    forget()
    for mask in every_mask(1):
        TRANSFORMS[transform](Masked(mask), torch.randn(1, 2, 70, 16))
    for mask, right in zip(every_mask(1), expected, strict=True):
        torch.testing.assert_close(train(mask), right, rtol=0, atol=0, msg=repr(mask))


@pytest.mark.parametrize("mode", MODES)
def test_boundaries_read_under_a_mode_serve_training_after_it(mode: str) -> None:
    starts = torch.tensor([0, 5, 70])

    def run(x: Tensor) -> Tensor:
        return fastattn.attention_varlen(x, x, x, starts, starts, causal=True)

    x = torch.randn(70, 2, 16)
    expected = run(x)
    forget()
    with MODES[mode]() as entered:
        run(entered.from_tensor(x) if mode == "fake" else x)
    x.requires_grad_()
    out = run(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert x.grad is not None and not x.grad.isnan().any()


@pytest.mark.parametrize("mode", ["inference", "on meta", "a mode of the user's"])
def test_a_mask_made_and_moved_under_a_mode_serves_training_after_it(mode: str) -> None:
    with MODES[mode]():
        lengths = torch.full((1,), 50, device="cpu")
        large = torch.rand(1, 1, 70, 70, device="cpu") < 0.5
        made = [masks.key_lengths(lengths), masks.from_dense(large) | masks.dilated(1)]
        moved = [mask.lower(1, 2, 70, 70, "meta").to("meta") for mask in made]
        lowered = [mask.lower(1, 2, 70, 70) for mask in made]
    assert all(not t.is_inference() for t in (moved[0].key_lengths, moved[1].packed[0]))
    for mask in (*made, *lowered):
        train(mask)


def test_masks_of_tensors_without_values_are_never_kept() -> None:
    with FakeTensorMode():
        lengths = torch.full((1,), 50)
        x = torch.randn(1, 2, 70, 16)
        assert fastattn.attention(x, x, x, mask=masks.key_lengths(lengths) & masks.causal()).shape == x.shape
        with pytest.raises(ValueError, match=r"documents\(.*\) holds a tensor whose values cannot be read"):
            fastattn.attention(x, x, x, mask=masks.documents(torch.zeros(70, dtype=torch.int64)))
        with pytest.raises(ValueError, match="cu_seqlens must have values that can be read"):
            masks.documents(cu_seqlens=torch.zeros(3, dtype=torch.int64))
    x = torch.randn(2, 1, 2, 70, 16)
    lengths = torch.tensor([[50], [20]])
    each = torch.vmap(lambda x, n: fastattn.attention(x, x, x, mask=masks.key_lengths(n)))(x, lengths)
    for i in range(2):
        one = fastattn.attention(x[i], x[i], x[i], key_lengths=lengths[i])
        torch.testing.assert_close(each[i], one)


def test_threads_in_different_modes_share_what_is_kept() -> None:
    problems: list[Exception] = []

    def work(mode: str) -> None:
        try:
            for seed in (1, 2) * 2:
                with MODES[mode]():
                    for mask in every_mask(seed):
                        mask.lower(1, 2, 70, 70)
                for mask in every_mask(seed)[:4]:
                    train(mask)
        except Exception as problem:  # shown in the thread of the test
            problems.append(problem)

    forget()
    threads = [threading.Thread(target=work, args=(mode,)) for mode in ("inference", "no gradient", "on meta")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_cuda_graph_gets_nothing_that_is_freed_and_leaves_nothing_behind(monkeypatch) -> None:
    made = []

    @modes.kept(1)
    def of(number: int) -> Tensor:
        made.append(number)
        return torch.full((2,), number)

    known = of(1)
    monkeypatch.setattr(modes, "capturing", lambda: True)
    monkeypatch.setattr(modes, "_read_by_graphs", {})
    assert of(1) is known and made == [1]
    # Made within a graph, it has no values outside.
    assert of(2) is not of(2) and made == [1, 2, 2]
    monkeypatch.setattr(modes, "capturing", lambda: False)
    of(2)
    assert made == [1, 2, 2, 2]
    assert of(3) is of(3) and of(1) is not known  # the cache has dropped it
    assert list(modes._read_by_graphs.values()) == [known]


# Functions that keep what is no tensor, with what they keep.
KEEP_NO_TENSOR = {
    "_triton_installed": "a bool",
    "_agree": "a bool",
    "_agrees": "a bool",
    "_same_bits": "a bool",
    "_possible_sizes": "numbers",
    "source_of": "text",
    "tiled": "rows of a record",
    "_own_code": "code",
    "_source": "text",
    "obstacle_of_class": "text",
    "_read": "numbers",
    "_named": "a class",
    "_columns_of": "a class",
    "_rows_of": "a class",
    "_seeing_every_key": "a spec",
    "kernels_hash": "text",
    "families": "text",
    "candidates": "the kernels",
    "_compiled": "a function",
    # Of a sequence that is spread over processes: made of the mask's own tensors, and no mode's call is spread.
    "intervals": "tensors of one object",
    "cells": "tensors of one object",
    "_tokens": "tensors of one object",
    "counts": "numbers",
    "rank_work": "tensors of one object",
}


def test_every_cache_of_tensors_is_made_by_kept() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and path.name != "modes.py":
                words = {
                    n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "")
                    for d in node.decorator_list
                    for n in ast.walk(d)
                }
                if words & {"lru_cache", "cache", "cached_property"}:
                    assert node.name in KEEP_NO_TENSOR, (
                        f"{path}: {node.name} must be `kept`, see fastattn/ground/modes.py"
                    )


MASKS_TO_READ = {
    "numbers": masks.causal(),
    "lengths": masks.key_lengths([3]),
    "intervals": masks.causal() & masks.documents([0] * 5 + [1] * 5),
    "lists": masks.dilated(2),
    "a function": masks.from_function(lambda b, h, i, j: i >= j),
}


def what_is_read(mask: masks.Mask, lowered: masks.Lowered) -> tuple:
    shape = 1, 2, 10, 10
    lowered_density = lowered.visible, lowered.visited_granules, lowered.ideal_granules
    return *lowered_density, mask.density(*shape), mask.flops(*shape, 16), mask.draw(10)


@pytest.mark.parametrize("name", MASKS_TO_READ)
def test_what_a_mask_shows_is_counted_and_drawn_in_every_mode(name: str) -> None:
    mask = MASKS_TO_READ[name]
    lowered = mask.lower(1, 2, 10, 10)
    expected = what_is_read(mask, lowered)
    found = []

    def read(x: torch.Tensor) -> torch.Tensor:
        found.append(what_is_read(mask, lowered))
        return x

    with FakeTensorMode():
        found.append(what_is_read(mask, lowered))
        with pytest.raises(ValueError, match="visible needs the mask's values, which cannot be read"):
            _ = MASKS_TO_READ["lists"].lower(1, 2, 10, 10).visible
    with torch.device("meta"):
        found.append(what_is_read(mask, lowered))
    torch.func.functionalize(read)(torch.ones(2))
    torch.func.vmap(read)(torch.ones(2, 2))
    assert found == [expected] * 4


def test_masks_on_the_meta_device_are_lowered_from_real_values_or_refused_in_words() -> None:
    q = torch.randn(1, 2, 10, 16, device="meta", dtype=torch.float16)
    for mask in MASKS_TO_READ.values():
        out = fastattn.attention(q, q, q, mask=mask)
        assert out.device.type == "meta" and out.shape == q.shape and out.dtype == q.dtype
    held = masks.from_dense(torch.ones(10, 10, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="holds a tensor whose values cannot be read"):
        fastattn.attention(q, q, q, mask=held)
    with pytest.raises(ValueError, match="holds a tensor whose values cannot be read"):
        held.density(1, 2, 10, 10, "meta")


def test_calls_on_the_meta_device_need_no_autocast() -> None:
    """torch has none there, and raises when it is asked or turned off."""
    q, x = torch.randn(2, 4, 10, 16, device="meta"), torch.randn(2, 10, 32, device="meta")
    w = torch.randn(32, 32, device="meta")
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            out, lse = fastattn.attention(q, q, q, return_lse=True)
            made = [
                (out, q), (lse, q[..., 0]), (fastattn.prepare_heads(q, norm=True), q),
                (fastattn.scaled_dot_product_attention(q, q, q), q),
                (fastattn.mlp(x, w, None, w, None), x), (fastattn.gated_mlp(x, w, w, w), x),
                (fastattn.rms_norm(x), x), (fastattn.layer_norm(x), x),
                (fastattn.nn.SelfAttention(32, 4, rotary=True, qk_norm=True, device="meta")(x), x),
                (fastattn.nn.MLP(32, device="meta")(x), x), (fastattn.nn.GatedMLP(32, device="meta")(x), x),
                (fastattn.nn.RMSNorm(32, device="meta")(x), x), (fastattn.nn.LayerNorm(32, device="meta")(x), x),
                (fastattn.nn.TransformerEncoderLayer(32, 4, batch_first=True, device="meta")(x), x),
            ]  # fmt: skip
            for result, like in made:
                assert (result.device, result.shape, result.dtype) == (like.device, like.shape, like.dtype)
            tokens = torch.zeros(2, 10, dtype=torch.int64, device="meta")
            assert lens.head_scores(q, q, lse, tokens).induction.shape == (4,)
