"""TensorBoard's event files: records of events, their framing, and cutting them back to a step.

Owns what TensorBoard reads. It must not import torch, Hydra, OmegaConf or `torch.utils.tensorboard`;
`tracking` imports it inside its thread, so that TensorBoard's protos cost the start of a run nothing.
"""

import io
import mmap
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import getpid
from pathlib import Path
from typing import Any, BinaryIO

from crc32c import crc32c
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from runner.tracking.repair import Log, Record, is_restorable, is_step, is_time, make_key
from runner.utils.files import open_regular, replace_file
from runner.utils.utils import encodable

_PREFIX = "events.out.tfevents."
_HPARAMS = "_hparams_/"
_length = struct.Struct("<Q").pack
_crc = struct.Struct("<I").pack


def find_event_files(folder: Path) -> list[Path]:
    """The event files of `folder`, in the order in which TensorBoard reads them."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def name_next_file(folder: Path) -> Path:
    """The path of a new event file, which TensorBoard reads after all those of `folder`."""
    stamps = [re.match(r"\d{1,12}(?!\d)", path.name.removeprefix(_PREFIX)) for path in find_event_files(folder)]
    stamp = max([int(time.time()), *(int(found[0]) + 1 for found in stamps if found)])
    return folder / f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{getpid()}.0"


def encode_header(wall_time: float, resume_step: int | None) -> bytes:
    """The records that open a file; after a resume, TensorBoard forgets the later steps that it has shown."""
    records = frame(Event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString())
    return records if resume_step is None else records + encode_restart(wall_time, resume_step)


def encode_restart(wall_time: float, resume_step: int) -> bytes:
    """A record after which TensorBoard forgets later steps that it has shown."""
    restart = Event(wall_time=wall_time, step=resume_step + 1)
    restart.session_log.status = SessionLog.START
    return frame(restart.SerializeToString())


def encode_scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """One record that holds every scalar of a step."""
    event = Event(wall_time=wall_time, step=step)
    add = event.summary.value.add
    for tag, value in values.items():
        add(tag=encodable(tag), simple_value=value)
    return frame(event.SerializeToString())


def encode_text(wall_time: float, step: int, name: str, text: str) -> bytes:
    """A record that TensorBoard shows, as Markdown, in its TEXT tab."""
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
    """A record with a picture: the bytes of a PNG, or a uint8 array `[height, width, 3]`."""
    png = image if isinstance(image, bytes) else _encode_png(image)
    width, height = struct.unpack_from(">II", png, 16)
    picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return _frame_values(wall_time, step, Summary.Value(tag=encodable(name), image=picture))


def encode_audio(wall_time: float, step: int, name: str, wav: bytes, sample_rate: int) -> bytes:
    """A record with a sound, the bytes of a WAV file of 16 bits and one channel, that TensorBoard's AUDIO tab plays."""
    sound = Summary.Audio(
        sample_rate=sample_rate,
        num_channels=1,
        length_frames=(len(wav) - 44) // 2,
        encoded_audio_string=wav,
        content_type="audio/wav",
    )
    return _frame_values(wall_time, step, Summary.Value(tag=encodable(name), audio=sound))


