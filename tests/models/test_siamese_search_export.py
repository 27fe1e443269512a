"""The ONNX graphs of an R-SiamNet against torch, on images that are not those of the export."""

from pathlib import Path

import pytest
import torch

from models.siamese_search import SiameseSearch, SiameseSearchConfig
from models.siamese_search_graph import search_graphs
from orchestrator.onnx_file import export_onnx, onnx_files

SIZES = ((72, 118), (118, 72), (96, 64), (187, 125))  # height and width


def network(sure: float = 8.0, **changes) -> SiameseSearch:
    """Sees people in noise; too sure, and many scores are exactly one, whose order is any."""
    torch.manual_seed(2)
    config = {"backbone": "resnet10t", "width": 0.125, "size": (64, 96), "levels": 64, "dim": 8, "crop": (64, 32),
              "candidates": 200, "score": 0.02}  # fmt: skip
    net = SiameseSearch(SiameseSearchConfig(**config | changes))
    with torch.no_grad():
        for value in net.detector.parameters():
            if value.ndim > 1:
                value.mul_(sure)
    return net.eval().requires_grad_(False)


def image(size, seed=5):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, atol=5e-4, rtol=0)


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture(scope="module")
def files(net, tmp_path_factory) -> dict[str, Path]:
    """By graph; written once, which takes long."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    assert export_onnx(net, path) < 1e-4
    return onnx_files(net, path)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_graph_finds_the_same_people_in_any_size(net, files, size):
    import onnxruntime

    expected = net(image(size))
    assert len(expected[0]) > 50
    session = onnxruntime.InferenceSession(files[""], providers=["CPUExecutionProvider"])
    assert_same(session.run(None, {"images": image(size).numpy()}), expected)


@pytest.mark.slow
def test_given_boxes_are_embedded(net, files):
    import onnxruntime

    session = onnxruntime.InferenceSession(files["embedding"], providers=["CPUExecutionProvider"])
    for boxes in (torch.tensor([[1.0, 2, 30, 60], [5, 5, 90, 70]]), torch.zeros(0, 4)):
        expected = net.embed(net.pyramid(image((96, 128))), [boxes], [(96, 128)])
        found = session.run(None, {"images": image((96, 128)).numpy(), "boxes": boxes.numpy()})
        assert_same(found, (expected,))


@pytest.mark.parametrize(
    "changes", [{"detector": "retinanet", "sure": 5.0}, {"detector": "faster_rcnn", "sure": 4.0, "score": 0.3}], ids=str
)
def test_what_is_traced_of_the_other_detectors_is_the_search(changes):
    net = network(**changes)
    for graph in search_graphs(net).values():
        for inputs in (graph.inputs, *graph.checks):
            found, expected = graph.module(*inputs), graph.reference(*inputs)
            found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
            assert len(expected[-1]) > 2 or not all(map(len, inputs))
            assert_same(found, expected)


def test_a_search_by_crops_has_no_graph():
    assert "search_by=scene has a graph" in network(search_by="crop").exportable()
