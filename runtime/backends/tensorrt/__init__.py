"""TensorRT: building, keying and running engines."""
