"""One call that makes a model use the fused attention, MLPs and norms, and one that takes it back."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastattn import mlp_forms
from fastattn.fused_classes import fused_class
from fastattn.mlp_forms import Form, form_of, is_this_mlp, obstacle
from fastattn.nn.norm import NORMS
from fastattn.nn.torch_layers import COUNTERPARTS
from fastattn.norm_forms import FusedNorm, names_of
from fastattn.swapping import WAS, swap


@dataclass(frozen=True)
class Row:
    """What became of one module.

    Attributes:
        name: its name in the model, "" for the model itself.
        kind: "attention", "mlp" or "norm".
        was: its class, or what computed its attention, before.
        now: what does now; None if it was left as it is.
        why: why it was left, or when its own code still computes.
    """

    name: str
    kind: str
    was: str
    now: str | None
    why: str = ""


class Report:
    """What `patch` did; prints as a table, and as a context manager takes it back at the end of its block.

    Attributes:
        model: the model.
        rows: one `Row` for each module that was swapped, or could have been.
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
        """Modules that differ in their number alone are one line."""
        lines = Counter(
            (re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name) or "(the model)", row.kind, row.was, row.now or "left",
             row.why)
            for row in self.rows
        )  # fmt: skip
        return [(f"{name} x {n}" if n > 1 else name, *rest) for (name, *rest), n in lines.items()]  # type: ignore[misc]

    def __str__(self) -> str:
        if not self.rows:
            return "Nothing in this model is attention, an MLP or a norm that was to be swapped."
        lines = [("module", "kind", "was", "now", "why"), *self.table()]
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join(padded)

    __repr__ = __str__

    def __rich__(self) -> Any:
        """The same as a table of rich's, for rich.print(report)."""
        from rich.table import Table

        table = Table("module", "kind", "was", "now", "why")
        for line in self.table():
            table.add_row(*line, style="dim" if line[3] == "left" else None)
        return table


def patch(
    model: nn.Module, *, attention: bool = True, mlp: bool = True, norm: bool = False, strict: bool = False
) -> Report:
    """Make the model's attention and MLPs fused, in place; parameters, state dict and hooks stay what they are.

    torch.nn's MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer get their counterparts'
    classes; Hugging Face models get attn_implementation="fastattn", in their configuration (another model that
    shares the configuration object shares this); MLPs are known by their parts: Linear, activation, Linear in an
    nn.Sequential, torch's layers, and Hugging Face's plain and gated ones, each tried on an input first. Only
    instances change, no class. An optimiser made before goes on; deepcopy, pickle, torch.save, torch.compile,
    autocast and gradient checkpointing work. Patch before `fully_shard`.

    Args:
        model: any module, on its device.
        attention, mlp: what to swap.
        norm: swap the norms, too: torch.nn's LayerNorm and RMSNorm get their counterparts' classes; modules whose
            class is called ...RMSNorm or ...LayerNorm are tried on an input first. Not by default, for it pays
            where the Triton kernels compute. Elsewhere PyTorch's norms still do, some ten microseconds later (RMS
            norms of half a million elements and more gain on a CPU), and under torch.compile the compiler fuses a
            module's own code anyway. Results are rounded once; Llama's norms also round before the weight.
        strict: raise if anything is left, and leave everything.

    Returns:
        A `Report`: print it. `with fastattn.patch(model): ...` is taken back after the block.

    Raises:
        TypeError: for what is no module.
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
    rows: list[Row] = []
    if attention:
        rows += _swap_huggingface(model)
        rows += [row for name, module in model.named_modules() if (row := _swap_bigbird(name, module))]
        rows += [row for name, module in model.named_modules() if (row := _swap_attention(name, module))]
    if mlp:
        rows += [row for name, module in model.named_modules() if (row := _swap_mlp(name, module))]
    if norm:
        rows += [row for name, module in model.named_modules() if (row := _swap_norm(name, module))]
    report = Report(model, rows)
    if strict and report.left:
        for module, kind, was in before:
            _undo(module, kind, was)
        left = "\n".join(f"  {row.name or '(the model)'}: {row.why}" for row in report.left)
        raise ValueError(f"strict=True, and these would be left as they are:\n{left}")
    return report


def unpatch(model: nn.Module) -> None:
    """Take back what `patch` did to this model, or to the model it is a copy of; else do nothing.

    Raises:
        RuntimeError: if a module's class was changed again since, as `fully_shard` does; nothing is then changed.
    """
    patched = [(name, module) for name, module in model.named_modules() if WAS in module.__dict__]
    changed = [name for name, module in patched if not _is_ours(module)]
    if changed:
        raise RuntimeError(f"the classes of these modules were changed after patch: {', '.join(changed)}")
    for _, module in patched:
        was = module.__dict__.pop(WAS)
        if isinstance(was, type):
            module.__class__ = was
        else:
            was.restore(module)


def _undo(module: nn.Module, kind: type[nn.Module], was: Any) -> None:
    """Make the module again what it was before this call of `patch`."""
    module.__class__ = kind
    if was is None and (new := module.__dict__.pop(WAS, None)) and not isinstance(new, type):
        new.restore(module)


ALREADY = "already patched"
BIGBIRD = "fastattn.integrations.bigbird"


def _is_ours(module: nn.Module) -> bool:
    if not isinstance(module.__dict__[WAS], type):
        return True
    kind, counterparts = type(module), (*_counterparts().values(), *NORMS.values())
    return "own" in kind.__dict__ or kind in counterparts or kind.__module__ == BIGBIRD


def _counterparts() -> dict[type[nn.Module], type[nn.Module]]:
    """torch's classes that attend, and ours: each differs from its torch class in code alone."""
    attending = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return {kind: COUNTERPARTS[kind] for kind in attending}


