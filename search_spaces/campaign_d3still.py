"""D3still and the methods it is compared with: every table of Xie et al., CVPR 2024, and of the authors' later code."""

from search_spaces._campaign import Campaign, Sweep

BENCHMARKS = ("inshop", "sop", "msmt17")
LATER = tuple(
    f"{data}_repo{network}"
    for data in ("inshop", "sop", "cub200", "msmt17")
    for network in ("", "_large", "_mobilenet", "_swin")
    if (data, network) != ("msmt17", "_swin")  # the authors have none
)

CAMPAIGN = Campaign(
    question="What do the tables of D3still say when every row is run anew?",
    sweeps=(
        *(Sweep("asymmetric_baselines", on, priority=2) for on in BENCHMARKS),
        *(Sweep("d3still_ablation", on, priority=2) for on in BENCHMARKS[:2]),
        *(Sweep("d3still_networks", on) for on in BENCHMARKS),
        *(Sweep("d3still_beta_gamma", on) for on in BENCHMARKS),
        *(Sweep("asymmetric_baselines", on) for on in LATER),
        *(Sweep("d3still_ablation", on) for on in ("inshop_repo", "sop_repo", "cub200_repo")),
    ),
)
