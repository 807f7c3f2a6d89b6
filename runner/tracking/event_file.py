"""TensorBoard's event files: encoding, framing and reading of records.

The tracker imports this module in its thread, so that TensorBoard's protos do not delay the start of a run.
"""

import io
import mmap
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from crc32c import crc32c
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from runner.tracking.repair import LINE_NAMES, Log, Record, is_step, is_time, make_key
from runner.utils.files import open_regular, replace_file
from runner.utils.utils import encodable

_PREFIX = "events.out.tfevents."
_HPARAMS = "_hparams_/"
_length = struct.Struct("<Q").pack
_crc = struct.Struct("<I").pack


def find_event_files(folder: Path) -> list[Path]:
    """Returns the event files of `folder`, in the order in which TensorBoard reads them."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def name_next_file(folder: Path) -> Path:
    """Returns the path of a new event file, which TensorBoard reads after the others of `folder`."""
    matches = [re.match(r"\d{1,12}(?!\d)", path.name.removeprefix(_PREFIX)) for path in find_event_files(folder)]
    stamp = max([int(time.time()), *(int(match[0]) + 1 for match in matches if match)])
    return folder / f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"


def encode_header(wall_time: float, resume_step: int | None) -> bytes:
    """Returns the first records of a file; after a resume, TensorBoard then drops the later steps that it has shown."""
    header = frame(Event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString())
    if resume_step is None:
        return header
    restart = Event(wall_time=wall_time, step=resume_step + 1)
    restart.session_log.status = SessionLog.START
    return header + frame(restart.SerializeToString())


def encode_scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """Returns one record with all scalars of a step."""
    return ScalarEncoder().encode(wall_time, step, values)


class ScalarEncoder:
    """Encodes the scalars of many steps, in one thread. An event is reused for scalars with the same tags."""

    _MAX_EVENTS = 256

    def __init__(self) -> None:
        self._events: dict[tuple[str, ...], tuple[Event, list[Summary.Value]]] = {}

    def encode(self, wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
        """Returns one record with all scalars of a step."""
        tags = tuple(values)
        if tags not in self._events:
            if len(self._events) >= self._MAX_EVENTS:
                self._events.clear()
            event = Event()
            self._events[tags] = event, [event.summary.value.add(tag=encodable(tag)) for tag in tags]
        event, scalars = self._events[tags]
        event.wall_time, event.step = wall_time, step
        for scalar, value in zip(scalars, values.values(), strict=True):
            scalar.simple_value = value
        return frame(event.SerializeToString())


def encode_text(wall_time: float, step: int, name: str, text: str) -> bytes:
    """Returns a record with Markdown for TensorBoard's TEXT tab."""
    value = Summary.Value(
        tag=encodable(name),
        metadata=SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name="text"), data_class=DATA_CLASS_TENSOR
        ),
        tensor=TensorProto(
            dtype=DT_STRING,
            string_val=[text.encode(errors="backslashreplace")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        ),
    )
    return _frame_values(wall_time, step, value)


def encode_image(wall_time: float, step: int, name: str, image: Any) -> bytes:
    """Returns a record with a picture.

    Args:
        image: the bytes of a PNG, or a uint8 array `[height, width, 3]`.
    """
    png = image if isinstance(image, bytes) else _encode_png(image)
    width, height = struct.unpack_from(">II", png, 16)
    picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return _frame_values(wall_time, step, Summary.Value(tag=encodable(name), image=picture))


def encode_audio(wall_time: float, step: int, name: str, wav: bytes, sample_rate: int) -> bytes:
    """Returns a record with a sound for TensorBoard's AUDIO tab.

    Args:
        wav: the bytes of a WAV file, 16 bits, one channel.
    """
    sound = Summary.Audio(
        sample_rate=sample_rate,
        num_channels=1,
        length_frames=(len(wav) - 44) // 2,
        encoded_audio_string=wav,
        content_type="audio/wav",
    )
    return _frame_values(wall_time, step, Summary.Value(tag=encodable(name), audio=sound))


