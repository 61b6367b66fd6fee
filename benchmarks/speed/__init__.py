"""What the benchmarks time: translations, the warp alone, training steps, and any bundle on this machine."""
