"""Backbones by name: any network of timm, or a function of the user's own that returns one.

"resnet18.tv_in1k" is a name of timm. "my_package.my_networks:small" is a function: it has no arguments, or takes
``pretrained``, and returns a torch module that maps normalised images (B, 3, H, W) to features (B, C) or to a map
(B, C, H, W). A module with timm's ``forward_features`` is asked for that.
"""

import inspect
import warnings
from collections.abc import Callable

import timm
from timm.models.resnet import ResNet
from torch import nn

from models.network import PIXELS, Pixels, imported, near
from models.weights import start


def is_own(name: str) -> bool:
    """Whether a name is of the user's own function."""
    return ":" in name


def check_backbone(name: str) -> None:
    """Raises ValueError, with near names, unless timm knows the network and its tag, or the user's function exists."""
    if is_own(name):
        own_function(name)
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {name!r}" + near(name, timm.list_models()))
    try:
        timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        if not tag and not name.endswith("."):
            return  # timm builds it, and has no weights of it
        known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        several = f"; it has {', '.join(known)}" if known else "; leave the tag out"
        raise ValueError(f"timm has no weights {tag!r} of {architecture}{several}") from error


def check_start(name: str, width: float = 1.0, pretrained: bool = False) -> None:
    """Raises ValueError when there is no such backbone, or none with this width or with pretrained weights."""
    check_backbone(name)
    if width != 1.0 and pretrained:
        raise ValueError(f"there are no pretrained weights for width {width}; set width to 1 or pretrained to false")
    if width != 1.0 and is_own(name):
        raise ValueError(f"width is for ResNets of timm; {name} has no scalable width, got {width}")
    if not pretrained:
        return
    if is_own(name) and not _takes_pretrained(own_function(name)):
        raise ValueError(f"{name} takes no argument pretrained; set pretrained to false, or start from a weights file")
    if not is_own(name) and not timm.models.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained weights of {name}; set pretrained to false")


def check_weights(name: str) -> None:
    """Builds a network with the weights that belong to its name, as a start of training does, and drops it.

    Raises:
        ValueError: there are none, or they cannot be had; in one line.
    """
    check_start(name, pretrained=True)
    if is_own(name):
        _own(name, pretrained=True)
        return
    try:
        timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the hub, of sockets, of files that are damaged
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"weights of {name} cannot be loaded: {type(error).__name__}: {reason}") from error


def build_backbone(
    name: str, image_size: tuple[int, int], width: float = 1.0, pretrained: bool = False, weights: str = ""
) -> nn.Module:
    """A network without head, changed as the authors of D3still changed theirs.

    Args:
        name: of timm or of the user's function.
        image_size: height and width in pixels; some networks are built for one size.
        width: scales the channels of every stage; ResNets only.
        pretrained: start from the weights that belong to the name.
        weights: start from a local file instead (:func:`models.weights.start`).

    Raises:
        ValueError: it cannot be built as asked, or the file holds another network.

    Warns:
        UserWarning: in one line, when a file fits in part.
    """
    check_start(name, width, pretrained and not weights)
    if is_own(name):
        net = _own(name, pretrained and not weights)
    else:
        net = _of_timm(name, image_size, width, pretrained and not weights)
    if weights and (left := start(net, weights)):
        warnings.warn(left, stacklevel=3)
    if isinstance(net, ResNet) and not is_own(name):
        _keep_last_stage_resolution(net)
        # Departs from torchvision's 3×3 pool with padding 1: the authors' code pools 2×2 without padding.
        net.maxpool = nn.MaxPool2d(kernel_size=2, stride=2)
    elif name.startswith("mobilenetv3_small") and not is_own(name):
        # The authors' code keeps the resolution in torchvision's feature block 9, which is stage 4 here.
        net.blocks[4][0].conv_dw.stride = (1, 1)
        net.conv_head, net.norm_head, net.act2 = nn.Identity(), nn.Identity(), nn.Identity()
    return net


def statistics(pixels: str, backbone: str = "") -> Pixels:
    """Mean and deviation of the input by name: "imagenet", "half", or "weights", those of timm's weights.

    >>> statistics("weights", "vit_small_patch16_224.augreg_in21k_ft_in1k")
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    Raises:
        ValueError: no such name, or a backbone whose weights do not say theirs.
    """
    if pixels in PIXELS:
        return PIXELS[pixels]
    if pixels != "weights":
        raise ValueError(f"pixels must be weights or one of {', '.join(PIXELS)}, got {pixels!r}")
    check_backbone(backbone)
    if is_own(backbone):
        raise ValueError(f"pixels=weights is for networks of timm; name one of {', '.join(PIXELS)} for {backbone}")
    known = timm.get_pretrained_cfg(backbone)
    return tuple(known.mean), tuple(known.std)


def own_function(name: str) -> Callable[..., nn.Module]:
    """The user's function of a name "package.module:function"; raises ValueError with near names."""
    module_name, _, function = name.partition(":")
    module = imported(module_name)
    found = getattr(module, function, None)
    if not callable(found):
        others = [name for name, value in vars(module).items() if callable(value)]
        raise ValueError(f"{module_name} has no function {function!r}" + near(function, others))
    return found


def _own(name: str, pretrained: bool) -> nn.Module:
    function = own_function(name)
    try:
        net = function(pretrained=pretrained) if _takes_pretrained(function) else function()
    except Exception as error:  # of somebody else's code: one line here, its traceback below it
        raise ValueError(f"{name} cannot be called: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} returns a {type(net).__name__}; expected a torch module")
    return net


def _takes_pretrained(function: Callable) -> bool:
    taken = inspect.signature(function).parameters.values()
    return any(p.name == "pretrained" or p.kind is p.VAR_KEYWORD for p in taken)


def _of_timm(name: str, image_size: tuple[int, int], width: float, pretrained: bool) -> nn.Module:
    options: dict = {}
    if width != 1.0:
        options["channels"] = tuple(max(8, round(c * width)) for c in (64, 128, 256, 512))
    if name.startswith("swin"):
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        if width != 1.0:
            raise ValueError(f"width is for ResNets; {name} has no scalable width, got {width}") from error
        raise


def _keep_last_stage_resolution(net: ResNet) -> None:
    """Last stride 1, not dilated: a finer map for retrieval, the pretrained kernels unchanged."""
    first = net.layer4[0]
    for conv in (first.conv1, getattr(first, "conv2", None), getattr(first, "conv3", None)):
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
    for module in first.downsample or ():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d):
            module.kernel_size = module.stride = 1
