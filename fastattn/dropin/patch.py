"""`patch` makes a model use the fused attention, MLPs and norms; `unpatch` takes it back."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastattn.dropin import blocks, mlp_forms, mlp_search
from fastattn.dropin.fused_classes import clash, fused_class
from fastattn.dropin.likeness import ATTENDS, attends, is_norm, may_be_norm
from fastattn.dropin.likeness import NORMS as LIKE_NORM
from fastattn.dropin.mlp_forms import Form, FusedForward, Names, obstacle
from fastattn.dropin.norm_forms import FusedNorm, names_of
from fastattn.dropin.swapping import (
    WAS,
    OwnClass,
    has_more_than_a_class,
    remember,
    restore_class,
    swap,
    swap_beside,
)
from fastattn.nn.norm import NORMS
from fastattn.nn.torch_layers import COUNTERPARTS

MLP_NAMES = re.compile(r"mlp|ffn|feed_?forward|glu|expert", re.I)


@dataclass(frozen=True)
class Row:
    """What `patch` did to one module.

    Attributes:
        name: its name in the model, "" for the model itself.
        kind: "attention", "mlp", "block" (a layer around an MLP), "norm" or "loss".
        was: its class before, or its attention implementation; with its Python module if two classes share the
            name.
        now: its class or implementation now; None if it was left as it is.
        why: why it was left, in which calls its own code still computes, or why it could not be tried.
    """

    name: str
    kind: str
    was: str
    now: str | None
    why: str = ""


class Report:
    """What `patch` did. It prints as a table; as a context manager it calls `unpatch` at the end of its block.

    Attributes:
        model: the model.
        rows: one `Row` for each module that was swapped, or looks as if it could have been.
    """

    def __init__(self, model: nn.Module, rows: list[Row]) -> None:
        self.model, self.rows = model, rows

    @property
    def swapped(self) -> list[Row]:
        return [row for row in self.rows if row.now is not None]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if row.now is None]

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        unpatch(self.model)

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """The lines of the table. Modules whose names differ only in a number share a line."""
        lines = Counter(
            (re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name) or "(the model)", row.kind, row.was, row.now or "left",
             row.why)
            for row in self.rows
        )  # fmt: skip
        return [(f"{name} x {n}" if n > 1 else name, *rest) for (name, *rest), n in lines.items()]  # type: ignore[misc]

    def __str__(self) -> str:
        if not self.rows:
            return "Nothing in this model looks like attention, an MLP or a norm that was to be swapped."
        lines = [("module", "kind", "was", "now", "why"), *self.table()]
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join(padded)

    __repr__ = __str__

    def __rich__(self) -> Any:
        """The table as rich prints it, for rich.print(report)."""
        from rich.table import Table

        table = Table("module", "kind", "was", "now", "why")
        for line in self.table():
            table.add_row(*line, style="dim" if line[3] == "left" else None)
        return table


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    mlp: bool = True,
    norm: bool = False,
    loss: bool = False,
    strict: bool = False,
) -> Report:
    """Make the model's attention and MLPs fused, in place. Parameters, state dict and hooks stay the same objects.

    - torch.nn's MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer get the classes of the
    same
      names in fastattn.nn.
    - Hugging Face models get attn_implementation="fastattn" in their configuration. Another model that shares the
      configuration object shares this, too.
    - MLPs are found by their parts, whatever their names: two or three linear layers and an activation, plain or
      gated, gate and up apart or packed. Each is swapped only after a trial with random weights, in which its own
      code and the fused function gave equal results.
    - A layer whose code computes h + dropout(mlp(norm(h))), as Llama's and GPT-2's, makes this one call of its MLP
      where the Triton kernels compute it, with neither dropout nor the norm's result kept. The norm is rounded
      once then. The rest of the layer's code stays as it is; an MLP whose layer has other code says so.

    Short calls on a CPU may get slower: each call of attention takes some 0.1 ms more Python than PyTorch's own.
    A small model of 128 tokens takes up to 1.3 times as long; at 512 tokens, 0.6 to 1.15 times.

    Only instances change, no class does. An optimiser made before stays valid; deepcopy, pickle, torch.save,
    torch.compile, torch.export, torch.fx, torch.jit.trace, autocast and gradient checkpointing work. Patch before
    `fully_shard`; use torch.jit.script before `patch`, or after `unpatch`.

    A module that looks like attention, an MLP or a norm and was left has a row in the report, with the reason. An
    MLP with dropout between its layers runs its own code in training. A layer with hooks, an adapter, a
    parametrization or weights that are no plain tensors is called as before.

    Args:
        model: any module, on its device.
        attention, mlp: what to swap.
        norm: swap the norms, too. torch.nn's LayerNorm and RMSNorm get the classes of fastattn.nn; other modules
            with a weight and nothing else are first tried on an input. Off by default, because it gains time only
            where the Triton kernels compute. Elsewhere PyTorch's norms compute as before, and a call takes some
            ten microseconds more (RMS norms of half a million elements and more gain on a CPU); under
            torch.compile the compiler fuses a module's own code anyway. Results are rounded once; Llama's own
            norms also round before the weight.
        loss: compute the loss of Hugging Face's causal language models by `fastattn.linear_cross_entropy`, in
            training mode, where a call has labels. Its output has no logits then (None). Off by default because of
            that. Calls in eval mode, and calls with arguments that change what is returned, run the model's own
            code. Each model is first tried on random tokens and logits.
        strict: raise if anything that was to be swapped is left, and change nothing.

    Returns:
        A `Report`, which prints as a table. `with fastattn.patch(model): ...` is taken back after the block.

    Raises:
        TypeError: model is not a module.
        ValueError: if strict, naming what would be left and why.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> print(patch(model))
        module       kind  was         now              why
        (the model)  mlp   Sequential  FusedSequential
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    before = [(module, type(module), module.__dict__.get(WAS)) for module in model.modules()]
    classes = {name: _class_of(module) for name, module in model.named_modules()}
    rows: list[Row] = []
    if attention:
        rows += _swap_huggingface(model)
        hugging_face = [row.name for row in rows]
        rows += _each(model, "attention", _swap_bigbird)
        rows += _each(model, "attention", _swap_attention)
        rows += _attention_left(model, rows, hugging_face)
    if mlp:
        rows += _with_blocks(model, _innermost(_each(model, "mlp", _swap_mlp)))
    if norm:
        rows += _each(model, "norm", _swap_norm)
    if loss:
        rows += _swap_losses(model)
    report = Report(model, _with_full_names(rows, classes))
    if strict and report.left:
        for module, kind, was in before:
            _undo(module, kind, was)
        left = "\n".join(f"  {row.name or '(the model)'}: {row.why}" for row in report.left)
        raise ValueError(f"strict=True, and these would be left as they are:\n{left}")
    return report


