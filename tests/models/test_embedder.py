"""The networks of the paper: sizes, costs, strides; and what goes wrong with names and widths."""

import pytest
import torch

from models.embedder import Embedder, EmbedderConfig, retrieval_config
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
    assert macs(net, size) / 1e9 == pytest.approx(giga_macs, abs=0.0006 if giga_macs < 1 else 0.005)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "test_vit"])
def test_any_backbone_gives_raw_embeddings(backbone):
    size = (160, 160) if backbone == "test_vit" else (64, 32)
    net = Embedder(EmbedderConfig(backbone=backbone, embedding_dim=24, image_size=size, num_classes=5)).eval()
    pooled, embedding = net.parts(torch.randn(2, 3, *size))
    assert embedding.shape == (2, 24) and net.classifier(embedding).shape == (2, 5) and pooled.shape[0] == 2
    assert torch.equal(net(torch.zeros(1, 3, *size)), net.parts(torch.zeros(1, 3, *size))[1])


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
    ],
)
def test_bad_configurations(config, pretrained, message):
    with pytest.raises(ValueError, match=message):
        Embedder(EmbedderConfig(**config), pretrained=pretrained)


def test_the_classifier_is_not_part_of_the_retrieval_model():
    config = EmbedderConfig(backbone="resnet18", num_classes=9)
    assert retrieval_config(config).num_classes == 0


def test_throughput_is_positive_and_leaves_the_mode():
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(16, 16), width=0.125))
    assert images_per_second(net, torch.zeros(4, 3, 16, 16), seconds=0.05) > 0 and net.training


def test_embeddings_are_float32_under_autocast():
    net = Embedder(EmbedderConfig(backbone="resnet18", image_size=(16, 16), width=0.125)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 16, 16)).dtype == torch.float32
