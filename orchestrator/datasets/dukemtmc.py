"""DukeMTMC-reID (Ristani et al., 2016; Zheng et al., ICCV 2017): people seen by eight cameras. Your own copy only.

    <data-root>/bounding_box_train/, query/, bounding_box_test/        0005_c2_f0046985.jpg: person 5, camera 2
    or the same below <data-root>/DukeMTMC-reID/

The gallery also holds 408 people that nobody searches for. Gallery images of the query's person and camera are removed.
"""

from pathlib import Path

from orchestrator.datasets import layout
from orchestrator.datasets.images import RetrievalData

_COUNTS = {"train": (16_522, 702), "query": (2_228, 702), "gallery": (17_661, 1_110)}
GRAMMAR = r"(\d{4})_c([1-8])_f\d{7}\.jpg$"
FOLDER, CAMERAS = "DukeMTMC-reID", 8
NOTICE = (
    "DukeMTMC was withdrawn by its creators in 2019 over the privacy of the people in it; this project neither "
    "provides nor downloads it. Market-1501, MSMT17 and Occluded-REID are read as well."
)


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    layout.check_part("dukemtmc", evaluate_on)
    given = layout.data_folder("dukemtmc", data_root, layout.PEOPLE_LAYOUT)
    return read("dukemtmc", layout.inside(given, FOLDER), evaluate_on, _COUNTS)


def read(name: str, root: Path, evaluate_on: str, counts: dict[str, tuple[int, int]]) -> RetrievalData:
    """DukeMTMC-reID, or what was made of it in the same layout."""
    sides = (
        layout.check_counts(
            layout.people(f"{name}/{p}", root, layout.PEOPLE[p], GRAMMAR, layout.PEOPLE_LAYOUT), counts[p]
        )
        for p in counts
    )
    return layout.search_across_cameras(*sides, cameras=CAMERAS, evaluate_on=evaluate_on, notice=NOTICE)
