"""Published numbers with their source. Shown beside ours as "published", never mixed with them.

All numbers are percent, single runs without spread.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One printed row."""

    source: str  # paper and table or figure
    benchmark: str
    student: str  # network @ pixels
    teacher: str
    losses: str  # which terms are on
    map: float
    rank1: float | None = None
    beta: float | None = None
    gamma: float | None = None
    note: str = ""  # inconsistencies of the source


_D3STILL = "D3still, CVPR 2024"
_NETS = {"student": "ResNet18@64", "teacher": "ResNet101@256"}


def _ablation(table: str, losses: str, inshop: tuple[float, float], sop: tuple[float, float]) -> list[Published]:
    return [
        Published(source=f"{_D3STILL}, table {table}", benchmark=b, losses=losses, map=m, rank1=r, **_NETS)
        for b, (m, r) in (("inshop", inshop), ("sop", sop))
    ]


D3STILL_ABLATION = [
    *_ablation("1", "L_pd", (0.85, 0.58), (25.73, 35.61)),
    *_ablation("1-3", "L_f", (61.55, 75.37), (49.46, 66.55)),
    *_ablation("3", "L_f + L_pair", (62.71, 76.94), (49.96, 66.94)),
    *_ablation("2", "L_f + L_irpd", (63.38, 78.01), (50.57, 68.04)),
    *_ablation("2", "L_f + L_crpd", (63.46, 78.33), (50.89, 68.63)),
    *_ablation("1, 2", "L_f + L_rpd", (63.88, 78.92), (51.00, 68.65)),
    *_ablation("2, 3", "L_f + L_drpd", (64.31, 79.60), (51.33, 69.18)),
]


def _curve(figure: int, beta: tuple[float, ...], gamma: tuple[float, ...], **by_benchmark: tuple) -> list[Published]:
    pairs = [(b, g) for b in beta for g in gamma]
    return [
        Published(
            source=f"{_D3STILL}, figure {figure}", benchmark=benchmark, losses="full", map=m, beta=b, gamma=g, **_NETS,
            note="the default β is not the best one here" if benchmark == "msmt17" and figure == 3 else "",
        )
        for benchmark, values in by_benchmark.items()
        for (b, g), m in zip(pairs, values, strict=True)
    ]  # fmt: skip


D3STILL_BETA = _curve(
    3, (0.1, 0.2, 0.3), (0.1,),
    inshop=(63.88, 64.31, 64.07), sop=(51.00, 51.33, 51.32), msmt17=(19.09, 18.64, 17.79),
)  # fmt: skip
D3STILL_GAMMA = _curve(
    4, (0.2,), (0.1, 0.2, 0.3),
    inshop=(64.31, 64.31, 63.97), sop=(51.33, 51.35, 51.15), msmt17=(18.64, 18.45, 17.52),
)  # fmt: skip

# Which published rows belong beside which sweep.
BESIDE = {
    "d3still_beta_gamma": [*D3STILL_BETA, *D3STILL_GAMMA],
    "d3still_ablation": D3STILL_ABLATION,
    "d3still_top_k": [],
    "d3still_alpha": [],
}
