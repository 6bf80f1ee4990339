"""One comparison of goldens, and everybody who asks for it gets the same answer."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_lab.cli import main
from sdxl_lab.config import RuntimeProfile
from sdxl_lab.errors import EngineStopped
from sdxl_lab.evaluation.regression import regress
from sdxl_lab.images import GeneratedImage, encode_png, open_image
from sdxl_lab.job import ImageRequest, Job
from sdxl_lab.release.promote import promote
from sdxl_lab.release.slot import SlotError, load_slot
from sdxl_lab.release.verify import LEAST_SSIM, compare_golden, verify
from service.attestation import attest
from tests.made import image, put

CUDA = {"device": "cuda", "dtype": "float16"}
COMPARED = [
    ({}, "max-abs", 0.0, None),
    ({"colour": (254, 0, 0)}, "max-abs", 1 / 255, None),
    ({"colour": (253, 0, 0)}, "max-abs", 2 / 255, "the image differs by 0.0078 (max-abs on [0, 1]); at most 0.0039"),
    ({"colour": (240, 0, 0), "runtime": CUDA}, "mean-abs", 5 / 255, None),
    (
        {"colour": (239, 0, 0), "runtime": CUDA},
        "mean-abs",
        16 / 3 / 255,
        "differs by 0.0209 (mean-abs",
    ),
    (
        {"weights": {"base": "sha256 def"}},
        "max-abs",
        0.0,
        "the weights are not those it was promoted with: base was sha256 abc, is sha256 def",
    ),
]


@pytest.mark.parametrize(("changes", "measure", "difference", "said"), COMPARED)
def test_a_golden_is_compared_as_strictly_as_the_runtime_allows(slot, changes, measure, difference, said):
    found = compare_golden(put(slot).goldens[0], image(**changes))
    assert (found.measure, found.difference) == (measure, pytest.approx(difference))
    assert found.passed == (said is None)
    if said:
        assert found.reason.startswith("golden 01-a-cat-in-a-hat-7.png: ")
        assert said in found.reason


EXACT = {"device": "cpu", "dtype": "float32", "exact": True, "threads": 1, "processor": "AMD EPYC"}
LIBRARIES = {"torch": "2.13.0"}
BITS = [
    ({}, 0.0),
    ({"runtime": EXACT | {"rows": 2, "active": 1, "order": "fifo"}}, 0.0),
    ({"runtime": EXACT | {"exact": False}}, 1 / 255),
    ({"runtime": EXACT | {"threads": 2}}, 1 / 255),
    ({"runtime": EXACT | {"processor": "Intel Xeon"}}, 1 / 255),
    ({"runtime": EXACT | {"compile": True}}, 1 / 255),
    ({"libraries": {"torch": "2.14.0"}}, 1 / 255),
    ({"runtime": EXACT | {"dtype": "bfloat16"}}, 5 / 255),
]


@pytest.mark.parametrize(("changes", "tolerance"), BITS)
def test_the_same_bits_are_asked_for_where_the_same_bits_can_be_had(slot, changes, tolerance):
    exact = {"runtime": EXACT, "libraries": LIBRARIES}
    golden = put(slot, images=[image(**exact)]).goldens[0]
    one_off = compare_golden(golden, image(**exact | changes | {"colour": (254, 0, 0)}))
    assert one_off.tolerance == pytest.approx(tolerance)
    assert one_off.passed == (tolerance > 0)
    assert compare_golden(golden, image(**exact | changes)).passed


def test_goldens_are_drawn_exactly_whatever_the_engine_does(drawn, engine):
    assert all(check.image.record.runtime["exact"] for check in verify(load_slot(drawn), engine))
    assert not engine.profile.exact


def test_a_image_of_another_size_is_another_image(slot):
    bigger = image()
    bigger = GeneratedImage(bigger.image.resize((24, 24)), bigger.record, {})
    assert not compare_golden(put(slot).goldens[0], bigger).passed


# --- everybody asks the same -----------------------------------------------------------------------------------------

FLOAT32 = RuntimeProfile(device="cpu", dtype="float32")
SEEDS = (3, 4, 5)


@pytest.fixture
def drawn(slot, engine, tiny_config) -> Path:
    """A slot whose goldens were drawn by the random model."""
    images = [engine.draw(ImageRequest(tiny_config, "a cat", seed)) for seed in SEEDS]
    return promote(tiny_config, slot, images=images, why="w", who="Ada").folder


def as_elsewhere(folder: Path, noise: float) -> None:
    """The first golden as if another kind of machine had drawn it: with noise of this deviation, of 255."""
    path = min((folder / "golden").iterdir())
    record, pixels = load_slot(folder).goldens[0].record, np.asarray(open_image(path), dtype=float)
    pixels = pixels + np.random.default_rng(0).normal(0, noise, pixels.shape)
    elsewhere = record.with_(runtime=record.runtime | {"device": "cuda", "dtype": "float16"})
    path.write_bytes(encode_png(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), elsewhere))


@pytest.mark.usefixtures("at_hand")
@pytest.mark.parametrize(("noise", "passes"), [(0.3, True), (5, False)])
def test_a_golden_of_another_structure_fails_for_everybody_or_nobody(drawn, engine, noise, passes, capsys, monkeypatch):
    """Its mean difference is small enough: a comparison without SSIM would let it through."""
    monkeypatch.setattr(type(engine), "weights", property(lambda _: {"base": "random"}, lambda *_: None), raising=False)
    as_elsewhere(drawn, noise)
    first, *others = verify(load_slot(drawn), engine)
    assert first.measure == "mean-abs"
    assert first.difference < first.tolerance
    assert (first.ssim >= LEAST_SSIM, first.passed) == (passes, passes)
    assert all(check.passed and check.measure == "max-abs" and check.ssim is None for check in others)
    found = regress(load_slot(drawn), profile=FLOAT32)
    assert found.reasons == ([] if passes else [first.reason])
    assert attest(load_slot(drawn), engine).reason == first.reason
    assert main(["verify", str(drawn)]) == (0 if passes else 1)
    if not passes:
        assert first.reason in capsys.readouterr().err


def test_all_goldens_are_drawn_in_one_batch(drawn, engine, submitted, monkeypatch):
    result = Job.result

    def waited(job, timeout=None):
        assert len(submitted) == len(SEEDS), "one is waited for before the last is submitted"
        return result(job, timeout)

    monkeypatch.setattr(Job, "result", waited)
    assert all(check.passed for check in verify(load_slot(drawn), engine))


def test_goldens_that_do_not_fit_into_the_queue_wait_for_their_turn(drawn, start):
    assert all(check.passed for check in verify(load_slot(drawn), start(rows=2, max_queue=1)))


def test_a_golden_that_cannot_be_drawn_is_named_and_the_others_are_cancelled(drawn, engine, monkeypatch):
    monkeypatch.setattr(engine, "_record", lambda work: 1 / (work.job.request.seed - SEEDS[0]))
    with pytest.raises(SlotError, match=r"golden 01-a-cat-3\.png: it could not be drawn and compared: .*division"):
        verify(load_slot(drawn), engine)


def test_an_engine_that_stops_ends_the_comparison(drawn, start):
    engine = start()
    engine.close()
    with pytest.raises(EngineStopped):
        verify(load_slot(drawn), engine)


def test_a_slot_without_goldens_promises_nothing(drawn, engine):
    (drawn / "evidence.json").unlink()
    with pytest.raises(SlotError, match=r"must have golden images to be held against; .* has none"):
        verify(load_slot(drawn), engine)
