"""The contract: every network of every file answers it; stored students of 0.3.0 and a network from elsewhere too."""

import importlib
import json
import pkgutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.embedder import Embedder, EmbedderConfig
from models.iresnet import IResNet, IResNetConfig
from models.mobilefacenet import MobileFaceNet, MobileFaceNetConfig
from models.network import (
    SINCE_0_4,
    TRAINING_ONLY,
    EmbeddingNetwork,
    Network,
    deployed_config,
    identity,
    network_class,
    rebuild,
    shared_copy,
)
from models.token_pruning import PrunedViT, PrunedViTConfig
from orchestrator import checkpoint
from orchestrator.evaluation import cost
from orchestrator.onnx_file import export_onnx

STORED = Path(__file__).parents[1] / "golden" / "v030_students"
TINY = EmbedderConfig(backbone="resnet18", width=0.125, embedding_dim=8, image_size=(16, 16), num_classes=3)
TINY_VIT = PrunedViTConfig(
    backbone="vit_tiny_patch16_224", image_size=(32, 16), patch_size=8, width=16, heads=2, depth=4, stages=(1, 2, 3),
    keep_ratio=0.5, cameras=2, num_classes=4,
)  # fmt: skip
TINY_FACES = {"width": 0.125, "embedding_dim": 8, "image_size": (32, 16), "num_classes": 3}
NETWORKS = {
    "embedder": lambda: Embedder(TINY),
    "iresnet": lambda: IResNet(IResNetConfig(layers=(1, 1, 1, 1), **TINY_FACES)),
    "mobilefacenet": lambda: MobileFaceNet(MobileFaceNetConfig(blocks=(1, 1, 1, 1), **TINY_FACES)),
    "token_pruning": lambda: PrunedViT(TINY_VIT),
}
DETECTORS = {"person_search", "siamese_search"}  # asked in their own test


def test_every_network_of_the_package_is_asked_here():
    found = [m.name for m in pkgutil.iter_modules(models.__path__)
             if hasattr(importlib.import_module(f"models.{m.name}"), "NETWORK")]  # fmt: skip
    assert sorted({*NETWORKS, *DETECTORS}) == sorted(found)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_answers_the_contract(kind):
    net = NETWORKS[kind]()
    members = [name for name in (*Network.__annotations__, *vars(Network)) if not name.startswith("_")]
    assert len(members) > 12 and all(hasattr(net, name) for name in members)
    assert net.kind == kind and network_class(kind) is type(net) and isinstance(net.config, net.Config)
    inputs = net.example(2)
    assert len(inputs) == len(net.input_names) and all(len(tensor) == 2 for tensor in inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, net.example(2), strict=True))
    deployed = net.deployed()
    assert net.training and not any(m.training for m in deployed.modules())
    assert deployed.classifier is None and net.classifier is not None and deployed.config.num_classes == 0
    theirs = dict(deployed.named_parameters())
    assert all(theirs[n] is p for n, p in net.named_parameters() if n != "classifier.weight")
    outputs = deployed(*inputs)
    assert torch.equal(outputs, net.eval()(*inputs)) and net.same([outputs], [outputs]) == 0
    assert net.same([outputs], [2 * outputs]) < 1e-6 < net.same([outputs], [-outputs])
    assert set(net.feeding) == {"size", "resize", "range", "mean", "std"} and json.dumps(dict(net.feeding))
    assert net.exportable() == "" and net.parts()["total"] is not None
    assert torch.equal(net.extras()["classifier.weight"], net.classifier.weight) and deployed.extras() == {}
    again = rebuild(kind, json.loads(json.dumps(asdict(deployed.config))))
    assert again.config == deployed.config and set(again.state_dict()) == set(deployed.state_dict())


