"""How should teacher and student widths be brought together? Table VI of the paper.

T-S brings the teacher to the student's width, S-T the student to the teacher's; by a trained linear layer, or by
interpolating along the channels.
"""

from search_spaces._space import SearchSpace

SPACE = SearchSpace(
    method="sureid",
    question="How should teacher and student widths be brought together?",
    cells={
        "S-T linear": {"align": "st_linear"},
        "T-S linear": {"align": "ts_linear"},
        "S-T interpolation": {"align": "st_interpolation"},
        "T-S interpolation": {},
    },
    seeds=(0, 1),
    early_stopping=False,
)
