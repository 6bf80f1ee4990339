"""The short form of `python -m bench replicas`: real processes, killed. `test_promises.py` has the single cases."""

import json

import pytest
from PIL import Image

from bench import __main__ as bench
from bench import replicas


@pytest.mark.slow
@pytest.mark.timeout(600)  # five processes that load torch, on a machine that may be busy
def test_images_outlive_their_replicas_and_an_outage_of_the_store(tiny_model, tmp_path, monkeypatch):
    """Where nginx is missing (`make system` installs it) the clients go from replica to replica themselves."""
    monkeypatch.setattr(replicas, "OUTAGE", 2.0)
    arguments = ["replicas", "--model", str(tiny_model), "--folder", str(tmp_path), "--images", "10"]
    bench.main([*arguments, "--side", "64", "--steps", "60"])
    report = json.loads((tmp_path / "replicas.json").read_text())
    values = {label: value for label, (value,) in report["values"].items()}
    assert report["wrong"] == []
    assert values["acknowledged images"] == values["equal to an undisturbed run in every sample"] == 10
    assert values["acknowledged and lost"] == values["stored and never requested"] == values["job records left"] == 0
    assert values["replicas killed with SIGKILL"] == 1
    assert values["being drawn on a replica as it was stopped"] > 0
    with Image.open(tmp_path / "replicas.png") as plot:
        assert plot.width > 500


def test_the_long_form_kills_and_stops_replicas_all_along():
    plan = replicas.strikes(120)
    assert len(plan) == 20
    assert sum(kind.name == "SIGKILL" for _, kind in plan) == 15
    assert all(0 < done <= 108 for done, _ in plan)
    assert plan == replicas.strikes(120)
