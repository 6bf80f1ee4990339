"""What every notebook of the lab keeps to."""

import ast
from pathlib import Path

import nbformat
import pytest

from sdxl_lab.notebook.runner import ROOT, defaults

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def test_there_are_six() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


def test_parameters_say_what_is_worked_on_and_where_the_results_go(notebook: nbformat.NotebookNode) -> None:
    given = defaults(notebook)
    assert "out" in given
    assert given.keys() & {"model", "config", "slot"}


def test_no_function_is_long_enough_for_the_library(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            functions = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.FunctionDef)]
            assert all(node.end_lineno - node.lineno < 5 for node in functions), cell.source


def test_it_is_stored_as_it_was_written(notebook: nbformat.NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_prose_comes_first(notebook: nbformat.NotebookNode) -> None:
    assert [cell.cell_type for cell in notebook.cells[:3]] == ["markdown", "markdown", "code"]
    assert notebook.cells[2].metadata.tags == ["parameters"]


def test_no_path_of_a_machine_is_in_it() -> None:
    for path in NOTEBOOKS:
        assert str(Path.home()) + "/" not in path.read_text()