def _each(model: nn.Module, kind: str, swap_one: Callable[[str, Any], Row | None]) -> list[Row]:
    """A row for each module of this kind. A module that raises an error is left."""
    rows = []
    for name, module in model.named_modules():
        try:
            row = swap_one(name, module)
        except Exception as error:
            what = _class_name(module)
            looks = {"attention": ATTENDS, "mlp": MLP_NAMES, "norm": LIKE_NORM}[kind].search(what)
            reason = f"looking at it raised {type(error).__name__}: {error}"
            row = Row(name, kind, what, None, reason) if looks else None
        if row is not None:
            rows.append(row)
    return rows


def _innermost(rows: list[Row]) -> list[Row]:
    """The rows without modules that were left and contain other modules with rows: those are the MLPs."""
    names = [row.name for row in rows]
    return [row for row in rows if row.now or row.why == ALREADY or not _holds_another(row.name, names)]


def _holds_another(name: str, names: list[str]) -> bool:
    """Whether a module of one of these names is inside the module of this name."""
    return any(other != name and other.startswith(_prefix(name)) for other in names)


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _with_full_names(rows: list[Row], classes: dict[str, Any]) -> list[Row]:
    """The rows, with the full name of a class that shares its name with another class in the model."""
    of_name: dict[str, set[Any]] = {}
    for row in rows:
        kind = classes.get(row.name)
        if kind is not None and kind.__name__ == row.was:
            of_name.setdefault(row.was, set()).add(kind)
    return [
        replace(row, was=f"{classes[row.name].__module__}.{classes[row.name].__qualname__}")
        if len(of_name.get(row.was, ())) > 1 else row
        for row in rows
    ]  # fmt: skip


def unpatch(model: nn.Module) -> None:
    """Take back what `patch` did to this model, or to the model it is a copy of; else do nothing.

    Raises:
        RuntimeError: a module's class was changed again since, as `fully_shard` does. Nothing is changed then.
    """
    patched = [(name, module) for name, module in model.named_modules() if WAS in module.__dict__]
    changed = [name for name, module in patched if not _is_ours(module)]
    if changed:
        raise RuntimeError(f"the classes of these modules were changed after patch: {', '.join(changed)}")
    for _, module in patched:
        was = module.__dict__.pop(WAS)
        if isinstance(was, type):
            restore_class(module, was)
        else:
            was.restore(module)


