"""ONNX Runtime, with its TensorRT provider."""
