import pytest
import torch

from runner.utils.distributed import memory
from runner.utils.train.failures import describe_failure

CPU = torch.device("cpu")


def test_out_of_memory_errors_of_every_allocator_are_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("size mismatch"))


def test_the_peak_is_read_at_most_twice_a_second(monkeypatch):
    now, asked = [10.0], []
    monkeypatch.setattr("runner.utils.distributed.memory.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(memory, "peak_gb", lambda device: asked.append(now[0]) or now[0])
    peak = memory.PeakMemory(CPU)
    found = []
    for now[0] in (10.0, 10.3, 10.6, 10.7, 12.0):
        found.append(peak.read_gb())
    assert found == [10.0, 10.0, 10.6, 10.6, 12.0]
    assert asked == [10.0, 10.6, 12.0]


def test_memory_use_is_reported_in_gigabytes():
    assert 0.05 < memory.peak_gb(CPU) < 1000
    assert "GB at its peak; the machine has" in memory.describe_memory(CPU)


def test_only_failures_that_are_no_bug_are_described():
    assert describe_failure(MemoryError("no room"), "in step 3", CPU).startswith(
        "Out of memory in step 3: this process had "
    )
    dead = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    assert describe_failure(dead, "in step 3", CPU) == f"A loader worker died in step 3: {dead}"
    assert describe_failure(RuntimeError("shape"), "in step 3", CPU) is None
    assert describe_failure(ValueError("DataLoader worker (pid 12)"), "in step 3", CPU) is None
