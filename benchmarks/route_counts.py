"""What a call of attention without our kernels asks of a GPU: python -m benchmarks.route_counts

For each kind of call: which of PyTorch's kernels computes it, how many operators are launched, and how many bytes
go through memory. Beside them stands the same for the steps that serve without PyTorch's fused kernels. Bytes are
given as a multiple of touching once what a call must: q, k, v, out and lse, and in a backward dout and the
gradients, too. A pretended GPU counts (tests/pretended_gpu), and nothing is timed. --markdown prints the table of
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import replace
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
from rich.console import Console
from rich.table import Table

from fastattn.core import plans
from fastattn.core.attention import torch_routes
from fastattn.measuring import kinds
from fastattn.measuring.kinds import LSE, Sizes
from fastattn.measuring.prove_worker import routes
from tests.attention import torch_stand_ins
from tests.pretended_gpu import GPUS, obstacle, pretended_gpus

CALLS = (
    *(("attention", kind) for kind in ("full", "causal", f"causal{LSE}")),
    *(
        ("masks", kind)
        for kind in ("window", "key lengths", "key lengths, causal", "documents", "boolean mask", "random lists")
    ),
    *(
        ("scores", kind)
        for kind in ("bias", "alibi", "relative bias", "sinks", "head scale", "softcap", "dropout")
    ),
)
Count = tuple[int, float]  # operators, and bytes over those that must be touched


def counts(sizes: Sizes, device: torch.device) -> tuple[str, list[Count]]:
    """Which kernel computes the call, and the counts of its forward and its backward."""
    plans.forget()
    of_lse = sizes.kind.endswith(LSE)
    call = kinds.build(replace(sizes, kind=sizes.kind.removesuffix(LSE)), device)
    with routes() as taken:
        found = torch_stand_ins.launched(call, of_lse)
    return taken[0], list(zip(map(len, found), torch_stand_ins.times_touched(found, call), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of each of 8 x 2 heads (default 512)")
    parser.add_argument("--width", type=int, default=64, help="of heads (default 64)")
    parser.add_argument("--markdown", action="store_true", help="as a table in Markdown")
    arguments = parser.parse_args()
    console = Console()
    if reason := obstacle():
        console.print(f"no GPU can be pretended: {reason}")
        return 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    heads = "call", "by", "forward", "by steps", "backward", "by steps"
    rows = []
    with (
        pretended_gpus(GPUS["H100"]),
        torch_stand_ins.operators(prefers_cudnn=False),
        # PyTorch's memory-efficient kernel gives rows that see nothing 0 and -inf.
        mock.patch.object(torch_stand_ins, "FAULTS", {"clean"}),
    ):
        device = torch.device("cuda", 0)
        for family, kind in CALLS:
            sizes = Sizes(family, kind, "float16", 8, 2, 2, arguments.length, width=arguments.width)
            name, routed = counts(sizes, device)
            with mock.patch.object(torch_routes, "candidates", lambda *_: ()):
                _, steps = counts(sizes, device)
            pairs = (pair for both in zip(routed, steps, strict=True) for pair in both)
            rows.append((kind, name.removeprefix("PyTorch's "), *(f"{n} / {times:.1f}" for n, times in pairs)))
    if arguments.markdown:
        lines = [heads, ("---",) * len(heads), *rows]
        print(
            "\n".join(
                f"| {' | '.join(line)} |".replace("| --- ", "|---").replace(" |---", "|---") for line in lines
            )
        )
        return 0
    title = f"operators / bytes over those that must be touched; 8 x 2 heads of {arguments.length} tokens"
    table = Table(*heads, title=f"{title}, {arguments.width} wide, float16")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
