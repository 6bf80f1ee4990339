"""What a call takes: remembered, forgotten when the machine changes, kept for the next start."""

import pytest

from sdxl_lab.diffusion.latency import CHANGED, REMEMBERED, Group, LatencyModel

SMALL, LARGE = Group("base", 8, 8), Group("base", 16, 16)


@pytest.fixture
def latency() -> LatencyModel:
    """A tenth of a second a row, measured at 2, 4 and 16 rows."""
    latency = LatencyModel()
    for rows in (2, 4, 16):
        for _ in range(3):
            latency.took(SMALL, rows, 0.1 * rows)
    return latency


def test_nothing_measured_is_nothing_known():
    assert not LatencyModel()
    assert LatencyModel().seconds(SMALL, 2) == 0
    assert LatencyModel().measured(SMALL) == []
    assert LatencyModel().prices(SMALL, [1, 2]) == {}


def test_a_first_slow_call_is_passed_over():
    latency = LatencyModel()
    for seconds in (9.0, 0.1, 0.1):
        latency.took(SMALL, 2, seconds)
    assert latency
    assert latency.seconds(SMALL, 2) == 0.1


def test_a_first_call_that_prepares_the_others_is_forgotten_at_once():
    latency = LatencyModel()
    latency.took(SMALL, 2, 9.0)
    assert latency.seconds(SMALL, 2) == 9.0, "better than nothing"
    latency.took(SMALL, 2, 0.1)
    assert latency.counts(SMALL) == {2: 1}
    assert latency.seconds(SMALL, 2) == 0.1


def test_old_calls_are_forgotten():
    latency = LatencyModel()
    for seconds in [9.0] * 100 + [0.1] * REMEMBERED:
        latency.took(SMALL, 2, seconds)
    assert latency.seconds(SMALL, 2) == 0.1


ROWS = [
    (1, 0.2, "never less than a smaller call"),
    (2, 0.2, "as measured"),
    (3, 0.3, "on the line between 2 and 4"),
    (10, 1.0, "on the line between 4 and 16"),
    (32, 3.2, "in proportion to 16"),
]


@pytest.mark.parametrize(("rows", "seconds", "why"), ROWS)
def test_rows_never_measured_go_by_their_neighbours(latency, rows, seconds, why):
    assert latency.seconds(SMALL, rows) == pytest.approx(seconds), why
    assert latency.seconds(LARGE, rows) == 0, "of another size nothing is known"


def test_a_price_is_of_a_row(latency):
    assert latency.prices(SMALL, [2, 3, 16]) == pytest.approx({2: 0.1, 16: 0.1})
    assert latency.counts(SMALL) == {2: 3, 4: 3, 16: 3}


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_when_the_machine_changes_what_was_measured_before_is_forgotten(latency, factor):
    for _ in range(REMEMBERED):
        latency.took(SMALL, 2, 0.2)
    latency.took(LARGE, 2, 1.0)
    for number in range(CHANGED):
        assert latency.measured(SMALL) == [2, 4, 16], number
        latency.took(SMALL, 2, 0.2 * factor)
    assert latency.measured(SMALL) == [2]
    assert latency.seconds(SMALL, 2) == pytest.approx(0.2 * factor)
    assert latency.measured(LARGE) == [2], "of another group nothing was seen"


def test_noise_is_no_change(latency):
    for number in range(100):
        latency.took(SMALL, 2, 0.2 * (2.0 if number % 4 == 0 else 1.0))
    assert latency.measured(SMALL) == [2, 4, 16]


def test_it_is_kept_for_the_same_machine_and_no_other(latency, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = LatencyModel.remembered(device="cpu", dtype="float32")
    assert not fresh
    fresh.keep(latency.to_dict())
    again = LatencyModel.remembered(dtype="float32", device="cpu")
    assert again.to_dict() == latency.to_dict()
    assert again.seconds(SMALL, 4) == pytest.approx(0.4)
    assert not LatencyModel.remembered(device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("text", ["", "{", '{"calls": 3}', '{"calls": [["base", 8, 8, 2, ["slow"]]]}', "[]"])
def test_a_damaged_file_is_left_out_and_written_anew(latency, tmp_path, monkeypatch, caplog, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = LatencyModel.remembered(device="cpu").path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert "damaged" not in caplog.text
    found = LatencyModel.remembered(device="cpu")
    assert not found
    assert f"{path} is damaged and left out" in caplog.text
    found.keep(latency.to_dict())
    assert LatencyModel.remembered(device="cpu").to_dict() == latency.to_dict()


def test_a_home_that_cannot_be_written_costs_nothing_else(latency, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    LatencyModel.remembered(device="cpu").keep(latency.to_dict())
