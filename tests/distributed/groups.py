"""Cases that run on several ranks: one spawned gloo group runs them all, and each reports for itself."""

from __future__ import annotations

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
Case = Callable[[DeviceMesh], None]


def run(cases: dict[str, Case], ranks: int) -> dict[str, str]:
    """What went wrong in each case, on any rank; "" if nothing did. Cases must be picklable.

    A case takes the mesh of all ranks. It must talk to the other ranks only before it can fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (ranks, folder, cases), nprocs=ranks)
        return {
            name: "".join((Path(folder) / f"{i}.{rank}").read_text() for rank in range(ranks))
            for i, name in enumerate(cases)
        }


def _worker(rank: int, ranks: int, folder: str, cases: dict[str, Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    mesh = dist.init_device_mesh("cpu", (ranks,))
    for i, case in enumerate(cases.values()):
        torch.manual_seed(0)
        report = ""
        try:
            case(mesh)
        except BaseException:  # also what pytest.raises raises
            report = f"rank {rank}:\n{traceback.format_exc()}"
        (Path(folder) / f"{i}.{rank}").write_text(report)
        dist.barrier()
    dist.destroy_process_group()
