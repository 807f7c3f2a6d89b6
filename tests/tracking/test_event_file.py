"""`runner.tracking.event_file`: TensorBoard reads its records, and a cut keeps exactly the steps up to one."""

import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from runner.tracking import event_file
from runner.utils.utils import encodable


def steps_of(path: Path) -> list[int]:
    with open(path, "rb") as file:
        events = [Event.FromString(record) for record in event_file.read_records(file)]
    return [event.step for event in events if event.HasField("summary")]


@given(st.binary(max_size=300))
def test_a_record_is_framed_as_tensorboard_frames_it(payload: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        RecordWriter(file).write(payload)
        file.seek(0)
        assert event_file.frame(payload) == file.read()
        file.seek(0)
        assert list(event_file.read_records(file)) == [payload]


scalars = st.dictionaries(st.text(max_size=3), st.floats() | st.integers(-(10**9), 10**9), max_size=4)


@given(st.lists(st.tuples(st.floats(allow_nan=False), st.integers(0, 2**40), scalars), max_size=8))
def test_an_encoder_of_many_steps_writes_the_records_of_single_ones(
    steps: list[tuple[float, int, dict[str, float]]],
) -> None:
    encoder = event_file.ScalarEncoder()
    encoder._MAX_EVENTS = 2
    for wall_time, step, values in steps:
        event = Event(wall_time=wall_time, step=step)
        for tag, value in values.items():
            event.summary.value.add(tag=encodable(tag), simple_value=value)
        assert encoder.encode(wall_time, step, values) == event_file.frame(event.SerializeToString())


@given(st.lists(st.integers(0, 50), max_size=12).map(sorted), st.integers(0, 50), st.integers(0, 80))
@settings(deadline=None)
def test_a_torn_file_is_cut_to_its_whole_records_up_to_a_step(steps: list[int], last: int, num_torn: int) -> None:
    records = [event_file.encode_scalars(1.0, step, {"loss": float(step)}) for step in steps]
    content = event_file.encode_header(1.0, None) + b"".join(records)
    torn = content[: max(len(content) - num_torn, 0)]
    num_whole, end = 0, len(content) - len(b"".join(records))
    for record in records:
        end += len(record)
        num_whole += end <= len(torn)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.out.tfevents.0000000001.host.1.0"
        path.write_bytes(torn)
        log = event_file.read_log(path, last)
        log.started = 1.0
        event_file.write_log(log)
        assert steps_of(path) == [step for step in steps[:num_whole] if step <= last]
        assert list(Path(folder).iterdir()) == [path]


@pytest.mark.parametrize("place", [0, 9, 20, -2])
def test_reading_leaves_out_a_damaged_record_alone(tmp_path: Path, place: int) -> None:
    whole = event_file.encode_scalars(1.0, 1, {"loss": 1.0})
    damaged = bytearray(event_file.encode_scalars(1.0, 2, {"loss": 2.0}))
    damaged[place] ^= 1
    path = tmp_path / "events"
    path.write_bytes(whole + damaged + whole)
    assert steps_of(path) == [1, 1]


def test_the_next_file_comes_after_every_other(tmp_path: Path) -> None:
    for _ in range(12):
        path = event_file.name_next_file(tmp_path)
        assert not path.exists()
        path.touch()
        assert event_file.find_event_files(tmp_path)[-1] == path


def test_the_header_names_the_version_that_tensorboard_expects() -> None:
    record = event_file.encode_header(12.5, None)
    (size,) = struct.unpack_from("<Q", record)
    event = Event.FromString(record[12 : 12 + size])
    assert (event.wall_time, event.file_version) == (12.5, "brain.Event:2")
    assert struct.unpack("<I", record[8:12]) == (masked_crc32c(record[:8]),)
