"""What the networks of face recognition share: their settings, the order of colours, the neck in float32, weights.

    image → backbone (1/16 of the size) → map → neck → embedding [→ Linear → class logits]

The embedding is the raw output of the last batch norm, not L2-normalised: losses and evaluation normalise.
"""

# Shape legend: B = batch, C = channels, D = embedding width, H and W = pixels, h and w = H / 16 and W / 16.

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.network import PIXELS, TRAINING_ONLY, EmbeddingNetwork, Pixels, at_least_float32
from models.weights import misfit, read, without_prefixes

STRIDE = 16  # of the backbone: pixels of the image in each direction for one position of the last map
COLOURS = ("rgb", "bgr")

_HEADS = ("classifier", "head")  # of a training, left out where the network does not have them
_COUNTER = "num_batches_tracked"  # of batch norms; nothing depends on it


@dataclass(frozen=True, kw_only=True)
class FaceConfig:
    """Settings that every network of face recognition has.

    Raises:
        ValueError: a value outside its range, in one line.
    """

    embedding_dim: int = 512
    image_size: tuple[int, int] = (112, 112)  # height and width in pixels, multiples of 16
    width: float = 1.0  # scales the channels of every layer, but not the embedding
    # What the first convolution sees. Weights of one order are of no use in the other, so it is stored with them.
    color: str = "rgb"
    mean: tuple[float, float, float] = PIXELS["half"][0]  # of the input, red, green, blue in [0, 1]
    std: tuple[float, float, float] = PIXELS["half"][1]
    # > 0 adds the training classifier, which is not part of the deployed network.
    num_classes: int = field(default=0, metadata=TRAINING_ONLY)

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.image_size) != 2 or any(side < STRIDE or side % STRIDE for side in self.image_size):
            raise ValueError(f"image_size must be two multiples of {STRIDE}, such as (112, 112), got {self.image_size}")
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {self.embedding_dim}")
        if not self.width > 0:
            raise ValueError(f"width must be above 0, got {self.width}")
        if self.color not in COLOURS:
            raise ValueError(f"color must be one of {', '.join(COLOURS)}, got {self.color!r}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0, for no classifier, or more, got {self.num_classes}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std above 0, got {self.mean} and {self.std}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last map.

        >>> FaceConfig(image_size=(112, 96)).grid
        (7, 6)
        """
        height, width = self.image_size
        return height // STRIDE, width // STRIDE

    def channels(self, count: int) -> int:
        """Channels of a layer that has ``count`` at width 1.

        >>> FaceConfig(width=0.125).channels(64)
        8
        """
        return max(1, round(count * self.width))


class FaceNetwork(EmbeddingNetwork):
    """A backbone with its neck; ``forward`` maps normalised RGB images (B, 3, H, W) to raw embeddings (B, D).

    A subclass has :meth:`build`, :meth:`maps` and :meth:`neck`, says its ``layout``, and knows the names that public
    files use.

    Args:
        config: what is built.
        pretrained: only accepted beside ``weights``: nothing can be downloaded.
        weights: the network starts from this local file (:func:`load`).

    Raises:
        ValueError: ``pretrained`` without ``weights``, or the file holds another network.
    """

    Config = FaceConfig
    config: FaceConfig
    last_norm: str  # name of the batch norm that gives the embedding
    layout: tuple[str, ...]  # how the layers follow each other

    def __init__(self, config: FaceConfig, pretrained: bool = False, weights: str = ""):
        super().__init__()
        if pretrained and not weights:
            raise ValueError(f"there are no pretrained weights of {self.kind} to download; give weights, a local file")
        self.config = config
        self.build(config)
        self.classifier = None
        if config.num_classes:
            self.classifier = nn.Linear(config.embedding_dim, config.num_classes, bias=False)
            nn.init.normal_(self.classifier.weight, std=0.01)
        if weights:
            load(self, weights)

    @property
    def pixels(self) -> Pixels:
        """Mean and deviation of the input."""
        return self.config.mean, self.config.std

    @property
    def architecture(self) -> tuple[str, ...]:
        colours = ("the images' red, green, blue are turned to blue, green, red first",)
        return (*(colours if self.config.color == "bgr" else ()), *self.layout)

    def build(self, config: FaceConfig) -> None:
        """Makes the layers, with initial weights."""
        raise NotImplementedError

    def maps(self, images_BCHW: Tensor) -> Tensor:
        """The backbone: images whose colours are in the order of ``config.color`` -> map (B, C, h, w)."""
        raise NotImplementedError

    def neck(self, map_BChw: Tensor) -> Tensor:
        """Map -> raw embedding (B, D)."""
        raise NotImplementedError

    def public_names(self) -> Mapping[str, str]:
        """Names of modules in public files -> their names here; those that are the same may be left out."""
        raise NotImplementedError

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.config.color == "bgr":
            images_BCHW = images_BCHW.flip(1)
        map_BChw = self.maps(images_BCHW)
        # In float32 also under autocast: an embedding rounded to bfloat16 has other neighbours.
        with torch.autocast(map_BChw.device.type, enabled=False):
            return self.neck(at_least_float32(map_BChw))


def load(net: FaceNetwork, file: str | Path) -> None:
    """Puts the weights of a public file, or of one of our own, into a network of the same architecture.

    Stricter than :func:`models.weights.start`: every tensor must fit and none may be left over, because an
    IResNet-34's file holds all that an IResNet-18 needs, and a shortcut that stays at its initial weights is not
    seen before the first evaluation. Free are the classifier of a training, the counters of batch norms, and scale and
    shift of the last batch norm, which some files do not have: they are 1 and 0 then.

    Args:
        net: receives the weights.
        file: as :func:`models.weights.read` takes it; wrappers' prefixes are ignored.

    Raises:
        ValueError: the file cannot be read or holds another network, with the first tensor that does not fit.
    """
    own = net.state_dict()
    names = net.public_names()
    stored = {}
    for name, tensor in without_prefixes(read(file), own, file).items():
        module, _, last = name.rpartition(".")
        stored[f"{names.get(module, module)}.{last}"] = tensor
    if f"{net.last_norm}.running_mean" in stored:
        for last, value in (("weight", 1.0), ("bias", 0.0)):
            if (name := f"{net.last_norm}.{last}") in own:
                stored.setdefault(name, torch.full(own[name].shape, value))
    stored = {n: t for n, t in stored.items() if not _is_free(n) or (n in own and own[n].shape == t.shape)}
    wrong = misfit(stored, {n: t for n, t in own.items() if not _is_free(n) or n in stored})
    if wrong:
        raise ValueError(f"{file} holds another network: {wrong}; give {net.kind} the settings that the file was "
                         f"trained with")  # fmt: skip
    net.load_state_dict(stored, strict=False)


def _is_free(name: str) -> bool:
    return name.partition(".")[0] in _HEADS or name.endswith(_COUNTER)
