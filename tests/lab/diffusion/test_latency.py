"""The forecast plays the engine's own rule forward; here against sums done by hand."""

import pytest

from sdxl_lab.diffusion.latency import REMEMBERED, Forecast, LatencyModel, Workload, forecast

SMALL, LARGE = ("base", 8, 8), ("base", 16, 16)


@pytest.fixture
def pace() -> LatencyModel:
    """A tenth of a second a row, and as much again for the large group."""
    pace = LatencyModel()
    for rows in range(1, 17):
        pace.took(SMALL, rows, 0.1 * rows)
        pace.took(LARGE, rows, 0.2 * rows)
    return pace


def ends(forecasts: list[Forecast]) -> list[float]:
    return [pytest.approx(span.end) for span in forecasts]


def test_nothing_measured_is_nothing_known():
    assert not LatencyModel()
    assert LatencyModel().seconds(SMALL, 2) == 0


def test_a_first_slow_call_is_passed_over():
    pace = LatencyModel()
    for seconds in (9.0, 0.1, 0.1):
        pace.took(SMALL, 2, seconds)
    assert pace
    assert pace.seconds(SMALL, 2) == 0.1


def test_old_calls_are_forgotten():
    pace = LatencyModel()
    for seconds in [9.0] * 100 + [0.1] * REMEMBERED:
        pace.took(SMALL, 2, seconds)
    assert pace.seconds(SMALL, 2) == 0.1


def test_rows_never_measured_go_by_the_nearest_number(pace):
    assert pace.seconds(SMALL, 32) == pytest.approx(3.2)
    small = LatencyModel()
    small.took(SMALL, 16, 1.6)
    assert small.seconds(SMALL, 12) == pytest.approx(1.2)
    assert small.seconds(SMALL, 2) == pytest.approx(0.8), "a call never gets cheaper than half, however few its rows"


def test_images_that_share_calls_and_one_that_waits(pace):
    running = [Workload(SMALL, 2, 10), Workload(SMALL, 2, 4)]
    forecasts = forecast(running, [Workload(SMALL, 2, 5)], 4, pace)
    # Four calls of four rows, then the third joins for five such, then one call of two rows.
    assert [span.start for span in forecasts] == [0, 0, pytest.approx(1.6)]
    assert ends(forecasts) == [3.6 + 0.2, 1.6, 3.6]


def test_two_sizes_take_turns(pace):
    forecasts = forecast([Workload(SMALL, 2, 3), Workload(LARGE, 2, 3)], [], 16, pace)
    assert ends(forecasts) == [1.8, 1.8]


def test_one_image_always_runs_however_small_the_budget(pace):
    forecasts = forecast([], [Workload(SMALL, 2, 1), Workload(SMALL, 2, 1)], 1, pace)
    assert ends(forecasts) == [0.2, 0.4]


def test_a_image_without_guidance_fits_where_a_guided_one_does_not(pace):
    running = [Workload(SMALL, 2, 5)]
    assert forecast(running, [Workload(SMALL, 1, 1)], 3, pace)[1].start == 0
    assert forecast(running, [Workload(SMALL, 2, 1)], 3, pace)[1].start == pytest.approx(1.0)


def test_decoding_takes_its_time(pace):
    pace.took("decode", 1, 5.0)
    assert ends(forecast([Workload(SMALL, 1, 1)], [], 4, pace)) == [5.1]


def test_a_thousand_waiting_images_are_forecast_at_once(pace):
    forecasts = forecast([], [Workload(SMALL, 2, 25)] * 1000, 16, pace)
    assert forecasts[-1].end == pytest.approx(125 * 25 * 1.6)