def _undo(module: nn.Module, kind: type[nn.Module], was: Any) -> None:
    """Restore the module to what it was before this call of `patch`."""
    if isinstance(module.__dict__.get(WAS), OwnClass) and module.__dict__[WAS] is not was:
        restore_class(module, module.__dict__[WAS].kind)
        module.__dict__[WAS] = module.__dict__[WAS].before
    if was is None and (new := module.__dict__.pop(WAS, None)):
        if isinstance(new, type):
            restore_class(module, kind)
        else:
            new.restore(module)


ALREADY = "already patched"
BIGBIRD = "fastattn.dropin.bigbird"


def _is_ours(module: nn.Module) -> bool:
    if not isinstance(module.__dict__[WAS], type):
        return True
    kind, counterparts = type(module), (*_counterparts().values(), *NORMS.values())
    return "own" in kind.__dict__ or kind in counterparts or kind.__module__ == BIGBIRD


def _counterparts() -> dict[type[nn.Module], type[nn.Module]]:
    """torch's attention classes and ours. Each of ours differs from torch's in code only."""
    attending = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return {kind: COUNTERPARTS[kind] for kind in attending}


def _swap_attention(name: str, module: nn.Module) -> Row | None:
    """Swap a torch attention module for its counterpart; None if it is no such module."""
    counterparts, kind = _counterparts(), type(module)
    if not isinstance(module, tuple(counterparts)):
        return None
    reason = _attention_obstacle(module)
    if reason:
        return Row(name, "attention", _class_name(module), None, reason)
    swap(module, counterparts[kind])
    return Row(name, "attention", kind.__name__, f"fastattn.nn.{counterparts[kind].__name__}")


def _attention_obstacle(module: nn.Module) -> str | None:
    counterparts, kind = _counterparts(), type(module)
    if WAS in module.__dict__:
        return ALREADY
    if kind in counterparts.values():
        return "fastattn's own"
    if kind not in counterparts:
        return f"{kind.__name__} is a subclass with code of its own"
    if reason := _instance_obstacle(module):
        return reason
    return None


