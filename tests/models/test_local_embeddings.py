"""What losses see inside an embedder: maps of its stages, and embeddings of the parts of an image."""

import pytest
import torch

from models.embedder import Embedder, EmbedderConfig


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_100", "mobilenetv2_100"])
def test_maps_and_local_embeddings(backbone):
    torch.manual_seed(0)
    net = Embedder(EmbedderConfig(backbone=backbone, embedding_dim=16, image_size=(64, 32))).eval()
    images = torch.randn(3, 3, 64, 32)
    channels = {"resnet18": (64, 128, 256, 512), "mobilenetv3_small_100": (16, 24, 48, 576),
                "mobilenetv2_100": (24, 32, 96, 320)}[backbone]  # fmt: skip
    for stage, width in enumerate(channels, 1):
        embedding, stage_map = net.with_map(images, stage)
        assert stage_map.shape[1] == width
        torch.testing.assert_close(embedding, net(images), rtol=1e-5, atol=1e-5)
    embedding, (local, half) = net.local(images, (4, 1))
    assert local.shape == (3, 16, 16) and half.shape == (3, 1, 16)
    torch.testing.assert_close(half[:, 0], embedding, rtol=1e-4, atol=1e-5)  # one cell is the whole image
    torch.testing.assert_close(embedding, net(images), rtol=1e-5, atol=1e-5)
    features = net.backbone.forward_features(images)  # 4 × 2 positions (2 × 1): square grids repeat columns
    assert torch.equal(local.view(3, 4, 4, 16)[:, :, 0], local.view(3, 4, 4, 16)[:, :, 1])
    corner = features[:, :, 0, 0]
    torch.testing.assert_close(local[:, 0], net.neck(corner), rtol=1e-5, atol=1e-5)


def test_a_swin_teacher_has_local_embeddings():
    net = Embedder(EmbedderConfig(backbone="swinv2_tiny_window8_256", embedding_dim=16, image_size=(64, 64))).eval()
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        embedding, (local,) = net.local(images, (2,))
        torch.testing.assert_close(embedding, net(images), rtol=1e-5, atol=1e-5)
        assert local.shape == (1, 4, 16)
        net = Embedder(EmbedderConfig(backbone="test_vit", embedding_dim=16, image_size=(160, 160))).eval()
        with pytest.raises(ValueError, match="test_vit has no feature map"):
            net.local(torch.zeros(1, 3, 160, 160), (2,))