def encode_hparams(wall_time: float, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> bytes:
    """A record that enters the run in TensorBoard's HPARAMS tab."""
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
    """A record that closes the run's row of the HPARAMS tab."""
    codes = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
    end = plugin_data_pb2.SessionEndInfo(status=codes.get(status, api_pb2.STATUS_UNKNOWN), end_time_secs=wall_time)
    return _frame_values(wall_time, 0, _hparams_value("session_end_info", session_end_info=end))


def read_log(path: Path, step: int, is_eval_owed: bool = False, earlier_s: float = 0.0) -> Log:
    """Reads the records of a file up to `step`, but for its header and hparams, which a resume writes anew.

    With `is_eval_owed`, evaluations of that very step are left out. `earlier_s` is how long the run had run before.

    Raises:
        OSError: it is no regular file, or the disk refuses.
    """
    log, names = Log(path, f"{_PREFIX}*"), dict[tuple[str, ...], tuple[str, ...]]()
    last, is_gap, has_header, is_own = -1, False, False, True  # not a SummaryWriter's of the user
    is_begun = False
    for record, event in _events(path):
        if record is None or event is None:
            is_gap = log.is_damaged = True
            continue
        if log.started is None:
            log.started, log.clock_zero = event.wall_time, event.wall_time - earlier_s
            log.is_clock_known = event.HasField("file_version")
        if event.HasField("session_log"):
            log.is_clock_known = False  # the run had run before
        if event.HasField("file_version"):
            has_header, is_own = True, not event.HasField("source_metadata")
        elif _is_of_hparams(event):
            # Damage before the first hparams is that of a header; damage behind them, that of a number.
            is_gap, is_begun = is_gap and (is_begun or last >= 0), True
        elif event.step <= step:
            if is_gap and (is_begun or last >= 0):  # else the header, or hparams
                log.gaps.append((last, event.step))
            elif is_gap:
                log.is_begin_damaged = True
            # A restart names the step after the last one.
            last, is_gap = event.step - event.HasField("session_log"), False
            if _is_made_again(event, step, is_eval_owed):
                log.num_owed += 1
            else:
                found = event.summary.value
                values = {value.tag: value.simple_value for value in found if value.HasField("simple_value")}
                is_restored = is_own and is_restorable(event.step, values)
                key = make_key(event.step, values, names) if values and is_restored else None
                time_s = earlier_s + event.wall_time - log.started
                log.records.append(Record(event.step, time_s, record, key))
    log.is_damaged |= not has_header
    return log


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """Gives the content of a file that may be larger than memory; nothing where there is no file."""
    if not os.path.lexists(path):
        yield b""
        return
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def _events(path: Path) -> Iterator[tuple[bytes | None, Event | None]]:
    """Yields the records of a file with their events; None for what is damaged."""
    with _mapped(path) as content:
        for record in _scan(content):
            yield record, None if record is None else _parse(record)


def _parse(record: bytes) -> Event | None:
    """Returns the event of a record, or None of one that no run has written, though its checksums are right."""
    try:
        event = Event.FromString(record[12:-4])
    except Exception:  # protobuf's own
        return None
    return event if is_step(abs(event.step)) and is_time(event.wall_time) else None


def write_log(log: Log) -> None:
    """The file holds a header and the log's records."""
    assert log.started is not None
    replace_file(log.path, [encode_header(log.started, None), *(record.content for record in log.records)])


def read_records(file: BinaryIO) -> Iterator[bytes]:
    """The payloads of a file's records but for those that are torn or damaged."""
    return (record[12:-4] for record in _scan(file.read()) if record is not None)


def _scan(content: Any) -> Iterator[bytes | None]:
    """The records of bytes or a mapped file, and None for each place that is torn or damaged."""
    at = num_vain = num_searched = 0
    while at < len(content):
        record = _record_at(content, at)
        yield record
        while record is None:
            # What looks like records that contain each other would take the square of the file's length.
            num_vain += _size_at(content, at) or 0
            # The next place that may begin a record: a length of at most four bytes that is not 0.
            found = _BEGINNING.search(content, at + 1, at + 1 + _MOST_SEARCHED_BYTES)
            if found is None or num_vain > _MOST_IN_VAIN * len(content) or num_searched > _MOST_SEARCHED_BYTES:
                return
            num_searched += found.start() - at
            at = found.start()
            record = _record_at(content, at)
            if record is not None:
                yield record
        at += len(record)


_MOST_IN_VAIN = 64  # times the bytes of a file, for checksums of damaged records
_MOST_SEARCHED_BYTES = 16 << 20
_BEGINNING = re.compile(rb"(?=(?!\0{4}).{4}\0{4})", re.DOTALL)


def _record_at(content: Any, at: int) -> bytes | None:
    size = _size_at(content, at)
    if size is None:
        return None
    record: bytes = content[at : at + size + 16]
    return record if record[-4:] == _masked_crc(record[12:-4]) else None


def _size_at(content: Any, at: int) -> int | None:
    """Returns the size of the payload of the record that begins at a place; None where none does that is whole."""
    head = content[at : at + 12]
    if len(head) < 12 or head[8:] != _masked_crc(head[:8]):
        return None
    (size,) = struct.unpack_from("<Q", head)
    return int(size) if at + size + 16 <= len(content) else None


def frame(payload: bytes) -> bytes:
    """The payload as a record: its length and itself, each with a masked CRC-32C.

    Source: the TFRecord format, https://www.tensorflow.org/tutorials/load_data/tfrecord
    """
    size = _length(len(payload))
    return size + _masked_crc(size) + payload + _masked_crc(payload)


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return _crc((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _is_made_again(event: Event, step: int, is_eval_owed: bool) -> bool:
    return is_eval_owed and event.step == step and _tag_of(event).startswith("eval/")


def _is_of_hparams(event: Event) -> bool:
    return _tag_of(event).startswith(_HPARAMS)


def _tag_of(event: Event) -> str:
    return event.summary.value[0].tag if event.summary.value else ""


def _frame_values(wall_time: float, step: int, *values: Summary.Value) -> bytes:
    event = Event(wall_time=wall_time, step=step, summary=Summary(value=values))
    return frame(event.SerializeToString())


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
