"""The plan of a head's memory: against measured peaks, against the published bytes, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from head.plan import FORMATS, GIB, HeadPlan, Rates, StorageFormat, check, main, parse_size, table
from runtime.errors import ModelError

pytestmark = pytest.mark.core

MEASURED = {
    "all rows": dict(classes=120_000),
    "accumulated": dict(classes=120_000, accumulate=4),
    "bf16 + int8": dict(classes=160_000, dtype="bfloat16", momentum_dtype="int8"),
    "bf16, no momentum": dict(classes=240_000, dtype="bfloat16", momentum=0.0, batch=128),
    "sampled": dict(classes=120_000, sample_rate=0.3),
    "sampled, accumulated": dict(classes=120_000, sample_rate=0.1, accumulate=3),
    "all move": dict(classes=120_000, sample_rate=0.3, update_rows="all"),
}


@pytest.fixture(scope="module")
def peaks(root):
    """Measured in a process of its own, whose memory nothing else moves."""
    cases = [{"dim": 128, "batch": 32, **case} for case in MEASURED.values()]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'test'}",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "262144",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(root / "test" / "memory_head.py"), json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(MEASURED, json.loads(done.stdout)))


def plan_of(
    classes,
    batch=32,
    dtype="float32",
    momentum_dtype="float32",
    momentum=0.9,
    momentum_on_host=False,
    sample_rate=1.0,
    update_rows="sampled",
    accumulate=1,
):
    form = StorageFormat(getattr(torch, dtype), getattr(torch, momentum_dtype) if momentum else None, momentum_on_host)
    return HeadPlan(classes, 128, 1, batch, sample_rate, form, update_rows, "cpu", 4, accumulate)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the size of a process is read from /proc")
@pytest.mark.parametrize("name", MEASURED)
def test_the_measured_peak_is_the_planned_one(peaks, name):
    plan = plan_of(**MEASURED[name])
    assert peaks[name] == pytest.approx(plan.device_bytes + plan.host_state, rel=0.1)


@pytest.mark.parametrize(
    "name, per_class, millions",
    [
        ("fp32 + fp32", 4096, 32),
        ("fp32 + bf16", 3072, 43),
        ("bf16 + bf16", 2048, 64),
        ("bf16 + int8", 1552, 85),
        ("bf16, no momentum", 1024, 129),
    ],
)
def test_the_bytes_of_a_class(name, per_class, millions):
    """D = 512 on a device of 139 GiB with 16 kept free: the arithmetic of the state alone."""
    plan = HeadPlan(10**8, form=FORMATS[name], sample_rate=0.02)
    assert plan.device_state == (per_class + 4) * 10**8
    assert 123 * GIB // per_class == pytest.approx(millions * 10**6, rel=0.012)
    # a step takes a little of it
    assert 0.97 * (123 * GIB // per_class) < plan.most_classes(123 * GIB, GIB) < 123 * GIB // per_class


def test_momentum_on_the_host_moves_its_bytes_there():
    device, host = (
        HeadPlan(10**8, form=FORMATS[name], sample_rate=0.02) for name in ("bf16 + bf16", "bf16 + host bf16")
    )
    assert host.device_state == 1028 * 10**8 and 1024 * 10**8 < host.host_state < 1.01 * 1024 * 10**8
    assert host.host_traffic == 1024 * host.sampled and device.host_traffic == 0
    assert host.most_classes(123 * GIB, 50 * GIB) < 53 * 10**6 < host.most_classes(123 * GIB, 112 * GIB)


def test_a_step_grows_with_what_is_sampled_not_with_what_there_is():
    small, large = HeadPlan(10**7, sample_rate=0.1), HeadPlan(10**8, sample_rate=0.01)
    assert small.sampled == large.sampled == 10**6
    for name in ("device_step", "operations", "device_traffic"):
        assert getattr(small, name) == getattr(large, name)
    assert HeadPlan(10**8, sample_rate=0.01, update_rows="all").device_traffic > 10 * large.device_traffic
    ranks = HeadPlan(10**8, sample_rate=0.01, world_size=8)
    assert ranks.rows == 10**8 // 8 and ranks.global_batch == 8 * 128 and large.network_traffic == 0
    # embeddings and their gradient; int64 labels; five numbers an image, which travel twice
    assert ranks.network_traffic == 7 / 8 * 1024 * (4 * 2 * 512 + 8 + 2 * 4 * 5)
    # gloo has no reduce_scatter: the gradient travels twice
    cpu = HeadPlan(10**8, sample_rate=0.01, world_size=8, device_type="cpu")
    assert cpu.network_traffic == 7 / 8 * 1024 * (4 * 3 * 512 + 8 + 2 * 4 * 5)


def test_the_floor_is_the_slowest_of_three():
    # 2.06 million classes, batch 1024, one H200: 31 ms in the published arithmetic, without the update's traffic
    plan = HeadPlan(2_060_000, batch=1024, form=FORMATS["bf16, no momentum"])
    assert plan.operations == 8.0 * 1024 * 2_060_000 * 512
    assert plan.seconds(Rates()) == plan.operations / 790e12
    assert plan.seconds(Rates(memory=1e9)) == plan.device_traffic / 1e9
    host = HeadPlan(10**8, sample_rate=0.1, form=FORMATS["bf16 + host bf16"])
    assert host.host_traffic == pytest.approx(10.24e9) and host.seconds(Rates()) == host.host_traffic / 50e9


def test_what_does_not_fit_is_refused_with_the_table(caplog):
    check(HeadPlan(10**6), 10 * GIB, 0)
    with pytest.raises(ModelError, match="--centers_dtype=bf16 --momentum_dtype=int8 would fit; pyth") as error:
        check(HeadPlan(80 * 10**6, sample_rate=0.02), 123 * GIB, GIB)
    assert "\n" not in str(error.value) and "80,000,000 class centers need 306.0 GiB on the device" in str(error.value)
    assert "bf16 + host bf16" in caplog.text and "classes that fit" in caplog.text
    with pytest.raises(ModelError, match="use more ranks"):
        check(HeadPlan(10**9), 10 * GIB, 0)
    # a cpu's momentum "on the host" lies in the same memory
    form = FORMATS["bf16 + host bf16"]
    plan = HeadPlan(10**7, form=form, sample_rate=0.001)
    assert plan.fits(12 * GIB, 12 * GIB) and not replace(plan, device_type="cpu").fits(12 * GIB, 12 * GIB)


def test_saving_counts():
    """One .pth gathers all in float32 on one host; a sharded checkpoint can do without a copy."""
    plan = HeadPlan(10**8, form=FORMATS["bf16 + int8"], sample_rate=0.02, checkpoint="pth")
    assert plan.save_bytes == 2 * 4 * 512 * 10**8 and replace(plan, checkpoint="sharded").save_bytes == 0
    with pytest.raises(
        ModelError, match=r"one .pth of them needs 381.5 GiB of host memory \(111.9 are there\): use --ch"
    ):
        check(plan, 160 * GIB, 112 * GIB)
    check(replace(plan, checkpoint="sharded"), 160 * GIB, 112 * GIB)
    check(plan, 160 * GIB, 400 * GIB)


def test_the_hosts_own_memory_is_part_of_the_floor():
    """Where no kernel addresses it, rows are collected and spread by the host."""
    npu = HeadPlan(10**8, sample_rate=0.02, form=FORMATS["bf16 + host int8"], device_type="npu")
    assert npu.seconds(Rates(host_memory=1e9)) == pytest.approx(4 * npu.host_traffic / 1e9)
    assert replace(npu, device_type="cuda").seconds(Rates(host_memory=1e9)) < 0.05


@pytest.mark.parametrize(
    "text, size",
    [
        ("139GiB", 139 * GIB),
        ("80GB", 80 * 10**9),
        ("512 mib", 2**29),
        ("1000", 1000),
        ("1.5k", 1500),
        ("100e6", 10**8),
        ("2G", 2 * 10**9),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "1.2.3G", "-3GB"])
def test_what_is_no_size(text):
    with pytest.raises(ModelError, match="is not a size: write 139GiB"):
        parse_size(text)


def test_the_command(capsys):
    main(["--classes", "100e6", "--device_memory", "139GiB", "--host_memory", "112GiB", "--sample_rate", "0.02"])
    printed = capsys.readouterr().out
    assert printed.strip() == table(HeadPlan(10**8, sample_rate=0.02), 123 * GIB, 112 * GIB)
    fits = {line[:20].strip(): line.split()[-5] for line in printed.splitlines()[2:]}
    assert set(fits) == set(FORMATS)
    assert [name for name, word in fits.items() if word == "yes"] == [
        "bf16 + host bf16",
        "bf16 + host int8",
        "bf16, no momentum",
    ]
    with pytest.raises(ModelError, match="--classes 1: must be at least 2"):
        main(["--classes", "1"])
    for wrong in ("--classes inf", "--classes 9 --world_size 0", "--classes 9 --batch_size 0"):
        with pytest.raises(ModelError, match="must be at least"):
            main(wrong.split())
