"""What the files of this package share: one printed row, and how rows and networks are written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Published:
    """One printed row of a single run, without spread."""

    source: str  # paper and table or figure
    benchmark: str  # the recipe that has the row's setting
    row: str  # its name, as in our tables
    student: str  # network @ pixels
    teacher: str
    losses: str = "distillation alone"  # what is trained with
    scores: Mapping[str, float] = field(default_factory=dict)  # last part of a metric's name, or all of it -> percent
    at: Mapping[str, float] = field(default_factory=dict)  # recipe field -> its value in a row that varies it
    images_per_s: float | None = None  # of the query network, on the source's device
    elsewhere: bool = True  # whether it is shown beside sweeps on other benchmarks too
    side: str = ""  # first part of the names of our metrics that the scores compare with; empty = of the main metric
    note: str = ""  # inconsistencies of the source


BOTH_SIDES = "the same network on both sides"
TEACHER = "teacher on both sides"  # the row of the gallery network
NO_TEACHER, OWN_NETWORK = "none", "its own network"
ALONE = "student alone"  # the row of the query network without distillation

_PRINTED = {
    "resnet18.tv_in1k": "ResNet18",
    "resnet50.tv_in1k": "ResNet50",
    "resnet101.tv_in1k": "ResNet101",
    "mobilenetv2_100.ra_in1k": "MobileNetV2",
    "mobilenetv3_small_100.lamb_in1k": "MobileNetV3-S",
    "deit_small_distilled_patch16_224.fb_in1k": "DeiT-S",
    "vit_base_patch16_224.orig_in21k_ft_in1k": "ViT-B",
    "swinv2_tiny_window8_256.ms_in1k": "SwinV2-T",
    "swinv2_small_window8_256.ms_in1k": "SwinV2-S",
}


def network(name: str, size: tuple[int, int]) -> str:
    """A timm name and its input as tables print them.

    >>> network("resnet101.tv_in1k", (320, 160))
    'ResNet101@320×160'
    """
    height, width = size
    return f"{_PRINTED.get(name, name)}@{height}" + (f"×{width}" if width != height else "")


def rows_of(table: str) -> Iterator[tuple[str, list[float | None]]]:
    """Lines "name: number …" as name and numbers; "-" is a number that is not given."""
    for line in table.strip().splitlines():
        row, numbers = line.strip().rsplit(":", 1)
        yield row, [None if v == "-" else float(v) for v in numbers.split()]


def given(names: tuple[str, ...], values: list[float | None]) -> dict[str, float]:
    """The named numbers without those that are not given.

    >>> given(("rank1", "rank3"), [84.6, None])
    {'rank1': 84.6}
    """
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}
