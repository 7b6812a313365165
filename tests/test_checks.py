"""The check of an exercise: open, wrong, failing and right answers."""

import pytest

from mocolayers.notebook import exercises
from mocolayers.notebook.exercises import Unsolved, check, solution, what_happened

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


def test_while_an_exercise_is_open_its_solution_is_judged_and_the_reader_is_not_told_that_it_is_solved(
    capsys, monkeypatch
):
    monkeypatch.setattr(exercises, "_solutions", {})
    solution("Exercise 1", 4)
    check("Exercise 1", None, EVEN)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Exercise 1 is still open: replace None") and said[-1] == "✓ it is even"
    assert not any("solved" in line for line in said)
    with pytest.raises(Unsolved, match="^Exercise 1: not yet. It does not hold that it is even"):
        check("Exercise 1", 3, EVEN)
    solution("Exercise 1", 5)
    with pytest.raises(Unsolved, match="^The solution of Exercise 1: not yet"):
        check("Exercise 1", None, EVEN)


def test_a_shortfall_is_told_in_numbers():
    least = {"it is at least 95": lambda n: n >= 95 or f"yours is {n}"}
    with pytest.raises(Unsolved, match="does not hold that it is at least 95: yours is 86. Change"):
        check("Exercise 1", 86, least)
    check("Exercise 1", 95, least)


@pytest.mark.parametrize("expected, wrong, right", [("a function of s and n", 2.5, max), ("a number", "2", 2.5)])
def test_an_answer_of_another_kind_is_told_what_was_expected(expected, wrong, right):
    kind = type(wrong).__name__
    with pytest.raises(Unsolved, match=f"Expected {expected}, got a value of type {kind}"):
        check("Exercise 1", wrong, {"it is right": lambda _: True}, expected)
    check("Exercise 1", right, {"it is right": lambda _: True}, expected)


def test_what_happened_is_folded(monkeypatch):
    shown = []
    monkeypatch.setattr(exercises, "display", shown.append)
    what_happened("It fell by **3**.")
    assert shown[0].data.startswith("<details><summary>") and "\n\nIt fell by **3**.\n\n</details>" in shown[0].data
