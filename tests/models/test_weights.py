"""Starting weights: files of timm, torchvision and trainings; what does not fit is named or refused."""

import warnings

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from models.embedder import Embedder, EmbedderConfig
from models.weights import read, start


def randomised(net, seed=0):
    """Norms and biases that tell every tensor from every other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.05)
    return net.eval()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("mobilenet_v2", "mobilenetv2_100"),
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("mobilenet_v3_large", "mobilenetv3_large_100"),
    ],
)
def test_networks_of_torchvision_compute_the_same(tmp_path, theirs, ours):
    source, net = randomised(getattr(torchvision.models, theirs)()), timm.create_model(ours, num_classes=0).eval()
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    told = start(net, tmp_path / "theirs.pth")
    assert ("adds 0.001 to the variance" in told) == ("v3" in theirs)
    assert "not used" not in told and "not in" not in told
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and "v3" in theirs:
            module.eps = 0.001
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if "mobilenet" in theirs:
            expected = source.features(x).mean((2, 3))
            expected = source.classifier[1](source.classifier[0](expected)) if "v3" in theirs else expected
        else:
            source.fc = torch.nn.Identity()
            expected = source(x)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "form", ["pth", "safetensors", "state_dict", "model", "module.", "student.", "module.backbone."]
)
def test_forms_of_files(tmp_path, form):
    source, net = randomised(timm.create_model("resnet18", num_classes=7)), timm.create_model("resnet18", num_classes=0)
    state, file = source.state_dict(), tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, file)
    elif form in ("state_dict", "model"):
        torch.save({form: state, "epoch": 3}, file)
    elif form.endswith("."):
        torch.save({form + name: tensor for name, tensor in state.items()}, file)
    else:
        torch.save(state, file)
    assert start(net, file) == ""  # the classifier is left out
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_a_student_s_own_file_starts_a_backbone(tmp_path):
    config = EmbedderConfig(backbone="resnet18", image_size=(16, 16), width=0.125, embedding_dim=8)
    source = randomised(Embedder(config))
    save_file(source.state_dict(), tmp_path / "student.safetensors")
    with pytest.warns(UserWarning, match=r"student.safetensors: 9 of its tensors are not used, such as neck.0.bias"):
        net = Embedder(config, pretrained=True, weights=str(tmp_path / "student.safetensors"))
    assert torch.equal(net.backbone.layer4[1].conv2.weight, source.backbone.layer4[1].conv2.weight)
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Embedder(config, weights=str(tmp_path / "backbone.pth"))


def test_mobilenet_s_unused_head_is_no_tensor_too_many(tmp_path):
    torch.save(timm.create_model("mobilenetv3_small_100").state_dict(), tmp_path / "small.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Embedder(
            EmbedderConfig(backbone="mobilenetv3_small_100", image_size=(32, 32)), weights=str(tmp_path / "small.pth")
        )


def test_part_of_a_network_is_reported_and_another_one_refused(tmp_path):
    net = timm.create_model("resnet18", num_classes=0)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("layer4.1") and "num_batches" not in k}
    torch.save({**state, "projector.weight": torch.ones(2)}, tmp_path / "part.pth")
    told = start(net, tmp_path / "part.pth")
    assert told.endswith("1 of its tensors are not used, such as projector.weight; "
                         "10 of the network's 120 are not in it, such as layer4.1.conv1.weight")  # fmt: skip
    for other in ("resnet50", "efficientnet_b0", "vit_tiny_patch16_224"):
        torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
        with pytest.raises(
            ValueError, match=r"other.pth holds another network: \d+ of 120 tensors fit, the first that"
        ):
            start(net, tmp_path / "other.pth")
    for builder in (torchvision.models.efficientnet_b0, torchvision.models.mobilenet_v3_small):
        torch.save(builder().state_dict(), tmp_path / "other.pth")
        for ours in ("efficientnet_b0", "mobilenetv2_100", "mobilenetv3_large_100"):
            with pytest.raises(ValueError, match="holds another network"):
                start(timm.create_model(ours, num_classes=0), tmp_path / "other.pth")


def test_other_names_are_translated_by_the_caller(tmp_path):
    net, state = timm.create_model("resnet18", num_classes=0), timm.create_model("resnet18", num_classes=0).state_dict()
    torch.save({f"net/{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    assert start(net, tmp_path / "w.pth", rename=lambda name: name.removeprefix("net/")) == ""


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    torch.save({"f": torch.nn.Linear}, tmp_path / "code.pth")
    for name in ("none.pth", "damaged.pth", "damaged.safetensors", "code.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="hold no tensors by name"):
        read(tmp_path / "empty.pth")
    torch.save({"module.a": torch.ones(1), "student.a": torch.ones(1)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="hold two tensors a"):
        start(torch.nn.Linear(1, 1), tmp_path / "two.pth")
