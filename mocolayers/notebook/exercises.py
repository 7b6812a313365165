"""`check`: does a reader's answer have the properties it must have? Nothing is compared with a stored number."""

from collections.abc import Callable
from numbers import Real

from IPython.display import Markdown, display

KINDS = {"a function": callable, "a number": lambda answer: isinstance(answer, Real)}
_solutions: dict[str, object] = {}


class Unsolved(Exception):
    """An exercise that is open, or an answer that lacks a property; notebooks show the message without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def solution(exercise: str, answer) -> None:
    """Keep a solution for `check`, which judges it while the reader's own answer is open."""
    _solutions[exercise] = answer


def check(exercise: str, answer, properties: dict[str, Callable], expected: str = "") -> None:
    """Say which properties an answer has, or, while it is open, that the solution has them.

    Args:
        exercise: its name in the notebook, such as "Exercise 2".
        answer: what the reader made; None while the exercise is open.
        properties: sentence and test; each test takes the answer, and returns whether the sentence is true of it, or a
            text that says by how much it is not.
        expected: what an answer is, such as "a function of s and n"; the kinds of `KINDS` are checked.
    Raises:
        Unsolved: the exercise is open and has no `solution`, or an answer lacks a property; it says what to do.
    """
    if answer is None:
        told = f"{exercise} is still open: replace None in the cell above by your answer, run it, then this cell."
        if exercise not in _solutions:
            raise Unsolved(told)
        print(f"{told}\nA right answer has these properties (checked here on the solution):")
        _hold(f"The solution of {exercise}", _solutions[exercise], properties, expected)
    else:
        _hold(exercise, answer, properties, expected)
        print(f"{exercise}: solved.")


def _hold(exercise: str, answer, properties: dict[str, Callable], expected: str) -> None:
    if any(expected.startswith(kind) and not fits(answer) for kind, fits in KINDS.items()):
        raise Unsolved(f"{exercise}: not yet. Expected {expected}, got a value of type {type(answer).__name__}.")
    for sentence, holds in properties.items():
        try:
            found = holds(answer)
            true, why = not isinstance(found, str) and bool(found), f": {found}" if isinstance(found, str) else ""
        except Exception as error:
            true, why = False, f" (it ended with {type(error).__name__}: {error})"
        if not true:
            raise Unsolved(
                f"{exercise}: not yet. It does not hold that {sentence}{why}. Change your answer and try again."
            )
        print("✓", sentence.replace("`", ""))


def what_happened(text: str) -> None:
    """Show the answer to a prediction, folded, so that a reader opens it after looking."""
    summary = "<summary><b>What happened, and why</b></summary>"
    display(Markdown(f"<details>{summary}\n\n{text}\n\n</details>"))
