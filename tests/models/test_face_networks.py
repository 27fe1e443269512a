"""Networks of face recognition: counts of the public ones, naive twins in public layouts, colours, refused files."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.face_network import FaceConfig
from models.iresnet import LAYERS, IResNet, IResNetConfig
from models.mobilefacenet import SIZES, MobileFaceNet, MobileFaceNetConfig
from models.network import deployed_config, rebuild
from orchestrator import checkpoint
from orchestrator.evaluation import cost
from orchestrator.onnx_file import export_onnx

SMALL = {"width": 0.125, "embedding_dim": 6, "image_size": (32, 48)}
IRESNET = IResNetConfig(layers=(1, 2, 1, 1), **SMALL)
MOBILE = MobileFaceNetConfig(blocks=(1, 2, 1, 1), **SMALL)
TINY = {"iresnet": (IResNet, IRESNET), "mobilefacenet": (MobileFaceNet, MOBILE)}


@pytest.fixture(params=TINY)
def tiny(request):
    return TINY[request.param]


def images(count=3, size=SMALL["image_size"], seed=0):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def randomised(net, seed=0):
    """Statistics, scales and slopes that tell every tensor from every other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.5)
    return net.eval()


@pytest.mark.parametrize(
    ("size", "millions", "giga_macs"), [(18, 24.03, 2.61), (34, 34.14, 4.46), (50, 43.59, 6.31), (100, 65.16, 12.09)]
)
def test_iresnets_cost_what_the_public_ones_do(size, millions, giga_macs):
    with FakeTensorMode():
        net = IResNet(IResNetConfig(layers=LAYERS[size]))
        assert round(cost.parameters(net) / 1e6, 2) == millions and round(cost.macs(net) / 1e9, 2) == giga_macs


@pytest.mark.parametrize(
    ("size", "millions", "giga_macs", "digits"),
    [("x1", 1.20, 0.221, 3), ("x2", 2.06, 0.438, 3), ("large", 6.31, 1.82, 2)],
)
def test_mobilefacenets_cost_what_the_public_ones_do(size, millions, giga_macs, digits):
    with FakeTensorMode():
        for affine in (True, False):
            net = MobileFaceNet(MobileFaceNetConfig(affine=affine, **SIZES[size]))
            assert round(cost.parameters(net) / 1e6, 2) == millions
            assert round(cost.macs(net) / 1e9, digits) == giga_macs


class OtherBlock(nn.Module):
    """A residual block of the other public code base."""

    def __init__(self, came, left, stride, pool, inner):
        super().__init__()
        if came == left and (pool or stride == 1):
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(came, left, 1, stride, bias=False), nn.BatchNorm2d(left))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(came), nn.Conv2d(came, left, 3, 1, 1, bias=False),
            *([nn.BatchNorm2d(left)] if inner else []), nn.PReLU(left),
            nn.Conv2d(left, left, 3, stride, 1, bias=False), nn.BatchNorm2d(left),
        )  # fmt: skip

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class OtherIResNet(nn.Module):
    """The twin of :data:`IRESNET`, in the layout of the other public code base."""

    def __init__(self, pool=False, inner=True, affine=True):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        blocks = [(8, 8, 2), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.body = nn.Sequential(*(OtherBlock(*block, pool, inner) for block in blocks))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(64), nn.Dropout(0.4), nn.Flatten(),
            nn.Linear(64 * 2 * 3, 6), nn.BatchNorm1d(6, affine=affine),
        )  # fmt: skip

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))


class Layers(nn.Module):
    """Any module of ArcFace's MobileFaceNet: everything in it is a number in "layers"."""

    def __init__(self, *layers, residual=False):
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def unit(came, left, kernel=1, stride=1, padding=0, groups=1, slope=True):
    convolution = nn.Conv2d(came, left, kernel, stride, padding, groups=groups, bias=False)
    return Layers(convolution, nn.BatchNorm2d(left), *([nn.PReLU(left)] if slope else []))


