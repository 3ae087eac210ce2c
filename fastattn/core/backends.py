"""The backends: each family has a module for each, with the same functions. fastattn.core.capabilities chooses.

attention   forward(q, k, v, spec, tensors, maxima=None) -> out, lse
                `maxima` (B, Hq, Lq), -inf, gets the largest score of each row.
            backward(dout, dlse, saved, spec, tensors, wanted) -> Gradients
            tangent(saved, tangents, spec, tensors) -> the tangents of out and lse
                `saved` is a Saved: q, k, v, out, lse.
mlp         forward(x, weights, spec) -> y, kept
            backward(dy, x, weights, kept, wanted, spec) -> dx, dw, db, dw_out, db_out, dnorm_weight, dnorm_bias
                x is (T, d). `kept` is up to four tensors (T, ...), () if nothing was kept; each backend takes what
                another one has kept. `wanted` says which gradients to compute; the others are None. dw and db are
                those of w_in and b_in, then of w_up and b_up.
            kept_empty(x, weights, spec) -> tensors like `kept`, without values
heads       forward(x, spec, tensors) -> y
            backward(dy, x, spec, tensors) -> dx, dnorm_weight or None, dhead_scale or None
norm        forward(x, residual, weight, bias, spec) -> y, x + residual or None, mean or None, inverse deviation
            backward(dy, dtotal, saved, spec, wanted) -> dx, dweight or None, dbias or None
                x is (B, R, W), weight and bias (B, W), moments (B, R). `saved` is a Saved; its x is what was
                normalised. dtotal is the gradient of x + residual, the second result, or None. `wanted` says which
                of dweight and dbias to compute, in the moments' dtype.
cache       append(storage, k, v, tensors) -> None
                writes new keys and values to the ends of their rows, in place.
            forward(q, storage, spec, tensors) -> out, lse
loss        forward(tensors, spec) -> rows
            backward(drows, tensors, rows, wanted, spec) -> dx, dw, db
            reduced(tensors, coefficients, wanted, spec) -> loss, dx, dw, db
                `tensors` is a LossTensors. rows (3, T), or (4, T) with entropies, are described in the definition,
                beside the loss of one number that `reduced` computes. `wanted` says which gradients to compute;
                the others are None.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from fastattn.core import proofs

NAMES = ("triton", "portable", "reference")


def load(family: str, name: str) -> ModuleType:
    """The backend's module. Triton is imported only here, when it is first used."""
    floor = "definition" if name == "reference" else name
    return importlib.import_module(f"fastattn.core.{family}.{floor}")


def proven(device: torch.device, family: str | None = None) -> bool:
    """Whether the record of this device lets the Triton kernels serve any call, or any of this family. Where there
    is no record, the log says so once."""
    record = proofs.record_of(device)
    if record is None:
        proofs.tell_once(device)
        return False
    return family in record.families if family else bool(record.families)


def proven_for(device: torch.device, question: proofs.Question) -> bool:
    """Whether that record lets them serve this call."""
    record = proofs.record_of(device)
    return record is not None and not record.obstacle(question)
