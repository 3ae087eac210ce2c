"""Cases that run on several ranks: one gloo group runs them all, since it takes seconds to start.

`python tests/distributed/groups.py 4 'ring, .*sinks'` runs the cases of four ranks whose names match. The group
`slow` has those that take long.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(seconds=60)
MODULES = (
    "cases_attention",
    "cases_ranks",
    "cases_models",
    "cases_tensors",
    "cases_loss",
    "cases_propagation",
    "cases_tensor_functions",
)
IMPORTED = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "fastattn",
    "transformers",
)
Case = Callable[[DeviceMesh], None]
# How many ranks run the cases; "slow" is two ranks.
Group = int | str


def cases(group: Group, pattern: str = "") -> dict[str, Case]:
    """The cases of a group, by name: each module has them as CASES[group]."""
    every = (importlib.import_module(module).CASES.get(group, {}) for module in MODULES)
    return {name: case for found in every for name, case in found.items() if re.search(pattern, name)}


def failures(group: Group, pattern: str = "") -> str:
    """Run the cases; what went wrong, by name of the case and rank. "" if nothing did.

    A case takes the mesh of all ranks. It must talk to the other ranks only before it can fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = ranks_of(group)
        start(_worker, (group, folder, pattern), ranks)
        return "".join((Path(folder) / f"failures.{rank}").read_text() for rank in range(ranks))


def start(function: Callable[..., None], arguments: tuple, ranks: int) -> None:
    """Call function(rank, *arguments) in a process for each rank. They are forks of one process that has imported
    what takes long, and nothing else."""
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    mp.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def ranks_of(group: Group) -> int:
    return 2 if group == "slow" else int(group)


def _worker(rank: int, group: Group, folder: str, pattern: str) -> None:
    ranks = ranks_of(group)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    mesh = dist.init_device_mesh("cpu", (ranks,))
    report = ""
    for name, case in cases(group, pattern).items():
        torch.manual_seed(0)
        try:
            case(mesh)
        except BaseException:  # also what pytest.raises raises
            problem = f"\n{name}, rank {rank}:\n{traceback.format_exc()}"
            report += problem
            print(problem, file=sys.stderr, flush=True)  # before the other ranks wait for this one in vain
        dist.barrier()
    (Path(folder) / f"failures.{rank}").write_text(report)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    which = sys.argv[1]
    print(failures(int(which) if which.isdigit() else which, *sys.argv[2:]) or "all passed")
