"""Translation on a GPU: TensorRT or ONNX Runtime for the graphs, compiled kernels for the warp, and their memory.

pycuda drives the GPU; neither torch nor triton is needed.
"""
