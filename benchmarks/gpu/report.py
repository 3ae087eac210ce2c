"""report.md and its plots, from results.json alone."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
FLOORS = ("plain GEMMs",)
MOST_NAMES = 8  # of cases that were not reached


def write_report(folder: Path, *, plots: bool = True) -> None:
    """Write report.md, and PNG plots if matplotlib is installed; where results are missing a sentence says so."""
    results = json.loads((folder / "results.json").read_text())
    pictures = _plots(results, folder) if plots else []
    parts = [
        _verdict(results),
        _head(results),
        _proofs(results),
        _record(results),
        _glance(results["speed"]),
        _sections(results),
        _compilations(results.get("compilations")),
        _suite(results["suite"]),
        _sanitizer(results.get("sanitizer", [])),
        _correctness(results["correctness"]),
        _ceilings(results["ceilings"]),
        _attention(results, pictures),
        _mlp(results, pictures),
        _features(results),
        _tokens(results),
        _small_calls(results["small_calls"]),
        _sweep(results),
    ]
    draft = folder / "report.md.part"
    draft.write_text("\n\n".join(part for part in parts if part) + "\n")
    draft.replace(folder / "report.md")


def table(headings: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    rows = [list(headings), *([("" if cell is None else str(cell)) for cell in line] for line in lines)]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([text[0], "|" + "---|" * len(rows[0]), *text[1:]])


# ---- the parts ----


def _verdict(results: dict[str, Any]) -> str:
    """The first line says what this run proves; then everything that failed or was not run."""
    verdict = results.get("verdict") or {"line": "INCOMPLETE: the run was cut off.", "failures": [], "missing": []}
    text = f"**{verdict['line']}**"
    for title, sentences in (("Failed", verdict["failures"]), ("Not run to its end", verdict["missing"])):
        if sentences:
            text += f"\n\n<details><summary>{title}: {len(sentences)}</summary>\n\n"
            text += "\n".join(f"- {sentence}" for sentence in sentences) + "\n</details>"
    return text


def _proofs(results: dict[str, Any]) -> str:
    """How much of each family is proven; every record is in results.json."""
    proofs = results.get("proofs") or []
    text = "## What is proven\n\n"
    if not proofs:
        return text + "Nothing."
    complete = "Every kernel test ran and passed." if results["proven"] else (
        "The kernels as a whole are not proven: that takes every case and every kernel test, run and passed."
    )  # fmt: skip
    text += f"{complete} A combination of kind, dtype and width is proven if its case passed.\n\n"
    lines = []
    for family in dict.fromkeys(proof["family"] for proof in proofs):
        mine = [proof for proof in proofs if proof["family"] == family]
        states = Counter(proof["state"] for proof in mine)
        bad = [f"{p['kind']} {p['dtype']} {p['width']}" for p in mine if p["state"] in ("failed", "incomplete")]
        tests = results["suite"].get("families", {}).get(family, {})
        said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(tests.items()))
        lines.append((family, ", ".join(f"{n} {s}" for s, n in states.items()), "; ".join(bad), said))
    return text + table(("family", "combinations", "failed or incomplete", "tests"), lines)


def _record(results: dict[str, Any]) -> str:
    """The proof record: a line for each family, direction and kind, over all dtypes, widths and sizes."""
    rows = results.get("record") or []
    if not rows or results["dry_run"]:
        return ""
    groups: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["family"], row["direction"], row["kind"]), []).append(row)
    lines = []
    for names, members in groups.items():
        ratios = sorted(row["ratio"] for row in members if row["ratio"] is not None)
        range_ = f"{ratios[0]:.2g} to {ratios[-1]:.2g}" if ratios else None
        counts = Counter(row["verdict"] for row in members)
        lines.append((*names, ", ".join(f"{n} {verdict}" for verdict, n in counts.items()), range_))
    headings = ("family", "direction", "kind", "dtypes, widths and sizes", "times as fast")
    return (
        "## Proof record\n\nWhat serves by default on this GPU once record.json lies in fastattn/proofs. `times as"
        " fast` compares with what would serve otherwise, host time included.\n\n" + table(headings, lines)
    )


def _compilations(counted: dict[str, Any] | None) -> str:
    if not counted:
        return ""
    return (
        f"Compiled: {counted['compiled']} kernels ({counted['different']} different ones) in"
        f" {counted['seconds']:.0f} s of processor time; {counted['from_cache']} came from the cache on disk."
    )


def _head(results: dict[str, Any]) -> str:
    where = results["environment"]
    title = f"# {where['device']}, {where['date']}"
    facts = [f"{name} {value}" for name, value in where.items() if value and name not in ("device", "date")]
    text = f"{title}\n\n{', '.join(facts)}."
    if results["dry_run"]:
        text += "\n\n**A rehearsal on a pretended GPU: everything was launched, nothing was computed or timed.**"
    if results.get("only"):
        text += f"\n\nOnly these families were run: {', '.join(results['only'])}."
    if results.get("absent"):
        text += f"\n\nNot installed here, so not compared: {', '.join(results['absent'])}."
    return text + (
        "\n\nHow a figure was made and in which order to read the tables: benchmarks/README.md. Times are medians"
        " of interleaved rounds; `x best` is the best peer's time divided by ours: above 1 we are faster."
    )


def _glance(rows: Rows) -> str:
    """One line for each family and direction."""
    lines = []
    kinds = sorted({(row["problem"]["family"], row["direction"]) for row in rows})
    for family, direction in kinds:
        ours = [
            row
            for row in rows
            if (row["problem"]["family"], row["direction"]) == (family, direction)
            and row["peer"].startswith("fastattn")
            and row["ratio"]
        ]
        if not ours:
            continue
        mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in ours))
        best, worst = (pick(ours, key=lambda row: row["ratio"]) for pick in (max, min))
        ahead = f"{sum(row['ratio'] > 1 for row in ours)} of {len(ours)}"
        ends = [f"{row['ratio']:.2f} ({row['label']})" for row in (best, worst)]
        lines.append((f"{family}, {direction}", ahead, f"{mean:.2f}", *ends))
    if not lines:
        return ""
    return "## At a glance\n\n" + table(("", "ahead", "x best, geometric mean", "best", "worst"), lines)


def _sections(results: dict[str, Any]) -> str:
    lines = [
        (s["title"], f"{s['reached']} of {s['planned']}", f"{s['seconds']:.0f} s",
         ", ".join(f"{name} {cost:g} s" for name, cost in s.get("costs", {}).items()))
        for s in results["sections"]
    ]  # fmt: skip
    text = "## What was reached\n\n" + table(("section", "cases", "time", "a case"), lines)
    for section in results["sections"]:
        if section["left_out"]:
            first, more = section["left_out"][:MOST_NAMES], len(section["left_out"]) - MOST_NAMES
            names = "; ".join(first) + (f"; and {more} more" if more > 0 else "")
            text += f"\n\nNot reached in *{section['title']}*: {names}."
    return text


def _sanitizer(rows: Rows) -> str:
    if not rows:
        return ""
    lines = [(row["tool"], row["verdict"], f"{row['seconds']:.0f} s") for row in rows]
    return "## compute-sanitizer\n\nA small selection of calls.\n\n" + table(("tool", "verdict", "time"), lines)


def _suite(suite: dict[str, Any]) -> str:
    if not suite:
        return "## Test suite\n\nDid not run."
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(suite["counts"].items())) or "no outcomes"
    text = f"## Test suite\n\n{counts}, {suite.get('seconds', 0):.0f} s."
    if suite.get("skipped"):
        text += "\n\nSkipped: " + "; ".join(f"{n} x {reason}" for reason, n in suite["skipped"].items()) + "."
    for failure in suite["failures"]:
        text += f"\n\n<details><summary>{failure['test']}</summary>\n\n```\n{failure['text']}\n```\n</details>"
    for title, names in (("More failures", suite.get("more_failures")), ("Never ended", suite.get("unfinished"))):
        if names:
            text += f"\n\n{title}: " + ", ".join(f"`{name}`" for name in names) + "."
    return text


def _correctness(rows: Rows) -> str:
    if not rows:
        return "## Correctness at real sizes\n\nNot reached."
    passed = sum(row["verdict"] == "passed" for row in rows)
    text = (
        "## Correctness at real sizes\n\nError against float64, ours and eager PyTorch's in the same dtype;"
        f" allowed is twice eager's. {passed} of {len(rows)} quantities passed.\n\n"
    )
    lines = [
        (
            row["label"],
            row["quantity"],
            *(f"{row[key]:.1e}" if key in row else None for key in (
                "max_error", "eager_max_error", "mean_error", "eager_mean_error")),
            row["verdict"],
        )
        for row in rows
    ]  # fmt: skip
    return text + table(("problem", "", "max", "eager max", "mean", "eager mean", "verdict"), lines)


def _ceilings(ceilings: dict[str, Any]) -> str:
    if "matmul_tflops" not in ceilings:
        return f"## Ceilings of the device\n\nNot measured. {ceilings.get('note', '')}"
    c = ceilings
    return (
        "## Ceilings of the device\n\n"
        f"A bf16 matrix product of {c['matmul_side']}^3: {c['matmul_tflops']:.4g} TFLOP/s"
        f" (spread {c['matmul_spread']:.1%}). A copy of {c['copy_bytes'] / 2**20:.0f} MiB:"
        f" {c['copy_tbytes_per_second']:.3g} TB/s read and written (spread {c['copy_spread']:.1%})."
    )


def _attention(results: dict[str, Any], plots: list[str]) -> str:
    rows = [row for row in results["speed"] if row["problem"]["family"] == "attention"]
    if not rows:
        return "## Attention\n\nNot reached."
    text = "## Attention\n\nTFLOP/s over visible scores (causal counts half).\n"
    text += _pictures(plots, "attention")

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        problem = row["problem"]
        mask = "causal" if problem["causal"] else "full"
        return problem["width"], mask, row["direction"], f"D={problem['width']}, {mask}, {row['direction']}"

    return text + _grouped(rows, group, "length", results["ceilings"])


def _mlp(results: dict[str, Any], plots: list[str]) -> str:
    rows = [row for row in results["speed"] if row["problem"]["family"] == "mlp"]
    if not rows:
        return "## MLP\n\nNot reached."
    text = (
        "## MLP\n\nTFLOP/s of the plain products. `plain GEMMs` is the floor: those products and nothing else;"
        " `of floor` is its time over ours.\n"
    )
    text += _pictures(plots, "mlp")

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        form = "gated" if row["problem"]["gated"] else "plain"
        return form, row["direction"], f"{form}, {row['direction']}"

    return text + _grouped(rows, group, "width", results["ceilings"])


def _grouped(rows: Rows, group: Callable[[dict[str, Any]], tuple], size: str, ceilings: dict[str, Any]) -> str:
    """A table for each group, a line for each size, a column for each peer; then what the notes say."""
    text = ""
    for name in sorted({group(row) for row in rows}):
        members = [row for row in rows if group(row) == name]
        peers = list(dict.fromkeys(row["peer"] for row in members if row["seconds"]))
        headings = (size, *peers, "x best", "of floor", "of matmul", "spread", "peak MiB: ours", "best peer's")
        floor = any(row["peer"] in FLOORS for row in members)
        lines = []
        for value in sorted({row["problem"][size] for row in members}):
            by_peer = {row["peer"]: row for row in members if row["problem"][size] == value}
            rates = [
                f"{by_peer[p]['tflops']:.3g}" if p in by_peer and by_peer[p]["seconds"] else None for p in peers
            ]
            lines.append((value, *rates, *_ours(by_peer, ceilings)))
        if not floor:
            headings, lines = _without("of floor", headings, lines)
        text += f"\n\n### {name[-1]}\n\n" + table(headings, lines)
        notes = {}
        for row in members:
            if row["note"]:
                notes.setdefault((row["peer"], row["note"]), []).append(str(row["problem"][size]))
        for (peer, note), sizes in notes.items():
            text += f"\n\n{peer} at {', '.join(sizes)}: {note}"
    return text


def _ours(by_peer: dict[str, dict[str, Any]], ceilings: dict[str, Any]) -> tuple[str | None, ...]:
    """The cells about ourselves: ratios, spread, memory."""
    ours = next((row for peer, row in by_peer.items() if peer.startswith("fastattn") and row["seconds"]), None)
    if ours is None:
        return (None,) * 6
    best = next((row for row in by_peer.values() if row["ratio"] == 1.0 and row is not ours), None)
    floor = next((row["seconds"] for peer, row in by_peer.items() if peer in FLOORS), None)
    matmul = ceilings.get("matmul_tflops")
    return (
        None if ours["ratio"] is None else f"{ours['ratio']:.2f}",
        f"{floor / ours['seconds']:.0%}" if floor else None,
        None if not matmul else f"{ours['tflops'] / matmul:.0%}",
        f"{ours['spread']:.1%}",
        _mebibytes(ours),
        _mebibytes(best) if best else None,
    )


def _mebibytes(row: dict[str, Any]) -> str | None:
    return None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.3g}"


def _without(heading: str, headings: tuple[str, ...], lines: list[tuple]) -> tuple[tuple[str, ...], list[tuple]]:
    """A table without one of its columns."""
    gone = headings.index(heading)
    return tuple(h for i, h in enumerate(headings) if i != gone), [
        tuple(cell for i, cell in enumerate(line) if i != gone) for line in lines
    ]


def _features(results: dict[str, Any]) -> str:
    """A line for each call and direction: ours, and every peer's time divided by ours, the fastest first."""
    rows = [row for row in results["features"] if row["problem"]["family"] != "cache"]
    if not rows:
        return "## Masks, scores, packed sequences, norms and heads\n\nNot reached."
    return (
        "## Masks, scores, packed sequences, norms and heads\n\nA peer's time divided by ours: above 1 we are"
        " faster. A library that is not named lacks the feature.\n\n" + _against_ours(rows, 1e3, "ms")
    )


