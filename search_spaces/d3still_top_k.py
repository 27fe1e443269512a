"""How many neighbours should be ordered? The paper uses k = 10 and prints no other value."""

from search_spaces._space import Int, SearchSpace

SPACE = SearchSpace(
    method="d3still",
    question="How many neighbours (k) should the student order as the teacher does?",
    tune={"top_k": Int(3, 64, log=True)},
    start=({"top_k": 10}, {"top_k": 5}, {"top_k": 20}, {"top_k": 40}),
    trials=8,
    picture=("top_k",),
)
