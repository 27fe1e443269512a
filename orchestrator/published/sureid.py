"""SUReID, arXiv 2401.07469. No seeds, no spread, and no score of the teacher are given.

The paper's device is one RTX 2080 Ti, with batches of 32.
"""

from orchestrator.published._row import NO_TEACHER, OWN_NETWORK, Published, given, rows_of

_PAPER = "SUReID, arXiv 2401.07469"
_DEIT = {"student": "DeiT-S@256×128", "teacher": "ViT-B@256×128"}
_VIT = {"student": "ViT-B@256×128", "teacher": "ViT-B@256×128"}
_OTHERS = {"student": OWN_NETWORK, "teacher": NO_TEACHER}
_TALL = ("PGFA", "PVPM")  # of table I

_ALONE = "identity + triplet"  # and the ratio of kept tokens, where any are dropped
_WHOLE = "identity + triplet + NPKD"


def _methods(number: str, benchmarks: tuple[str, ...], names: tuple[str, ...], table: str) -> list[Published]:
    """Rows "method: number …" with the named numbers of every benchmark; "-" is not given."""
    found = []
    for row, values in rows_of(table):
        for at, benchmark in enumerate(benchmarks):
            numbers = given(names, values[at * len(names) : (at + 1) * len(names)])
            networks = (_VIT if "reid" in benchmark else _DEIT) if row == "SUReID" else _OTHERS
            found.append(
                Published(
                    source=f"{_PAPER}, table {number}",
                    benchmark=benchmark,
                    row=f"{row[:-1]}, sliding window" if row.endswith("*") else row,
                    losses=_WHOLE if row == "SUReID" else "all of its own",
                    images_per_s=numbers.pop("images_per_s", None),
                    scores=numbers,
                    note="384×128 pixels" if "images_per_s" in names and row in _TALL else "",
                    **networks,
                )
            )
    return found


def _ablation(number: str, table: str, note: str = "") -> list[Published]:
    """Rows "name: R1 mAP [images/s]" on Occluded-DukeMTMC."""
    found = []
    for row, values in rows_of(table):
        numbers = given(("rank1", "map", "images_per_s")[: len(values)], values)
        taught = row not in ("none", "HTS", "ViT", "ViT + NODA")
        networks = _VIT if row.startswith("ViT") else _DEIT
        found.append(
            Published(
                source=f"{_PAPER}, table {number}",
                benchmark="occluded_duke",
                row=row,
                losses=_WHOLE if taught else _ALONE,
                images_per_s=numbers.pop("images_per_s", None),
                scores=numbers,
                note=note,
                **(networks if taught else {**networks, "teacher": NO_TEACHER}),
            )
        )
    return found


TABLES = {
    "I": _methods(
        "I", ("occluded_duke",), ("images_per_s", "rank1", "map"),
        """
        PFD: 119 67.7 60.1
        PFD*: 95 69.5 61.8
        PGFA: 744 51.4 37.3
        POS: 137 65.0 54.0
        PVPM: 630 47.0 37.7
        HOReID: 141 55.1 43.8
        ISP: 554 62.8 52.3
        TransReID: 379 64.2 55.7
        TransReID*: 169 66.4 59.2
        PAT: 849 64.5 53.6
        FED: 411 68.1 56.4
        SRFR: 55 71.4 60.6
        SUReID: 1585 65.8 54.9
        """,
    ),
    "II": [
        *_methods(
            "II", ("occluded_reid",), ("rank1", "map"),
            """
            PVPM: 70.4 61.2
            HOReID: 80.3 70.2
            PAT: 81.6 72.1
            FED: 87.0 79.4
            PFD: 79.8 81.3
            PFD*: 81.5 83.0
            SRFR: 86.8 82.0
            SUReID: 86.8 80.7
            """,
        ),
        *_methods(
            "II", ("partial_reid",), ("rank1", "rank3"),
            """
            PGFA: 68.0 80.0
            PVPM: 78.3 87.7
            HOReID: 85.3 91.0
            POS: 86.1 91.3
            PAT: 88.0 92.3
            FED: 84.6 -
            SRFR: 86.0 92.0
            SUReID: 85.3 90.7
            """,
        ),
    ],
    "III": _methods(
        "III", ("market1501", "dukemtmc"), ("rank1", "map"),
        """
        PGFA: 91.2 76.8 82.6 65.5
        HOReID: 94.2 84.9 86.9 75.6
        ISP: 95.3 88.6 89.6 80.0
        POS: 95.0 86.2 88.7 76.7
        TransReID: 95.2 88.9 89.6 80.6
        TransReID*: 95.0 88.2 90.7 82.0
        PAT: 95.4 88.0 88.8 78.2
        FED: 95.0 86.3 89.4 78.0
        PFD: 95.5 89.6 90.6 82.2
        PFD*: 95.5 89.7 91.2 83.2
        SRFR: 95.9 90.2 90.9 82.0
        SUReID: 94.5 87.2 89.1 79.7
        """,
    ),
    "IV": _ablation(
        "IV",
        """
        none: 57.6 49.2 1074
        HTS: 55.6 46.7 1585
        HTS + NPKD: 64.8 53.2 1585
        SUReID: 65.8 54.9 1585
        """,
    ),
    "V": _ablation(
        "V",
        """
        p = 0.5: 64.2 53.2 2269
        p = 0.6: 65.6 54.2 1843
        p = 0.7: 65.8 54.9 1585
        p = 0.8: 65.5 55.3 1392
        p = 0.9: 65.9 55.7 1279
        """,
    ),
    "VI": _ablation(
        "VI",
        """
        S-T linear: 56.6 46.7
        T-S linear: 57.2 47.1
        S-T interpolation: 64.3 53.3
        T-S interpolation: 65.8 54.9
        """,
    ),
    "VII": _ablation(
        "VII",
        """
        ViT: 61.9 54.0
        ViT + NODA: 61.1 51.6
        SUReID without NODA: 64.8 53.2
        SUReID: 65.8 54.9
        """,
        note="the rows seem to be of two networks: the last two are rows of table IV",
    ),
}  # fmt: skip

# Which rows belong beside which sweep.
BESIDE = {
    "sureid_components": [*TABLES["IV"], *TABLES["I"], *TABLES["II"], *TABLES["III"]],
    "sureid_keep_ratio": TABLES["V"],
    "sureid_alignment": TABLES["VI"],
    "sureid_noda": TABLES["VII"],
}