def _swap_attention(name: str, module: nn.Module) -> Row | None:
    """Swap a torch module that attends for its counterpart; None if it is no such module."""
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
    """Why this instance is not to be changed, whatever its class."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "its weights are on the meta device, without values"
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"its weights are of type {type(parameter).__name__}"
    return None


def _swap_mlp(name: str, module: nn.Module) -> Row | None:
    """Swap a module for one that computes its MLP fused; None if there is no MLP in it."""
    if type(module).__module__.startswith("fastattn.") and WAS not in module.__dict__:
        return None
    if isinstance(module, Form):
        return Row(name, "mlp", _class_name(module), None, ALREADY)
    known = form_of(module)
    if known is None:
        return None
    form, names = known
    if form is mlp_forms.FusedSequential:
        return _swap_sequential(name, module)
    parts = names.read(module)
    assert parts is not None
    was, reason = _class_name(module), obstacle(parts)
    in_training = mlp_forms.dropout_obstacle(parts)
    if "forward" in module.__dict__:
        reason = "its forward was replaced on the instance"
    elif reason == in_training and not is_this_mlp(module, form, names):
        reason = "its own code computes more than this MLP, or something else"
    if reason != in_training:
        return Row(name, "mlp", was, None, reason or "")
    swap(module, fused_class(form, type(module), names))
    return Row(name, "mlp", was, _now(module), _training_note([parts]))


def _swap_sequential(name: str, module: nn.Module) -> Row | None:
    modules = list(module.children())
    candidates = [run for i in range(len(modules)) if (run := mlp_forms.run_at(modules, i))]
    if not candidates:
        return None
    was, good = _class_name(module), mlp_forms.runs(module)
    if type(module) is not nn.Sequential:
        return Row(name, "mlp", was, None, f"{was} is a subclass with code of its own")
    if "forward" in module.__dict__:
        return Row(name, "mlp", was, None, "its forward was replaced on the instance")
    if not good:
        return Row(name, "mlp", was, None, obstacle(candidates[0]) or "")
    swap(module, fused_class(mlp_forms.FusedSequential, type(module), mlp_forms.SEQUENTIAL))
    return Row(name, "mlp", was, _now(module), _training_note(good))


def _now(module: nn.Module) -> str:
    return type(module).__name__


def _class_name(module: nn.Module) -> str:
    return module.__dict__.get(WAS, type(module)).__name__


def _training_note(found: list[mlp_forms.Parts]) -> str:
    """When the module's own code still computes, although swapped."""
    rates = {run.dropout.p for run in found if isinstance(run.dropout, nn.Dropout) and run.dropout.p > 0}
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
            continue  # Its attention modules are swapped one by one.
        was = f"attn_implementation={module.config._attn_implementation!r}"
        reason = ALREADY if WAS in module.__dict__ else huggingface.obstacle(module) or _meta_obstacle(module)
        if reason is None:
            before = huggingface.Before.of(module)
            try:
                module.set_attn_implementation(huggingface.NAME)
            except (ValueError, ImportError) as error:
                before.restore(module)
                reason = str(error)
            else:
                module.__dict__[WAS] = before
        rows.append(Row(name, "attention", was, None if reason else huggingface.NAME, reason or ""))
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
    from fastattn.integrations import bigbird

    was = _class_name(module)
    if was == bigbird.BigBirdAttention.__name__:
        # It computes nothing itself: what attends is a module in it, which it may replace later.
        if _bigbird_obstacle(module.self) is None:
            swap(module, bigbird.FusedBigBirdAttention)
        return None
    reason = _bigbird_obstacle(module)
    if reason:
        return Row(name, "attention", was, None, reason)
    swap(module, bigbird.FUSED[type(module)])
    return Row(name, "attention", was, type(module).__name__)


def _bigbird_obstacle(module: Any) -> str | None:
    """Why this module that attends is left to transformers' code; None if it can be swapped."""
    from fastattn.integrations import bigbird

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
    """Swap a norm for its counterpart of torch's, or for one that computes it fused; None if it is no norm."""
    kind, ours = type(module), module.__dict__.get(WAS)
    by_name = kind.__name__.endswith(("RMSNorm", "LayerNorm")) and not any(True for _ in module.children())
    if not isinstance(module, tuple(NORMS)) and not by_name:
        return None
    was, reason = _class_name(module), _instance_obstacle(module)
    names = None
    if ours is not None:
        reason = ALREADY
    elif kind in NORMS.values():
        reason = "fastattn's own"
    elif isinstance(module, tuple(NORMS)):
        reason = reason or (None if kind in NORMS else f"{was} is a subclass with code of its own")
    elif reason is None and (names := names_of(module)) is None:
        reason = "its own code computes another norm, or something else"
    if reason:
        return Row(name, "norm", was, None, reason)
    swap(module, NORMS[kind] if names is None else fused_class(FusedNorm, kind, names))
    return Row(name, "norm", was, f"fastattn.nn.{kind.__name__}" if names is None else _now(module))
