"""The warp on a GPU: the Triton kernels, their launch settings, and their compilation ahead of time."""
