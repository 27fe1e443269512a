"""DDPS: every table of Jia et al., IEEE TMM 2025, and its curves."""

from search_spaces._campaign import Campaign, Sweep

CAMPAIGN = Campaign(
    question="What do the tables of DDPS say when every row is run anew?",
    sweeps=(
        *(Sweep("ddps_modules", on, priority=2) for on in ("prw", "cuhk_sysu")),
        *(Sweep("ddps_students", on) for on in ("prw", "cuhk_sysu")),
        Sweep("ddps_temperature", "prw"),
        Sweep("ddps_weights", "prw"),
    ),
)