def bottleneck(came, inside, left, stride=1):
    return Layers(unit(came, inside), unit(inside, inside, 3, stride, 1, inside), unit(inside, left, slope=False),
                  residual=stride == 1)  # fmt: skip


class ArcFaceMobile(nn.Module):
    """The twin of :data:`MOBILE` and of its larger forms, in the layout of ArcFace's public code."""

    def __init__(self, scale=1, first=1, affine=True):
        super().__init__()
        low, high = 8 * scale, 16 * scale
        self.layers = nn.ModuleList([
            unit(3, low, 3, 2, 1),
            unit(low, low, 3, 1, 1, groups=8) if first == 1
            else Layers(*(bottleneck(low, 16, low) for _ in range(first))),
            bottleneck(low, 16, low, 2), Layers(bottleneck(low, 16, low), bottleneck(low, 16, low)),
            bottleneck(low, 32, high, 2), Layers(bottleneck(high, 32, high)),
            bottleneck(high, 64, high, 2), Layers(bottleneck(high, 32, high)),
        ])  # fmt: skip
        self.conv_sep = unit(high, 64)
        self.features = Layers(
            unit(64, 64, (2, 3), groups=64, slope=False), nn.Flatten(),
            nn.Linear(64, 6, bias=False), nn.BatchNorm1d(6, affine=affine),
        )  # fmt: skip

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.features(self.conv_sep(x))


TWINS = {
    "conv": (OtherIResNet, {}, IResNet, IRESNET),
    "pool": (OtherIResNet, {"pool": True}, IResNet, replace(IRESNET, shortcut="pool")),
    "no inner norm": (OtherIResNet, {"inner": False}, IResNet, replace(IRESNET, inner_norm=False)),
    "last norm without scale": (OtherIResNet, {"affine": False}, IResNet, IRESNET),
    "x1": (ArcFaceMobile, {}, MobileFaceNet, MOBILE),
    "x2": (ArcFaceMobile, {"scale": 2}, MobileFaceNet, replace(MOBILE, scale=2)),
    "large": (ArcFaceMobile, {"scale": 4, "first": 2}, MobileFaceNet, replace(MOBILE, scale=4, blocks=(2, 2, 1, 1))),
    "no affine": (ArcFaceMobile, {"affine": False}, MobileFaceNet, replace(MOBILE, affine=False)),
    "x1 without scale": (ArcFaceMobile, {"affine": False}, MobileFaceNet, MOBILE),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_public_file_is_read_and_computes_what_its_network_does(name, tmp_path):
    theirs, settings, ours, config = TWINS[name]
    twin = randomised(theirs(**settings))
    torch.save(twin.state_dict(), tmp_path / "w.pth")
    net = ours(config, weights=str(tmp_path / "w.pth")).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(images()), twin(images()), rtol=1e-5, atol=1e-5)


def of_distillation(name):
    """A name of ours as files of face distillation have it."""
    parts = [f"model.{part}" if part.isdigit() else part for part in name.split(".")]
    return ".".join([*(["output_layer"] if parts[0] in ("conv_6_dw", "linear", "bn") else []), *parts])


@pytest.mark.parametrize("output", [True, False])
def test_files_of_face_distillation_are_read(tmp_path, output):
    source = randomised(MobileFaceNet(MOBILE))
    state = {of_distillation(name): tensor for name, tensor in source.state_dict().items()}
    assert {
        "conv1.conv.weight", "conv2_dw.bn.bias", "conv_23.project.bn.weight", "conv_3.model.1.conv_dw.prelu.weight",
        "conv_34.conv.conv.weight", "conv_4.model.0.project.conv.weight", "conv_45.conv_dw.bn.running_mean",
        "conv_5.model.0.conv.prelu.weight", "conv_6_sep.prelu.weight", "output_layer.conv_6_dw.conv.weight",
        "output_layer.conv_6_dw.bn.weight", "output_layer.linear.weight", "output_layer.bn.running_var",
    } <= set(state)  # fmt: skip
    if not output:
        state = {name.removeprefix("output_layer."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "w.pth")
    found = MobileFaceNet(MOBILE, weights=str(tmp_path / "w.pth")).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in source.state_dict().items())


