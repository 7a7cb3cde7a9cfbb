"""Exercises of the notebooks: every stub turns red, every solution green, a slip is found, none is slow."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path

import pytest
import torch

from dfrot_lab import dfrot, lessons, massive, weighting
from dfrot_lab.activations import Activations
from dfrot_lab.answers import Case, Comparison, grade
from dfrot_lab.lessons import LESSONS, refining
from dfrot_lab.lessons.lesson import rows
from dfrot_lab.quantizers import QuantSpec

ROOT = Path(__file__).resolve().parents[1]
OURS = "07"  # its exercises are kernels: tests/test_exercises.py
NOTEBOOKS = {
    p.stem[:2]: json.loads(p.read_text())["cells"]
    for p in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if not p.stem.startswith(OURS)
}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def stubs(number: str) -> dict[str, str]:
    """Exercise → the code of its cell, in a notebook: the one whose next code cell checks it."""
    code = [c for c in NOTEBOOKS[number] if c["cell_type"] == "code"]
    found = {}
    for cell, after in itertools.pairwise(code):
        if "exercise" in cell["metadata"].get("tags", []):
            asked = re.fullmatch(r'lessons\.check\("(\S+)\.(\w+)", my_(\w+)\)', source(after))
            assert asked and asked[1] == number and asked[2] == asked[3]
            found[asked[2]] = source(cell)
    return found


def folded(number: str, title: str) -> list[str]:
    """What is folded away under `title`, in order."""
    text = "\n".join(source(c) for c in NOTEBOOKS[number] if c["cell_type"] == "markdown")
    pattern = rf"<details><summary>{title}</summary>\n\n(.*?)\n</details>"
    return re.findall(pattern, text, re.DOTALL)


def solutions(number: str) -> dict[str, str]:
    found = [
        re.fullmatch(r"```python\n(.*)\n```", t, re.DOTALL) for t in folded(number, "Solution")
    ]
    assert all(found)
    return {re.search(r"def my_(\w+)", m[1])[1]: m[1] for m in found}


def defined(code: str, name: str, space: dict | None = None):
    space = {} if space is None else space
    exec(compile(code, f"my_{name}", "exec"), space)
    return space[f"my_{name}"]


def solved(number: str, name: str, code: str | None = None):
    """The function of a solution, with those before it at hand; `code` in place of its own."""
    space: dict = {}
    for one, text in solutions(number).items():
        if one == name:
            return defined(code or text, name, space)
        defined(text, one, space)
    raise KeyError(name)


EVERY = [tuple(name.split(".")) for name in LESSONS]
each = pytest.mark.parametrize(("number", "name"), EVERY, ids=LESSONS)


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_a_notebook_has_its_exercises_after_the_result_is_saved(number):
    names = [name for n, name in EVERY if n == number]
    assert sorted(stubs(number)) == sorted(names) and len(names) in (2, 3)
    assert list(stubs(number)) == list(solutions(number))
    assert len(folded(number, "Hint")) == len(names)
    for name, stub in stubs(number).items():
        heads = [re.search(r"def .*?\):", s)[0] for s in (stub, solutions(number)[name])]
        assert heads[0] == heads[1]
    cells = [source(c) for c in NOTEBOOKS[number]]
    saved = max(i for i, text in enumerate(cells) if "results.save(" in text)
    asked = [i for i, text in enumerate(cells) if "lessons.check(" in text]
    assert min(asked) > saved and cells[saved].splitlines()[-1].startswith("tables.claims_table(")
    assert all(not c["id"].startswith("e") for c in NOTEBOOKS[number][: saved + 1])


@each
def test_the_stub_fails_and_the_solution_passes(number, name):
    stub = lessons.check(f"{number}.{name}", defined(stubs(number)[name], name))
    assert stub.state == "failed" and not stub
    assert "wanted" in stub.example and "case 1 of" in stub.text  # the first case can be read
    report = lessons.check(f"{number}.{name}", solved(number, name))
    assert report, report


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_all_checks_of_a_notebook_are_quick(number):
    solutions_of = {name: solved(number, name) for name in solutions(number)}
    lessons.check("01.fold", None)  # transformers is imported by now, as where the model was loaded
    start = time.process_time()
    assert all(lessons.check(f"{number}.{name}", f) for name, f in solutions_of.items())
    assert time.process_time() - start < 3  # under 1 s on a quiet machine


MUTATIONS = [
    ("01.fold", "weight * gain", "weight / gain"),
    ("01.fold", "weight * gain", "(weight.mT * gain[:, None]).mT[:, :1] * weight"),
    ("01.hadamard", "kron(h, two)", "kron(two, h)"),  # S ⊗ C
    ("01.hadamard", "signs[:, None]", "signs"),  # H D
    ("01.hadamard", " / len(signs) ** 0.5", ""),
    ("01.merge", "r.mT @ writer", "r @ writer"),
    ("01.merge", "reader @ r,", "reader @ r.mT,"),
    ("02.step", ".clamp(max=0)", ""),
    ("02.step", ".clamp(min=0)", ""),
    ("02.step", "2**bits - 1", "2**bits"),
    ("02.step", "    step = step.masked_fill(step == 0, 1)\n", ""),
    ("02.error", "y = x @ r", "y = x @ r.mT"),
    ("02.error", "my_step(y, 4)", "my_step(x, 4)"),
    ("02.error", "+ zero)", ")"),
    ("02.floor", "2**bits - 1", "2**bits"),
    ("02.floor", "x.amax(-1) - x.amin(-1)", "2 * x.abs().amax(-1)"),
    ("03.massive", " & (kurtosis > 3 + 5 * (24 / d) ** 0.5)", ""),
    ("03.massive", "(lost < floor) & ", ""),
    ("03.massive", " / energy\n", "\n"),
    ("03.keep", "y @ r.mT", "y"),
    ("03.keep", "y @ r.mT", "y @ r"),
    ("03.closed", "1 - (", "("),
    ("03.closed", "fmean(ro_kept) - fmean(rh_kept)", "fmean(ro_kept) - fmean(rh)"),
    ("04.procrustes", "u @ vt", "(u @ vt).mT"),
    ("04.procrustes", "w2[:, None]", "w2[:, None].sqrt()"),
    ("04.weights", "gamma**2", "gamma"),
    ("04.weights", "    if math.isinf(gamma):\n        return heavy.double()\n", ""),
    ("04.iteration", "x @ r,", "x,"),
    ("04.iteration", "QuantSpec()", "QuantSpec(symmetric=True)"),  # the released code's
    ("05.rtn", "amax(-1, keepdim=True)", "amax()"),
    ("05.rtn", "- 1) - 1)", "- 1))"),
    ("05.rtn", "    step = step.masked_fill(step == 0, 1)\n", ""),
    ("05.gptq", " / u[i, i]", ""),
    ("05.gptq", "e[:, None] * u[i, i:]", "0"),
    ("05.gptq", "upper=True", "upper=False"),
    ("05.difference", "0.975", "0.95"),
    ("05.difference", "len(d) - 1)", "len(d))"),
    ("06.static", "min(0.0, *(", "min(*("),
    ("06.static", ".clamp(0, 15)", ""),
    ("06.clip", "low = ratio * ", "low = "),
    ("06.clip", ".clamp(0, 15)", ""),
    ("06.composed", "(x * first) * second", "(x * second) * first"),
    ("08.spikes", "v - one, v + one", "v, v + one"),
    ("08.spikes", "symmetric=symmetric", "symmetric=True"),
    ("08.must_win", "7**2", "15**2"),
    ("08.must_win", ".square() / x", " / x"),
    ("08.path", "start.mT @ end", "end.mT @ start"),
    ("08.path", "expm(t * generator)", "expm(generator)"),
    ("09.direction", "- u**3", "- u**2"),
    ("09.direction", ") * rms", ")"),
    ("09.kl", "log_p.exp()", "log_q.exp()"),
    ("09.kl", ".sum(-1).mean()", ".mean()"),
    ("09.cayley", "a = gradient @ r.mT - r @ gradient.mT", "a = r @ gradient.mT - gradient @ r.mT"),
    ("09.cayley", "eta / 2", "eta"),
    ("10.score", "logits.log_softmax(-1)", "logits"),
    ("10.score", ".sum()", ".mean()"),
    ("10.tau", "(accuracy[i] - accuracy[j])", "(accuracy[j] - accuracy[i])"),
    ("10.tau", "2 * sum(alike) / len(pairs) - 1", "sum(alike) / len(pairs)"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "right", "wrong"), MUTATIONS)
def test_a_slip_is_found(exercise, right, wrong):
    number, name = exercise.split(".")
    code = solutions(number)[name]
    assert right in code
    report = lessons.check(exercise, solved(number, name, code.replace(right, wrong)))
    assert report.state == "failed" and report.example


def test_every_exercise_has_slips_that_are_tried():
    assert {name for name, _, _ in MUTATIONS} == set(LESSONS)


@each
def test_cases_are_several_and_the_same_each_time(number, name):
    first, second = (list(LESSONS[f"{number}.{name}"].cases()) for _ in range(2))
    assert len(first) >= 2 and len({c.about for c in first}) == len(first)
    for a, b in zip(first, second, strict=True):
        parts = zip(torch.utils._pytree.tree_leaves(a[1:]), torch.utils._pytree.tree_leaves(b[1:]),
                    strict=True)  # fmt: skip
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in parts)


@pytest.mark.parametrize("name", ["03.massive", "08.must_win"])
def test_a_mask_has_both_answers(name):
    found = torch.cat([case.expected for case in LESSONS[name].cases()])
    assert 0.1 < found.double().mean() < 0.9


def test_the_iteration_is_what_the_optimiser_does():
    x, spec, how = rows(60, 12, 1, spike=300.0).float(), QuantSpec(), weighting.Weighting(10.0)
    w2 = torch.cat(weighting.row_weights(Activations.of(x), spec, how)[0])
    assert massive.is_massive(x, spec).any() or w2.eq(1).all()
    start = torch.linalg.qr(rows(12, 12, 2)).Q
    theirs, _ = dfrot.optimize(
        Activations.of(x), start, spec, how, iterations=1, dtype=torch.float64, solver="svd"
    )
    ours = refining._iteration(x.double(), start, w2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("candidate", [max, None, 3])
def test_what_has_no_signature_is_a_report_too(candidate):
    assert lessons.check("10.tau", candidate).state == "failed"


def test_what_goes_wrong_in_a_readers_code_is_a_report():
    def broken(weight, gain):
        raise RuntimeError("not\nthis")

    found = [lessons.check("01.fold", f) for f in (broken, None, 3, lambda: 0)]
    assert {r.state for r in found} == {"failed"}
    assert all("raises " in r.example for r in found)
    assert "raises RuntimeError: not\n\nweight [12, 8] = " in found[0].example
    assert "gain [8] = " in found[0].example


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        (None, torch.ones(2), "result is NoneType: a tensor is wanted"),
        (None, 1.5, "result is NoneType: a number is wanted"),
        (torch.ones(3), torch.ones(2), "torch.float32 [3]: torch.float32 [2] is wanted"),
        (torch.ones(2), torch.tensor([True, True]), "torch.bool [2] is wanted"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), "result[1] is nan, 1 is wanted; 1 of 2"),
        (2.5, 2.0, "result is 2.5, 2 is wanted"),
        ((1.0,), (1.0, 2.0), "returns tuple: tuple of 2 is wanted"),
        ((1.0, 3.0), (1.0, 2.0), "result 1 is 3, 2 is wanted"),
        (torch.ones(2, dtype=torch.float64), torch.ones(2), ""),
        (torch.tensor(2.0), 2.0, ""),
        (True, 1.0, "torch.bool []: torch.float32 [] is wanted"),
    ],
)
def test_the_comparison_says_what_is_wrong(found, expected, said):
    report = grade("it", lambda x: found, [Case("one", (1,), expected)], names=["x"])
    assert bool(report) == (not said) and said in report.example


def test_a_kernel_is_held_to_its_dtype():
    case = [Case("one", (1,), torch.ones(2))]
    double = torch.ones(2, dtype=torch.float64)
    assert grade("it", lambda x: double, case)
    assert not grade("it", lambda x: double, case, Comparison(exact_type=True))


def test_an_argument_that_is_written_to_spoils_nothing():
    def greedy(calibration, x):
        found = solved("06", "static")(calibration, x)
        x.zero_()
        calibration[0].zero_()
        calibration.clear()
        return found

    assert lessons.check("06.static", greedy)


def test_an_unknown_exercise_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'01\.knit' is unknown: use one of 01\.fold, 01\.hada"):
        lessons.check("01.knit", None)
