"""Weights that come with the package: safetensors, the ONNX pair and a model card per variant."""