def _tokens(results: dict[str, Any]) -> str:
    """A line for each cache: the time of one token for each row, against what memory needs for its keys and
    values."""
    rows = [row for row in results["features"] if row["problem"]["family"] == "cache"]
    title = "## One token from a cache"
    if not rows:
        return f"{title}\n\nNot reached."
    bandwidth = results["ceilings"].get("copy_tbytes_per_second")
    lines, notes = [], _notes(rows)
    for label in dict.fromkeys(row["label"] for row in rows):
        here = [row for row in rows if row["label"] == label]
        ours = next((row for row in here if row["peer"].startswith("fastattn")), None)
        if ours is None or not ours["seconds"]:
            lines.append((label, "launched" if ours and ours.get("launched") else None, *(None,) * 5))
            continue
        needed = ours["bytes_needed"]
        read = f"{ours['seconds'] * bandwidth * 1e12 / needed:.2f}" if bandwidth else None
        best = None if ours["ratio"] is None else f"{ours['ratio']:.2f}"
        speed = f"{needed / ours['seconds'] / 1e12:.3g}"
        lines.append(
            (
                label,
                f"{ours['seconds'] * 1e6:.4g}",
                f"{needed / 2**20:.4g}",
                speed,
                read,
                best,
                _others(ours, here),
            )
        )
    headings = ("cache", "ours, us", "MiB needed", "TB/s", "read over needed", "x best", "others' time over ours")
    return (
        f"{title}\n\nNeeded are the keys and values of each row, once. `read over needed` is what a copy moves in"
        " the same time, over that: the most that can have been read. Rows have half to all of the keys.\n\n"
        + table(headings, lines)
        + notes
    )


