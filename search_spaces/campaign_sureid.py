"""SUReID: every table of Song and Liu, arXiv 2401.07469, and its curves."""

from search_spaces._campaign import Campaign, Sweep

CAMPAIGN = Campaign(
    question="What do the tables of SUReID say when every row is run anew?",
    sweeps=(
        Sweep("sureid_components", "occluded_duke", priority=2),
        Sweep("sureid_keep_ratio", "occluded_duke"),
        Sweep("sureid_noda", "occluded_duke"),
        Sweep("sureid_alignment", "occluded_duke"),
        Sweep("sureid_lambda_temperature", "occluded_duke"),
        *(Sweep("sureid_components", on) for on in ("occluded_reid", "partial_reid", "market1501", "dukemtmc")),
    ),
)