def encode_histogram(wall_time: float, step: int, name: str, histogram: Any) -> bytes:
    """Returns a record with a `Histogram` for TensorBoard's HISTOGRAMS and DISTRIBUTIONS tabs."""
    content = HistogramProto(
        min=histogram.low,
        max=histogram.high,
        num=histogram.num,
        sum=histogram.total,
        sum_squares=histogram.total_squares,
        bucket_limit=histogram.edges[1:],
        bucket=histogram.counts,
    )
    return _frame_values(wall_time, step, Summary.Value(tag=encodable(name), histo=content))


def encode_hparams(wall_time: float, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> bytes:
    """Returns a record that enters the run in TensorBoard's HPARAMS tab."""
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=wall_time)
    infos = []
    for name, value in values.items():
        field, kind = _kind_of(value)
        name, value = encodable(name), encodable(value) if isinstance(value, str) else value
        setattr(start.hparams[name], field, value)
        infos.append(api_pb2.HParamInfo(name=name, type=kind))
    rows = [_hparams_value("session_start_info", session_start_info=start)]
    if metrics is not None:
        shown = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=encodable(tag))) for tag in metrics]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=shown)
        rows.append(_hparams_value("experiment", experiment=experiment))
    return _frame_values(wall_time, 0, *rows)


def encode_hparams_end(wall_time: float, status: str) -> bytes:
    """Returns a record that ends the run's row of the HPARAMS tab."""
    codes = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
    end = plugin_data_pb2.SessionEndInfo(status=codes.get(status, api_pb2.STATUS_UNKNOWN), end_time_secs=wall_time)
    return _frame_values(wall_time, 0, _hparams_value("session_end_info", session_end_info=end))


def read_log(path: Path, step: int, is_eval_pending: bool = False, earlier_s: float = 0.0) -> Log:
    """Reads the records of a file up to `step`, except its header and hparams, which a resume writes again.

    Args:
        is_eval_pending: leaves out evaluations of that very step.
        earlier_s: the duration of the run's earlier sessions.
    Raises:
        OSError: it is no regular file, or the disk refuses.
    """
    log, names = Log(path, f"{_PREFIX}*"), dict[tuple[str, ...], tuple[str, ...]]()
    last = -1  # the step of the last record
    is_gap = False  # damage came since then
    has_header = False
    is_ours = True  # False for a file of the user's own SummaryWriter
    has_hparams = False
    for record, event in _events(path):
        if record is None or event is None:
            is_gap = log.is_damaged = True
            continue
        if log.started is None:
            log.started, log.clock_zero = event.wall_time, event.wall_time - earlier_s
            log.is_clock_known = event.HasField("file_version")
        tag = event.summary.value[0].tag if event.summary.value else ""
        if event.HasField("session_log"):
            log.is_clock_known = False  # the run had run before
        if event.HasField("file_version"):
            has_header = True
            is_ours = not event.HasField("source_metadata")
        elif tag.startswith(_HPARAMS):
            # Damage before the first hparams has hit the header; damage after them has hit numbers.
            is_gap = is_gap and (has_hparams or last >= 0)
            has_hparams = True
        elif event.step <= step:
            if is_gap and (has_hparams or last >= 0):
                log.gaps.append((last, event.step))
            elif is_gap:  # in the header or the hparams
                log.is_begin_damaged = True
            # A restart has the step after the last one.
            last = event.step - event.HasField("session_log")
            is_gap = False
            if is_eval_pending and event.step == step and tag.startswith("eval/"):
                log.num_pending_evals += 1
            else:
                values = {
                    value.tag: value.simple_value for value in event.summary.value if value.HasField("simple_value")
                }
                is_restorable = is_ours and event.step >= 0 and LINE_NAMES.isdisjoint(values)
                key = make_key(event.step, values, names) if values and is_restorable else None
                time_s = earlier_s + event.wall_time - log.started
                log.records.append(Record(event.step, time_s, record, key))
        elif not event.HasField("session_log"):
            log.last_step = max(log.last_step, event.step)
    log.is_damaged |= not has_header
    return log