def _small_calls(rows: Rows) -> str:
    if not rows:
        return "## Small calls\n\nNot reached."
    return (
        "## Small calls\n\nWall-clock time over many calls: most of it is Python and launches.\n\n"
        + _against_ours(rows, 1e6, "us")
    )


def _against_ours(rows: Rows, unit: float, name: str) -> str:
    lines = []
    for label, direction in dict.fromkeys((row["label"], row["direction"]) for row in rows):
        here = [row for row in rows if (row["label"], row["direction"]) == (label, direction)]
        ours = next((row for row in here if row["peer"].startswith("fastattn")), None)
        if ours is None or not ours["seconds"]:
            lines.append(
                (label, direction, "launched" if ours and ours.get("launched") else None, None, None, None)
            )
            continue
        best = None if ours["ratio"] is None else f"{ours['ratio']:.2f}"
        figures = f"{ours['seconds'] * unit:.4g}", f"{ours['spread']:.1%}"
        lines.append((label, direction, *figures, best, _others(ours, here)))
    headings = ("call", "direction", f"ours, {name}", "spread", "x best", "others' time over ours")
    return table(headings, lines) + _notes(rows)


def _others(ours: dict[str, Any], rows: Rows) -> str:
    """The other peers' times over ours, the fastest first."""
    rivals = sorted((row for row in rows if row["seconds"] and row is not ours), key=lambda row: row["seconds"])
    return ", ".join(f"{row['peer']} {row['seconds'] / ours['seconds']:.2f}" for row in rivals)


