"""From checkpoint to device: fold, split, write ONNX, verify, build engines (needs the ``export`` extra)."""
