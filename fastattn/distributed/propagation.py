"""What the raw operators, `torch.ops.fastattn.*`, do with DTensors.

`fastattn.attention` and the other functions take DTensors themselves (see tensors.py), and never get here. An
operator gets DTensors where a tracer or a transform has taken the function apart: `torch.func.grad`, `make_fx`, a
compiled graph. Then DTensor asks for a strategy. It is made here, from a name for each dimension of each tensor:

    attention_forward: q "b h q .", k "b g k .", v "b g k ."; out "b h q .", lse "b h q"

A dimension of the mesh may share out one of these names at a time: "b" batch, "h" heads ("g" are the key heads
that go with them), "q" queries, "t" tokens, "r" rows, "l" positions, "f" hidden units. All tensors that have this
name must be sharded by it, or are replicated and sliced, which sends nothing. A result without this name is a
partial sum. What cannot be computed so is refused in words; nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor.placement_types import _StridedShard

from fastattn.core.attention.spec import ScoreTensors, Tangents
from fastattn.core.mlp.spec import NEVER
from fastattn.core.statistics.spec import StatisticsTensors

Arguments = dict[str, Any]
PAIRS = "2.13"  # the first PyTorch that is known to take two halves, each of them sharded, apart without sending


@dataclass(frozen=True)
class Rule:
    """How one operator may be shared out.

    inputs: the names of the dimensions of each tensor, by argument.
    results: those of each result; see `Result`. A function of the arguments where their number depends on them.
    shared: the names that may be shared out.
    deciders: the arguments whose placements say what is shared out; the first that is sharded decides.
    check: raises ValueError for what cannot be shared out by a name, given the name, the number of ranks and the
        arguments.
    summed: arguments in which the operator is linear. Partial sums of them are summed up first.
    written: arguments that the operator writes to, which must not be copied.
    instead: what to call instead.
    """

    inputs: dict[str, str]
    results: Sequence[Result] | Callable[[Arguments], Sequence[Result]]
    shared: str
    deciders: tuple[str, ...]
    check: Callable[[str, int, Arguments], None]
    instead: str
    summed: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Result:
    """names: of its dimensions; "f+f" is one after the other of two dimensions, of which each rank has its part of
    both. same_for: shared names on which it does not depend, so that all ranks have the same; where it depends on
    a name that it does not have, it is a partial sum. is_there: whether it is not empty.
    """

    names: str
    same_for: str = ""
    is_there: Callable[[Arguments], bool] = lambda _: True


def _strategy(rule: Rule, schema: OpSchema) -> OpStrategy:
    """The only placements with which these tensors can be computed."""
    mesh = schema.get_mesh_from_args()
    arguments = _by_name(schema)
    tensors = {name: a for name, a in arguments.items() if isinstance(a, DTensorSpec)}
    results = rule.results(arguments) if callable(rule.results) else rule.results
    wanted: dict[str, list[Placement]] = {name: [] for name in tensors}
    found: list[list[Placement]] = [[] for _ in results]
    for dimension in range(mesh.ndim):
        shared = _shared(rule, tensors, dimension, str(schema.op))
        if shared:
            rule.check(shared, _ranks(rule, tensors, shared), arguments)
        for name, spec in tensors.items():
            wanted[name].append(_placement(rule, name, spec, shared, dimension))
        for placements, result in zip(found, results, strict=True):
            placements.append(_of_result(result, shared, arguments))
    outputs = tuple(DTensorSpec(mesh, tuple(placements)) for placements in found)
    inputs = [DTensorSpec(mesh, tuple(p), tensor_meta=tensors[name].tensor_meta) for name, p in wanted.items()]
    returns = schema.op._schema.returns
    single = len(returns) == 1 and not isinstance(returns[0].type, torch.ListType)
    return OpStrategy([OpSpec(
        output_specs=None if not returns else outputs[0] if single else outputs,
        input_specs=inputs, redistribute_cost=[[0.0] for _ in inputs],
    )])  # fmt: skip


def _by_name(schema: OpSchema) -> Arguments:
    """The arguments, tensors as what DTensor knows about them."""
    names = [argument.name for argument in schema.op._schema.arguments]
    given = {**dict(zip(names, schema.args_schema, strict=False)), **schema.kwargs_schema}
    return {
        name: value.strategies[0].output_spec if isinstance(value, OpStrategy) else value
        for name, value in given.items()
    }


def _shared(rule: Rule, tensors: dict[str, DTensorSpec], dimension: int, operator: str) -> str:
    """The name that a dimension of the mesh shares out; "" for none."""
    for decider in rule.deciders:
        spec = tensors.get(decider)
        placement = None if spec is None else spec.placements[dimension]
        if spec is not None and type(placement) is Shard:
            name = _names(rule.inputs[decider], spec.ndim)[placement.dim % spec.ndim].replace("g", "h")
            if name not in rule.shared:
                raise ValueError(
                    f"{operator} cannot be computed on a {decider} with {placement} over dimension {dimension} of "
                    f"the mesh. {rule.instead}"
                )
            return name
    return ""


def _ranks(rule: Rule, tensors: dict[str, DTensorSpec], shared: str) -> int:
    """Among how many ranks a name is shared out, over all dimensions of the mesh."""
    count, mesh = 1, next(iter(tensors.values())).mesh
    for dimension in range(mesh.ndim):
        count *= mesh.size(dimension) if _shared(rule, tensors, dimension, "") == shared else 1
    return count


def _placement(rule: Rule, name: str, spec: DTensorSpec, shared: str, dimension: int) -> Placement:
    """What a tensor must have over a dimension of the mesh that shares out this name."""
    want = _sharded(rule.inputs[name], spec, shared)
    if name == "b_out" and shared == "f":
        # Each rank adds a part of the bias, since the results are summed.
        want = Partial()
    has = spec.placements[dimension]
    sliced = has == Replicate() and name not in rule.written
    if has != want and not sliced and not (isinstance(has, Partial) and name in rule.summed):
        raise ValueError(
            f"{name} must have {want}{'' if name in rule.written else ' or be replicated'} over dimension "
            f"{dimension} of the mesh, which shares out {WORDS[shared]}; got {has}. Redistribute it first. "
            f"{rule.instead}"
        )
    return want


def _sharded(names: str, spec: DTensorSpec, shared: str) -> Placement:
    for dim, name in enumerate(_names(names, spec.ndim)):
        # One key head serves all query heads, and a "?" marks a dimension that may have size 1 for all.
        if name.replace("g", "h").rstrip("?") == shared and (name == shared or spec.shape[dim] != 1):
            return Shard(dim)
    return Replicate()


def _names(names: str, dimensions: int) -> list[str]:
    """The names of so many dimensions; none for an empty tensor, which stands for one that does not exist."""
    return next((each for way in names.split("|") if len(each := way.split()) == dimensions), [])


def _of_result(result: Result, shared: str, arguments: Arguments) -> Placement:
    if not shared or not result.is_there(arguments):
        return Replicate()
    names = result.names.split()
    one_key_head = "g" in names and arguments["k"].shape[1] == 1
    for dim, name in enumerate(names):
        if name == f"{shared}+{shared}":
            return _StridedShard(dim, split_factor=2)
        if name == shared or (name == "g" and shared == "h" and not one_key_head):
            return Shard(dim)
        if name == f"{shared}?" and arguments["bias"].shape[dim] != 1:
            return Shard(dim)
    return Replicate() if shared in result.same_for else Partial()


WORDS = {
    "": "nothing", "b": "the batch", "h": "heads", "q": "queries", "t": "tokens", "r": "rows", "l": "positions",
    "f": "hidden units",
}  # fmt: skip


def _refuse(name: str, shared: str, instead: str) -> None:
    raise ValueError(f"{name} must not be given to an operator that shares out {WORDS[shared]}. {instead}")


_ATTENTION = (
    "fastattn.attention takes q, k and v sharded by batch, by heads, or q alone by queries; "
    "fastattn.distributed.attention takes a sequence whose keys are sharded, too"
)
_SCORES = dict(zip(
    ScoreTensors._fields,
    ("b", "b h", "b? h? q? .", "b h .", "b h", "b .", ".", "b . .", "b h", "b . ."), strict=True,
))  # fmt: skip
_QKV = {"q": "b h q .", "k": "b g k .", "v": "b g k ."}
_ROWS = {"out": "b h q .", "lse": "b h q"}


def _check_scores(shared: str, ranks: int, arguments: Arguments) -> None:
    """Refuse what depends on positions or heads, which a shard counts from 0."""
    patterns = arguments["mask_layout"] and arguments["mask_layout"][6:8]
    if shared == "b" and patterns and patterns[0] != 1:
        _refuse("a mask that differs by batch element", shared, _ATTENTION)
    if shared == "h":
        _check_heads(ranks, arguments["q"].shape[1], arguments["k"].shape[1])
        if patterns and patterns[1] != 1:
            _refuse("a mask that differs by head", shared, _ATTENTION)
        if arguments["dropout"]:
            _refuse("dropout", shared, _ATTENTION)
    if shared == "q":
        given = {name: arguments[name] is not None for name in (
            "left", "right", "mask", "intervals", "alibi_slopes", "relative_bias"
        )}  # fmt: skip
        for name, there in {**given, "causal": arguments["causal"], "dropout": arguments["dropout"]}.items():
            if there:
                _refuse(name, shared, _ATTENTION)


def _check_heads(ranks: int, queries: int, keys: int) -> None:
    if queries % ranks or (keys % ranks and keys != 1):
        raise ValueError(
            f"{queries} query heads and {keys} key heads cannot be shared out among {ranks} ranks so that each "
            f"key head stays with its query heads. {_ATTENTION}"
        )


def _always(value: bool) -> Callable[[Arguments], bool]:
    return lambda arguments: value


def _wants(index: int) -> Callable[[Arguments], bool]:
    return lambda arguments: arguments["wanted"][index]


def _has(name: str) -> Callable[[Arguments], bool]:
    return lambda arguments: arguments[name] is not None


def _is_true(name: str) -> Callable[[Arguments], bool]:
    return lambda arguments: arguments[name]


def _check_nothing(shared: str, ranks: int, arguments: Arguments) -> None:
    pass


def _attention(inputs: dict[str, str], results: Sequence[Result], summed: Sequence[str] = ()) -> Rule:
    return Rule(inputs | _SCORES, results, "bhq", ("q",), _check_scores, _ATTENTION, frozenset(summed))


_MOVED = {f"{name}_tangent": (_QKV | _SCORES)[name] for name in Tangents._fields}
RULES = {
    "attention_forward": _attention(_QKV, [Result("b h q ."), Result("b h q")]),
    "attention_forward_max": _attention(_QKV, [Result("b h q ."), Result("b h q"), Result("b h q")]),
    "attention_backward": _attention(
        {"dout": "b h q .", **_QKV, **_ROWS, "dlse": "b h q"},
        [
            Result("b h q ."), Result("b g k ."), Result("b g k ."),
            Result("b? h? q? .", is_there=_is_true("want_bias")),
            Result("b h .", is_there=_is_true("want_relative_bias")),
            Result("b h", is_there=_has("sinks")), Result("b h", is_there=_has("head_scale")),
        ],
        ("dout", "dlse"),
    ),
    "attention_tangent": _attention(
        {**_QKV, **_ROWS, **_MOVED}, [Result("b h q ."), Result("b h q")], tuple(_MOVED)
    ),
}  # fmt: skip

_NORM = "fastattn.rms_norm and layer_norm take x sharded by any dimension but the last"
_NORM_TENSORS = {"x": "b r .", "weight": "b .", "bias": "b ."}
RULES |= {
    "norm_forward": Rule(
        {**_NORM_TENSORS, "residual": "b r ."},
        [
            Result("b r ."), Result("b r .", is_there=_has("residual")),
            Result("b r", is_there=_is_true("centred")), Result("b r"),
        ],
        "br", ("x",), _check_nothing, _NORM,
    ),
    "norm_backward": Rule(
        {**_NORM_TENSORS, "dy": "b r .", "dtotal": "b r .", "mean": "b r", "inverse": "b r"},
        [
            Result("b r ."), Result("b .", is_there=_is_true("want_weight")),
            Result("b .", is_there=_is_true("want_bias")),
        ],
        "br", ("x",), _check_nothing, _NORM, frozenset(("dy", "dtotal")),
    ),
}  # fmt: skip

_HEADS = "fastattn.prepare_heads takes x sharded by batch, heads or length, and moves the positions"
_HEAD_TENSORS = {
    "x": "b h l .", "norm_weight": "b h .", "cos": "b . .", "sin": "b . .", "offsets": "b", "head_scale": "b h"
}  # fmt: skip


def _check_positions(shared: str, ranks: int, arguments: Arguments) -> None:
    if shared == "l" and arguments["cos"] is not None:
        _refuse("cos", shared, _HEADS)


RULES |= {
    "prepare_heads": Rule(_HEAD_TENSORS, [Result("b h l .")], "bhl", ("x",), _check_positions, _HEADS),
    "prepare_heads_backward": Rule(
        {**_HEAD_TENSORS, "dy": "b h l ."},
        [
            Result("b h l ."), Result("b h .", is_there=_has("norm_weight")),
            Result("b h", is_there=_has("head_scale")),
        ],
        "bhl", ("x",), _check_positions, _HEADS, frozenset(("dy",)),
    ),
}  # fmt: skip

_MLP = (
    "fastattn.mlp and gated_mlp take x sharded by tokens, or the rows of the first weights and the columns of the "
    "last one sharded by hidden units"
)
_WEIGHTS = {
    "x": "t .", "w_in": "f .", "b_in": "f", "w_up": "f .", "b_up": "f", "w_out": ". f", "b_out": ".",
    "norm_weight": ".", "norm_bias": ".", "residual": "t .", "dropout_state": ". .|.",
}  # fmt: skip
_KEPT = {f"kept_{i}": "t f" for i in (1, 2, 3, 4)}


def _check_hidden(shared: str, ranks: int, arguments: Arguments) -> None:
    if arguments["dropout"]:
        _refuse("dropout", shared, _MLP)
    forward = "wanted" not in arguments
    if forward and arguments["whole"] != NEVER and _kept(arguments) != _kept(arguments, shared, ranks):
        # DTensor asks what is kept of the whole tensors, and gets what is kept of the parts.
        _refuse(f"whole={arguments['whole']!r}", shared, _MLP)
    if shared != "f":
        return
    if arguments["w_in"].shape[0] % ranks:
        raise ValueError(
            f"{arguments['w_in'].shape[0]} hidden units cannot be shared out among {ranks} ranks equally"
        )
    for name in ("norm", "residual_kind"):
        if arguments[name]:
            # Each rank has a part of a sum, and would add the residual to it.
            _refuse("norm and residual", shared, _MLP)
    if arguments["packed"]:
        # A shard of the rows has no pairs of gate and up.
        _refuse("a packed weight", shared, _MLP)
    if arguments["w_up"] and not forward:
        # DTensor must take the gradients of gate and up apart.
        if torch.__version__ < PAIRS:
            _refuse(f"w_up with a gradient, before PyTorch {PAIRS},", shared, _MLP)
        if arguments["w_in"].placements.count(Shard(0)) > 1:
            _refuse("w_up with a gradient, over two dimensions of the mesh,", shared, _MLP)
    if arguments["save"] == "int8":
        _refuse('save="int8"', shared, _MLP)


def _mlp_results(arguments: Arguments) -> list[Result]:
    return [Result("t ."), *(Result("t f", is_there=_always(there)) for there in _kept(arguments))]


def _kept(arguments: Arguments, shared: str = "", ranks: int = 1) -> list[bool]:
    """Which slots of what is kept are not empty; on a rank that has its part of what is shared out."""

    def stand_in(name: str, a: Any) -> Any:
        if not isinstance(a, DTensorSpec) or a.tensor_meta is None:
            return a
        names = _names(_WEIGHTS[name], a.ndim)
        shape = [-(-size // ranks) if n == shared else size for n, size in zip(names, a.shape, strict=True)]
        return torch.empty(shape, dtype=a.tensor_meta.dtype, device=a.mesh.device_type)

    with torch._guards.detect_fake_mode() or torch._subclasses.FakeTensorMode():
        _, *slots = torch.ops.fastattn.mlp_forward(*(stand_in(*each) for each in arguments.items()))
    return [t.dim() == 2 for t in slots]


def _mlp_gradients(arguments: Arguments) -> list[Result]:
    units = "f+f" if arguments["w_up"] else "f"  # the gradients of gate and up are one tensor
    return [
        Result("t .", is_there=_wants(0)), Result(f"{units} .", is_there=_wants(1)),
        Result(units, is_there=_wants(2)), Result(". f", is_there=_wants(3)), Result(".", "f", is_there=_wants(4)),
        Result(".", is_there=_wants(5)), Result(".", is_there=_wants(6)),
    ]  # fmt: skip


RULES |= {
    "mlp_forward": Rule(_WEIGHTS, _mlp_results, "tf", ("x", "w_in"), _check_hidden, _MLP),
    "mlp_backward": Rule(
        {**_WEIGHTS, **_KEPT, "dy": "t ."}, _mlp_gradients, "tf", ("x", "w_in"), _check_hidden, _MLP,
        frozenset(("dy",)),
    ),
}  # fmt: skip

_LOSS = "fastattn.linear_cross_entropy takes the tokens sharded, or the classes: linear_weight sharded by its rows"
_LOSS_TENSORS = {
    "x": "t .", "w": ". .", "b": ".", "target": "t|t .", "class_weight": ".", "drows": ". t", "rows": ". t",
    "coefficients": ". t",
}  # fmt: skip
_LOSS_GRADIENTS = [
    Result("t .", is_there=_wants(0)),
    Result(". .", is_there=_wants(1)),
    Result(".", is_there=_wants(2)),
]
RULES |= {
    "loss_rows": Rule(_LOSS_TENSORS, [Result(". t")], "t", ("x",), _check_nothing, _LOSS),
    "loss_rows_backward": Rule(
        _LOSS_TENSORS, _LOSS_GRADIENTS, "t", ("x",), _check_nothing, _LOSS, frozenset(("drows",))
    ),
    "loss_reduced": Rule(
        _LOSS_TENSORS, [Result(""), *_LOSS_GRADIENTS], "t", ("x",), _check_nothing, _LOSS,
        frozenset(("coefficients",)),
    ),
}  # fmt: skip

_STATISTICS = "fastattn.lens takes q, k and lse sharded by batch or by heads"
_ASKED = dict(zip(
    StatisticsTensors._fields, ("b h q", "b h k", ". b q", ". b k", "q", "b h q"), strict=True
))  # fmt: skip
_STATISTIC_NAMES = {"match_mass": ". b h .", "top_keys": "b h . .", "thumbnail": "b h . ."}


def _statistics(arguments: Arguments) -> list[Result]:
    each = [Result(_STATISTIC_NAMES.get(name, "b h .")) for name in arguments["want"]]
    # The top keys are two results: weights and keys.
    return [r for name, r in zip(arguments["want"], each, strict=True) for r in [r] * (1 + (name == "top_keys"))]


RULES |= {
    "attention_statistics": Rule(
        {"q": _QKV["q"], "k": _QKV["k"], "lse": "b h q"} | _ASKED | _SCORES,
        _statistics, "bh", ("q",), _check_scores, _STATISTICS,
    ),
    "attention_weights": Rule(
        {
            "q": _QKV["q"], "k": _QKV["k"], "lse": "b h q", "rows": ".", "columns": ".", "remainder": "b h q",
            **_SCORES,
        },
        [Result("b h .")], "bh", ("q",), _check_scores, _STATISTICS,
    ),
}  # fmt: skip

_CACHE = "fastattn.attention_with_cache takes caches and queries sharded by batch or by heads; pages by heads only"


def _check_cache(shared: str, ranks: int, arguments: Arguments) -> None:
    if shared == "b" and arguments["block_table"] is not None:
        _refuse("block_table", shared, _CACHE)
    if shared == "h":
        keys = arguments["k_cache"].shape[1]
        _check_heads(ranks, arguments["q"].shape[1] if "q" in arguments else keys, keys)


_CACHES = {
    "k_cache": "b g . .", "v_cache": "b g . .", "k_scale": "b g .|b g", "v_scale": "b g .|b g", "lengths": "b",
    "block_table": "b .",
}  # fmt: skip
RULES |= {
    "cache_append": Rule(
        {**_CACHES, "k": "b g . .", "v": "b g . ."}, (), "bh", ("k_cache",), _check_cache, _CACHE,
        written=frozenset(("k_cache", "v_cache", "k_scale", "v_scale")),
    ),
    "cache_attention": Rule(
        {**_CACHES, "q": "b h q .", "starts": "b", "alibi_slopes": "b h", "sinks": "b h", "tree_mask": "b . ."},
        [Result("b h q ."), Result("b h q")], "bh", ("q",), _check_cache, _CACHE,
    ),
}  # fmt: skip


def _register(name: str, rule: Rule) -> None:
    operator = getattr(torch.ops.fastattn, name).default
    # A strategy depends on options, such as causal. torch.distributed.tensor.experimental.register_sharding would
    # keep it for all calls with the same integers, so the first argument that is no tensor is named here.
    options = [i for i, a in enumerate(operator._schema.arguments) if "Tensor" not in str(a.type)]
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        operator, lambda schema: _strategy(rule, schema), RuntimeSchemaInfo(min(options), needs_pytree=True)
    )


def _refuse_on_cpu(schema: OpSchema) -> OpStrategy:
    raise ValueError(
        "torch computes F.scaled_dot_product_attention of DTensors on GPUs only, and its context_parallel, too, "
        "also while fastattn.sdpa is active. Take fastattn.distributed.context_parallel, which runs on CPUs, too, "
        "under any mask; fastattn.scaled_dot_product_attention takes DTensors whose batch or heads are sharded"
    )


def _of_storages(schema: OpSchema) -> OpStrategy:
    """Forward mode asks whether the storages of a tensor and its tangent have one size. Each rank answers for its
    shards."""
    specs = [strategy.strategies[0].output_spec for strategy in schema.args_schema]  # type: ignore[attr-defined]
    return OpStrategy([OpSpec(output_specs=None, input_specs=specs, redistribute_cost=[[0.0] for _ in specs])])


for _name, _rule in RULES.items():
    _register(_name, _rule)
# A version of torch that knows these operators has an answer of its own.
for _operator, _answer in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, _refuse_on_cpu),
    (torch.ops.aten._has_same_storage_numel.default, _of_storages),
):
    if not any(
        _operator in known
        for name, known in vars(DTensor._op_dispatcher.sharding_propagator).items()
        if name.startswith("op_") and isinstance(known, dict)
    ):
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(_operator, _answer)