def _instance_obstacle(module: nn.Module) -> str | None:
    """Why this instance must not be changed, whatever its class; None if it may be."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "its weights are on the meta device, without values"
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"its weights are of type {type(parameter).__name__}"
    return None


def _attention_left(model: nn.Module, rows: list[Row], hugging_face: list[str]) -> list[Row]:
    """Rows for modules whose own code seems to attend: the innermost ones, outside of those that were swapped."""
    known = [row.name for row in rows]
    inside = tuple(_prefix(name) for name in (*hugging_face, *(row.name for row in rows if row.now)))

    def look(name: str, module: nn.Module) -> Row | None:
        if name in known or (inside and f"{name}.".startswith(inside)) or (reason := attends(module)) is None:
            return None
        return Row(name, "attention", _class_name(module), None, reason)

    left = _each(model, "attention", look)
    names = [*known, *(row.name for row in left)]
    return [row for row in left if not _holds_another(row.name, names)]


def _swap_mlp(name: str, module: nn.Module) -> Row | None:
    """Make a module compute its MLP fused; None if there is no MLP in it."""
    kind, was = type(module), _class_name(module)
    if kind.__module__.startswith("fastattn.") and WAS not in module.__dict__:
        return None
    if isinstance(module, Form):
        return Row(name, "mlp", was, None, ALREADY)
    if isinstance(module, nn.Sequential):
        return _swap_sequential(name, module)
    if known := mlp_search.known_form(module):
        form, ways = known[0], [known[1]]
    else:
        form, ways = FusedForward, [] if ATTENDS.search(was) else mlp_search.candidates(module)
    if not ways:
        reason = None if attends(module) else mlp_search.why_left(module)
        return None if reason is None else Row(name, "mlp", was, None, reason)
    parts = ways[0].read(module)
    assert parts is not None
    reason, in_training = obstacle(parts), mlp_forms.dropout_obstacle(parts)
    found: Names | None = None
    if "forward" in module.__dict__:
        reason = "its forward was replaced on the instance"
    elif hidden := clash(module, form):
        reason = hidden
    elif reason == in_training:
        found = mlp_search.found_way(module, form, ways)
        reason = "its own code computes more than this MLP, or something else"
    if found is None:
        looks = known or ways[0].activation or MLP_NAMES.search(was) or mlp_search.why_left(module)
        return Row(name, "mlp", was, None, reason or "") if looks and not attends(module) else None
    swap(module, fused_class(form, kind, found))
    believed = found.read(module)
    assert believed is not None
    note = _ONLY_IN_EVAL if found.only_in_eval else _training_note([believed])
    return Row(name, "mlp", was, _now(module), note)


_ONLY_IN_EVAL = "in eval mode; in training its own code computes it, which does something else there (dropout?)"


IN_ONE_CALL = "norm, MLP and sum in one call"


def _with_blocks(model: nn.Module, rows: list[Row]) -> list[Row]:
    """Swap the layers around the swapped MLPs. Returns the rows of the MLPs and those of the layers. The row of an
    MLP says why its layer was left."""
    of_mlps = {row.name: row for row in rows}
    of_blocks = []
    for name, block in model.named_modules():
        held = [key for key, part in block.named_children() if isinstance(part, FusedForward)]
        if len(held) != 1 or type(block).__module__.startswith("torch."):
            continue
        (mlp,), was = held, _class_name(block)
        if isinstance(block, blocks.FusedBlock):
            of_blocks.append(Row(name, "block", was, None, ALREADY))
            continue
        found = _instance_obstacle(block) or clash(block, blocks.FusedBlock) or blocks.sum_of(block, mlp)
        if isinstance(found, blocks.Sum):
            swap(block, fused_class(blocks.FusedBlock, type(block), found))
            of_blocks.append(Row(name, "block", was, IN_ONE_CALL, "by the kernels; elsewhere by its own code"))
        elif any(is_norm(part) or isinstance(part, tuple(NORMS)) for part in block.children()):
            # Layers that share an MLP share its row, which has the first one's name.
            row = of_mlps.get(f"{_prefix(name)}{mlp}")
            if row is not None:
                of_mlps[row.name] = replace(
                    row, why="; ".join(filter(None, (row.why, f"alone in {was}: {found}")))
                )
    return [*of_mlps.values(), *of_blocks]


def _swap_sequential(name: str, module: nn.Sequential) -> Row | None:
    modules = list(module.children())
    candidates = [run for i in range(len(modules)) if (run := mlp_forms.run_at(modules, i))]
    if not candidates:
        return None
    was, good = _class_name(module), mlp_forms.runs(module)
    if type(module).forward is not nn.Sequential.forward:
        return Row(name, "mlp", was, None, f"{was} is a subclass with code of its own")
    if "forward" in module.__dict__:
        return Row(name, "mlp", was, None, "its forward was replaced on the instance")
    if reason := clash(module, mlp_forms.FusedSequential):
        return Row(name, "mlp", was, None, reason)
    if not good:
        return Row(name, "mlp", was, None, obstacle(candidates[0]) or "")
    swap(module, fused_class(mlp_forms.FusedSequential, type(module), mlp_forms.SEQUENTIAL))
    return Row(name, "mlp", was, _now(module), _training_note(good))


def _now(module: nn.Module) -> str:
    return type(module).__name__


def _class_name(module: nn.Module) -> str:
    return _class_of(module).__name__


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one it had before `patch`."""
    was = module.__dict__.get(WAS)
    was = was.kind if isinstance(was, OwnClass) else was
    return was if isinstance(was, type) else type(module)


def _training_note(found: list[mlp_forms.Parts]) -> str:
    """In which calls the module's own code still computes, although it was swapped."""
    dropouts = [dropout for run in found for dropout in run.dropouts if isinstance(dropout, nn.Dropout)]
    rates = {dropout.p for dropout in dropouts if dropout.p > 0}
    if not rates:
        return ""
    listed = ", ".join(f"{p:g}" for p in sorted(rates))
    return f"in eval mode; in training PyTorch computes it: dropout {listed} inside"


def _huggingface_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost Hugging Face models in the model."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, library.PreTrainedModel) and not inside:
            found.append(name)
            yield name, module


