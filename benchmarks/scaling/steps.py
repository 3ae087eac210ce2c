"""A training step: attention by a method, and all the rest, on GPUs that share one sequence and all weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaling.models import Model
from fastattn.distributed import layout
from fastattn.distributed.prediction import BACKWARD, TRAINING, Cost, Machine, Pairs, Sizes, pairs, predict
from fastattn.distributed.visibility import Visibility, whole_mask

HALF = 2  # bytes of a value of bf16
# Of a weight: itself and its gradient in bf16, and in float32 itself and Adam's two averages.
STATE_BYTES = 16


@dataclass(frozen=True)
class Cluster:
    """Figures of a machine file. machine: what attention needs to know. products: flop a second of matrix
    products. memory: bytes of a GPU."""

    machine: Machine
    products: float
    memory: float


def cluster(file: Path, link: str) -> Cluster:
    """The machine of a file, with the link of this name between its nodes. "nvlink" between nodes means that all
    GPUs are one node."""
    try:
        given = json.loads(file.read_text())
    except json.JSONDecodeError as problem:
        raise ValueError(f"--machine {file} is no JSON: {problem}") from problem
    links: dict[str, dict[str, float]] = given["links"]
    if link not in links:
        raise ValueError(f"--link must be one of {', '.join(links)}, got {link!r}")
    near, far = links["nvlink"], links[link]
    machine = Machine(
        float(given["attention"]), far["link"], far["latency"], given["node"], near["link"], near["latency"]
    )
    return Cluster(machine, float(given["products"]), float(given["memory"]))


@dataclass(frozen=True)
class Step:
    """What is predicted of one step.

    seconds: of the whole step. attention: of that, all layers' attention. exposed: seconds in which a GPU neither
    computes attention nor anything else, since it waits for others.
    memory: bytes of the GPU that holds most.
    """

    gpus: int
    method: str
    seconds: float
    attention: float
    exposed: float
    memory: float
    fits: bool


@dataclass(frozen=True)
class Training:
    """model, length and mask: what is trained. checkpoint: layers are computed again in the backward.
    gradient_element: bytes per element of the gradients of keys and values that travel."""

    model: Model
    length: int
    mask: dict[str, Any]
    checkpoint: bool = True
    gradient_element: int = HALF

    @property
    def sizes(self) -> Sizes:
        m = self.model
        return Sizes(1, m.heads, m.key_heads, m.head_width, m.head_width, HALF, self.gradient_element)

    @property
    def passes(self) -> tuple[float, ...]:
        return (1.0, 1.0, BACKWARD) if self.checkpoint else TRAINING

    def seen(self, ranks: int) -> Pairs:
        """The mask's granules, of one layer, by ranks."""
        length, heads = self.length, self.model.heads
        plan = layout(length, ranks, heads=heads, **self.mask)
        left, right = self.mask.get("window") or (None, None)
        right = 0 if self.mask.get("causal") else right
        lowered = whole_mask((1, heads, length, length, "cpu"), (left, right), self.mask.get("mask"))
        return pairs(Visibility(lowered), plan.owners, ranks)

    def steps(self, gpus: int, cluster: Cluster) -> Iterator[Step]:
        """The step by each method that can serve on so many GPUs; of rings x heads the fastest way."""
        seen, tokens = self.seen(gpus), self.length / gpus

        def cost(method: str, rings: int = 1) -> Cost:
            return predict(method, seen, self.sizes, cluster.machine, tokens, rings=rings, passes=self.passes)

        yield self._step(gpus, "ring", cost("ring"), cluster)
        yield self._step(gpus, "gather", cost("gather"), cluster)
        if self._shares(gpus):
            yield self._step(gpus, "heads", cost("heads"), cluster)
        both = [n for n in (2, 4, 8, 16, 32) if n < gpus and gpus % n == 0 and self._shares(n)]
        found = [(f"ring {gpus // n} x heads {n}", cost("ring x heads", gpus // n)) for n in both]
        if found:
            name, least = min(found, key=lambda named: named[1].seconds)
            yield self._step(gpus, name, least, cluster)

    def _shares(self, ranks: int) -> bool:
        """Whether so many ranks can share the heads."""
        m = self.model
        return m.heads % ranks == 0 and (m.key_heads % ranks == 0 or ranks % m.key_heads == 0)

    def _step(self, gpus: int, method: str, attention: Cost, cluster: Cluster) -> Step:
        m, tokens = self.model, self.length / gpus
        # A forward multiplies each token by each weight, two operations; a backward takes twice that.
        times = 2 * (len(self.passes) - 1) + 4
        rest = times * tokens * m.products / cluster.products
        layers = m.layers * attention.seconds
        # Weights are spread over all GPUs: gathered in each pass, their gradients summed once.
        moved = (len(self.passes) + 1) * HALF * m.weights * (gpus - 1) / gpus / cluster.machine.link
        late = max(0.0, moved - rest - m.layers * attention.computing)
        return Step(
            gpus, method, rest + layers + late, layers, m.layers * attention.exposed + late,
            memory := self._memory(gpus, attention), memory <= cluster.memory,
        )  # fmt: skip

    def _memory(self, gpus: int, attention: Cost) -> float:
        m, tokens = self.model, self.length / gpus
        gathered = 2 * HALF * m.layer_weights  # this layer's and the next one's
        kept = m.layers * m.width + m.layer_values if self.checkpoint else m.layers * m.layer_values
        return STATE_BYTES * m.weights / gpus + gathered + HALF * tokens * kept + attention.memory
