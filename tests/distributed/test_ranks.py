"""Every case on spawned ranks, and a rank that dies."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta

import groups
import pytest
import torch
import torch.distributed as dist
from cases_ranks import LENGTH, heads, shards

from fastattn import distributed

SLOW = pytest.mark.slow


@pytest.mark.parametrize("group", [2, 4, pytest.param(8, marks=SLOW), pytest.param("slow", marks=SLOW)])
def test_ranks_together_compute_what_one_process_computes(group: groups.Group) -> None:
    failures = groups.failures(group)
    assert not failures, failures


def _dies(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3, timeout=timedelta(seconds=5)
    )
    mesh = dist.init_device_mesh("cpu", (3,))
    plan = distributed.layout(LENGTH, mesh)
    q, k, v = shards(plan, *heads())
    for method in ("ring", "gather"):
        distributed.attention(q, k, v, layout=plan, method=method)
    if rank == 2:
        os._exit(0)
    for method, words, options in (
        ("ring", rf"rank {rank} could not exchange keys .*rank 2", {}),
        (
            "gather",
            f"rank {rank} could not exchange with the 2 other ranks of its group: rank 2 may have died",
            {},
        ),
        (
            "ring",
            f"rank {rank} prepared a call that is new to its layout, but not all of the 2 other",
            {"scale": 0.5},
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            distributed.attention(q, k, v, layout=plan, method=method, **options)
    os._exit(0)  # destroying the group would wait for the dead rank


def test_a_rank_that_dies_ends_the_others_with_its_name() -> None:
    with tempfile.TemporaryDirectory() as folder:
        groups.start(_dies, (folder,), 3)