def _swap_huggingface(model: nn.Module) -> list[Row]:
    """Set attn_implementation="fastattn" on the Hugging Face models in the model."""
    rows = []
    for name, module in _huggingface_models(model):
        from fastattn.integrations import huggingface

        if any(_is_bigbird(part) for part in module.modules()):
            continue  # `_swap_bigbird` swaps its attention modules one by one.
        was = f"attn_implementation={module.config._attn_implementation!r}"
        already = has_more_than_a_class(module)
        reason, note = ALREADY if already else huggingface.obstacle_in_code(module), ""
        reason = reason or _meta_obstacle(module)
        if reason is None:
            reason, untried = huggingface.try_against_eager(module)
            note = f"not compared with eager: {untried}" if untried else ""
        if reason and not any(ATTENDS.search(_class_name(part)) or attends(part) for part in module.modules()):
            continue  # A model without attention, of convolutions or state spaces.
        if reason is None:
            before = huggingface.Before.of(module)
            try:
                module.set_attn_implementation(huggingface.NAME)
            except (ValueError, ImportError) as error:
                before.restore(module)
                reason = str(error)
            else:
                remember(module, before)
        rows.append(Row(name, "attention", was, None if reason else huggingface.NAME, reason or note))
    return rows


def _swap_losses(model: nn.Module) -> list[Row]:
    """Swap the losses of the Hugging Face models in the model."""
    rows = []
    for name, module in _huggingface_models(model):
        from fastattn.dropin import causal_loss

        was = _class_name(module)
        reason = ALREADY if isinstance(module, causal_loss.FusedCausalLoss) else _instance_obstacle(module)
        try:
            reason = reason or clash(module, causal_loss.FusedCausalLoss)
            reason = reason or causal_loss.obstacle(module) or causal_loss.trial(module)
        except Exception as error:
            reason = f"trying it raised {type(error).__name__}: {error}"
        if reason is None:
            names = causal_loss.names_of(module)
            swap_beside(module, fused_class(causal_loss.FusedCausalLoss, type(module), names))
        rows.append(Row(name, "loss", was, None if reason else _now(module), reason or ""))
    return rows


def _is_bigbird(module: nn.Module) -> bool:
    library = sys.modules.get("transformers.models.big_bird.modeling_big_bird")
    if library is None:
        return False
    kinds = (library.BigBirdAttention, library.BigBirdBlockSparseAttention, library.BigBirdSelfAttention)
    return isinstance(module, kinds)


def _swap_bigbird(name: str, module: Any) -> Row | None:
    """Swap an attention of Hugging Face's BigBird; None if it is no such module."""
    if not _is_bigbird(module):
        return None
    from fastattn.dropin import bigbird

    was = _class_name(module)
    if was == bigbird.BigBirdAttention.__name__:
        # It computes nothing itself: a module inside it attends, and it may replace that module later.
        if _bigbird_obstacle(module.self) is None:
            swap(module, bigbird.FusedBigBirdAttention)
        return None
    reason = _bigbird_obstacle(module)
    if reason:
        return Row(name, "attention", was, None, reason)
    swap(module, bigbird.FUSED[type(module)])
    return Row(name, "attention", was, type(module).__name__)


def _bigbird_obstacle(module: Any) -> str | None:
    """Why this attention module is left to transformers' code; None if it can be swapped."""
    from fastattn.dropin import bigbird

    if WAS in module.__dict__:
        return ALREADY
    if type(module) not in bigbird.FUSED:
        return f"{_class_name(module)} is a subclass with code of its own"
    return _instance_obstacle(module)


def _meta_obstacle(module: nn.Module) -> str | None:
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        return "its weights are on the meta device, without values"
    return None


def _swap_norm(name: str, module: nn.Module) -> Row | None:
    """Swap a norm for the class of fastattn.nn, or for one that computes it fused; None if it is no norm."""
    kind, ours = type(module), module.__dict__.get(WAS)
    named = isinstance(module, tuple(NORMS)) or is_norm(module)
    if not named and not may_be_norm(module):
        return None
    was, reason = _class_name(module), _instance_obstacle(module)
    names = None
    if ours is not None:
        reason = ALREADY
    elif kind in NORMS.values():
        reason = "fastattn's own"
    elif isinstance(module, tuple(NORMS)):
        reason = reason or (None if kind in NORMS else f"{was} is a subclass with code of its own")
    elif reason := reason or clash(module, FusedNorm):
        pass  # it is left
    elif (names := names_of(module)) is None:
        reason = "its own code computes another norm, or something else"
    if reason:
        return Row(name, "norm", was, None, reason) if named or ours is not None else None
    swap(module, NORMS[kind] if names is None else fused_class(FusedNorm, kind, names))
    return Row(name, "norm", was, f"fastattn.nn.{kind.__name__}" if names is None else _now(module))
