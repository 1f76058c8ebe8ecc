"""The teacher: its ONNX graphs run in torch, its labels, and training from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from safetensors.torch import load_file

from asymtrack_edge.errors import DatasetError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.command import main
from asymtrack_edge.training.log import read_log
from asymtrack_edge.training.teacher import OnnxGraph, Opinion, Teacher, relabel, teacher_loss
from asymtrack_edge.variants import VARIANTS
from tests.training.conftest import CPU, random_pairs

Shapes = Dict[str, List[int]]


def save_graph(path: Path, nodes: List[Any], inputs: Shapes, outputs: Shapes, constants: Dict[str, np.ndarray]) -> None:
    values = ([make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in io.items()] for io in (inputs, outputs))
    graph = make_graph(nodes, "teacher", *values, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 13)], ir_version=8), str(path))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: Any) -> Path:
    """Small graphs with the teacher's names, shapes and operators; their shapes are fixed to a batch of one."""
    folder = tmp_path_factory.mktemp("teacher")
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    constants = {"w": weights(256, 3, 16, 16), "b": weights(256), "s": np.full((1, 3, 1, 1), 0.02, np.float32)}
    features = {"template_features": [1, 256, 8, 8]}
    encode = [
        make_node("Mul", ["image", "s"], ["scaled"]),
        make_node("Conv", ["scaled", "w", "b"], ["raw"], strides=[16, 16], pads=[0, 0, 1, 1]),
    ]
    first = [*encode, make_node("Relu", ["raw"], ["template_features"])]
    save_graph(folder / "fear_xs_init.onnx", first, {"image": [1, 3, 128, 128]}, features, constants)
    constants.update(flat=np.array([1, 256, -1]), map=np.array([1, -1, 16, 16]), minus=np.full(1, -3, np.float32))
    constants.update(reach=weights(4, 320, 1, 1), score=weights(1, 320, 3, 3))
    second = [
        *encode,
        make_node("Reshape", ["template_features", "flat"], ["z"]),
        make_node("Transpose", ["z"], ["zt"], perm=[0, 2, 1]),
        make_node("Reshape", ["raw", "flat"], ["xf"]),
        make_node("MatMul", ["zt", "xf"], ["product"]),
        make_node("Reshape", ["product", "map"], ["similar"]),
        make_node("Concat", ["raw", "similar"], ["both"], axis=1),
        make_node("Conv", ["both", "score"], ["sum"], pads=[1, 1, 1, 1]),
        make_node("Add", ["sum", "minus"], ["cls"]),
        make_node("Conv", ["both", "reach"], ["log"]),
        make_node("Exp", ["log"], ["bbox"]),
    ]
    outputs = {"bbox": [1, 4, 16, 16], "cls": [1, 1, 16, 16]}
    save_graph(folder / "fear_xs_track.onnx", second, {"image": [1, 3, 256, 256], **features}, outputs, constants)
    return folder


def test_a_batch_equals_onnx_runtimes_output_for_each_item(graphs: Path) -> None:
    random = np.random.default_rng(1)
    given = {
        "image": random.uniform(0, 255, (3, 3, 256, 256)).astype(np.float32),
        "template_features": random.normal(size=(3, 256, 8, 8)).astype(np.float32),
    }
    path = graphs / "fear_xs_track.onnx"
    found = OnnxGraph(path, CPU)(**{name: torch.from_numpy(value) for name, value in given.items()})
    reference = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for i in range(3):
        expected = reference.run(None, {name: value[i : i + 1] for name, value in given.items()})
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(ours[i : i + 1].numpy(), theirs, rtol=2e-3, atol=1e-3)


