"""The batch benchmark: seconds of cells are read from the notebook, and a result that differs is told."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from benchmarks import batch


def write(path, durations):
    cells = [{"cell_type": "markdown", "metadata": {}}]
    cells += [{"cell_type": "code", "metadata": {"papermill": {"duration": d}}} for d in durations]
    path.write_text(json.dumps({"cells": cells}))


def test_seconds_of_cells_are_added_up(tmp_path):
    write(tmp_path / "n.ipynb", [1.5, None, 2.0])
    assert batch.inside(tmp_path / "n.ipynb") == 3.5


@pytest.mark.parametrize("same", [True, False])
def test_a_batch_whose_result_differs_is_no_measurement(tmp_path, monkeypatch, same):
    for folder, text in (("smoke", "1"), ("direct", "1" if same else "2")):
        place = tmp_path / "results" / folder / "02"
        place.mkdir(parents=True)
        (place / "result.json").write_text(text)
    monkeypatch.setattr(batch, "call", lambda *_: 0.0)
    if same:
        batch.check(tmp_path, ["02"])
    else:
        with pytest.raises(click.ClickException, match="02: the batch's result is not"):
            batch.check(tmp_path, ["02"])


def test_wall_time_less_the_cells_is_what_is_added(tmp_path, monkeypatch):
    home = tmp_path / "results" / "smoke"

    def call(folder, *arguments):
        for name, seconds in (("02", [4.0]), ("03", [1.0, 2.0])):
            assert not (home / name / "old").exists()
            (home / name).mkdir(parents=True)
            write(home / name / "notebook.ipynb", seconds)
        return 12.0

    (home / "02").mkdir(parents=True)
    (home / "02" / "old").touch()
    monkeypatch.setattr(batch, "call", call)
    assert batch.added(tmp_path, ["02", "03"]) == 5.0


def test_a_failing_command_is_told_with_its_last_lines(tmp_path):
    with pytest.raises(click.ClickException, match="No such command 'nothing'"):
        batch.call(batch.checkout(tmp_path / "checkout"), "nothing")


@pytest.mark.slow
def test_one_notebook_is_measured():
    done = CliRunner().invoke(batch.main, ["--only", "02", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    assert "a batch of one notebook adds" in done.output and "nothing to do" in done.output
