"""The check of an exercise: open, wrong, failing and right answers."""

import pytest

from mocolayers.notebook.exercises import Unsolved, check

EVEN = {"it is a number": lambda n: n + 0 == n, "it is even": lambda n: n % 2 == 0}


def test_an_open_exercise_says_what_to_do():
    with pytest.raises(Unsolved, match="Exercise 1 is still open: replace None"):
        check("Exercise 1", None, EVEN)


def test_a_wrong_answer_names_the_property_it_lacks():
    with pytest.raises(Unsolved, match="does not hold that it is even"):
        check("Exercise 1", 3, EVEN)


def test_an_answer_that_fails_names_its_error():
    with pytest.raises(Unsolved, match="it is a number .*TypeError"):
        check("Exercise 1", "four", EVEN)


def test_a_right_answer_is_told_every_property(capsys):
    check("Exercise 1", 4, EVEN)
    assert capsys.readouterr().out.splitlines() == ["✓ it is a number", "✓ it is even", "Exercise 1: solved."]
