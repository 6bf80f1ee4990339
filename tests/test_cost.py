"""The guide's table of costs is what the arithmetic gives."""

from pathlib import Path

from bench import cost


def test_the_guide_has_the_table_that_the_module_prints():
    assert cost.table() in (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
