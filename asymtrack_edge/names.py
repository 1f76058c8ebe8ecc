"""Names of backends and precisions, the same in all commands and in Python."""

#: What runs a model: values of ``--backend`` and of ``Tracker.load(backend=...)``.
BACKENDS = ("auto", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino", "tensorrt")

#: Prefix of a Triton server's address, which is accepted as a backend as well: ``triton://host:8001``.
TRITON = "triton://"

#: Values of ``--precision``: the model's own (the default is None), or bf16 where the backend supports it.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
