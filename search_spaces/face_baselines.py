"""ILED + RPSD (our reading) beside what face recognition distils with; rows as AdaDistill's table names them."""

from search_spaces._space import SearchSpace

_COSFACE = {"head.kind": "cosface", "head.margin": 0.35}

SPACE = SearchSpace(
    method="unified_face",
    question="Which distillation of a face network verifies best?",
    cells={
        "student alone": {"method": "margin_softmax"},
        "Raw L2": {"method": "feature_consistency", "form": "l2_mean"},
        "FC": {"method": "feature_consistency"},
        "ShrinkTeaNet": {"method": "shrinkteanet"},
        "KD": {"method": "face_kd"},
        "GKD": {"method": "gkd"},
        "EKD": {"method": "ekd"},
        "RKD": {"method": "face_rkd"},
        "SP": {"method": "face_sp"},
        "PKT": {"method": "face_pkt"},
        "ArcDistill": {"method": "proxylesskd"},
        "MarginDistillation": {"method": "margin_distillation"},
        "TripletDistillation": {"method": "triplet_distillation"},
        "AdaArcDistill": {"method": "adadistill"},
        "AdaCosDistill": {"method": "adadistill", **_COSFACE},
        "ILED + RPSD": {},
    },
    seeds=(0, 1),
    early_stopping=False,
)