def test_an_iresnet_has_the_names_of_the_public_margin_code():
    names = {name.rpartition(".")[0] for name in IResNet(IRESNET).state_dict()}
    block = ["bn1", "conv1", "bn2", "prelu", "conv2", "bn3"]
    expected = {"conv1", "bn1", "prelu", "bn2", "fc", "features"}
    for stage, count in enumerate((1, 2, 1, 1), 1):
        expected |= {f"layer{stage}.{b}.{layer}" for b in range(count) for layer in block}
        expected |= {f"layer{stage}.0.downsample.{at}" for at in (0, 1)}
    assert names == expected
    assert "layer1.0.downsample.0.weight" not in IResNet(replace(IRESNET, shortcut="pool")).state_dict()


@pytest.mark.parametrize("form", ["pth", "safetensors", "module.", "state_dict", "no counters", "with classifiers"])
def test_forms_of_files(form, tiny, tmp_path):
    cls, config = tiny
    source = randomised(cls(replace(config, num_classes=4)))
    state = {n: t for n, t in source.state_dict().items() if not n.startswith("classifier")}
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, file)
    elif form == "state_dict":  # of a training with Lightning, whose head is beside the network
        torch.save(
            {"state_dict": {f"model.{n}": t for n, t in state.items()} | {"head.kernel": torch.ones(6, 9)}}, file
        )
    elif form == "module.":
        torch.save({f"module.{n}": t for n, t in state.items()}, file)
    elif form == "no counters":
        torch.save({n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}, file)
    else:
        torch.save(source.state_dict() if form == "with classifiers" else state, file)
    for classes in (0, 4, 5):
        net = cls(replace(config, num_classes=classes), weights=str(file))
        found = net.state_dict()
        assert all(torch.equal(t, found[n]) for n, t in state.items() if not n.endswith("num_batches_tracked"))
        taken = classes == 4 and torch.equal(net.classifier.weight, source.classifier.weight)
        assert taken == (classes == 4 and form == "with classifiers")


