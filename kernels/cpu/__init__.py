"""The warp on the CPU, tile by tile: for numpy arrays and for torch tensors, with numba or without."""
