"""A slot to promote into, from a work tree without changes."""

from pathlib import Path

import pytest

from sdxl_lab.release import promote as promotion


@pytest.fixture(autouse=True)
def clean_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "git_state", lambda: ("c0ffee", False))


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    return tmp_path / "promoted" / "slot"
