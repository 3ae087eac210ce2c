"""Watch what happens inside a model while it runs: `with watch(model, "blocks.*.out") as seen: model(tokens)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.core.statistics.functional import attention_statistics
from fastattn.core.statistics.labels import check_are_labels
from fastattn.ground.arguments import integer
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.places import Call, Kind, Name, find, kinds_of, listen, read
from fastattn.lens.seen import Seen, Step, is_wild, key_of, reduce, split_steps

PATTERN_LIMIT = 2**24  # weights of one pattern, over batch and heads: 64 MiB in fp32

_BY_QUERY, _BY_KEY = ("batch", "head", "position"), ("batch", "head", "key")
# Statistics of attention, as `attention_statistics` names them, by their axes.
STATISTICS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("entropy", "max_logit", "max_weight", "sum_of_squares", "mean_distance", "mass", "value_norm"), _BY_QUERY
    ),
    "top_keys": (*_BY_QUERY, "rank"),
    **dict.fromkeys(("received", "max_received", "received_value_norm"), _BY_KEY),
    "lag_profile": ("batch", "head", "lag"),
    "thumbnail": ("batch", "head", "row", "column"),
}
# Weight on the keys whose labels match the query's, as `match_mass` names the kinds.
MATCHES = ("induction", "duplicate", "previous", "first")
PATTERN_AXES = ("batch", "head", "position", "key")


@contextmanager
def watch(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    labels: Tensor | None = None,
    top: int = 8,
    pattern_limit: int = PATTERN_LIMIT,
) -> Iterator[Seen]:
    """Record tensors inside a model while it runs, and statistics of its attention.

    Names, with wildcards (`*` is anything but a dot, `[0-3]` one of these):

    - `blocks.3.resid_pre`, `.resid_mid`, `.resid_post`: the residual stream (B, L, d);
    - `blocks.3.attention.hook_q`, `.hook_k`, `.hook_v`, `.hook_z`: (B, heads, L, D), queries, keys and values as
      attention takes them and what the heads read; `.out`: what attention adds to the stream;
    - `blocks.3.mlp.hook_post` or `.neurons`: (B, L, neurons), what the MLP's last layer is given; `.out`;
    - `blocks.3.attention.entropy` and the other statistics of `attention_statistics`, in O(L) memory: by query
      (B, Hq, L) entropy, max_logit, max_weight, sum_of_squares, mean_distance, mass, value_norm, top_keys; by key
      (B, Hq, L) received, max_received, received_value_norm; lag_profile and thumbnail. They are of the weights
      before dropout;
    - with `labels`, `.induction`, `.duplicate`, `.previous` and `.first`: the weight on such keys (B, Hq, L), as
      `match_mass` defines them;
    - `blocks.3.attention.pattern`: the weights (B, Hq, Lq, Lk) themselves, up to `pattern_limit` of them.

    A wildcard at the end of a name means tensors; statistics and patterns must be named.

    Names of TransformerLens are known, too (`blocks.3.attn.hook_q`, `blocks.3.hook_resid_post`).

    Reductions at the end of a name are made on the way, so that only their result is kept: `.mean` over the batch,
    `.head(3)`, `.at(-1)` or `.at(2:9)` of the positions, `.top(20)` along the last dimension (values and indices).

    Each forward within the block replaces what the one before it recorded. Nothing else is kept, and nothing is
    left in the model after the block. A model whose neurons are watched computes its MLPs layer by
    layer, not fused.

    Args:
        model: a model that `adapt` knows: one of this library's, or one of Hugging Face's with attn_implementation
            "fastattn" or "sdpa", patched by `fastattn.patch` or not; or one with a torch.nn.TransformerEncoder in
            it, patched. It must not be compiled.
        names: one or several.
        labels: integers (B, Lk), the token ids say.
        top: how many keys top_keys has.
        pattern_limit: how many weights one pattern may have.

    Yields:
        `Seen`, a mapping from names to tensors.

    Raises:
        TypeError, ValueError: a name that means nothing in this model (the error says what there is), labels that
            are no integers (B, Lk), statistics of a Hugging Face model that attends in another way.
        ValueError: in the forward: a pattern above the limit, labels of another length.

    Example:
        >>> sizes = {"vocab_size": 64, "embed_dim": 64, "num_heads": 4, "num_layers": 2}
        >>> model = fastattn.nn.TransformerModel(**sizes, positions="rotary")
        >>> with watch(model, ["blocks.*.resid_post", "blocks.1.attention.hook_z.at(-1)"]) as seen:
        ...     logits = model(torch.randint(64, (1, 32)))
        >>> seen["blocks.*.resid_post"].shape
        torch.Size([2, 1, 32, 64])

    Source: names and what they mean: Nanda and Bloom, TransformerLens (2022).
    """
    adapter = adapt(model)
    pattern_limit, top = integer("pattern_limit", pattern_limit, least=0), integer("top", top, least=1)
    if labels is not None:
        check_are_labels(labels)
    kinds = _kinds(adapter)
    seen = Seen(adapter, kinds)
    asked = _asked(names, adapter, kinds)
    if labels is None and (needed := [str(n) for n, _ in asked.values() if _statistic(n) in MATCHES]):
        raise ValueError(f"labels must be given for {needed[0]}: integers (B, Lk), such as token ids; got None")
    seen._asked = {key: name for key, (name, _) in asked.items()}
    with ExitStack() as stack:
        of_layers: dict[int, list[tuple[Name, tuple[Step, ...]]]] = {}
        for name, steps in asked.values():
            if _statistic(name) is None:
                handle = read(adapter, name, _recorder(seen, name, steps))
                stack.callback(handle.remove)
            else:
                of_layers.setdefault(name.layer, []).append((name, steps))
        for layer, wanted in of_layers.items():
            observer = _Observer(seen, wanted, labels, top, pattern_limit)
            stack.callback(listen(adapter, layer, observer).remove)
        yield seen


def _kinds(adapter: Adapter) -> dict[str, Kind]:
    """All that can be asked for."""
    statistics = {**STATISTICS, **dict.fromkeys(MATCHES, _BY_QUERY), "pattern": PATTERN_AXES}
    return {
        **kinds_of(adapter),
        **{f"attention.{name}": Kind((f"attn.{name}",), axes) for name, axes in statistics.items()},
        "attention.pattern": Kind(("attn.pattern", "attention.hook_pattern", "attn.hook_pattern"), PATTERN_AXES),
    }


def _statistic(name: Name) -> str | None:
    """Which statistic of attention this is; None for a tensor."""
    part = name.kind.removeprefix("attention.")
    return part if part in STATISTICS or part in MATCHES or part == "pattern" else None


def _asked(names: Any, adapter: Adapter, kinds: dict[str, Kind]) -> dict[str, tuple[Name, tuple[Step, ...]]]:
    """Every name that is meant, with its reductions, by what it is called in `Seen`."""
    names = [names] if isinstance(names, str) else list(names)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be one or several strings, got {names!r}")
    asked: dict[str, tuple[Name, tuple[Step, ...]]] = {}
    for name in names:
        pattern, steps = split_steps(name)
        # A wildcard at the end means tensors: the rest costs a computation of its own, and is named.
        tensors_only = is_wild(pattern.rpartition(".")[2])
        found = [n for n in find(pattern, adapter, kinds) if not (tensors_only and _statistic(n))]
        if not found:
            raise ValueError(
                f"{name!r} matches statistics alone: name each of them, without a wildcard at the end"
            )
        for one in found:
            _check_steps(one, steps, adapter, kinds)
            asked[key_of(one, steps)] = one, steps
    return asked


def _check_steps(name: Name, steps: tuple[Step, ...], adapter: Adapter, kinds: dict[str, Kind]) -> None:
    """Raise for a reduction that this cannot have, before anything runs."""
    axes = kinds[name.kind].axes
    heads = adapter.num_kv_heads if name.kind in ("attention.hook_k", "attention.hook_v") else adapter.num_heads
    if steps and name.kind == "attention.top_keys":
        raise ValueError(f"{name} is not one tensor, and has no reductions")
    shape = [heads if axis == "head" else 1 for axis in axes]
    rehearsed = [step._replace(argument=0) if step.kind == "at" else step for step in steps]
    reduce(torch.empty(shape, device="cpu"), axes, rehearsed, str(name))


def _recorder(seen: Seen, name: Name, steps: tuple[Step, ...]) -> Any:
    axes, key = seen._kinds[name.kind].axes, key_of(name, steps)

    def record(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach()
        with torch.no_grad():
            seen._recorded[key] = reduce(value, axes, steps, str(name))

    return record


class _Observer:
    """What is asked of one layer's attention, computed from its call: all statistics together, in one go."""

    def __init__(
        self,
        seen: Seen,
        wanted: list[tuple[Name, tuple[Step, ...]]],
        labels: Tensor | None,
        top: int,
        pattern_limit: int,
    ) -> None:
        self.records = [(_statistic(name), _recorder(seen, name, steps)) for name, steps in wanted]
        self.layer = wanted[0][0].layer
        self.labels, self.top, self.pattern_limit = labels, top, pattern_limit

    @torch.no_grad()
    def __call__(self, call: Call) -> None:
        call = Call(call.q.detach(), call.k.detach(), call.v.detach(), call.options)
        names = {name for name, _ in self.records}
        found: dict[Any, Any] = {}
        if "pattern" in names:
            found["pattern"] = self._pattern(call)
        if names - {"pattern"}:
            found |= self._statistics(call, names)
        for name, record in self.records:
            record(found[name])

    def _pattern(self, call: Call) -> Tensor:
        """The weights: what attention reads where each key's value is its own unit vector."""
        batch, heads, queries, keys = (*call.q.shape[:3], call.k.shape[2])
        if (count := batch * heads * queries * keys) > self.pattern_limit:
            raise ValueError(
                f"the pattern of block {self.layer} has {batch} x {heads} x {queries} x {keys} = {count:,} "
                f"weights, above pattern_limit={self.pattern_limit:,}. Statistics answer most questions in O(L) "
                f"memory: "
                f"{', '.join(('attention.' + name) for name in (*STATISTICS, *MATCHES))}"
            )
        unit = torch.eye(keys, dtype=call.v.dtype, device=call.v.device)
        # Values as wide as there are keys are more than the kernels compute: the backend is free.
        return call.attend(v=unit.expand(batch, call.k.shape[1], keys, keys), backend=None)

    def _statistics(self, call: Call, names: set[str | None]) -> dict[str, Any]:
        matches = [kind for kind in MATCHES if kind in names]
        want = [name for name in STATISTICS if name in names] + (["match_mass"] if matches else [])
        _, lse = call.attend(return_lse=True)
        asked: dict[str, Any] = {"labels": self.labels, "match": matches} if matches else {}
        result = attention_statistics(
            call.q, call.k, lse, call.v, want=want, top=self.top, **asked, **call.options
        )._asdict()
        if matches:
            mass = result.pop("match_mass")
            result |= dict(zip(matches, getattr(mass, "mass", mass), strict=True))
        return result
