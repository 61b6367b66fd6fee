"""From a bundle to TensorRT engines, behind `flashcocos build`. Needs TensorRT, but no GPU."""
