"""The words of a space refuse what cannot be meant."""

import pytest

from search_spaces._space import Choice, Float, Int, SearchSpace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either tune or cells"),
        ({"tune": {"a": Float(0, 1)}, "cells": {"x": {}}}, "either tune or cells"),
        ({"tune": {"a": Float(0, 1)}, "compare": "x"}, "is of the rows of a table, and there is none"),
        ({"tune": {"a": Float(0, 1)}, "fix": {"a": 1}}, "both tuned and fixed"),
        ({"tune": {"a": Float(0, 1)}, "start": ({"b": 1},)}, "must name exactly"),
        ({"tune": {"a": Float(0, 1)}, "start": ({"a": 2},)}, "outside"),
        ({"tune": {"a": Float(1, 1)}}, "bounds must rise"),
        ({"tune": {"a": Int(0, 4, log=True)}}, "lower bound above 0"),
    ],
)
def test_bad_spaces(arguments, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(method="m", question="q", **arguments)


def test_a_table_is_every_cell_with_every_seed():
    space = SearchSpace(method="m", question="q", cells={"x": {"a": 1}, "y": {}}, seeds=(0, 1), fix={"b": 2})
    assert [(p["cell"], p["seed"]) for p in space.table()] == [("x", 0), ("y", 0), ("x", 1), ("y", 1)]
    assert space.settings({"cell": "x", "seed": 1}) == {"b": 2, "a": 1, "train.seed": 1}


def test_choices_contain_their_options():
    assert "a" in Choice(("a", "b")) and 3 in Int(1, 4) and 2.5 not in Int(1, 4) and 0.5 in Float(0, 1)
