"""Ranks over gloo: collectives, data parallel gradients, and who is named when a rank is lost."""

from __future__ import annotations

import re
import socket

import pytest
import torch
import workers_runtime as workers
from ranks import free_port, run_ranks

from runtime import dist as module
from runtime.device import Device
from runtime.dist import ALONE, World, open_world, world_env, wrap_data_parallel
from runtime.errors import DeviceError, RankError

pytestmark = pytest.mark.core
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """environment(RANK=0, ...): torchrun's variables are these and no others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size):
    ranks = range(size)
    for rank, got in enumerate(run_ranks(workers.collectives, size)):
        assert got["sum"] == 2**size - 1
        assert got["max"] == size - 1 and got["min"] == 5
        assert got["gathered"] == [[float(r)] * 3 for r in ranks for _ in range(2)]
        assert got["gathered_0"] == (0, 3)
        assert got["gathered_odd"] == [[x] for r in ranks for x in ([0.0, 1.0, 2.0], [3.0, 4.0, 5.0])[r % 2]]
        assert got["rows"] == [[r, r] for r in ranks for _ in range(r)]
        assert got["no_rows"] == (0, 4)
        factor = sum(r + 1 for r in ranks)
        assert got["scattered"] == [[factor * 2.0 * rank], [factor * (2.0 * rank + 1)]]
        assert got["broadcast"] == size - 1
        assert got["objects"] == [{"rank": r} for r in ranks]
        assert got["place"] == (rank, size, rank, size, rank == 0)


@pytest.mark.parametrize(
    "beside, share",
    [
        ([range(8)], 8),
        ([range(8)] * 4, 2),  # four ranks that may all use the same cores
        ([range(8), range(8, 16)], 8),  # bound by a launcher
        ([range(8)] * 16, 1),
        ([range(8), range(4)], 6),
    ],
)
def test_a_ranks_share_of_the_cores(monkeypatch, beside, share):
    everyone = [(socket.gethostname(), frozenset(cores)) for cores in beside] + [("another machine", frozenset())]

    class Beside(World):
        def all_gather_object(self, mine):
            assert mine == everyone[0]
            return everyone

    monkeypatch.setattr(module.host, "allowed_cores", lambda: everyone[0][1])
    assert Beside().core_share() == share


def test_wrong_calls_say_what_is_wrong():
    for rank, said in enumerate(run_ranks(workers.wrong_calls, 2)):
        assert said == [
            "op 'mean': choose from sum, max, min",
            f"rank {rank} holds 3 rows; counts say [2, 2] for 2 ranks",
            f"rank {rank} holds 3 rows; counts say [3] for 2 ranks",
            "3 rows do not divide among 2 ranks",
        ]


def test_ranks_that_wait_for_different_collectives_are_told_so():
    with pytest.raises(RuntimeError, match="every rank waits, but not all at the same place"):
        run_ranks(workers.diverges, 2, dist_timeout=2)


def test_data_parallel_gradients_are_those_of_one_rank_with_the_whole_batch():
    x_ND = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ((whole, _, plain),) = run_ranks(workers.gradients, 1, x_ND)
    assert plain == "Net"
    parts = run_ranks(workers.gradients, 2, x_ND)
    for grads, _, wrapped in parts:
        assert wrapped == "DistributedDataParallel"
        for got, expected in zip(grads, whole):
            assert (got - expected).abs().max() <= 1e-15
    # each rank keeps the statistics of its own images
    assert not torch.equal(parts[0][1], parts[1][1])


def test_one_rank_is_not_wrapped_and_its_world_does_nothing():
    net = workers.Net()
    assert wrap_data_parallel(net, ALONE) is net
    t = torch.ones(3, 2)
    for same in (
        ALONE.all_reduce_(t),
        ALONE.all_gather(t),
        ALONE.gather_rows(t, [3]),
        ALONE.broadcast_(t),
        ALONE.reduce_scatter_rows(t),
    ):
        assert same is t
    assert ALONE.all_gather_object("x") == ["x"] and ALONE.barrier() is None and ALONE.is_main
    with pytest.raises(ValueError, match="choose from sum, max, min"):
        ALONE.all_reduce_(t, "mean")
    with pytest.raises(ValueError, match="holds 3 rows"):
        ALONE.gather_rows(t, [2])


@pytest.mark.parametrize(
    "kind, culprit, told, own",
    [
        ("dies", 1, "rank 1 died or froze: see its log", "ended without an answer, exit code -9"),
        ("stops", 2, "rank 2 stopped: ValueError: image 7 is damaged", "ValueError: image 7\nis damaged"),
        # the ranks' store is in rank 0's process here, and what it left behind may be gone with it
        (
            "stops",
            0,
            "rank 0 (stopped: ValueError: image 7 is damaged|died, and with it the store)",
            "ValueError: image 7",
        ),
    ],
)
def test_a_rank_that_dies_or_stops_is_named_by_the_others(kind, culprit, told, own):
    with pytest.raises(RuntimeError) as failed:
        run_ranks(workers.trouble, 3, kind, culprit, timeout=600, dist_timeout=30)
    assert own in answer(failed, culprit)
    for rank in {0, 1, 2} - {culprit}:
        assert re.search(f"runtime.errors.RankError: {told}", answer(failed, rank))


@pytest.mark.parametrize("worker", [(workers.trouble, "hangs"), (workers.barrier_without_one,)])
def test_a_rank_that_hangs_is_named_within_the_timeout(worker):
    fn, *arguments = worker
    with pytest.raises(RuntimeError) as failed:
        run_ranks(fn, 3, *arguments, 1, timeout=600, dist_timeout=2)
    for rank in (0, 2):
        assert "runtime.errors.RankError: rank 1 hangs: see its log" in answer(failed, rank)


def answer(failed, rank) -> str:
    """What that rank answered, among all failed ones."""
    return str(failed.value).split(f"rank {rank}:\n", 1)[1].split("\nrank ", 1)[0]


def test_ranks_that_never_come_are_missed_within_the_timeout(environment):
    environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    with pytest.raises(RankError, match="rank 0 found no world of 2 ranks within 1 s .*are all ranks started"):
        with open_world(Device("cpu"), timeout_s=1):
            pass


def test_a_taken_port_is_one_line(environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken.getsockname()[1])
        with pytest.raises(RankError, match="MASTER_PORT"):
            with open_world(Device("cpu"), timeout_s=1):
                pass


def test_ranks_without_an_address_are_one_line(environment):
    environment(RANK=0, WORLD_SIZE=2)
    with pytest.raises(RankError, match="MASTER_ADDR"):
        with open_world(Device("cpu"), timeout_s=1):
            pass


def test_one_rank_opens_nothing(environment):
    with open_world(Device("cpu")) as world:
        assert world == ALONE == World()
        assert not torch.distributed.is_initialized()


def test_errors_of_one_rank_pass_through(environment):
    with pytest.raises(ZeroDivisionError):
        with open_world(Device("cpu")):
            raise ZeroDivisionError


def test_a_backend_for_another_device_is_refused_before_anything_starts(environment):
    environment(RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    with pytest.raises(DeviceError, match="hccl cannot move cuda tensors: --dist_backend=auto, or nccl"):
        with open_world(Device("cuda"), backend="hccl"):
            pass


def test_more_ranks_than_devices_are_refused_before_anything_starts(environment, monkeypatch):
    monkeypatch.setattr("runtime.device.device_count", lambda kind: 2)
    environment(RANK=0, WORLD_SIZE=8, LOCAL_RANK=0, LOCAL_WORLD_SIZE=8)
    with pytest.raises(DeviceError, match="8 ranks on this machine, but 2 cuda devices: start with RANK_SIZE=2"):
        with open_world(Device("cuda")):
            pass


def test_the_place_of_a_rank_comes_from_torchrun(environment):
    assert world_env() == {"rank": 0, "size": 1, "local_rank": 0, "local_size": 1}
    environment(RANK=9, WORLD_SIZE=16, LOCAL_RANK=1, LOCAL_WORLD_SIZE=8)
    assert world_env() == {"rank": 9, "size": 16, "local_rank": 1, "local_size": 8}


@pytest.mark.parametrize(
    "values, said",
    [
        ({"RANK": "first", "WORLD_SIZE": 2}, "RANK='first' is not a number"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 does not exist among WORLD_SIZE=2 ranks"),
    ],
)
def test_nonsense_from_the_environment_is_one_line(environment, values, said):
    environment(**values)
    with pytest.raises(DeviceError, match=said):
        world_env()


def test_only_collectives_that_lost_a_peer_count_as_such():
    lost = [
        "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1",
        "NCCL error: unhandled system",
        "[Rank 0]: Rank 2 failed to pass monitoredBarrier in 4500 ms",
        "Timed out waiting 6000ms for recv",
    ]
    assert all(module._is_lost_peer(RuntimeError(text)) for text in lost)
    assert not module._is_lost_peer(RuntimeError("shape '[3]' is invalid for input of size 4"))
    assert not module._is_lost_peer(ValueError("gloo"))


def test_run_ranks_itself_names_silent_and_failed_ranks():
    with pytest.raises(TimeoutError, match="no answer from rank 0, 1 of 2 within 3 s"):
        run_ranks(workers.sleeps, 2, 60, timeout=3)


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
def test_ranks_exchange_gradients_while_a_compiled_net_still_computes_others():
    """DistributedDataParallel around the compiled module, as in the Learner: torch cuts its graph at the buckets."""
    for happened in run_ranks(workers.exchange_beside_backward, 2):
        parts = [i for i, what in enumerate(happened) if what == "part"]
        assert len(parts) >= 3 and happened[: parts[-1]].count("bucket") >= 2, happened
