"""The warp on the CPU, tile by tile: for numpy arrays by numba or numpy, for torch tensors by numba."""