@pytest.mark.parametrize("name", ["embedder", "pruned_vit"])
def test_students_of_0_3_0_are_read_unchanged(name):
    net, facts = checkpoint.load_model(STORED / f"{name}.safetensors")
    expected, numbers = load_file(STORED / "expected.safetensors"), json.loads((STORED / "expected.json").read_text())
    images = expected[f"{name}.images"].float()
    with torch.no_grad():
        torch.testing.assert_close(net(images), expected[f"{name}.embedding"], rtol=1e-4, atol=1e-5)
        if name == "pruned_vit":
            found = net(images, torch.tensor([1, 0]))
            torch.testing.assert_close(found, expected["pruned_vit.of_cameras"], rtol=1e-4, atol=1e-5)
    assert facts == {"metrics": {"val/map": 0.5}} and not net.training
    assert {"macs": cost.macs(net), "parameters": cost.parameters(net)} == numbers[name]
    assert set(checkpoint.load_extras(STORED / f"{name}.safetensors")) == {"classifier.weight"}
    assert len(checkpoint.load_classifier(STORED / f"{name}.safetensors").weight) == 4


@pytest.mark.parametrize("name", ["embedder", "pruned_vit"])
def test_a_student_is_stored_as_0_3_0_did(tmp_path, name):
    net, facts = checkpoint.load_model(STORED / f"{name}.safetensors")
    net.classifier = checkpoint.load_classifier(STORED / f"{name}.safetensors")
    checkpoint.save_model(tmp_path, net, facts, name)
    for file in (f"{name}.safetensors", f"{name}.classifier.safetensors"):
        assert (tmp_path / file).read_bytes() == (STORED / file).read_bytes()
    old, new = (json.loads((folder / f"{name}.json").read_text()) for folder in (STORED, tmp_path))
    assert new.pop("kind") == net.kind and old.pop("kind") == name
    more = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]} if name == "embedder" else {}
    assert new == {**old, "model": old["model"] | more}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_stored_network_that_is_not_the_expected_one_is_named(tmp_path):
    path = tmp_path / "student.safetensors"
    checkpoint.save_model(tmp_path, Embedder(TINY), {})
    with pytest.raises(ValueError, match="another kind of network: embedder instead of token_pruning"):
        checkpoint.load_model(path, TINY_VIT)
    with pytest.raises(ValueError, match="another architecture: embedding_dim 8 instead of 9"):
        checkpoint.load_model(path, replace(TINY, embedding_dim=9))
    weights = load_file(path)
    count = len(weights)
    weights["neck.2.weight"] = weights["neck.2.weight"][:5]
    save_file(weights, path)
    with pytest.raises(ValueError, match=rf"{count - 1} of {count} tensors fit, .*: neck.2.weight is \(5, 64\), exp"):
        checkpoint.load_model(path)
    for description, words in (
        ({"kind": "embeder", "model": {}}, "no network 'embeder' in models; did you mean embedder"),
        (
            {"kind": "embedder", "model": {"backbone": "resnet18", "widht": 1.0}},
            "no setting 'widht'; did you mean width",
        ),
        ({"kind": "os.path", "model": {}}, "os.path is of Python's standard library"),
        ({"kind": "no_such.thing", "model": {}}, "no_such.thing cannot be imported"),
        ({"kind": "models.weights", "model": {}}, "models.weights has no NETWORK"),
    ):
        path.with_suffix(".json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match=words):
            checkpoint.load_model(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"student.json is not the description of a network"):
        checkpoint.load_model(path)


OWN = """
from dataclasses import dataclass

import torch
from torch import nn

from models.network import free_batch


@dataclass(frozen=True)
class TableConfig:
    sizes: tuple[int, int] = (3, 4)


class Table(nn.Module):
    kind = "own_networks.table"
    Config = TableConfig
    input_names, outputs = ("vectors",), ("sum", "largest")
    output, architecture, feeding = "two numbers", ("a linear layer",), {"range": "any"}

    def __init__(self, config):
        super().__init__()
        self.config, self.layer = config, nn.Linear(*config.sizes)
        self.register_buffer("queue", torch.ones(2, 3), persistent=False)

    def forward(self, x):
        y = self.layer(x)
        return y.sum(1), y.amax(1)

    def deployed(self):
        return self.eval()

    def example(self, count):
        return (torch.arange(count * self.config.sizes[0]).view(count, -1) / 7,)

    def parts(self):
        return {"total": self, "layer": self.layer}

    def extras(self):
        return {"bank.queue": self.queue, "bank.position": torch.tensor(1)}

    def same(self, ours, exported):
        return max((a - b).abs().max().item() for a, b in zip(ours, exported))

    def exportable(self):
        return "it is a table" if self.config.sizes[1] == 9 else ""

    def graphs(self):
        return {"": free_batch(self)}


NETWORK = Table
"""


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    """A package of the user's own, importable as ``own_networks``."""
    folder = tmp_path / "code" / "own_networks"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "table.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "own_networks"]:
        del sys.modules[name]


def test_a_network_from_elsewhere_is_stored_counted_and_exported(own_networks, tmp_path):
    net = rebuild("own_networks.table", {"sizes": [3, 5]})
    assert net.config.sizes == (3, 5)
    checkpoint.save_model(tmp_path, net, {"note": 1}, "table")
    save_file({"x": torch.ones(1)}, tmp_path / "table.other.safetensors")
    (tmp_path / "table.other.json").write_text("{}")  # another network, whose name begins like this one's
    found, facts = checkpoint.load_model(tmp_path / "table.safetensors", net.config)
    assert type(found) is type(net) and facts == {"note": 1} and torch.equal(found.layer.weight, net.layer.weight)
    extras = checkpoint.load_extras(tmp_path / "table.safetensors")
    assert set(extras) == {"bank.queue", "bank.position"} and extras["bank.queue"].shape == (2, 3)
    assert checkpoint.load_classifier(tmp_path / "table.safetensors") is None
    (tmp_path / "table.json").unlink()
    assert checkpoint.load_model(tmp_path / "table.safetensors", net.config)[0].config == net.config
    assert checkpoint.load_model(tmp_path / "table.safetensors", net.config, "own_networks.table")[1] == {}
    assert cost.macs(net) == cost.macs(net, "layer") == 15 and cost.parameters(net, "layer") == 20
    assert cost.images_per_second(net, 2, seconds=0.01) > 0
    with pytest.raises(ValueError, match="has the parts total, layer, not 'body'"):
        cost.macs(net, "body")
    assert export_onnx(net, tmp_path / "table.onnx") < 1e-5
    with pytest.raises(ValueError, match=r"own_networks.table has no ONNX file: it is a table"):
        export_onnx(rebuild("own_networks.table", {"sizes": [3, 9]}), tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()


def test_fields_that_came_later_change_no_fingerprint():
    config = replace(TINY, num_classes=0)
    assert list(identity(config)) == ["backbone", "embedding_dim", "image_size", "width", "num_classes"]
    assert identity(replace(config, mean=(0.5, 0.5, 0.5)))["mean"] == (0.5, 0.5, 0.5)
    assert identity(TINY_VIT) == asdict(TINY_VIT)

    @dataclass(frozen=True)
    class Later:
        size: int = 3
        classes: int = field(default=0, metadata=TRAINING_ONLY)
        more: float = field(default=1.0, metadata=SINCE_0_4)

    assert identity(Later(more=1.0)) == {"size": 3, "classes": 0} and "more" in identity(Later(more=2.0))
    assert deployed_config(Later(classes=5, more=2.0)) == Later(more=2.0)


def test_a_shared_copy_has_the_weights_and_its_own_mode():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    copied = shared_copy(net).eval()
    assert net[0].training and copied[1].weight is net[1].weight and copied[0].running_mean is net[0].running_mean


def test_cost_does_not_depend_on_what_only_training_has():
    bare = Embedder(replace(TINY, num_classes=0))
    assert cost.parameters(Embedder(TINY)) == cost.parameters(bare) == sum(p.numel() for p in bare.parameters())
    assert cost.macs(Embedder(TINY)) == cost.macs(bare)
    assert issubclass(Embedder, EmbeddingNetwork)