def _events(path: Path) -> Iterator[tuple[bytes | None, Event | None]]:
    """Yields the records of a file, which may be larger than memory, with their events; None for a damaged one."""
    if not os.path.lexists(path):
        return
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size:  # an empty file can't be mapped
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for record in _scan(content):
                    yield record, None if record is None else _parse(record)


def _parse(record: bytes) -> Event | None:
    """Returns the event of a record, or None if no run has written it, though its checksums are right."""
    try:
        event = Event.FromString(record[12:-4])
    except Exception:  # protobuf's own
        return None
    return event if is_step(abs(event.step)) and is_time(event.wall_time) else None


def write_log(log: Log) -> None:
    """Replaces the file by a header and the log's records."""
    assert log.started is not None
    replace_file(log.path, [encode_header(log.started, None), *(record.content for record in log.records)])


def read_records(file: BinaryIO) -> Iterator[bytes]:
    """Yields the payloads of a file's records, except torn or damaged ones."""
    return (record[12:-4] for record in _scan(file.read()) if record is not None)


def _scan(content: Any) -> Iterator[bytes | None]:
    """Yields the records of bytes or a mapped file, and None for each torn or damaged place."""
    at = num_wasted = num_searched = 0
    while at < len(content):
        record = _record_at(content, at)
        yield record
        while record is None:
            # Bytes that look like nested records would need time quadratic in the length of the file.
            num_wasted += _size_at(content, at) or 0
            match = _RECORD_START.search(content, at + 1, at + 1 + _MAX_SEARCHED_BYTES)
            is_too_slow = num_wasted > _MAX_WASTED * len(content) or num_searched > _MAX_SEARCHED_BYTES
            if match is None or is_too_slow:
                return
            num_searched += match.start() - at
            at = match.start()
            record = _record_at(content, at)
            if record is not None:
                yield record
        at += len(record)


_MAX_WASTED = 64  # times the size of the file, for checksums of damaged records
_MAX_SEARCHED_BYTES = 16 << 20
_RECORD_START = re.compile(rb"(?=(?!\0{4}).{4}\0{4})", re.DOTALL)  # a length below 2**32 that is not 0


def _record_at(content: Any, at: int) -> bytes | None:
    size = _size_at(content, at)
    if size is None:
        return None
    record: bytes = content[at : at + size + 16]
    return record if record[-4:] == _masked_crc(record[12:-4]) else None


def _size_at(content: Any, at: int) -> int | None:
    """Returns the size of the payload of the record at a position; None if there is no complete record."""
    head = content[at : at + 12]
    if len(head) < 12 or head[8:] != _masked_crc(head[:8]):
        return None
    (size,) = struct.unpack_from("<Q", head)
    return int(size) if at + size + 16 <= len(content) else None


def frame(payload: bytes) -> bytes:
    """Returns a payload as a record: its length and itself, each with a masked CRC-32C.

    Source: the TFRecord format, https://www.tensorflow.org/tutorials/load_data/tfrecord
    """
    return _frame_head(len(payload)) + payload + _masked_crc(payload)


@lru_cache(maxsize=1024)
def _frame_head(num_bytes: int) -> bytes:
    size = _length(num_bytes)
    return size + _masked_crc(size)


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return _crc((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _frame_values(wall_time: float, step: int, *values: Summary.Value) -> bytes:
    return frame(Event(wall_time=wall_time, step=step, summary=Summary(value=values)).SerializeToString())


def _hparams_value(name: str, **content: Any) -> Summary.Value:
    data = plugin_data_pb2.HParamsPluginData(version=0, **content).SerializeToString()
    return Summary.Value(
        tag=_HPARAMS + name,
        metadata=SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=data),
            data_class=DATA_CLASS_TENSOR,
        ),
        tensor=TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)])),
    )


def _kind_of(value: bool | float | str) -> tuple[str, int]:
    if isinstance(value, bool):
        return "bool_value", api_pb2.DATA_TYPE_BOOL
    if isinstance(value, str):
        return "string_value", api_pb2.DATA_TYPE_STRING
    return "number_value", api_pb2.DATA_TYPE_FLOAT64


def _encode_png(array: Any) -> bytes:
    from PIL import Image  # Pillow is slow to import and most runs log no picture

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()