def _notes(rows: Rows) -> str:
    """Why peers have no time; "" if all have one."""
    notes = [f"- {row['label']}, {row['direction']}, {row['peer']}: {row['note']}" for row in rows if row["note"]]
    if not notes:
        return ""
    return "\n\n<details><summary>Not measured</summary>\n\n" + "\n".join(notes) + "\n</details>"


def _sweep(results: dict[str, Any]) -> str:
    text = "## Launch configurations\n\nThe row in the table is marked (now).\n\n"
    if not results["sweep"]:
        return text + "Not reached."
    text += "Tile rows x columns x warps x stages; or our kernel (fused) against the library's product.\n\n"
    if results["proposals"]:
        text += "Proposed rows:\n\n```python\n" + "\n".join(results["proposals"]) + "\n```"
    else:
        text += "No candidate beat the table's rows by more than the noise."
    for target in results["sweep"]:
        title = f"{target['table']}, {target['family']}: {target['direction']} {target['label']}"
        tried = sorted(target["tried"], key=lambda t: t["seconds"] or float("inf"))
        lines = [
            (
                t["name"],
                f"{t['seconds'] * 1e3:.4g} ms" if t["seconds"] else t["note"],
                f"{t['spread']:.1%}" if t["seconds"] else None,
            )
            for t in tried
        ]
        headings = ("", "time", "spread")
        text += f"\n\n<details><summary>{title}</summary>\n\n{table(headings, lines)}\n</details>"
    return text


