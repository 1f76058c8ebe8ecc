"""A stand-in, in Python, for Triton's backend ``onnxruntime``: loaded by a real Triton server, not by tests."""

import os
import sys

# Triton's Python takes no notice of PYTHONPATH.
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)

import numpy as np  # noqa: E402
import onnxruntime as ort  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402


class TritonPythonModel:
    """One instance of a network."""

    def initialize(self, args):
        """Opens the network."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """Runs the requests that Triton joined as one batch."""
        inputs = [tensor.name for tensor in self.session.get_inputs()]
        outputs = [tensor.name for tensor in self.session.get_outputs()]
        rows = [{n: triton.get_input_tensor_by_name(r, n).as_numpy() for n in inputs} for r in requests]
        results = self.session.run(outputs, {n: np.concatenate([row[n] for row in rows]) for n in inputs})
        responses, first = [], 0
        for row in rows:
            last = first + len(row[inputs[0]])
            tensors = [triton.Tensor(n, np.ascontiguousarray(v[first:last])) for n, v in zip(outputs, results)]
            responses.append(triton.InferenceResponse(tensors))
            first = last
        return responses
