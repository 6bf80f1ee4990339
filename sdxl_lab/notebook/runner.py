"""Running notebooks as programs, with papermill and stricter checks.

papermill only warns of a parameter that the notebook does not have, writes a tuple as text, sets no time limit for a
cell, takes `sys.exit(0)` in the middle for success, and marks a notebook "completed" after a time-out or a dead kernel.
Here each of these raises `NotebookError`, and the executed copy says what happened.
"""

import ast
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXECUTED = Path("runs/notebooks")


class NotebookError(RuntimeError):
    """A notebook got parameters that it does not take, or did not run to its end."""


def run_notebook(
    path: Path | str,
    parameters: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    cell_seconds: float = 600,
) -> Path:
    """Execute a notebook in a kernel of its own and return the executed copy, by default `runs/notebooks/NAME`.

    `parameters` replace values that the cell tagged "parameters" assigns. Other names, and values of another type, are
    refused before anything runs. `cell_seconds` limits the time of one cell. The kernel works in the repository's root.
    Raises `NotebookError` unless the notebook ran to its last cell; the copy is kept in either case.
    """
    import papermill

    path, out = Path(path), Path(out or EXECUTED / Path(path).name)
    notebook = _read(path)
    given = _checked(path, defaults(notebook), parameters or {})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    try:
        executed = papermill.execute_notebook(
            notebook,
            str(out.resolve()),
            parameters=given,
            cwd=str(ROOT),
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=ERROR"],  # or the kernel warns of its own loopback sockets
            execution_timeout=cell_seconds,
            start_timeout=120,
            iopub_timeout=60,
        )
    except Exception as error:  # the notebook's own, a cell's time-out, a dead kernel: nbclient has a class for each
        reason = f"{path.name} did not run to its end: {type(error).__name__}: {str(error).strip()}"
        _mark(out, reason)
        raise NotebookError(reason) from error
    if left := [cell.source for cell in executed.cells if cell.cell_type == "code" and cell.execution_count is None]:
        reason = f"{path.name} stopped early: {len(left)} cells did not run, the first of them {left[0][:100]!r}"
        _mark(out, reason)
        raise NotebookError(reason)
    return out


def defaults(notebook: Any) -> dict[str, Any]:
    """The values that the cell tagged "parameters" assigns. They must be literals."""
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for statement in ast.parse(cell.source).body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    found[statement.targets[0].id] = ast.literal_eval(statement.value)
    return found


def parse_parameters(path: Path | str, words: Mapping[str, str]) -> dict[str, Any]:
    """Parameters from the command line: text where the notebook's own value is text, else a Python literal.

    papermill guesses from the word alone, and turns the prompt "7" into a number.
    """
    own = defaults(_read(Path(path)))
    return {name: word if isinstance(own.get(name), str) else _literal(word) for name, word in words.items()}


def origin(path: Path | str, **parameters: Any) -> dict[str, Any]:
    """The notebook that something was made in, for the evidence of a promotion: its name, the sha256 of its cells'
    sources (without outputs and execution counts), and the parameters it ran with."""
    cells = json.loads(Path(path).read_text())["cells"]
    sources = json.dumps([["".join(cell["source"]), cell["cell_type"]] for cell in cells])
    digest = hashlib.sha256(sources.encode()).hexdigest()
    return {"file": Path(path).name, "sha256": digest, "parameters": parameters}


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _read(path: Path) -> Any:
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat, json and jsonschema each raise classes of their own
        raise NotebookError(
            f"a notebook must be an .ipynb file; received {str(path)!r} ({type(error).__name__}: {error}). "
            "Example: notebooks/04_promote.ipynb"
        ) from error
    return notebook


def _checked(path: Path, own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    checked = {}
    for name, value in given.items():
        if name not in own:
            known = ", ".join(own) or "none: no cell is tagged 'parameters'"
            raise NotebookError(f"a parameter of {path.name} must be one of its own ({known}); received {name!r}")
        checked[name] = value = _plain(name, value)
        types = (int, float) if type(own[name]) is float else (type(own[name]),)
        if own[name] is not None and type(value) not in types:
            raise NotebookError(
                f"the parameter {name} of {path.name} must be of the type {types[-1].__name__}; received {value!r}. "
                f"Example: {own[name]!r}"
            )
    return checked


def _plain(name: str, value: Any) -> Any:
    """The value as papermill can write it into a cell; a tuple becomes a list."""
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise NotebookError(
        f"the parameter {name} must be text, a number, true, false, none, or a list or table of these; received "
        f"{value!r} ({type(value).__name__})"
    )


def _mark(out: Path, reason: str) -> None:
    """Record the failure in the executed copy, where papermill writes "completed" even for cells that never ran."""
    import nbformat

    if not out.is_file():
        return
    executed = nbformat.read(out, as_version=4)
    executed.metadata.papermill["exception"] = True
    started = [cell for cell in executed.cells if cell.metadata.get("papermill", {}).get("start_time")]
    for cell in executed.cells:
        if cell.metadata.get("papermill", {}).get("status") == "completed" and cell not in started:
            cell.metadata.papermill["status"] = "pending"
    if started:
        started[-1].metadata.papermill |= {"status": "failed", "exception": True}
    executed.cells.insert(0, nbformat.v4.new_markdown_cell(f"**This run failed.** {reason.splitlines()[0]}"))
    nbformat.write(executed, out)
