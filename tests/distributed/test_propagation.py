"""The rules by which operators take DTensors; see cases_propagation.py for what they compute."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastattn.distributed.propagation import RULES

OPERATORS = sorted(
    name
    for schema in torch._C._jit_get_all_schemas()
    if (name := schema.name.removeprefix("fastattn::")) != schema.name
)


def test_every_operator_has_a_rule() -> None:
    assert set(OPERATORS) == set(RULES), "give a new operator a rule in fastattn/distributed/propagation.py"


@pytest.mark.parametrize("name", OPERATORS)
def test_a_rule_names_the_dimensions_of_every_tensor_and_of_every_result(name: str) -> None:
    rule, schema = RULES[name], getattr(torch.ops.fastattn, name).default._schema
    tensors = {argument.name for argument in schema.arguments if "Tensor" in str(argument.type)}
    assert tensors <= set(rule.inputs)
    assert set(rule.deciders) | rule.written <= tensors
    if not callable(rule.results):
        assert len(rule.results) == len(schema.returns)


def test_a_dtensor_is_known_though_fastattn_was_imported_first() -> None:
    program = """
import fastattn, sys, torch
assert "torch.distributed.tensor" not in sys.modules
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = distribute_tensor(torch.randn(2, 8), dist.init_device_mesh("cpu", (1,)), [Shard(0)])
y = fastattn.rms_norm(x)
assert y.placements == x.placements
"""
    subprocess.run([sys.executable, "-c", program], check=True)
