"""What a processor can do decides which dtype is fast on it."""

import pytest
import torch

from recipes.nano.fit import autocast
from sdxl_lab.diffusion import processor
from sdxl_lab.diffusion.processor import NEEDED, capability, multiplies


def flags() -> set[str]:
    """The processor's own, as Linux lists them."""
    try:
        with open("/proc/cpuinfo") as file:
            listed = [line for line in file if line.startswith("flags")]
    except FileNotFoundError:
        listed = []
    if not listed:
        pytest.skip("needs an x86 processor under Linux")
    return set(listed[0].split())


def test_every_processor_multiplies_float32():
    assert multiplies(torch.float32)


def test_bfloat16_takes_avx_512():
    """As oneDNN has it: without the three of AVX-512 there is no kernel."""
    assert multiplies(torch.bfloat16) == ({"avx512bw", "avx512vl", "avx512dq"} <= flags())
    assert not (multiplies(torch.bfloat16) and capability() in ("DEFAULT", "AVX2"))


def test_without_onednn_there_are_no_kernels_of_low_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert [multiplies(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [True, False, False]


def test_every_dtype_that_may_be_slow_says_what_it_takes():
    assert set(NEEDED) == {"bfloat16", "float16"}


@pytest.mark.parametrize("able", [True, False])
def test_the_recipe_trains_in_bfloat16_where_the_processor_multiplies_it(monkeypatch, able):
    monkeypatch.setattr(processor.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    with autocast():
        assert torch.is_autocast_enabled("cpu") == able
