"""R-SiamNet, ICCV 2021: tables 2, 3 and 4, of single runs; scenes of 800×1333 where no other size is said.

The paper's detector is RepPoints; ours is another, so its rows are what to compare with, not what must come out.
Table 4's other rows are fully supervised methods as the paper prints them. Table 1 counts the data sets: 11,206 images
of 5,532 identities and 5,704 of 482, which their readers check.
"""

from orchestrator.published._row import NO_TEACHER, Published, given, rows_of

_SOURCE = "R-SiamNet, ICCV 2021"
_STUDENT = "ResNet50@800×1333"
_LOSSES = {
    "search path + IR": "detection + IR",
    "instance path + IR": "detection + IR",
    "L_ins + IR": "detection + L_ins + IR",
    "L_ins + L_int + IR": "detection + L_ins + L_int + IR",
}
_WHOLE = "detection + L_ins + L_int + L_clu"


def _row(table: str, benchmark: str, row: str, scores: dict[str, float], **other: str) -> Published:
    settings = {"student": _STUDENT, "losses": _WHOLE} | other
    return Published(
        source=f"{_SOURCE}, {table}", benchmark=benchmark, row=row, teacher=NO_TEACHER, scores=scores, **settings
    )


LOSSES = [
    _row("table 2", "cuhk_sysu", row, given(("map", "top1", "top5", "top10"), values), losses=_LOSSES.get(row, _WHOLE))
    for row, values in rows_of(
        """
        search path + IR: 51.85 59.69 67.31 69.03
        instance path + IR: 63.79 65.55 82.21 86.83
        L_ins + IR: 76.06 78.21 90.28 92.90
        L_ins + L_int + IR: 79.62 82.17 91.69 94.03
        L_ins + L_int + L_clu: 85.72 86.86 95.24 96.86
        """
    )
]

_UNIONS = {
    "with the other": {"cuhk_sysu": "cuhk_sysu_and_prw", "prw": "prw_and_cuhk_sysu"},
    "with the other and INRIA": {"cuhk_sysu": "cuhk_sysu_and_both", "prw": "prw_and_both"},
}
DATA_SCALE = [
    _row("table 3", _UNIONS.get(row, {}).get(benchmark, benchmark), row, {"top1": pair[0], "map": pair[1]})
    for row, values in rows_of(
        """
        20 % data: 78.34 76.71 66.94 15.61
        40 % data: 82.41 80.50 69.32 17.59
        60 % data: 83.45 82.52 71.80 19.10
        80 % data: 85.41 84.15 72.73 19.64
        100 % data: 86.86 85.72 73.36 21.16
        with the other: 87.00 85.92 75.06 23.50
        with the other and INRIA: 87.59 86.19 76.03 25.53
        """
    )
    for benchmark, pair in (("cuhk_sysu", values[:2]), ("prw", values[2:]))
]

_SUPERVISED = "boxes and identities"
_OURS = {"R-SiamNet": _STUDENT, "R-SiamNet, large scenes": "ResNet50@900×1500"}
COMPARED = [
    _row(
        "table 4", f"{benchmark}_large" if "large" in row else benchmark, row,
        given(("top1", "map"), pair), losses=_WHOLE if row in _OURS else _SUPERVISED,
        student=_OURS.get(row, "their own networks"),
    )
    for row, values in rows_of(
        """
        RCAA: 81.3 79.3 - -
        MGTS: 83.7 83.0 72.1 32.6
        CLSA: 88.5 87.2 65.0 38.7
        RDLR: 94.2 93.0 70.2 42.9
        TCTS: 95.1 93.9 87.5 46.8
        OIM: 78.7 75.5 49.9 21.3
        IAN: 80.1 76.3 61.9 23.0
        NPSM: 81.2 77.9 53.1 24.2
        CTXGraph: 86.5 84.1 73.6 33.4
        DC-I-Net: 86.5 86.2 55.1 31.8
        QEEPS: 89.1 88.9 76.7 37.1
        NAE: 92.4 91.5 80.9 43.3
        NAE+: 92.9 92.1 81.1 44.0
        DMRNet: 94.2 93.2 83.3 46.9
        R-SiamNet: 86.9 85.7 73.4 21.2
        R-SiamNet, large scenes: 87.1 86.0 75.2 21.4
        """
    )
    for benchmark, pair in (("cuhk_sysu", values[:2]), ("prw", values[2:]))
    if any(value is not None for value in pair)
]  # fmt: skip

BESIDE = {"rsiamnet_losses": [*LOSSES, *COMPARED], "rsiamnet_data_scale": DATA_SCALE}
