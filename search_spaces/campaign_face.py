"""Face recognition: ILED, RPSD and the methods they are compared with, and the tables that are public."""

from search_spaces._campaign import Campaign, Sweep

CAMPAIGN = Campaign(
    question="What do the tables of face distillation say when every row is run anew?",
    sweeps=(
        *(Sweep("face_baselines", on, priority=2) for on in ("ms1mv2", "casia")),
        Sweep("face_ablation", "ms1mv2"),
        Sweep("face_weights", "ms1mv2"),
        Sweep("face_bank", "ms1mv2"),
        Sweep("face_temperature", "ms1mv2"),
    ),
)
