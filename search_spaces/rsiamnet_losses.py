"""What do the two paths, the consistency losses and the clusters of R-SiamNet add? The paper's table 2.

The last row trains the same network on identities, which the others never see.
"""

from search_spaces._space import SearchSpace

_RECOGNITION = {"clusters": "singletons"}
_NO_CONSISTENCY = {"ins": 0.0, "inter": 0.0}

SPACE = SearchSpace(
    method="rsiamnet",
    question="What do both paths, consistency and clusters add?",
    cells={
        "search path + IR": {**_RECOGNITION, **_NO_CONSISTENCY, "path": "scene"},
        "instance path + IR": {**_RECOGNITION, **_NO_CONSISTENCY, "path": "crop", "student.search_by": "crop"},
        "L_ins + IR": {**_RECOGNITION, "inter": 0.0},
        "L_ins + L_int + IR": _RECOGNITION,
        "L_ins + L_int + L_clu": {},
        "supervised OIM": {**_NO_CONSISTENCY, "clu": 0.0, "oim": 1.0, "path": "scene"},
    },
    seeds=(0, 1),
    early_stopping=False,
    compare="matches",  # the paper's figure 3
)
