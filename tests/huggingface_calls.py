"""Which keywords can reach an attention function in transformers' modelling code, read from its source."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator

import needs_transformers  # noqa: F401

from fastattn.integrations.huggingface_models import is_attention_interface


def keywords_that_reach_attention(source: str) -> set[str]:
    """The keywords of the calls of attention functions in a file, and those that **kwargs carries into them.

    A keyword is carried from a call of a module to the calls in its forward that pass **kwargs on, unless a
    parameter of the forward takes it.
    """
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    members = _members(classes)
    carried: dict[str, set[str]] = {name: set() for name in classes}
    calls = [(name, *call) for name in classes for call in _calls(classes, name, members)]
    growing = True
    while growing:
        growing = False
        for caller, targets, keywords, passes_on in calls:
            for target in targets:
                parameters = _parameters(classes, target)
                new = (keywords | (carried[caller] if passes_on else set())) - parameters - carried[target]
                carried[target] |= new
                growing |= bool(new)
    reached = set()
    for name in classes:
        for call in _nodes(classes, name, ast.Call):
            if is_attention_interface(call.func):
                reached |= _keywords(call) | (carried[name] if _passes_on(call) else set())
    return reached


def _members(classes: dict[str, ast.ClassDef]) -> dict[str, set[str]]:
    """The classes that may stand behind an attribute, a list of modules included."""
    members = defaultdict(set)
    for node in (n for c in classes.values() for n in ast.walk(c) if isinstance(n, ast.Assign)):
        named = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)} & classes.keys()
        for target in node.targets:
            if isinstance(target, ast.Attribute):
                members[target.attr] |= named
    return members


def _calls(
    classes: dict[str, ast.ClassDef], name: str, members: dict[str, set[str]]
) -> Iterator[tuple[set[str], set[str], bool]]:
    """The calls of modules in a class: classes that may be called, keywords, whether **kwargs goes along."""
    loops = defaultdict(set)
    for loop in _nodes(classes, name, ast.For):
        over, variables = _loop_variables(loop)
        for variable in variables:
            loops[variable] |= {c for attribute in over for c in members.get(attribute, ())}
    for call in _nodes(classes, name, ast.Call):
        function = call.func
        if isinstance(function, ast.Attribute):
            targets = members.get(function.attr, set())
        else:
            targets = loops.get(function.id, set()) if isinstance(function, ast.Name) else set()
        if targets:
            yield targets, _keywords(call), _passes_on(call)


def _nodes(classes: dict[str, ast.ClassDef], name: str, kind: type) -> Iterator:
    """The nodes of a class and of its bases in the file."""
    yield from (node for node in _walked(classes[name]) if isinstance(node, kind))
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _nodes(classes, base.id, kind)


@functools.cache
def _walked(node: ast.ClassDef) -> list[ast.AST]:
    return [n for n in ast.walk(node) if isinstance(n, ast.For | ast.Call | ast.FunctionDef)]


@functools.cache
def _loop_variables(loop: ast.For) -> tuple[set[str], set[str]]:
    """The attributes that a loop runs over, and its variables."""
    over = {n.attr for n in ast.walk(loop.iter) if isinstance(n, ast.Attribute)}
    return over, {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}


def _parameters(classes: dict[str, ast.ClassDef], name: str) -> set[str]:
    for node in _nodes(classes, name, ast.FunctionDef):
        if node.name == "forward":
            return {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    return set()


def _keywords(call: ast.Call) -> set[str]:
    return {k.arg for k in call.keywords if k.arg is not None}


def _passes_on(call: ast.Call) -> bool:
    return any(k.arg is None for k in call.keywords)
