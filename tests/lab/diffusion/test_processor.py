"""What the processor can do, how many cores a made-up machine has, and torch's threads around calls."""

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recipes.nano.fit import autocast
from sdxl_lab.config import RuntimeProfile
from sdxl_lab.diffusion import processor
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.processor import NEEDED, CallThreads, capability, multiplies, usable_cores
from sdxl_lab.job import ImageRequest


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a root folder with the given files, seen by a process that may run on 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    def make(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
        ({"proc/self/cgroup": "0::/../elsewhere\n"}, 64),
    ],
)
def test_cores_are_those_of_the_affinity_or_of_the_tightest_quota(machine, files, cores):
    assert usable_cores(machine(files)) == cores


def test_without_affinity_every_core_counts(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path) == 6


def test_this_machine_has_a_core():
    assert 1 <= usable_cores() <= (os.cpu_count() or math.inf)


@pytest.fixture
def three(monkeypatch):
    """Call threads of a machine with three cores, in a thread of their own as in the engine."""
    monkeypatch.setattr(processor, "most_threads", lambda: 3)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        yield lambda work: pool.submit(work).result()
    torch.set_num_threads(before)


def test_a_call_has_the_chosen_threads_and_what_follows_the_proven_ones(three):
    def work():
        calls = CallThreads()
        calls.choice.choose = lambda kind, now: 1
        seen = [torch.get_num_threads()]
        with calls.call("kind"):
            seen.append(torch.get_num_threads())
        return [*seen, torch.get_num_threads()]

    assert three(work) == [3, 1, 3]


def test_what_a_call_took_is_told_in_wall_and_cpu_seconds(three):
    told = []

    def work():
        calls = CallThreads()
        calls.choice.took = lambda *call: told.append(call)
        with calls.call("kind"):
            threading.Event().wait(0.2)

    three(work)
    ((kind, threads, wall, cpu, _),) = told
    assert (kind, threads) == ("kind", 3)
    assert wall >= 0.2 > cpu >= 0


def test_a_call_that_fails_is_not_measured(three):
    def work():
        calls = CallThreads()
        calls.choice.took = lambda *call: pytest.fail("it was measured")
        calls.choice.choose = lambda kind, now: 1
        with pytest.raises(RuntimeError), calls.call("kind"):
            raise RuntimeError
        return torch.get_num_threads()

    assert three(work) == 3


def test_nothing_is_set_where_threads_were_chosen_by_somebody_else(three):
    def work():
        torch.set_num_threads(2)
        with CallThreads(adapt=False).call("kind"):
            return torch.get_num_threads()

    assert three(work) == 2


def test_a_new_thread_begins_with_what_any_thread_set_last():
    """The reason why the most threads are read once."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == before + 1
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize(("options", "adapts"), [({}, True), ({"threads": 1}, False), ({"compile": True}, False)])
def test_the_engine_measures_threads_unless_they_are_fixed_or_compiled_for(tiny_models, options, adapts):
    before = torch.get_num_threads()
    try:
        with Engine(tiny_models, RuntimeProfile(device="cpu", **options), {}) as engine:
            pass
        assert (engine._threads.choice is not None) == adapts
    finally:
        torch.set_num_threads(before)


def test_the_engines_calls_are_measured_by_group_and_rows(tiny_models, tiny_config):
    with Engine(tiny_models, RuntimeProfile(device="cpu"), {}) as engine:
        told = []
        engine.draw(ImageRequest(tiny_config.with_(steps=1), "a cat", 0))
        engine._threads.choice.took = lambda kind, *call: told.append(kind)
        engine.draw(ImageRequest(tiny_config.with_(steps=2, guidance_scale=1), "a cat", 0))
        engine.draw(ImageRequest(tiny_config.with_(steps=1, guidance_scale=3), "a cat", 0))
    assert told == [(("base", 8, 8), 1), (("base", 8, 8), 1), (("base", 8, 8), 2)]
