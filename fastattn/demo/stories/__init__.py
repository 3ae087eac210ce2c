"""Stories: small experiments on models, each with one claim, a table and a picture. `fastattn demo --story NAME`.

A story is a file here and a row in the table below. Its function `tell(stage)` returns the figures that its claim
rests on.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from fastattn.errors import CommandError


class Story(NamedTuple):
    """A name, one sentence, and the module that has the function."""

    name: str
    sentence: str
    module: str

    @property
    def tell(self) -> Callable[[Any], dict[str, float]]:
        """The function: takes a `Stage`, returns figures by name. Imported when it is asked for."""
        return importlib.import_module(f"{__name__}.{self.module}").tell


STORIES = (
    Story(
        "induction",
        "Two layers of attention learn all at once to copy what repeats; one layer cannot.",
        "induction",
    ),
    Story(
        "positional-shortcut",
        "A head in layer 0 scores high in induction without any: all its texts repeat with one period.",
        "positional_shortcut",
    ),
    Story(
        "displaced-circuit",
        "Two texts read word by word in turn are copied without an induction head; the lag profile shows how.",
        "displaced_circuit",
    ),
    Story(
        "zero-positions",
        "An encoder whose learned positions start at zero sees a set, until training teaches it the order.",
        "zero_positions",
    ),
    Story(
        "in-context-regression",
        "A transformer fits a line from examples in its context; its error follows least squares, from above.",
        "in_context_regression",
    ),
    Story(
        "neuron",
        "The neuron of a text model that writes the space, found by what it adds, confirmed by taking it out.",
        "neuron",
    ),
    Story(
        "causal-trace",
        "A trace finds the one place where a small model can look its facts up, and ablation agrees.",
        "causal_trace",
    ),
    Story(
        "logit-lens",
        "The answer that induction finds can be read from the stream after the last layer, and not before.",
        "logit_lens",
    ),
    Story(
        "smollm2",
        "In a real model: induction heads, a fact traced and read layer by layer, neurons, and an exact sum.",
        "smollm2",
    ),
)


def find(name: str) -> Story:
    """The story of this name.

    Raises:
        CommandError: there is none.
    """
    for story in STORIES:
        if story.name == name:
            return story
    raise CommandError(f"--story must be one of {', '.join(story.name for story in STORIES)}; got {name!r}")


def listing() -> str:
    """A line for each story."""
    width = max(len(story.name) for story in STORIES)
    return "\n".join(f"{story.name:{width}}  {story.sentence}" for story in STORIES)


def run(options: argparse.Namespace) -> int:
    """Tell one story; returns the exit status."""
    from fastattn.demo.stories.stage import Stage

    story = find(options.story)
    stage = Stage.prepare(options)
    with stage.open(story.name, story.sentence):
        story.tell(stage)
    return 0
