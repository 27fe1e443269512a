"""What every method of asymmetric retrieval shares on a benchmark: networks, sizes, batch, schedule, mode.

``inshop``, ``sop``, ``msmt17`` are the D3still paper's (ResNet18 at 64 pixels under ResNet101 at 256, the
distillation loss alone). ``*_repo`` and ``cub200*`` are those of the authors' later code: cross-entropy and triplet
on a second batch, four pairs of networks. Their published numbers are not comparable.

    *_repo              ResNet101 teacher, ResNet18 student
    *_repo_large        the teacher at 384 × 384 (people: 480 × 240)
    *_repo_mobilenet    MobileNetV3-small student
    *_repo_swin         SwinV2-small teacher

The published MSMT17 column with a ResNet101-IBN teacher has no recipe: timm has no such network.

``demo``, ``omniglot`` and ``emoji`` are ours: small networks, minutes on a CPU. There, the weights of FitNet, CCKD,
CSD, RAML, ROP, AML and UGD were chosen on Omniglot's held-out alphabets (``data.part=validation``, 4 epochs, 3 to 5
values each): the published ones belong to other networks and a tenth of the learning rate. Of D3still the paper's own
were the best tried. RKD, PKT, VanillaKD and SP-KD keep published ones.
"""

from typing import Any

SMALL = "demo|omniglot|emoji"
_SMALL = {
    "student.name": "resnet18",
    "student.width": 0.25,
    "student.size": (32, 32),
    "teacher.name": "resnet18",
    "teacher.width": 0.5,
    "teacher.size": (64, 64),
    "teacher.pad": 4,
    "teacher.epochs": 16,
    "teacher.optimizer": "adamw",
    "teacher.rate": 0.002,
    "embedding_dim": 128,
    "student.pretrained": False,
    "teacher.pretrained": False,
    "batch_size": 120,
    "views": "recorded",
    "num_views": 4,
    "erase": 0.2,
    "train.rate": 0.1,
    "train.epochs": 24,
    "warmup_epochs": 2,
    "constant_epochs": 8,
    "evaluate_every": 2,
    "labelled.identities_per_batch": 15,
    "labelled.images_per_identity": 4,
    "loader_workers": 0,
}
_PLAIN = {"flip": 0.0, "erase": 0.0, "batch_size": 128, "views": "clean", "evaluate_every": 4,
          "evaluate_symmetric": True}  # fmt: skip
_PEOPLE = {"student.size": (160, 80), "student.pad": 4, "teacher.size": (320, 160)}
_BIRDS = {"student.size": (128, 128), "student.pad": 4, "erase": 0.0}
_REPO = {"mode": "repo", "batch_size": 256}
_MOBILENET = {"student.name": "mobilenetv3_small_100.lamb_in1k"}
_SWIN = {
    "teacher.name": "swinv2_small_window8_256.ms_in1k",
    "teacher.optimizer": "adamw",
    "teacher.rate": 1e-4,
}


def _authors(name: str, large: tuple[int, int], data: str, **settings: Any) -> dict[str, dict[str, Any]]:
    base = {"data.name": data, **_REPO, **settings}
    return {
        name: base,
        f"{name}_large": {**base, "teacher.size": large, "teacher.pad": 12},
        f"{name}_mobilenet": {**base, **_MOBILENET},
    }


def _with_swin(name: str, data: str, **settings: Any) -> dict[str, dict[str, Any]]:
    swin = {"data.name": data, **_REPO, **settings, **_SWIN}
    return {**_authors(name, (384, 384), data, **settings), f"{name}_swin": swin}


BENCHMARKS: dict[str, dict[str, Any]] = {
    "demo": {"data.name": "demo", **_SMALL},
    "omniglot": {
        "data.name": "omniglot",
        **_SMALL,
        **_PLAIN,
        "student.size": (28, 28),
        "teacher.size": (56, 56),
        "train.epochs": 8,
        "constant_epochs": 3,
        "teacher.epochs": 8,
    },
    "emoji": {"data.name": "emoji", **_SMALL, **_PLAIN},
    "folder": {"data.name": "folder", "student.pixels": "weights", "teacher.pixels": "weights"},
    "inshop": {"data.name": "inshop"},
    "sop": {"data.name": "sop"},
    "msmt17": {"data.name": "msmt17"},
    "msmt17_v2": {"data.name": "msmt17_v2"},
    "market1501": {"data.name": "market1501", **_PEOPLE},
    "cub200_metric": {"data.name": "cub200_metric", **_BIRDS},
    **_with_swin("inshop_repo", data="inshop"),
    **_with_swin("sop_repo", data="sop"),
    **_with_swin("cub200_repo", data="cub200", **_BIRDS),
    **_authors("msmt17_repo", (480, 240), data="msmt17", **_PEOPLE),
}
