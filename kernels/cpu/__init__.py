"""The warp on the CPU, tile by tile: for numpy arrays (with numba or numpy alone) and for torch tensors."""