def test_the_teacher_sees_squeezed_views_and_returns_the_coordinates_of_pairs(graphs: Path) -> None:
    teacher, reach = Teacher(graphs, CPU), torch.tensor([10.0, 20.0, 30.0, 40.0])

    def spot(size: int) -> Any:  # a bright spot, to the upper right of the centre
        x, y = np.meshgrid(*[np.arange(size) / size] * 2)
        spot = torch.from_numpy(np.exp(-30 * ((x - 0.56) ** 2 + (y - 0.41) ** 2))).float()
        return (spot.expand(3, 3, -1, -1) * 255 - teacher.mean) / teacher.std

    teacher.search = lambda image, **_: [reach[:, None, None].expand(3, 4, 16, 16), image[:, :1, ::16, ::16] / 32]
    teacher.template = lambda image: [F.pad(image[..., ::16, ::16], (0, 0, 0, 0, 0, 1), value=90.0)]
    pairs = random_pairs(VARIANTS["T"], 3)._replace(template=spot(128), search=spot(256))
    opinion = teacher(pairs._replace(aspect=torch.tensor([0.5, 1.0, 2.0])))
    np.testing.assert_allclose(opinion.view[2], [0.7 * 2**0.5, 0.7 / 2**0.5], rtol=1e-5)
    pixel = 1.25 / 0.7 / 256 * opinion.view.repeat(1, 2)  # the teacher's pixel: it sees five times the box, not four
    middle = opinion.corners + torch.cat([reach[:2], -reach[2:]]) * pixel
    np.testing.assert_allclose(middle, [[0.56, 0.41] * 2] * 3, atol=0.06)
    assert [divmod(int(i), 16) for i in opinion.response.flatten(1).argmax(1)] == [(7, 9)] * 3
    (ours,) = teacher.template(image=pairs.template * teacher.std + teacher.mean)
    right, wrong = (teacher_loss(opinion.response, ours, opinion._replace(view=opinion.view * k)) for k in (1, 1.2))
    assert right["features"] < 0.001 < wrong["features"]


def test_only_a_confident_teacher_changes_labels() -> None:
    pairs = random_pairs(replace(VARIANTS["T"], template_size=32, search_size=32), 6)
    known = torch.tensor([False, False, False, True, True, True])
    present = torch.tensor([True, True, True, True, False, False])
    peak = torch.tensor([0.99, 0.5, 0.01, 0.01, 0.99, 0.6])
    box = torch.full((6, 4), 0.5)
    labelled = relabel(pairs._replace(known=known, present=present), Opinion(peak, peak, box, peak, peak))
    # Unlabelled: sure, unsure, absent. Labelled: stays. Negatives: becomes unknown where the teacher is sure, or stays.
    assert labelled.known.tolist() == [True, False, True, True, False, True]
    assert labelled.present.tolist() == [True, False, False, True, False, False]
    assert torch.equal(labelled.corners[:3], box[:3]) and torch.equal(labelled.corners[3:], pairs.corners[3:])


def test_the_loss_vanishes_if_student_and_teacher_agree() -> None:
    response, features = torch.rand(2, 16, 16), torch.randn(2, 256, 8, 8)
    opinion = Opinion(response.round(), response, response, features, torch.ones(2, 2))
    terms = teacher_loss(100 * (response.round() - 0.5), 3 * features, opinion)
    assert terms["response"] < 1e-4 and terms["features"] < 1e-4
    terms = teacher_loss(0 * response, -features, opinion)
    assert terms["response"].item() == pytest.approx(np.log(2)) and terms["features"].item() == pytest.approx(2)


def test_learning_from_a_teacher_and_resuming(graphs: Path, collection: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    quick = ["--device", "cpu", "--threads", "1", "--time-budget", "0.1", "--fp32"]
    data = ["--data", str(collection), "--canvas", "128", "--preset", "small", "--batch", "2"]
    assert main([*data, "--teacher", str(graphs), "--output", str(folder), *quick]) == 0
    assert set(load_file(str(folder / "weights.safetensors"))) == set(AsymTrack(VARIANTS["T"]).state_dict())
    assert main(["--resume", str(folder), *quick]) == 0
    first, second = read_log(folder)  # each run logs its first step
    assert second["pairs"] > first["pairs"]
    weights = {"giou": 2, "l1": 5, "corner": 0.5, "response": 4, "features": 1}
    assert first["loss"] == pytest.approx(sum(weight * first[term] for term, weight in weights.items()))


def test_invalid_teachers_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no fear_xs_init\.onnx"):
        Teacher(tmp_path, CPU)
    (tmp_path / "bad.onnx").write_bytes(b"no graph at all")
    with pytest.raises(DatasetError, match=r"bad\.onnx is not an ONNX"):
        OnnxGraph(tmp_path / "bad.onnx", CPU)
    for name, words in (("image", "Tanh"), ("a", "inputs that a teacher does not have: a")):
        save_graph(tmp_path / "odd.onnx", [make_node("Tanh", [name], ["b"])], {name: [1]}, {"b": [1]}, {})
        with pytest.raises(DatasetError, match=words):
            OnnxGraph(tmp_path / "odd.onnx", CPU)
