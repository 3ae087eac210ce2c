"""A causal trace finds the one place where a small model can look its facts up, and ablation agrees.

Meng et al., Locating and Editing Factual Associations in GPT (2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.demo.stories.stage import Stage
from fastattn.lens import CausalTrace, adapt, causal_trace, patch_activations
from fastattn.nn import TransformerModel

STEPS, PROMPTS, SAMPLES, BATCH = 1000, 8, 8, 256
LAYERS, WIDTH, WINDOW = 2, 64, 2
# The vocabulary: a start, "is", relations, first names, last names, objects.
RELATIONS, NAMES, OBJECTS = 4, 8, 8
START, IS, RELATION = 0, 1, 2
FIRST = RELATION + RELATIONS
LAST = FIRST + NAMES
OBJECT = LAST + NAMES
VOCABULARY = OBJECT + OBJECTS
SUBJECT, END = (2, 3), 4  # positions of the first and the last name, and of "is"
LABELS = ("start", "relation", "first name", "last name", '"is"')


def tell(stage: Stage) -> dict[str, float]:
    facts = RELATIONS * NAMES * NAMES
    stage.say(f"""
        A model of two layers is taught {facts} facts, such as "capital-of Anna Berg is Xyz". It takes all three
        words to know the object: no two of them tell it. We build the model so that
        we know where it must look a fact up. Attention only gathers: it weighs all that it sees evenly, and a
        token sees {WINDOW + 1} tokens. So the last name sees all three words, and "is" sees only the two names.
        The MLP of layer 1 adds nothing. What is left is the MLP of layer 0 at the last name; attention of layer
        1 must bring the answer to "is". Does the trace find this? We add noise to the two names, put one clean
        state back at a time, and see where the answer returns.
    """)
    model = _model(stage)
    objects = _facts(stage.generator(1))

    def loss(generator: torch.Generator) -> Tensor:
        prompts, answers = (t.to(stage.device) for t in _batch(objects, generator))
        return F.cross_entropy(model(prompts)[:, END], answers)

    stage.train(model, STEPS, loss)
    prompts, answers = (t.to(stage.device) for t in _batch(objects, stage.generator(2)))
    known = _probability(model, prompts, answers)
    traces = _traces(stage, model, prompts[: stage.how_many(PROMPTS, 2)], answers)
    mean = {kind: torch.stack([t.restored[kind] for t in traces]).mean(0).cpu() for kind in traces[0].restored}
    clean = sum(t.clean for t in traces) / len(traces)
    noised = sum(t.noised for t in traces) / len(traces)
    stage.table(
        ("put back clean", *LABELS),
        [
            (f"{name} of layer {layer}", *(f"{p:.2f}" for p in mean[kind][layer].tolist()))
            for name, kind in (("MLP", "mlp.out"), ("attention", "attention.out"))
            for layer in range(LAYERS)
        ],
    )
    without = _without_mlps(model, prompts, answers)
    stage.table(
        ("no MLP at", "probability of the answer"),
        [("(all there)", f"{known:.2f}"), *((LABELS[i], f"{p:.2f}") for i, p in enumerate(without))],
    )
    elsewhere = [i for i in range(len(LABELS)) if i != SUBJECT[1]]
    at_subject, at_others = (float(mean["mlp.out"][0, i].max()) for i in (SUBJECT[1], elsewhere))
    brought = float(mean["attention.out"][1, END])
    stage.say(f"""
        The model gives the right answer a probability of {known:.2f}. In the traced prompts noise brings it from
        {clean:.2f} to {noised:.2f}. The MLP of layer 0, clean again at the last name, brings it to
        {at_subject:.2f}; the MLPs at other places bring it to {at_others:.2f} at most. Attention of layer 1,
        clean again at "is", brings it to {brought:.2f}. Ablation agrees: without the MLPs at the last name the
        probability is {without[SUBJECT[1]]:.2f}, without those at another place at least
        {min(without[i] for i in elsewhere):.2f}. The trace has found the place.
    """)
    shown = CausalTrace(**{**vars(traces[0]), "restored": mean}).plot()
    shown.axes[0].set_yticks(range(len(LABELS)), [f"{s}{'*' * (i in SUBJECT)}" for i, s in enumerate(LABELS)])
    shown.suptitle(f"Probability of the answer, mean of {len(traces)} facts (* noised)", fontsize=10)
    stage.picture(shown, "story_causal_trace")
    return {
        "known": known,
        "clean": clean,
        "noised": noised,
        "MLP at the subject": at_subject,
        "MLP elsewhere, at most": at_others,
        "attention at the end": brought,
        "without MLPs at the subject": without[SUBJECT[1]],
        "without MLPs elsewhere, at least": min(without[i] for i in elsewhere),
    }


def _model(stage: Stage) -> TransformerModel:
    """Attention of even weights, and an MLP that adds something in layer 0 only."""
    torch.manual_seed(stage.seed)
    model = TransformerModel(
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        num_heads=4,
        num_layers=LAYERS,
        max_length=len(LABELS),
        window=(WINDOW, 0),
        tied=False,
        embedding_std=1.0,
        backend=stage.backend,
    ).to(stage.device)
    parts = adapt(model)
    with torch.no_grad():
        for layer in range(LAYERS):
            for parameter in parts.part("q", layer).parameters():  # queries, keys and values in one
                # Queries and keys. They stay zero: the gradient of each is a multiple of the other.
                parameter[: 2 * WIDTH] = 0
    for parameter in parts.part("down", LAYERS - 1).parameters():
        nn.init.zeros_(parameter.requires_grad_(False))
    return model


def _facts(generator: torch.Generator) -> Tensor:
    """The object of each (relation, first name, last name): each word has a number, and the sum tells."""
    numbers = (torch.randperm(OBJECTS, generator=generator)[:n] for n in (RELATIONS, NAMES, NAMES))
    relation, first, last = numbers
    return (relation[:, None, None] + first[:, None] + last) % OBJECTS


def _batch(objects: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts (BATCH, 5) and the tokens of their answers (BATCH,)."""
    relation = torch.randint(RELATIONS, (BATCH,), generator=generator)
    first, last = torch.randint(NAMES, (2, BATCH), generator=generator)
    answers = OBJECT + objects[relation, first, last]
    start, end = torch.full_like(relation, START), torch.full_like(relation, IS)
    return torch.stack([start, RELATION + relation, FIRST + first, LAST + last, end], 1), answers


def _traces(stage: Stage, model: TransformerModel, prompts: Tensor, answers: Tensor) -> list[CausalTrace]:
    traces = []
    with stage.screen.progress("tracing", len(prompts)) as advance:
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=False)):
            options = {"samples": stage.how_many(SAMPLES, 2), "window": 1}
            traces.append(causal_trace(model, prompt[None], subject=SUBJECT, target=answer, **options))  # type: ignore[arg-type]
            advance(number + 1, "")
    return traces


@torch.no_grad()
def _probability(model: TransformerModel, prompts: Tensor, answers: Tensor) -> float:
    """Of the right answer after "is", on average."""
    return model(prompts)[:, END].softmax(-1).gather(1, answers[:, None]).mean().item()


def _without_mlps(model: TransformerModel, prompts: Tensor, answers: Tensor) -> list[float]:
    """The right answer's probability if at one position no MLP adds anything, for each position."""
    found = []
    for position in range(prompts.shape[1]):
        nothing = {f"blocks.{layer}.mlp.out.at({position})": torch.zeros(WIDTH) for layer in range(LAYERS)}
        with patch_activations(model, nothing):
            found.append(_probability(model, prompts, answers))
    return found
