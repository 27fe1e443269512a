"""The ONNX graphs of a person search against torch, on images that are not those of the export."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.network import Graph
from models.person_search import PersonSearch, PersonSearchConfig
from orchestrator.onnx_file import export_onnx, onnx_files

# Proposals of padding all score one half, and torch's order of equal ones is any: there are none of them.
TINY = PersonSearchConfig(
    "resnet10t", 0.125, (64, 96), levels=8, head=16, dim=4, score=0.3, proposal_score=0.55
)  # fmt: skip
SIZES = ((72, 118), (118, 72), (96, 64), (187, 125))  # height and width


def network(config: PersonSearchConfig = TINY) -> PersonSearch:
    """Sees people in noise, moves boxes, and sees nobody where there is nothing."""
    torch.manual_seed(2)
    net = PersonSearch(config)
    with torch.no_grad():
        net.regions.head.cls_logits.weight.mul_(600)
        net.regions.head.bbox_pred.weight.mul_(20)
        net.predictor.bbox_pred.weight.mul_(5)
        net.predictor.cls_score.weight.mul_(10)
        net.predictor.cls_score.bias.copy_(torch.tensor([1.5, 0.0]))
    return net.eval().requires_grad_(False)


def image(size: tuple[int, int], seed: int = 5) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def ran(file: Path, **inputs: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {name: value.numpy() for name, value in inputs.items()})]


def assert_same(found: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def net() -> PersonSearch:
    return network()


@pytest.fixture(scope="module")
def files(net, tmp_path_factory) -> dict[str, Path]:
    """By graph; written once, which takes long."""
    path = tmp_path_factory.mktemp("onnx") / "tiny-0.5.onnx"
    assert export_onnx(net, path) < 1e-4
    files = onnx_files(net, path)
    assert sorted(path.parent.iterdir()) == sorted(files.values())
    return files


@pytest.mark.slow
def test_files_say_what_goes_in_and_out(files):
    import onnxruntime

    assert [file.name for file in files.values()] == ["tiny-0.5.onnx", "tiny-0.5.fixed.onnx", "tiny-0.5.embedding.onnx"]
    sessions = {key: onnxruntime.InferenceSession(file) for key, file in files.items()}
    shapes = {key: {i.name: i.shape for i in session.get_inputs()} for key, session in sessions.items()}
    assert shapes == {
        "": {"images": [1, 3, "height", "width"]},
        "fixed": {"images": [1, 3, 64, 85]},
        "embedding": {"images": [1, 3, "height", "width"], "boxes": ["people", 4]},
    }
    outputs = {key: [o.name for o in session.get_outputs()] for key, session in sessions.items()}
    assert outputs["embedding"] == ["embeddings"]
    assert outputs[""] == outputs["fixed"] == ["boxes", "scores", "embeddings"]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_graph_finds_the_same_people_in_any_size(net, files, size):
    images = image(size)
    expected = net(images)
    assert len(expected[0]) > 50
    assert_same(ran(files[""], images=images), expected)


@pytest.mark.slow
def test_a_graph_of_one_size_finds_the_same_people(net, files):
    (images,) = net.example(1)
    images = images.flip(2)
    assert len(net(images)[0]) > 50
    assert_same(ran(files["fixed"], images=images), net(images))


@pytest.mark.slow
def test_nobody_is_found(net, files):
    images = torch.zeros(1, 3, 70, 100)
    found = ran(files[""], images=images)
    assert_same(found, net(images))
    assert [tuple(x.shape) for x in found] == [(0, 4), (0,), (0, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 5])
def test_given_boxes_are_embedded(net, files, count):
    images = image((110, 75))
    boxes = torch.tensor([[3.0, 2, 40, 70], [0, 0, 75, 110], [20.5, 30, 24, 33], [60, 5, 75, 100], [1, 90, 60, 110]])
    (found,) = ran(files["embedding"], images=images, boxes=boxes[:count])
    assert found.shape == (count, TINY.dim)
    assert_same([found], (net.graphs()["embedding"].reference(images, boxes[:count]),))


@pytest.mark.parametrize("proposals, detections", [(1000, 100), (60, 7), (3, 100)])
def test_keeping_every_row_changes_nothing(proposals, detections):
    """In torch: as many proposals and detections as there may be, fewer than there are, and hardly any."""
    config = replace(TINY, proposal_score=0.0, proposals=proposals, detections=detections)
    graph = network(config).graphs()[""]
    for seed, size in enumerate(((64, 64), (96, 64), (64, 160), (192, 320))):  # without padding
        images = image(size, seed)
        expected = graph.reference(images)
        assert_same(graph.module(images), expected)
        assert 0 < len(expected[0]) <= min(proposals, detections)


@dataclass(frozen=True)
class Two:
    """A network of two graphs, of which the second may be another than it says."""

    wrong: float
    kind = "two"

    def exportable(self) -> str:
        return ""

    def graphs(self) -> dict[str, Graph]:
        layer, other = nn.Linear(2, 3).eval(), nn.Linear(2, 3).eval()
        other.load_state_dict({name: value + self.wrong for name, value in layer.state_dict().items()})
        x = torch.ones(1, 2)
        first = Graph(layer, (x,), ("x",), ("y",), ({0: "rows"},), ((x.repeat(3, 1),),))
        return {"": first, "more": Graph(layer, (x,), ("x",), ("y",), checks=((-x,),), reference=other)}

    def same(self, ours: list[Tensor], exported: list[Tensor]) -> float:
        return (ours[0] - exported[0]).abs().max().item()


@pytest.mark.slow
def test_every_graph_is_written_or_none(tmp_path):
    assert export_onnx(Two(0.0), tmp_path / "two.onnx") < 1e-5
    assert {file.name for file in tmp_path.iterdir()} == {"two.onnx", "two.more.onnx"}
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for wrong in (0.01, np.nan):
        with pytest.raises(ValueError, match=r"the ONNX file two.more.onnx differs from the student by"):
            export_onnx(Two(wrong), tmp_path / "two.onnx")
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
