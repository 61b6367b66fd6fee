"""Translation on the CPU: what runs the graphs there, and the pipeline from label to picture on numpy arrays."""
