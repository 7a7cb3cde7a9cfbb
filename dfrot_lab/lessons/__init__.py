"""Lessons: the exercises of notebooks 01 to 06 and 08 to 10, checked against this package's own functions.

    lessons.check("01.fold", my_fold)

gives a report, green or red, with the first case that shows what is wrong. (Notebook 07's, which are kernels,
are in `dfrot_lab.exercises`.) Expected values come from the functions that the experiments run.
"""

from __future__ import annotations

import inspect
from typing import Any

from dfrot_lab.answers import Report, grade
from dfrot_lab.lessons import quantizing, refining, rotating, spikes, tasks, weights
from dfrot_lab.lessons.lesson import Lesson

__all__ = ["LESSONS", "Lesson", "check"]

LESSONS: dict[str, Lesson] = dict(
    sorted(
        (name, lesson)
        for part in (rotating, quantizing, refining, weights, spikes, tasks)
        for name, lesson in part.LESSONS.items()
    )
)


def check(name: str, candidate: Any) -> Report:
    """Try the reader's function `candidate` for exercise `name`, such as "01.fold".

    Raises ValueError for a name that is none.
    """
    if name not in LESSONS:
        raise ValueError(f"exercise {name!r} is unknown: use one of {', '.join(LESSONS)}")
    try:
        names = list(inspect.signature(candidate).parameters)
    except (TypeError, ValueError):  # no function, or one without a signature, such as max
        names = []
    return grade(name, candidate, LESSONS[name].cases(), LESSONS[name].how, names=names)
