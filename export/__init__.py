"""From a model file to a bundle or one ONNX graph; download, verification and quantization. Needs torch and onnx."""
