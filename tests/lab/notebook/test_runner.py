"""The runner of notebooks: what papermill lets pass is a failure here, and the copy that is kept says so."""

import json
from pathlib import Path

import nbformat
import pytest

from sdxl_lab.cli import main
from sdxl_lab.notebook.runner import NotebookError, defaults, origin, parse_parameters, run_notebook

OWN = "words = 'a cat'\nsteps = 4  # of diffusion\nscale = 1.5\nsizes = [\n    1,\n    2,\n]\nslot = None"


@pytest.fixture
def notebook(tmp_path: Path):
    """Writes a notebook with parameters and the given code cells."""

    def written(*code: str, own: str = OWN) -> Path:
        cells = [nbformat.v4.new_code_cell(own, metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(source) for source in code]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        made = nbformat.v4.new_notebook(
            cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
        )
        nbformat.write(made, tmp_path / "made.ipynb")
        return tmp_path / "made.ipynb"

    return written


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "executed" / "made.ipynb"


def statuses(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell.metadata.papermill.status for cell in cells if cell.cell_type == "code"]


def test_the_parameters_are_what_the_tagged_cell_assigns(notebook):
    made = nbformat.read(notebook(), as_version=4)
    assert defaults(made) == {"words": "a cat", "steps": 4, "scale": 1.5, "sizes": [1, 2], "slot": None}


REFUSED = [
    ({"stepz": 4}, "must be one of its own (words, steps, scale, sizes, slot); received 'stepz'"),
    ({"steps": "4"}, "the parameter steps of made.ipynb must be of the type int; received '4'. Example: 4"),
    ({"steps": 4.0}, "must be of the type int; received 4.0"),
    ({"steps": True}, "must be of the type int; received True"),
    ({"words": 7}, "must be of the type str; received 7. Example: 'a cat'"),
    ({"sizes": 3}, "must be of the type list; received 3"),
    ({"slot": Path("here")}, "must be text, a number, true, false, none, or a list or table of these; received"),
    ({"sizes": [1, {2}]}, "or a list or table of these; received {2} (set)"),
    ({"scale": float("nan")}, "received nan"),
]


@pytest.mark.parametrize(("parameters", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_parameter_that_the_notebook_does_not_take_is_refused_before_it_runs(notebook, out, parameters, said):
    with pytest.raises(NotebookError) as caught:
        run_notebook(notebook(), parameters, out=out)
    assert said in str(caught.value)
    assert not out.exists()


def test_a_notebook_without_parameters_takes_none(notebook, out):
    with pytest.raises(NotebookError, match="one of its own \\(none: no cell is tagged 'parameters'\\)"):
        run_notebook(notebook(own=""), {"steps": 4}, out=out)


@pytest.mark.parametrize("content", [None, "no notebook"])
def test_what_is_no_notebook_is_refused(tmp_path, content):
    path = tmp_path / "theirs.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NotebookError, match=r"a notebook must be an \.ipynb file; received .*theirs"):
        run_notebook(path)


def test_words_of_the_command_line_become_what_the_notebook_has(notebook):
    words = {"words": "7", "steps": "7", "scale": "2", "sizes": "(1, 2)", "slot": "here", "unknown": "x"}
    read = {"words": "7", "steps": 7, "scale": 2, "sizes": (1, 2), "slot": "here", "unknown": "x"}
    assert parse_parameters(notebook(), words) == read


def test_a_notebook_is_known_by_its_sources_and_parameters(tmp_path):
    cell = {"cell_type": "code", "source": ["a = 1\n", "b"], "outputs": [], "execution_count": None}

    def known(**changes) -> dict:
        (tmp_path / "04.ipynb").write_text(json.dumps({"cells": [cell | changes]}))
        return origin(tmp_path / "04.ipynb", steps=3)

    assert known() == known(outputs=["an image"], execution_count=3) == known(source="a = 1\nb")
    assert known()["sha256"] != known(source="a = 2\nb")["sha256"]
    assert (known()["file"], known()["parameters"]) == ("04.ipynb", {"steps": 3})


@pytest.mark.slow
def test_parameters_arrive_as_they_were_given(notebook, out):
    given = {"words": 'a "red" {cat}\\\n', "steps": 9, "scale": 2, "sizes": ((1, "x"), (2, "y")), "slot": "runs"}
    check = "assert (words, steps, scale, sizes, slot) == " + repr((given["words"], 9, 2, [[1, "x"], [2, "y"]], "runs"))
    assert run_notebook(notebook(check, "import sdxl_lab"), given, out=out) == out
    assert set(statuses(out)) == {"completed"}


FAILURES = [
    ("raise ValueError('no such hat')", 60, "ValueError: no such hat"),
    ("import time; time.sleep(60)", 2, "CellTimeoutError"),
    ("import os; os._exit(1)", 60, "DeadKernelError"),
    ("import sys; sys.exit(0)", 60, "1 cells did not run, the first of them 'after = 1'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("code", "seconds", "said"), FAILURES, ids=["error", "time-out", "dead kernel", "exit"])
def test_a_run_that_does_not_reach_its_end_fails_and_its_copy_says_so(notebook, out, code, seconds, said):
    with pytest.raises(NotebookError) as caught:
        run_notebook(notebook("before = 1", code, "after = 1"), {"steps": 9}, out=out, cell_seconds=seconds)
    assert said in str(caught.value)
    kept = nbformat.read(out, as_version=4)
    assert kept.metadata.papermill.exception is True
    assert "This run failed" in kept.cells[0].source
    assert statuses(out) == ["completed", "completed", "completed", "failed", "pending"]


@pytest.mark.slow
def test_the_command_line_runs_a_notebook(notebook, out, capfd):
    path = str(notebook("assert (words, steps) == ('7', 7)"))
    assert main(["notebook", path, "-p", "words=7", "-p", "steps=7", "--out", str(out)]) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith(f"{out}  ran to its end in ")
    assert captured.err == "", "neither kernel nor papermill has anything to say"
    assert main(["notebook", path, "--out", str(out)]) == 1
    assert "made.ipynb did not run to its end" in capfd.readouterr().err
    assert main(["notebook", path, "-p", "words"]) == 1
    assert "a parameter must be NAME=VALUE; received 'words'. Example: steps=6" in capfd.readouterr().err
