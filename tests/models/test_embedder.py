"""The networks of the paper: sizes, costs, strides; what goes wrong with names and widths; a network of one's own."""

import sys

import pytest
import torch

from models.embedder import Embedder, EmbedderConfig, check_backbone, check_buildable, statistics
from models.network import PIXELS, deployed_config
from orchestrator.datasets.augmentation import normalised
from orchestrator.evaluation.cost import images_per_second, macs, parameters


@pytest.mark.parametrize(
    ("backbone", "size", "million_parameters", "giga_macs"),
    [
        ("resnet18.tv_in1k", (64, 64), 11.44, 0.249),
        ("resnet18.tv_in1k", (128, 128), 11.44, 0.995),
        ("resnet18.tv_in1k", (160, 80), 11.44, 0.778),
        ("resnet101.tv_in1k", (256, 256), 43.55, 12.956),
        ("resnet101.tv_in1k", (320, 160), 43.55, 10.12),
        ("mobilenetv3_small_100", (64, 64), 1.22, 0.009),
    ],
)
def test_costs_of_the_paper(backbone, size, million_parameters, giga_macs):
    net = Embedder(EmbedderConfig(backbone=backbone, image_size=size))
    assert parameters(net) / 1e6 == pytest.approx(million_parameters, abs=0.005)
    assert macs(net) / 1e9 == pytest.approx(giga_macs, abs=0.0006 if giga_macs < 1 else 0.005)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "test_vit"])
def test_any_backbone_gives_raw_embeddings(backbone):
    size = (160, 160) if backbone == "test_vit" else (64, 32)
    net = Embedder(EmbedderConfig(backbone=backbone, embedding_dim=24, image_size=size, num_classes=5)).eval()
    pooled, embedding = net.with_pooled(torch.randn(2, 3, *size))
    assert embedding.shape == (2, 24) and net.classifier(embedding).shape == (2, 5) and pooled.shape[0] == 2
    assert torch.equal(net(torch.zeros(1, 3, *size)), net.with_pooled(torch.zeros(1, 3, *size))[1])


def test_swin_is_pooled_over_positions():
    config = EmbedderConfig(backbone="swinv2_tiny_window8_256", image_size=(256, 256))
    net = Embedder(config).eval()
    with torch.no_grad():
        features = net.backbone.forward_features(torch.zeros(1, 3, 256, 256))
        assert features.shape == (1, 8, 8, 768)
        assert torch.allclose(net.pool(torch.zeros(1, 3, 256, 256)), features.flatten(1, 2).mean(1))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet10t"])
def test_last_stage_keeps_its_resolution_without_dilation(backbone):
    net = Embedder(EmbedderConfig(backbone=backbone, image_size=(64, 64)))
    features = net.backbone.forward_features(torch.zeros(1, 3, 64, 64))
    assert features.shape[-2:] == (4, 4)
    convolutions = [m for m in net.backbone.layer4.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.stride == (1, 1) and m.dilation == (1, 1) for m in convolutions)
    pool = net.backbone.maxpool
    assert (pool.kernel_size, pool.stride, pool.padding) == (2, 2, 0)


def test_building_leaves_the_running_statistics_alone():
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(32, 32), width=0.25))
    assert net.training and all(
        m.num_batches_tracked == 0 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)
    )
    assert net.backbone.num_features == 128


def test_initial_values_of_the_neck():
    torch.manual_seed(0)
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(32, 32), num_classes=200))
    assert net.neck[2].bias is None and net.classifier.bias is None
    assert net.neck[2].weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)  # fan-out
    assert net.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)


@pytest.mark.parametrize(
    ("config", "pretrained", "message"),
    [
        ({"backbone": "resnet81"}, False, "timm has no model 'resnet81'"),
        ({"backbone": "mobilenetv2_100", "width": 0.5}, False, "width is for ResNets"),
        ({"backbone": "resnet18", "width": 0.5}, True, "no pretrained weights for width 0.5"),
        ({"backbone": "resnet18", "width": 0.0}, False, "must be positive"),
        ({"backbone": "resnet18", "std": (1.0, 1.0, 0.0)}, False, "std above 0"),
        ({"backbone": "resnet18.tv_in1"}, False, "timm has no weights 'tv_in1' of resnet18; it has a1_in1k"),
        ({"backbone": "resnet18."}, False, "timm has no weights '' of resnet18"),
        ({"backbone": "vit_small_patch16_224", "image_size": (64, 64)}, False, "takes no images of 64×64 pixels"),
        ({"backbone": "test_vit2.r160_in1k_"}, True, "timm has no weights 'r160_in1k_'"),
        ({"backbone": "mobilenetv2_035"}, True, "timm has no pretrained weights of mobilenetv2_035"),
    ],
)
def test_bad_configurations(config, pretrained, message):
    for build in (Embedder, check_buildable):
        with pytest.raises(ValueError, match=message):
            build(EmbedderConfig(**config), pretrained=pretrained)


