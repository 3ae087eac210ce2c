"""Transformer layers of other people whose code adds a residual to their MLP: h + dropout(mlp(norm(h))).

Where the kernels serve, this sum is one call of the fused MLP. The layer's class is replaced by one whose forward
is the layer's own code with a question before the statements of the sum, here Llama's:

    if (fused := self._in_one_call(hidden_states)) is not None:
        hidden_states = fused
    else:
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states

Everything else that a layer does (attention, caches, what it returns) stays its own code. So do these statements
in every call that the kernels do not compute, or in which somebody looks at a module inside. The lines in a
traceback are those of the layer's own source.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.core.intact import alteration
from fastattn.dropin.fused_classes import Fused, digest, fused_class, methods_of
from fastattn.dropin.mlp_forms import FusedForward
from fastattn.dropin.norm_forms import FusedNorm, NormNames, fits, values_of
from fastattn.dropin.norm_forms import names_of as norm_names_of
from fastattn.nn.residual import KINDS, SMALLEST_EPS, may_be_kernels, read_norm

MOST_STATEMENTS = 5  # that one sum is spread over
_DOES = ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom
_ASK, _ANSWER = "_in_one_call", "_fastattn_sum"


class OwnCode(NamedTuple):
    """What is known of the forward of a class of layer.

    calls: the modules that are called one on the other's result, the outermost first: dropout, MLP, norm.
    forward: the class's code with the question in it.
    """

    calls: tuple[str, ...]
    forward: types.FunctionType


@dataclass(frozen=True)
class Sum:
    """The attributes that hold a layer's MLP, the norm before it and the dropout after it; "" for none.

    kind, read, tried: the norm's class, how it is read, and the digest of its forward when that was tried, if that
        class is none of torch's.
    """

    mlp: str
    norm: str
    dropout: str
    kind: type[nn.Module] | None = None
    read: NormNames | None = None
    tried: str = ""


class FusedBlock(Fused):
    """A layer; its sum is one call where the kernels serve."""

    keeps_name = True  # Tools that shard a model layer by layer find the layers by the name of their class.
    names: Sum

    @classmethod
    def forward_for(cls, own: type[nn.Module], names: Sum) -> Any:
        found = own_code(own, names.mlp)
        # A copy may be made where the source can no longer be read: then all stays the layer's own code.
        return _unless_outdated(found.forward) if isinstance(found, OwnCode) else None

    def _in_one_call(self, x: Any) -> Tensor | None:
        """x + dropout(mlp(norm(x))); None if the layer's own code must compute it."""
        if type(x) is not Tensor or torch.compiler.is_compiling() or not may_be_kernels(x):
            return None
        names, mlp = self.names, getattr(self, self.names.mlp)
        if not isinstance(mlp, FusedForward) or alteration(mlp, type(mlp)):
            return None
        norm = getattr(self, names.norm) if names.norm else None
        dropout = getattr(self, names.dropout) if names.dropout else None
        reader = read_norm if names.kind is None else functools.partial(_read_own_norm, names)
        return mlp._added(x, norm, dropout, reader)


