"""The house: a family is a folder, a floor is a file name, and imports point down only."""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Iterator
from pathlib import Path

import public_api
import pytest

import fastattn

PACKAGE = Path(fastattn.__file__).parent
FAMILIES = ("attention", "mlp", "norm", "heads", "loss", "statistics", "cache")
# Statistics look at the scores of attention: by its definition and its tiles, not by a second one.
SCORES = {"core.attention.definition", "core.attention.tiles"}
# A row of a cache is a call of attention: by its definition and its portable backend, not by second ones.
ROWS = {"core.attention.definition", "core.attention.portable"}
# A residual branch is a norm, an MLP and dropout: by the norm's own backends and attention's random numbers.
BRANCH = {"core.norm.definition", "core.norm.portable", "core.attention.dropout"}
FLOORS_OF_A_FAMILY = ("spec", "definition", "portable", "triton", "operators", "functional")
# From the ground up. A module imports from the floors below, and from its own where no circle comes of it.
FLOORS = (
    ("kernels", "kernels.*", "errors"),
    ("ground", "ground.*"),
    ("masks", "masks.*"),
    ("core.function", "core.invariance", "core.mapped", "core.layout", "core.intact", "core.workspace"),
    (
        "core.autocast",
        "core.derivatives",
        "core.backends",
        "core.plans",
        "core.proofs",
        "core.rows",
        "core.spread",
    ),
    ("core.*.spec", "core.attention.dropout", "core.statistics.labels", "core.statistics.queries"),
    ("core.*.definition",),
    ("core.*.tiles", "core.*.granules", "core.*.torch_*", "core.*.whole_rows", "core.*.invariant_flash"),
    ("core.mlp.chunks", "core.mlp.int8"),
    ("core.*.head_scales", "core.attention.invariant", "core.attention.tilings"),
    ("core.*.portable", "core.*.triton", "core.attention.derivatives"),
    ("core.capabilities",),
    ("core.mlp.whole",),
    ("core.*.operators",),
    ("core.*.functional", "core.attention.varlen", "core.attention.sdpa", "flops"),
    ("flash_attn", "kv_cache", "integrations", "integrations.*"),
    ("nn", "nn.*"),
    ("dropin", "dropin.*"),
    ("distributed", "distributed.*"),
    ("lens", "lens.*"),
    ("fastattn",),
    ("measuring", "measuring.*"),
    ("demo", "demo.*"),
    ("looking", "looking.*"),
    ("generating",),
    ("cli", "__main__"),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name without `fastattn.`; the package itself is "fastattn"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts) or "fastattn"] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of the package that this one imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["fastattn", *name.split(".")[: -node.level], *filter(None, [node.module])])
            # `from package import name` may name a module or something in the package.
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    inside = {full.removeprefix("fastattn.") for full in found if full.split(".")[0] == "fastattn"}
    known = {full for full in inside if full in MODULES}
    # A package stands for itself only where nothing more exact is named.
    exact = {m for m in known if not any(other.startswith(f"{m}.") for other in known)}
    return exact - {name} - ({"fastattn"} if len(exact) > 1 else set())


def floor(name: str) -> int:
    """The floor of a module: where its name, or the pattern it fits, stands in FLOORS."""
    for i, names in enumerate(FLOORS):
        if any(fnmatch.fnmatch(name, pattern) for pattern in names):
            return i
    raise AssertionError(f"{name} has no floor: give it one in FLOORS")


PARTS = [name for name in MODULES if not name.startswith("kernels") and MODULES[name].stat().st_size > 0]


@pytest.mark.parametrize("name", PARTS)
def test_imports_point_down(name: str) -> None:
    upward = sorted(other for other in imported(name) if floor(other) > floor(name))
    assert not upward, f"{name} imports from above: {', '.join(upward)}"


def test_no_imports_run_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(imported(name)):
                visit(other, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_six_files(family: str) -> None:
    missing = [name for name in FLOORS_OF_A_FAMILY if f"core.{family}.{name}" not in MODULES]
    assert not missing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_enters_another_by_its_functional_or_spec_only(family: str) -> None:
    allowed = {f"core.{other}.{name}" for other in FAMILIES for name in ("functional", "spec")}
    allowed |= {"statistics": SCORES, "cache": ROWS, "mlp": BRANCH}.get(family, set())
    for name in MODULES:
        if name.startswith(f"core.{family}."):
            elsewhere = {m for m in imported(name) if m.split(".")[1:2] != [family] and m.count(".") == 2}
            reached = {m for m in elsewhere if m.startswith("core.")} - allowed
            assert not reached, f"{name} reaches into {', '.join(sorted(reached))}"


def test_kernels_import_nothing_of_the_library() -> None:
    for name in MODULES:
        if name.startswith("kernels."):
            assert all(other.startswith("kernels") for other in imported(name)), name


MOST_PARAMETERS = 12
# Functions that may take more, though they are not public, each with the reason.
MORE_PARAMETERS = {
    "core.attention.operators.Attention.forward": "torch.compile cannot trace a forward of *arguments",
    "core.attention.operators.AttentionMax.forward": "torch.compile cannot trace a forward of *arguments",
    "core.attention.operators.AttentionBackward.forward": "torch.compile cannot trace a forward of *arguments",
    "core.mlp.operators.MLPBackward.forward": "torch.compile cannot trace a forward of *arguments",
    "core.attention.tiles._tangent_of_tile": "derivatives pass each tensor of a tile by position",
    "core.attention.functional.scores_asked": "it takes the keywords of fastattn.attention that change scores",
    "integrations.huggingface.attention_of_call": "it takes the keywords that transformers passes",
}


def functions(name: str) -> Iterator[tuple[str, int]]:
    """The functions of a module by their names within it, with the number of their parameters. No overloads."""

    def inside(node: ast.AST, path: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{path}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                taken = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                if not any(ast.unparse(decorator) == "overload" for decorator in child.decorator_list):
                    yield f"{path}{child.name}", len(taken) - (bool(taken) and taken[0].arg in ("self", "cls"))
                yield from inside(child, f"{path}{child.name}.")

    return inside(ast.parse(MODULES[name].read_text()), "")


def test_only_public_functions_take_more_than_twelve_parameters() -> None:
    names = {line.split("(")[0] for line in public_api.LISTED.read_text().splitlines()}
    public = {name.removeprefix(f"{module}.") for name in names for module in public_api.MODULES}
    private = {
        f"{module}.{name}"
        for module in MODULES
        for name, count in functions(module)
        if count > MOST_PARAMETERS and name.removesuffix(".__init__") not in public
    }
    assert private == set(MORE_PARAMETERS), "put what belongs together into one type, or give a reason above"
