"""The backends: in each family a module for each, with the same functions. fastattn.core.capabilities chooses.

attention   forward(q, k, v, spec, tensors) -> out, lse
            backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted) -> Gradients
            tangent(q, k, v, out, lse, tangents, spec, tensors) -> the tangents of out and lse
mlp         forward(x, weights, spec, save) -> y, saved
            backward(dy, x, weights, saved, wanted, spec) -> dx, dw, db, dw_out, db_out
                x is (T, d). `saved` holds what was activated, (T, h), or gate and up side by side, (T, 2h); it is
                empty if not `save`. `wanted` says which of the gradients to compute, the others are None. dw and
                db are w_in's, then w_up's.
heads       forward(x, spec, tensors) -> y
            backward(dy, x, spec, tensors) -> dx, dnorm_weight or None, dhead_scale or None
norm        forward(x, residual, weight, bias, spec) -> y, x + residual or None, mean or None, inverse deviation
            backward(dy, dtotal, x, weight, mean, inverse, spec, wanted) -> dx, dweight or None, dbias or None
                x is (B, R, W), weight and bias (B, W), moments (B, R). The backward's x is what was normalised,
                dtotal what came to it as a result, or None. `wanted` says which of dweight and dbias to compute,
                in the moments' dtype.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("triton", "portable", "reference")


def load(family: str, name: str) -> ModuleType:
    """The backend's module; Triton is imported here, when first asked for, and nowhere else."""
    floor = "definition" if name == "reference" else name
    return importlib.import_module(f"fastattn.core.{family}.{floor}")