def _unless_outdated(with_question: Any) -> Any:
    """A forward that runs this code, as long as it is that of the layer's own class."""

    @functools.wraps(with_question)
    def forward(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        if self.is_outdated():
            return self.own.forward(self, *args, **kwargs)
        return with_question(self, *args, **kwargs)

    return forward


def _read_own_norm(names: Sum, norm: Any, x: Tensor, backend: str | None) -> dict[str, Any] | None:
    """As `read_norm`, of a norm that is none of torch's."""
    kind, read = names.kind, names.read
    assert kind is not None and read is not None
    fused = fused_class(FusedNorm, kind, read, names.tried)
    if fused.is_outdated() or alteration(norm, (kind, fused), x):
        return None
    weight, bias, eps = values_of(norm, read)
    if eps < SMALLEST_EPS or any(
        t is not None and not (fits(t, x) and t.shape == x.shape[-1:]) for t in (weight, bias)
    ):
        return None
    if weight is not None and read.weight_offset:
        weight = weight.float() + read.weight_offset
    found = {"norm_weight": weight, "norm_eps": eps}
    return {**found, "norm": "layer", "norm_bias": bias} if read.centred else {**found, "norm": "rms"}


def sum_of(block: nn.Module, mlp: str) -> Sum | str:
    """Where the block adds the result of this MLP; or why that stays a step of its own."""
    found = own_code(type(block), mlp)
    if isinstance(found, str):
        return found
    position = found.calls.index(mlp)
    before, after = found.calls[position + 1 :], found.calls[:position]
    if len(before) > 1 or len(after) > 1:
        return "it computes more than a norm before its MLP and dropout after it"
    if called := next((name for name in found.calls if not isinstance(getattr(block, name), nn.Module)), ""):
        return f"{called} is no module"
    dropout = getattr(block, after[0]) if after else None
    if after and type(dropout) not in (nn.Dropout, nn.Identity):
        return f"{type(dropout).__name__} comes after its MLP"
    found_sum = Sum(mlp, "".join(before), "".join(after))
    if not before or isinstance(norm := getattr(block, before[0]), KINDS):
        return found_sum
    if isinstance(norm, FusedNorm):
        return replace(found_sum, kind=norm.own, read=norm.names, tried=norm.tried)
    if (read := norm_names_of(norm)) is None:
        return f"{type(norm).__name__} is no norm that the kernels know"
    return replace(found_sum, kind=type(norm), read=read, tried=digest(methods_of(type(norm), "forward")))


def own_code(own: Any, mlp: str) -> OwnCode | str:
    """The code of a class of layer with the question in it; or why there is none."""
    forward = own.forward
    while _is_checkpointing(own, forward):  # A derived class is wrapped once more.
        forward = forward.__wrapped__
    return _own_code(forward, mlp)


@functools.lru_cache(maxsize=256)
def _own_code(forward: Any, mlp: str) -> OwnCode | str:
    definition = _definition(forward)
    if definition is None:
        return "the source of its forward cannot be read, or is not the code that runs"
    statements = definition.body  # Those that every call runs; not those in an if or a loop.
    for start, end in _windows(len(statements)):
        window = statements[start:end]
        if (found := _added(window)) is None or mlp not in found.calls:
            continue
        if read := found.within & _read_after(definition, window[-1]):
            return f"its code reads {', '.join(sorted(read))} later"
        statements[start:end] = [_question(window, found)]
        return OwnCode(found.calls, _compiled(definition, forward))
    return "its code is not h + mlp(norm(h)), with at most dropout around the MLP"


def _is_checkpointing(own: type[nn.Module], forward: Any) -> bool:
    """Whether this is transformers' wrapper around a layer's forward for gradient checkpointing."""
    library = sys.modules.get("transformers.modeling_layers")
    return (
        library is not None
        and getattr(forward, "__globals__", None) is vars(library)
        and (hasattr(forward, "__wrapped__") and issubclass(own, library.GradientCheckpointingLayer))
    )


class _Added(NamedTuple):
    """What some assignments compute together: target = h + calls[0](calls[1](...(h)))."""

    target: str
    h: str
    calls: tuple[str, ...]
    within: frozenset[str]  # the other names that they assign


def _definition(forward: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function, if that is what runs."""
    try:
        lines, _ = inspect.getsourcelines(forward)
        is_method = lines[0][0].isspace()  # Its lines keep their indentation.
        tree: Any = ast.parse(("if True:\n" if is_method else "\n") + "".join(lines))
        ast.increment_lineno(tree, forward.__code__.co_firstlineno - 2)
        (definition,) = tree.body[0].body if is_method else tree.body
        same = isinstance(definition, ast.FunctionDef) and _code(definition, forward) == forward.__code__
    except (OSError, TypeError, ValueError, AttributeError, SyntaxError):
        # It has no source, is no plain function, or is wrapped.
        return None
    return definition if same else None


def _code(definition: ast.FunctionDef, forward: Any) -> types.CodeType:
    """The definition, compiled as `forward` was."""
    module = ast.fix_missing_locations(ast.Module([definition], []))
    compiled = compile(module, forward.__code__.co_filename, "exec", _future(forward), dont_inherit=True)
    name = forward.__code__.co_name
    found = [c for c in compiled.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
    if not found:
        raise ValueError(f"there is no {name} in its source: it is wrapped")
    return found[0]


def _future(forward: Any) -> int:
    """The flags of the `from __future__ import` statements above it."""
    return forward.__code__.co_flags & __future__.annotations.compiler_flag


def _compiled(definition: ast.FunctionDef, forward: Any) -> types.FunctionType:
    code = _code(definition, forward)
    made = types.FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__)
    made.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(made, forward)
    del made.__wrapped__  # type: ignore[attr-defined]
    return made


def _windows(count: int) -> Iterator[tuple[int, int]]:
    """Start and end of the runs of statements, the shortest first."""
    for length in range(1, MOST_STATEMENTS + 1):
        yield from ((start, start + length) for start in range(count - length + 1))


def _added(window: list[ast.stmt]) -> _Added | None:
    """What these statements compute, if it is a sum with the calls of some modules."""
    meaning: dict[str, ast.expr] = {}
    for statement in window:
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
            return None
        if not isinstance(statement.targets[0], ast.Name):
            return None
        target = statement.targets[0].id
        meaning[target] = _Replaced(meaning).visit(copy.deepcopy(statement.value))
    value = meaning.pop(target)
    if not (isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)):
        return None
    for h, branch in ((value.left, value.right), (value.right, value.left)):
        calls, read = _calls(branch)
        # Another call in these statements may do something that is not part of the sum.
        made = sum(isinstance(node, _DOES) for statement in window for node in ast.walk(statement))
        if not calls or made != len(calls):
            continue
        if isinstance(h, ast.Name) and isinstance(read, ast.Name) and h.id == read.id:
            return _Added(target, h.id, calls, frozenset(meaning))
    return None


class _Replaced(ast.NodeTransformer):
    """Replaces names by the expressions that were assigned to them."""

    def __init__(self, meaning: dict[str, ast.expr]) -> None:
        self.meaning = meaning

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.meaning.get(node.id, node)


def _calls(branch: ast.expr) -> tuple[tuple[str, ...], ast.expr]:
    """Of self.a(self.b(x)): a and b, and x."""
    names = []
    while isinstance(branch, ast.Call) and len(branch.args) == 1 and not branch.keywords:
        function = branch.func
        if not (isinstance(function, ast.Attribute) and ast.unparse(function.value) == "self"):
            break
        names.append(function.attr)
        branch = branch.args[0]
    return tuple(names), branch


_FUNCTIONS = ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.GeneratorExp


def _read_after(definition: ast.FunctionDef, last: ast.stmt) -> frozenset[str]:
    """The names that are read behind a statement, or changed, or deleted; or read in a function within this one,
    which may be called behind it."""
    changed = {id(node.target) for node in ast.walk(definition) if isinstance(node, ast.AugAssign)}
    functions = [n for n in ast.walk(definition) if isinstance(n, _FUNCTIONS) and n is not definition]
    later = {id(node) for function in functions for node in ast.walk(function)}
    end = last.end_lineno, last.end_col_offset
    return frozenset(
        node.id for node in ast.walk(definition)
        if isinstance(node, ast.Name) and ((node.lineno, node.col_offset) >= end or id(node) in later)
        and (not isinstance(node.ctx, ast.Store) or id(node) in changed)
    )  # fmt: skip


def _question(window: list[ast.stmt], found: _Added) -> ast.If:
    """The statements, unless the sum is computed in one call."""
    text = f"if ({_ANSWER} := self.{_ASK}({found.h})) is not None: {found.target} = {_ANSWER}"
    (question,) = ast.parse(text).body
    for node in ast.walk(question):
        ast.copy_location(node, window[-1])
    assert isinstance(question, ast.If)
    question.orelse = window
    return question
