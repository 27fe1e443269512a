"""Images of any size and rough boxes in, better boxes and their embeddings out."""

# Shape legend: K = boxes of one image, N = boxes of all images, D = embedding width, M = rows of the bank.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network import TRAINING_ONLY, Graph, deployed_config, shared_copy

_STRIDE, _REACH = 4, 6.0  # pixels


class Bank(nn.Module):
    """A ring of embeddings with the training row of each; -1 = empty."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows_MD", torch.zeros(size, dim))
        self.register_buffer("owner_M", torch.full((size,), -1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def put(self, rows_ND: Tensor, owner_N: Tensor) -> None:
        """Writes the rows that have an owner; the others go to a place that is thrown away."""
        real_N, size = owner_N >= 0, len(self.owner_M)
        at_N = torch.where(real_N, (self.position + real_N.cumsum(0) - 1) % size, size)
        for buffer, new in ((self.rows_MD, rows_ND), (self.owner_M, owner_N)):
            longer = torch.cat([buffer, buffer[:1]])
            longer[at_N] = new.to(buffer.dtype)
            buffer.copy_(longer[:size])
        self.position.add_(real_N.sum()).remainder_(size)


@dataclass(frozen=True)
class Config:
    channels: int = 8
    dim: int = 8
    bank: int = field(default=0, metadata=TRAINING_ONLY)


class BoxEmbedder(nn.Module):
    kind = "toy.network"
    Config = Config
    input_names = ("images", "starts")
    outputs = ("box", "embedding")
    output = "corners in pixels and raw embeddings, one row for each box"
    architecture = ("two convolutions of stride 2; means over boxes; one linear layer moves, another embeds",)
    feeding = {"range": "RGB in [0, 1]", "size": "any"}  # noqa: RUF012

    def __init__(self, config: Config):
        super().__init__()
        self.config, c = config, config.channels
        self.body = nn.Sequential(
            nn.Conv2d(3, c, 3, 2, 1), nn.ReLU(), nn.Conv2d(c, 2 * c, 3, 2, 1), nn.ReLU(),
        )  # fmt: skip
        self.move, self.embed = nn.Linear(2 * c, 4), nn.Linear(2 * c, config.dim, bias=False)
        self.bank = Bank(config.bank, config.dim) if config.bank else None

    def forward(self, images: Sequence[Tensor], starts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) and embeddings (N, D) of all images one after the other; the boxes get no gradient of these."""
        maps = self.maps(images)
        moved = [_REACH * torch.tanh(self.move(_mean(m, start))) for m, start in zip(maps, starts, strict=True)]
        own = [start + move for start, move in zip(starts, moved, strict=True)]
        return torch.cat(own), self.embeddings(maps, own)

    def at(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Embeddings (N, D) of given boxes."""
        return self.embeddings(self.maps(images), boxes)

    def maps(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self.body(image[None].to(self.embed.weight.dtype))[0] for image in images]

    def embeddings(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.embed(_mean(m, box.detach())) for m, box in zip(maps, boxes, strict=True)])

    def deployed(self) -> nn.Module:
        bare = shared_copy(self)
        bare.config, bare.bank = deployed_config(self.config), None
        return bare.eval()

    def example(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        draw = torch.Generator().manual_seed(0)
        images = [torch.rand(3, *((24, 32), (32, 28))[n % 2], generator=draw) for n in range(count)]
        return images, [torch.tensor([[2.0, 2.0, 12.0, 12.0]])] * count

    def parts(self) -> Mapping[str, nn.Module]:
        return {"total": self.deployed()}

    def extras(self) -> Mapping[str, Tensor]:
        return {} if self.bank is None else {f"bank.{name}": value for name, value in self.bank.named_buffers()}

    def same(self, ours: Sequence[Tensor], exported: Sequence[Tensor]) -> float:
        return max((a - b).abs().max().item() for a, b in zip(ours, exported, strict=True))

    def exportable(self) -> str:
        return "it takes a list of images of different size"

    def graphs(self) -> Mapping[str, Graph]:
        return {}


def _mean(map_CHW: Tensor, box_K4: Tensor) -> Tensor:
    """Mean feature inside every box against that of the whole image: (K, C)."""
    y_H, x_W = (_STRIDE * (torch.arange(n, device=map_CHW.device) + 0.5) for n in map_CHW.shape[1:])
    x0, y0, x1, y1 = box_K4[:, :, None].unbind(1)
    inside_KHW = ((y0 <= y_H) & (y_H <= y1))[:, :, None] & ((x0 <= x_W) & (x_W <= x1))[:, None]
    weight_KHW = inside_KHW.to(map_CHW.dtype)
    inside_KC = weight_KHW.flatten(1) @ map_CHW.flatten(1).T / weight_KHW.sum((1, 2)).clamp(min=1)[:, None]
    return 2 * (inside_KC - map_CHW.mean((1, 2)))


def cosines(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    return F.normalize(a_ND) @ F.normalize(b_MD).T


NETWORK = BoxEmbedder
