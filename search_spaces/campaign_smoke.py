"""Every system's smallest sweep, so that a cluster is known to work before a night is spent on it.

The embedded data, two epochs each: it shows that everything runs, and nothing about any method.
"""

from search_spaces._campaign import Campaign, Sweep

SHORT = {"train.epochs": 2, "teacher.epochs": 2}

CAMPAIGN = Campaign(
    question="Does every system run from its data to its report?",
    sweeps=(
        Sweep("d3still_alpha", trials=3, settings=SHORT),
        Sweep("sureid_alignment", seeds=(0,), settings=SHORT),
        Sweep("face_weights", trials=2, settings=SHORT),
        Sweep("ddps_temperature", trials=1, settings=SHORT),
        Sweep("rsiamnet_consistency", trials=2, settings={"train.epochs": 2}),
    ),
)
