"""From a report to one HTML page that needs nothing else: no network, no font and no script from elsewhere.

The page is page.html with one JSON object in it. Small numbers stand there as they are. Long arrays are quantised,
deflated and written in base64, so that 4,096 tokens stay below 5 MB:

    float32                         logit lens, lag profiles (in bins that grow with the lag), sources
    16 bits, the square root        received weight: it may be 0.001 or the number of tokens, and the square root
                                    keeps what is small
    8 bits                          the weights of top keys, from 0 to 1, to 1/255
    16 bits                         positions of top keys
    32 bits                         token ids

Top keys and received weight are by far the largest, tokens x heads: fewer keys of a query are told, and then fewer
heads, until the page is small enough.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from importlib import resources
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.lens import LogitLens, Neurons
from fastattn.looking.report import TOP_KEYS, Heads, Report

LARGEST_PAGE = 5_000_000  # bytes
MOST_TOKENS = 4096
ABOUT_DETAIL = 200  # bytes of what stands around the layers
NO_KEY = 2**16 - 1
EXACT_LAGS, BINS_PER_OCTAVE = 32, 8
# How many keys of a query are told, and of which share of the heads, from the best to what always fits.
DETAILS = ((TOP_KEYS, 1.0), (4, 1.0), (2, 1.0), (1, 1.0), (2, 0.5), (2, 0.25), (2, 0.125), (1, 0.03), (0, 0.0))


def make_page(report: Report, limit: int = LARGEST_PAGE) -> str:
    """The whole page, of at most `limit` bytes if it can be, with as much detail as fits."""
    template = (resources.files("fastattn.looking") / "page.html").read_text(encoding="utf-8")
    page = template.replace("{{title}}", _escaped(report.title))
    contents = _contents(report)
    left = limit - len(page.encode()) - len(_written(contents))
    tries = (_detail(report.heads, top, share, left) for top, share in DETAILS)
    contents["detail"] = next(detail for detail in tries if detail is not None)
    return page.replace("{{data}}", _written(contents))


def _written(contents: Any) -> str:
    """As JSON that may stand in a script element, which a "<" could end."""
    return json.dumps(contents, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")


def _contents(report: Report) -> dict[str, Any]:
    """All but the detail of heads."""
    heads, tokens = report.heads, report.tokens
    lens, found = report.lens, report.attribution
    ids = (
        set(tokens.tolist())
        | (set() if report.target is None else {report.target})
        | (set() if lens is None else set(lens.tokens.flatten().tolist()))
    )
    bins = lag_bins(tokens.shape[0], bool(heads.lag_profile[..., : tokens.shape[0] - 1].any()))
    return {
        "title": report.title,
        "family": report.family,
        "cut": report.cut,
        "tokens": packed(tokens, "u32"),
        "target": report.target,
        "words": {str(i): _word(report, i) for i in sorted(ids)},
        "scores": {name.replace("_", " "): _plain(values) for name, values in heads.scores.items()},
        "chance": {name.replace("_", " "): value for name, value in heads.chance.items() if not math.isnan(value)},
        "lags": {"bins": bins, "weights": packed(binned(heads.lag_profile, bins), "f32")},
        "lens": None if lens is None else _lens(lens),
        "attribution": None if found is None else _attribution(report),
        "neurons": None if report.neurons is None else _neurons(report.neurons),
        "missing": report.missing,
    }


def lag_bins(length: int, ahead: bool) -> list[tuple[int, int]]:
    """Ranges of lags, both ends within: one by one up to `EXACT_LAGS`, then ever wider; negative if `ahead`."""
    edges = list(range(min(EXACT_LAGS, length)))
    while edges[-1] + 1 < length:
        edges.append(min(length - 1, max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / BINS_PER_OCTAVE)))))
    bins = [(0, 0), *((before + 1, edge) for before, edge in pairwise(edges))]
    return [(-to, -start) for start, to in reversed(bins[1:])] + bins if ahead else bins


def binned(profile: Tensor, bins: list[tuple[int, int]]) -> Tensor:
    """A lag profile (Y, H, 2 L - 1) summed over ranges of lags: (Y, H, bins)."""
    zero = profile.shape[-1] // 2
    return torch.stack([profile[..., zero + start : zero + to + 1].sum(-1) for start, to in bins], -1)


def _detail(heads: Heads, top: int, share: float, limit: int) -> dict[str, Any] | None:
    """What is told of single tokens: by layer, for the chosen heads (n), received weight and top keys.

    None if it takes more than `limit` bytes; nothing at all (`top` 0) always fits.
    """
    top = min(top, heads.keys.shape[-1])
    chosen = _chosen(heads, share)
    layers: list[dict[str, Any]] = []
    for layer, numbers in enumerate(chosen):
        received = heads.received[layer, numbers]
        keys, weights = heads.keys[layer, numbers, :, :top], heads.weights[layer, numbers, :, :top]
        layers.append(
            {
                "heads": numbers,
                "received": packed(received, "u16", scale=received.amax(-1, keepdim=True), power=2),
                "keys": packed(torch.where(keys < 0, NO_KEY, keys), "u16"),
                "weights": packed(weights, "u8", scale=torch.ones(1)),
            }
        )
        limit -= len(_written(layers[-1])) + len(", ")
        if limit < ABOUT_DETAIL and top > 0:
            return None
    return {"top": top, "all": share == 1, "layers": layers}


def _chosen(heads: Heads, share: float) -> list[list[int]]:
    """For each layer the numbers of the heads that are told in detail: those that score highest at something."""
    named = ("induction", "previous_token", "duplicate_token")
    best = torch.stack([heads.scores[name].nan_to_num() for name in named]).amax(0)
    layers, count = best.shape
    kept = best.flatten().argsort(descending=True, stable=True)[: math.ceil(share * layers * count)]
    return [sorted((kept[kept // count == layer] % count).tolist()) for layer in range(layers)]


def packed(values: Tensor, kind: str, scale: Tensor | None = None, power: int = 1) -> dict[str, Any]:
    """An array as the page has it.

    Args:
        values: of any shape.
        kind: "f32", "u32", "u16" or "u8".
        scale: for numbers that are no integers, the largest value: one, or one for each entry of the first
            dimension. An integer n then stands for scale * (n / largest integer) ** power.
    """
    values = values.detach().cpu()
    about: dict[str, Any] = {"kind": kind, "shape": list(values.shape)}
    if scale is not None:
        scale = scale.detach().cpu().double()
        about |= {"scale": scale.flatten().tolist(), "power": power}
        share = (values.double() / scale.clamp(min=1e-300)).clamp(0, 1) ** (1 / power)
        values = (share * (2 ** int(kind[1:]) - 1)).round()
    dtype = {"f32": torch.float32, "u32": torch.int32, "u16": torch.uint16, "u8": torch.uint8}[kind]
    raw = values.to(torch.int64 if kind[0] == "u" else torch.float64).to(dtype).contiguous().numpy()
    data = zlib.compress(raw.astype(raw.dtype.newbyteorder("<")).tobytes())
    return {**about, "data": base64.b64encode(data).decode("ascii")}


def _lens(lens: LogitLens) -> dict[str, Any]:
    assert lens.target_rank is not None and lens.target_probability is not None
    return {
        "positions": lens.positions.tolist(),
        "tokens": packed(lens.tokens[:, 0], "u32"),
        "probabilities": packed(lens.probabilities[:, 0], "f32"),
        "entropy": packed(lens.entropy[:, 0], "f32"),
        "kl": packed(lens.kl[:, 0], "f32"),
        "rank": packed(lens.target_rank[:, 0], "u32"),
        "probability": packed(lens.target_probability[:, 0], "f32"),
    }


def _attribution(report: Report) -> dict[str, Any]:
    found = report.attribution
    assert found is not None
    return {
        "target": _word(report, int(found.target[0])),
        "against": None if found.against is None else _word(report, int(found.against[0])),
        "total": float(found.total[0]),
        "components": {name: float(value[0]) for name, value in found.components.items()},
        "heads": _plain(found.heads[..., 0]),
        "sources": {name: packed(values, "f32") for name, values in report.sources.items()},
    }


def _neurons(found: Neurons) -> list[dict[str, Any]]:
    """The neurons that add most to the target's logit, and the positions where they do."""
    return [
        {
            "name": f"L{n.layer}N{n.neuron}",
            "congruence": n.congruence,
            "mean": n.mean,
            "fires": [[f.position, f.contribution] for f in n.fires or ()],
        }
        for n in found.top
    ]


def _plain(values: Tensor) -> Any:
    """Numbers of six digits as nested lists; NaN is None."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if math.isnan(value) else float(f"{value:.6g}")

    return plain(values.tolist())


def _word(report: Report, token: int) -> str:
    """A token as it reads behind another one, with its space if it has one; a number without a tokenizer."""
    tokenizer = report.words.tokenizer
    if tokenizer is None:
        return str(token)
    # Alone, tokens of SentencePiece lose their space, and word pieces do not say whether they begin a word.
    other = int(report.tokens[len(report.tokens) // 2])
    before, both = tokenizer.decode([other]), tokenizer.decode([other, token])
    return both.removeprefix(before) if both.startswith(before) and both != before else tokenizer.decode([token])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
