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
CSD, RAML, ROP, AML and UGD were chosen on Omniglot's held-out alphabets (``evaluate_on=validation``, 4 epochs, 3 to 5
values each): the published ones belong to other networks and a tenth of the learning rate. Of D3still the paper's own
were the best tried. RKD, PKT, VanillaKD and SP-KD keep published ones.
"""

from typing import Any

SMALL = "demo|omniglot|emoji"
_SMALL = {
    "student": "resnet18",
    "student_width": 0.25,
    "student_size": (32, 32),
    "teacher": "resnet18",
    "teacher_width": 0.5,
    "teacher_size": (64, 64),
    "teacher_pad": 4,
    "teacher_epochs": 16,
    "teacher_optimizer": "adamw",
    "teacher_learning_rate": 0.002,
    "embedding_dim": 128,
    "pretrained": False,
    "teacher_pretrained": False,
    "batch_size": 120,
    "views": "recorded",
    "num_views": 4,
    "erase": 0.2,
    "learning_rate": 0.1,
    "epochs": 24,
    "warmup_epochs": 2,
    "constant_epochs": 8,
    "evaluate_every": 2,
    "identities_per_batch": 15,
    "images_per_identity": 4,
    "loader_workers": 0,
}
_PLAIN = {"flip": 0.0, "erase": 0.0, "batch_size": 128, "views": "clean", "evaluate_every": 4,
          "evaluate_symmetric": True}  # fmt: skip
_PEOPLE = {"student_size": (160, 80), "student_pad": 4, "teacher_size": (320, 160)}
_BIRDS = {"student_size": (128, 128), "student_pad": 4, "erase": 0.0}
_REPO = {"mode": "repo", "batch_size": 256}
_MOBILENET = {"student": "mobilenetv3_small_100.lamb_in1k"}
_SWIN = {
    "teacher": "swinv2_small_window8_256.ms_in1k",
    "teacher_optimizer": "adamw",
    "teacher_learning_rate": 1e-4,
}


def _authors(name: str, large: tuple[int, int], **settings: Any) -> dict[str, dict[str, Any]]:
    base = {**_REPO, **settings}
    return {
        name: base,
        f"{name}_large": {**base, "teacher_size": large, "teacher_pad": 12},
        f"{name}_mobilenet": {**base, **_MOBILENET},
    }


def _with_swin(name: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {**_authors(name, (384, 384), **settings), f"{name}_swin": {**_REPO, **settings, **_SWIN}}


BENCHMARKS: dict[str, dict[str, Any]] = {
    "demo": {"dataset": "demo", **_SMALL},
    "omniglot": {
        "dataset": "omniglot",
        **_SMALL,
        **_PLAIN,
        "student_size": (28, 28),
        "teacher_size": (56, 56),
        "epochs": 8,
        "constant_epochs": 3,
        "teacher_epochs": 8,
    },
    "emoji": {"dataset": "emoji", **_SMALL, **_PLAIN},
    "folder": {"dataset": "folder"},
    "inshop": {"dataset": "inshop"},
    "sop": {"dataset": "sop"},
    "msmt17": {"dataset": "msmt17"},
    "msmt17_v2": {"dataset": "msmt17_v2"},
    "market1501": {"dataset": "market1501", **_PEOPLE},
    "cub200_metric": {"dataset": "cub200_metric", **_BIRDS},
    **_with_swin("inshop_repo", dataset="inshop"),
    **_with_swin("sop_repo", dataset="sop"),
    **_with_swin("cub200_repo", dataset="cub200", **_BIRDS),
    **_authors("msmt17_repo", (480, 240), dataset="msmt17", **_PEOPLE),
}