def test_a_file_of_another_network_is_refused_in_one_line(tmp_path):
    deeper = replace(IRESNET, layers=(2, 2, 1, 1))  # its file holds every name and shape of the other
    older, bare = replace(IRESNET, inner_norm=False), replace(MOBILE, affine=False)
    cases = [
        (IResNet(deeper), IResNet, IRESNET, "layer1.1.bn1.weight is not the network's"),
        (IResNet(IRESNET), IResNet, deeper, "layer1.1.bn1.weight is missing"),
        (IResNet(replace(IRESNET, shortcut="pool")), IResNet, IRESNET, "layer1.0.downsample.0.weight is missing"),
        (IResNet(IRESNET), IResNet, replace(IRESNET, shortcut="pool"), "downsample.0.weight is not the network's"),
        (OtherIResNet(inner=False), IResNet, IRESNET, "layer1.0.bn2.bias is missing"),
        (OtherIResNet(), IResNet, older, "layer1.0.conv2.weight is (8,), expected (8, 8, 3, 3)"),
        (IResNet(replace(IRESNET, embedding_dim=7)), IResNet, IRESNET, "fc.weight is (7, 384), expected (6, 384)"),
        (IResNet(replace(IRESNET, image_size=(32, 32))), IResNet, IRESNET, "fc.weight is (6, 256), expected (6, 384)"),
        (MobileFaceNet(MOBILE), IResNet, IRESNET, "the first that does not: conv1.weight is missing"),
        (ArcFaceMobile(scale=2), MobileFaceNet, MOBILE, "conv1.conv.weight is (16, 3, 3, 3), expected (8, 3, 3, 3)"),
        (MobileFaceNet(MOBILE), MobileFaceNet, bare, "bn.weight is not the network's"),
        (nn.Linear(2, 2), MobileFaceNet, MOBILE, "0 of "),
    ]
    for source, cls, config, words in cases:
        torch.save(source.state_dict(), tmp_path / "other.pth")
        with pytest.raises(ValueError) as error:
            cls(config, weights=str(tmp_path / "other.pth"))
        assert "other.pth holds another network: " in str(error.value) and words in str(error.value)
        assert f"give {cls.kind} the settings that the file was trained with" in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    for name in ("damaged.pth", "none.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            IResNet(IRESNET, weights=str(tmp_path / name))
    torch.save({"conv1": nn.Linear}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        MobileFaceNet(MOBILE, weights=str(tmp_path / "code.pth"))


def test_nothing_can_be_downloaded(tiny, tmp_path):
    cls, config = tiny
    with pytest.raises(ValueError, match=f"weights of {cls.kind} to download; give weights, a local file"):
        cls(config, pretrained=True)
    torch.save(cls(config).state_dict(), tmp_path / "w.pth")
    assert cls(config, pretrained=True, weights=str(tmp_path / "w.pth")).config == config


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (FaceConfig, {"image_size": (112, 100)}, "image_size must be two multiples of 16, such as .*112, 100"),
        (FaceConfig, {"image_size": (0, 112)}, "image_size must be two multiples of 16"),
        (FaceConfig, {"image_size": (112,)}, "image_size must be two multiples of 16"),
        (FaceConfig, {"embedding_dim": 0}, "embedding_dim must be at least 1, got 0"),
        (FaceConfig, {"width": 0}, "width must be above 0, got 0"),
        (FaceConfig, {"color": "gbr"}, "color must be one of rgb, bgr, got 'gbr'"),
        (FaceConfig, {"num_classes": -1}, "num_classes must be 0, for no classifier, or more, got -1"),
        (FaceConfig, {"std": (0.5, 0, 0.5)}, "mean and std must be three numbers, std above 0"),
        (FaceConfig, {"mean": (0.5,)}, "mean and std must be three numbers"),
        (IResNetConfig, {"layers": (3, 4, 6)}, "layers must be four numbers of blocks, such as .* got .3, 4, 6."),
        (IResNetConfig, {"layers": (3, 4, 0, 3)}, "layers must be four numbers of blocks"),
        (IResNetConfig, {"shortcut": "max"}, "shortcut must be one of conv, pool, got 'max'"),
        (IResNetConfig, {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        (MobileFaceNetConfig, {"blocks": (0, 4, 6, 2)}, "blocks must be four numbers of blocks, such as .* got .0, 4"),
        (MobileFaceNetConfig, {"scale": 0}, "scale must be at least 1, got 0"),
        (MobileFaceNetConfig, {"image_size": (96, 90)}, "image_size must be two multiples of 16"),
    ],
)
def test_settings_outside_their_range_are_named(config, settings, words):
    with pytest.raises(ValueError, match=words) as error:
        config(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(16, 16), (64, 32), (112, 96)])
def test_any_multiple_of_16_gives_one_raw_embedding_per_image(tiny, size):
    cls, config = tiny
    net = cls(replace(config, image_size=size, num_classes=5))
    found = net(images(2, size))
    assert found.shape == (2, 6) and net.classifier(found).shape == (2, 5) and net.classifier.bias is None
    assert net.config.grid == (size[0] // 16, size[1] // 16)
    assert not torch.allclose(found.norm(dim=1), torch.ones(2))


def test_initial_weights():
    torch.manual_seed(0)
    net = IResNet(IResNetConfig(layers=(1, 1, 1, 1), width=0.5, embedding_dim=64, image_size=(32, 32), num_classes=300))
    assert net.layer4[0].conv2.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert net.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.fc.bias is not None and torch.equal(net.features.weight, torch.ones(64))
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["features.weight"]
    net(images(4, (32, 32))).square().sum().backward()
    assert net.features.weight.grad is None and net.conv1.weight.grad.abs().sum() > 0
    mobile = MobileFaceNet(MobileFaceNetConfig(blocks=(1, 1, 1, 1), embedding_dim=64, image_size=(32, 32)))
    for weight, fan_out in ((mobile.conv_6_sep.conv.weight, 512), (mobile.linear.weight, 64)):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert mobile.linear.bias is None and mobile.conv2_dw.prelu.weight.shape == (64,)
    assert all(p.requires_grad for p in mobile.parameters())
    assert MobileFaceNet(replace(MOBILE, affine=False)).bn.weight is None


def test_with_bgr_the_network_turns_the_colours_of_rgb_images_itself(tiny, tmp_path):
    cls, config = tiny
    net = randomised(cls(config))
    turned = cls(replace(config, color="bgr")).eval()
    turned.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(turned(images()), net(images().flip(1)))
        assert not torch.allclose(turned(images()), net(images()))
    assert turned.architecture[1:] == net.architecture and "blue, green, red first" in turned.architecture[0]
    assert turned.feeding == net.feeding and "RGB" in net.feeding["range"]
    assert turned.feeding["mean"] == turned.feeding["std"] == [0.5, 0.5, 0.5]
    checkpoint.save_model(tmp_path, turned, {})
    found, _ = checkpoint.load_model(tmp_path / "student.safetensors", turned.config)
    with torch.no_grad():
        assert torch.equal(found(images()), turned(images()))
    with pytest.raises(ValueError, match="another architecture: color bgr instead of rgb"):
        checkpoint.load_model(tmp_path / "student.safetensors", config)


def test_the_pool_shortcut_takes_every_second_position():
    block = IResNet(replace(IRESNET, shortcut="pool")).layer1[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = images(2, (8, 6)).repeat(1, 3, 1, 1)[:, :8]
    with torch.no_grad():
        assert torch.equal(block(x), x[:, :, ::2, ::2])


def test_the_neck_is_in_float32_under_autocast(tiny):
    cls, config = tiny
    net = randomised(cls(config))
    seen = []
    last = net.get_submodule(net.last_norm)
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    first = net.conv1 if cls is IResNet else net.conv1.conv
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net(images())
    assert seen == [torch.bfloat16, torch.float32] and found.dtype == torch.float32
    with torch.no_grad():
        assert nn.functional.cosine_similarity(found, net(images())).min() > 0.99
    assert net.double()(images().double()).dtype == torch.float64


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_no_step_depends_on_the_data_so_none_waits_for_the_device(tiny, color):
    cls, config = tiny
    with FakeTensorMode():  # reading a value, as item() and bool() do, is an error here
        net = cls(replace(config, num_classes=3, color=color))
        net.classifier(net(images())).logsumexp(1).mean().backward()
        assert net.classifier.weight.grad.shape == (3, 6)


def test_only_training_drops_out():
    net = IResNet(replace(IRESNET, dropout=0.4))
    assert deployed_config(net.config) == replace(IRESNET, dropout=0.0) and net.deployed().config.dropout == 0
    torch.manual_seed(0)
    assert not torch.equal(net(images()), net(images()))
    again = rebuild("iresnet", {"layers": [1, 2, 1, 1], **SMALL, "image_size": [32, 48]})
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), net.eval()(images()))


@pytest.mark.parametrize(
    "config", [replace(IRESNET, layers=(1, 1, 1, 1), shortcut="pool", color="bgr"), replace(MOBILE, affine=False)]
)
def test_the_exported_graph_computes_the_same(config, tmp_path):
    cls = IResNet if isinstance(config, IResNetConfig) else MobileFaceNet
    net = randomised(cls(replace(config, num_classes=3)))
    assert export_onnx(net, tmp_path / "net.onnx") < 1e-5
