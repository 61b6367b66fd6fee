"""The correlation + softmax warp of CoCosNet, exact and without its matrix, on CPU and GPU, forward and backward.

    from flashcocos.kernels import corr_warp
    warped = corr_warp(theta, phi, values)      # torch tensors or numpy arrays; the same kind comes back
    corr_warp(theta, phi, values, backend="numba")

Source: arXiv 2004.05571, equations 2 and 3, with the 3 x 3 patches of its public code. Importing this
folder loads neither torch, triton nor numba, and the array paths never load torch.

One naming grammar for every file of this folder:
  B  batch                       N  queries, Hq x Wq, positions of theta and of the output
  C  channels of theta and phi   M  keys, Hk x Wk, positions of phi and of the values
  V  channels of the values      D  length of a patch, patch * patch * C
  theta/phi/values  the inputs; out  the warp; lse  log-sum-exp of a query's logits, natural, always float32
  mu, nu            means of a query's and of a key's patch vector
  a, b              reciprocal norms of the centered query and key patch vectors
  product           theta(i) . phi(j), channels only; taps: its diagonal sum over the patch; logits: / temperature
  BN, BM, BC, BV    tile sizes along N, M, C, V
  lane, band, walk  a column of a map that a row or column of a tile stands for, the query rows it takes in turn, and
                    one pass down a diagonal of query and key rows (`triton_nine_tap`)
  i_ program or loop index, o_ offsets, m_ mask, p_ pointer, b_ a block held in registers
  d*                a gradient (d_theta, d_logits); delta  sum over V of grad_out * out, the softmax's own term
"""

from __future__ import annotations

# eager but light: corr_warp.py itself imports numpy alone, and binding the function here, before anyone can import the
# submodule of the same name, makes `kernels.corr_warp` the function
from .corr_warp import corr_match, corr_row, corr_warp

__all__ = ["corr_match", "corr_row", "corr_warp"]