def test_the_classifier_is_not_part_of_the_retrieval_model():
    config = EmbedderConfig(backbone="resnet18", num_classes=9)
    assert deployed_config(config).num_classes == 0


def test_throughput_is_positive_and_leaves_the_mode():
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(16, 16), width=0.125))
    assert images_per_second(net, 4, seconds=0.05) > 0 and net.training


def test_embeddings_are_float32_under_autocast():
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(16, 16), width=0.125)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize(
    "backbone", ["resnet18.tv_in1k", "mobilenetv3_small_100", "swinv2_tiny_window8_256", "test_vit"]
)
def test_what_can_be_built_passes_the_check_without_random_numbers(backbone):
    size = {"test_vit": (160, 160), "swinv2_tiny_window8_256": (256, 256)}.get(backbone, (64, 32))
    before = torch.get_rng_state()
    check_buildable(EmbedderConfig(backbone=backbone, image_size=size), pretrained=True)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"weights: there is no file none.pth"):
        check_buildable(EmbedderConfig(backbone=backbone, image_size=size), weights="none.pth")


def test_pixels_are_imagenet_s_those_of_the_weights_or_any():
    assert statistics("imagenet") == PIXELS["imagenet"] and statistics("weights", "test_vit") == PIXELS["half"]
    with pytest.raises(ValueError, match="pixels must be weights or one of imagenet, half, got 'tanh'"):
        statistics("tanh")
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(16, 16), width=0.125))
    assert net.pixels == PIXELS["imagenet"]
    mean, std = statistics("half")
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(16, 16), width=0.125, mean=list(mean), std=std))
    assert net.feeding["mean"] == [0.5, 0.5, 0.5]
    frames = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    assert torch.equal(normalised(frames, net.pixels), normalised(frames, "half"))
    assert not torch.equal(normalised(frames, net.pixels), normalised(frames))


OWN = """
import timm, torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())

def pooled(pretrained=False):
    return nn.Sequential(small(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5 + 2 * pretrained))

def of_timm(pretrained=False):
    return timm.create_model("resnet10t", pretrained=False, num_classes=0)

class Two(nn.Module):
    def forward(self, x):
        return x, x

def two():
    return Two()

def tokens():
    return nn.Flatten(2)

def text():
    return "no module"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_backbones.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: EmbedderConfig(backbone=f"own_backbones:{name}", image_size=(16, 12), embedding_dim=4)
    sys.modules.pop("own_backbones", None)


def test_a_network_of_the_user_s_own(own):
    x = torch.randn(2, 3, 16, 12)
    net = Embedder(own("small")).eval()
    check_backbone("own_backbones:small")
    assert torch.equal(net.pool(x), net.backbone(x).mean((2, 3))) and net(x).shape == (2, 4)
    assert net.local(x, (1, 2))[1][1].shape == (2, 4, 4) and "the user's own" in net.architecture[0]
    with pytest.raises(ValueError, match="own_backbones:small has no stages"):
        net.with_map(x, 4)
    assert Embedder(own("pooled"), pretrained=True).neck[0].num_features == 7
    assert Embedder(own("pooled")).eval().pool(x).shape == (2, 5)
    of_timm = Embedder(own("of_timm")).eval()
    assert of_timm.backbone.layer4[0].conv1.stride == (2, 2)  # the user's networks are left as they are
    assert of_timm.with_map(x, 4)[1].shape[1] == 512 and of_timm.pool(x).shape == (2, 512)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("smal", False, "own_backbones has no function 'smal'; did you mean small"),
        ("small", True, "own_backbones:small takes no argument pretrained"),
        ("two", False, r"own_backbones:two has no features: it returns a tuple for one image"),
        ("tokens", False, r"has no features: it returns \(1, 3, 192\) for one image"),
        ("text", False, "own_backbones:text returns a str; expected a torch module"),
    ],
)
def test_own_networks_that_are_none(own, name, pretrained, message):
    for build in (Embedder, check_buildable):
        with pytest.raises(ValueError, match=message):
            build(own(name), pretrained=pretrained)


def test_own_networks_that_are_nowhere(own):
    for name, message in (
        ("no_such_package.nets:small", r"no_such_package.nets cannot be imported: .*PYTHONPATH"),
        ("os:abort", "os is of Python's standard library"),
        (":small", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            check_backbone(name)
    with pytest.raises(ValueError, match="width is for ResNets of timm"):
        Embedder(EmbedderConfig(backbone="own_backbones:small", width=0.5))
