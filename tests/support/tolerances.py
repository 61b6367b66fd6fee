"""How far a kernel may be from the float64 oracle on the same inputs; one line per result and dtype, with its reason.

`assert_close` bounds two errors over the root mean square of the reference: the root mean square error, and the largest
(a single wrong row hides in the first). Inputs are random features at temperature 0.01, which turn a rounding of the
correlation into a hundredfold one of the logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Bounds of the root mean square error and of the largest error, over the root mean square of the reference."""

    mean: float
    largest: float


TRITON = {
    # a logit of about 30 from float32 sums of D products: 1e-6 to 1e-5 of each weight
    ("out", torch.float32): Tolerance(5e-6, 5e-5),
    # the weights and the result are each rounded to 11 bits (2^-12 on average is 2.4e-4)
    ("out", torch.float16): Tolerance(5e-4, 2e-3),
    # the same with 8 bits, which the interpreter truncates where a GPU rounds
    ("out", torch.bfloat16): Tolerance(6e-3, 5e-2),
    # as the result, and the terms through means and norms cancel; maps whose mean equals their spread reach 1.3e-5
    ("grad", torch.float32): Tolerance(2e-5, 2e-4),
    # the softmax's own term is formed from the rounded result: a difference of two terms with 11 bits each
    ("grad", torch.float16): Tolerance(2e-3, 1e-2),
    # the same with 8 bits
    ("grad", torch.bfloat16): Tolerance(5e-2, 3e-1),
    # float32 logits whatever the input: absolute errors of 1e-5 on 10 to 100
    ("lse", torch.float32): Tolerance(1e-6, 5e-6),
}

CPU = {
    # as Triton's: logits from float32 sums of D products, 1e-6 to 1e-5 of each weight
    ("out", torch.float32): Tolerance(3e-6, 4e-5),
    # exact arithmetic but for the rounding of sums: 1e-15 of a logit, a hundredfold in the weight
    ("out", torch.float64): Tolerance(3e-14, 3e-13),
    # float32 arithmetic, then one rounding to 11 bits (2^-12) or to 8 bits (2^-9)
    ("out", torch.float16): Tolerance(3e-4, 2e-3),
    ("out", torch.bfloat16): Tolerance(2.5e-3, 1.5e-2),
    # as the result, and the terms through means and norms cancel
    ("grad", torch.float32): Tolerance(1e-5, 2e-4),
    ("grad", torch.float64): Tolerance(5e-14, 6e-13),
    # the softmax's own term is formed from the rounded result, and the gradient is rounded itself
    ("grad", torch.float16): Tolerance(2e-3, 2e-2),
    ("grad", torch.bfloat16): Tolerance(1.5e-2, 1e-1),
    # absolute errors of 1e-5 on 10 to 100
    ("lse", torch.float32): Tolerance(1e-6, 5e-6),
    ("lse", torch.float64): Tolerance(3e-14, 1e-13),
    # a weight has the error of its logit
    ("probability", torch.float32): Tolerance(3e-6, 1.5e-5),
}

# the compiled kernels, executed: as in the interpreter, but bfloat16 is rounded, as on a GPU and by `CPU`
EXECUTED = {**TRITON, **{key: CPU[key] for key in CPU if key[1] == torch.bfloat16}}


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> None:
    """`got` against the float64 `expected`; a failure says both errors, both bounds, and where the largest lies."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert expected.isfinite().all(), f"{name}: the reference itself is not finite"
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    scale = expected.square().mean().sqrt()
    error = (got - expected).abs()
    mean, largest = float(error.square().mean().sqrt() / scale), float(error.max() / scale)
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    print(f"{name}: mean error {mean:.2e} of {tolerance.mean:.0e}, largest {largest:.2e} of {tolerance.largest:.0e}")
    assert mean <= tolerance.mean, f"{name}: mean error {mean:.2e}, allowed {tolerance.mean:.0e}"
    assert largest <= tolerance.largest, f"{name}: largest {largest:.2e} at {where}, allowed {tolerance.largest:.0e}"