def _pictures(plots: list[str], family: str) -> str:
    return "".join(f"\n![{name}]({name})\n" for name in plots if name.startswith(family))


# ---- the plots ----


def _plots(results: dict[str, Any], folder: Path) -> list[str]:
    """The names of the PNG files written; none without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        print("no plots: matplotlib is not installed here; elsewhere, python -m benchmarks.gpu --report FOLDER")
        return []
    rows = [row for row in results["speed"] if row["seconds"]]
    matmul = results["ceilings"].get("matmul_tflops")
    written = []
    for family, size, across in (("attention", "length", "width"), ("mlp", "width", None)):
        for direction in sorted({r["direction"] for r in rows if r["problem"]["family"] == family}):
            members = [r for r in rows if r["problem"]["family"] == family and r["direction"] == direction]
            name = f"{family}-{direction.replace('+', '-')}.png"
            _plot(members, size, across, matmul, f"{family}, {direction}", folder / name)
            written.append(name)
    return written


def _plot(rows: Rows, size: str, across: str | None, matmul: float | None, title: str, path: Path) -> None:
    """A panel for each mask or form (down) and head width (across); a line for each peer."""
    import matplotlib.pyplot as plt

    form = "causal" if across else "gated"
    columns = sorted({row["problem"][across] for row in rows}) if across else [None]
    lines = sorted({row["problem"][form] for row in rows})
    figure, axes = plt.subplots(
        len(lines), len(columns), figsize=(4.5 * len(columns) + 1.5, 3.4 * len(lines)), squeeze=False, sharey=True
    )
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    colours = dict(zip(peers, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 2, strict=False))
    for y, down in enumerate(lines):
        for x, column in enumerate(columns):
            panel = axes[y][x]
            here = [
                r for r in rows if r["problem"][form] == down and (not across or r["problem"][across] == column)
            ]
            for peer in peers:
                points = sorted((r["problem"][size], r["tflops"]) for r in here if r["peer"] == peer)
                bold = {"linewidth": 2.6} if peer.startswith("fastattn") else {"linewidth": 1.2}
                if points:
                    panel.plot(
                        *zip(*points, strict=True), "o-", markersize=3, label=peer, color=colours[peer], **bold
                    )
            if matmul:
                panel.axhline(matmul, linestyle=":", color="grey")
            name = ({True: "causal", False: "full"} if across else {True: "gated", False: "plain"})[down]
            panel.set_title(f"{name}, D={column}" if across else name)
            panel.set_xscale("log", base=2)
            panel.set_xlabel(size)
            panel.set_ylim(bottom=0)
        axes[y][0].set_ylabel("TFLOP/s (dotted: matmul)")
    unique = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    figure.legend(unique.values(), unique.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    plt.close(figure)
