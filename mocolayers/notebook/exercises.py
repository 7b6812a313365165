"""`check`: does a reader's answer have the properties it must have? Nothing is compared with a stored number."""

from collections.abc import Callable


class Unsolved(Exception):
    """An exercise that is open, or an answer that lacks a property; notebooks show the message without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def check(exercise: str, answer, properties: dict[str, Callable]) -> None:
    """Say which properties an answer has.

    Args:
        exercise: its name in the notebook, such as "Exercise 2".
        answer: what the reader made; None while the exercise is open.
        properties: sentence and test; each test takes the answer and returns whether the sentence is true of it.
    Raises:
        Unsolved: naming the first property that the answer lacks, and what to do.
    """
    if answer is None:
        raise Unsolved(
            f"{exercise} is still open: replace None in the cell above by your answer, run it, then this cell."
        )
    for sentence, holds in properties.items():
        try:
            true, why = bool(holds(answer)), ""
        except Exception as error:
            true, why = False, f" (it ended with {type(error).__name__}: {error})"
        if not true:
            raise Unsolved(
                f"{exercise}: not yet. It does not hold that {sentence}{why}. Change your answer and try again."
            )
        print(f"✓ {sentence}")
    print(f"{exercise}: solved.")
