"""TensorBoard's event files: records of events, their framing, and cutting them back to a step.

Owns what TensorBoard reads. It must not import torch, Hydra, OmegaConf or `torch.utils.tensorboard`;
`tracking` imports it inside its thread, so that TensorBoard's protos cost the start of a run nothing.
"""

import io
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping
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

from runner.utils.files import replace_file

_PREFIX = "events.out.tfevents."
_HPARAMS = "_hparams_/"
_length = struct.Struct("<Q").pack
_crc = struct.Struct("<I").pack


def find_event_files(folder: Path) -> list[Path]:
    """The event files of `folder`, in the order in which TensorBoard reads them."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def name_next_file(folder: Path) -> Path:
    """The path of a new event file, which TensorBoard reads after all those of `folder`."""
    stamps = [re.match(r"\d+", path.name.removeprefix(_PREFIX)) for path in find_event_files(folder)]
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
        add(tag=tag, simple_value=value)
    return frame(event.SerializeToString())


def encode_text(wall_time: float, step: int, name: str, text: str) -> bytes:
    """A record that TensorBoard shows, as Markdown, in its TEXT tab."""
    value = Summary.Value(
        tag=name,
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
    return _frame_values(wall_time, step, Summary.Value(tag=name, image=picture))


def encode_audio(wall_time: float, step: int, name: str, wav: bytes, sample_rate: int) -> bytes:
    """A record with a sound, the bytes of a WAV file of 16 bits and one channel, that TensorBoard's AUDIO tab plays."""
    sound = Summary.Audio(
        sample_rate=sample_rate,
        num_channels=1,
        length_frames=(len(wav) - 44) // 2,
        encoded_audio_string=wav,
        content_type="audio/wav",
    )
    return _frame_values(wall_time, step, Summary.Value(tag=name, audio=sound))


def encode_hparams(wall_time: float, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> bytes:
    """A record that enters the run in TensorBoard's HPARAMS tab."""
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=wall_time)
    infos = []
    for name, value in values.items():
        field, kind = _kind_of(value)
        setattr(start.hparams[name], field, value)
        infos.append(api_pb2.HParamInfo(name=name, type=kind))
    rows = [_hparams_value("session_start_info", session_start_info=start)]
    if metrics is not None:
        shown = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=shown)
        rows.append(_hparams_value("experiment", experiment=experiment))
    return _frame_values(wall_time, 0, *rows)


def encode_hparams_end(wall_time: float, status: str) -> bytes:
    """A record that closes the run's row of the HPARAMS tab."""
    codes = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
    end = plugin_data_pb2.SessionEndInfo(status=codes.get(status, api_pb2.STATUS_UNKNOWN), end_time_secs=wall_time)
    return _frame_values(wall_time, 0, _hparams_value("session_end_info", session_end_info=end))


def cut_event_file(path: Path, step: int, is_eval_owed: bool = False) -> Counter[tuple[int, frozenset[str]]]:
    """The file holds the records up to `step`, less damaged ones and hparams, which a resume writes anew.

    With `is_eval_owed`, that of the very step goes too. Returns how often each step has scalars of which names.
    """
    found: Counter[tuple[int, frozenset[str]]] = Counter()

    def keep(records: Iterator[bytes]) -> Iterator[bytes]:
        for record in records:
            event = Event.FromString(record)
            if _is_kept(event, step, is_eval_owed):
                names = frozenset(value.tag for value in event.summary.value if value.HasField("simple_value"))
                if names:
                    found[event.step, names] += 1
                yield frame(record)

    with open(path, "rb") as file:
        replace_file(path, keep(read_records(file)))
    return found


def read_records(file: BinaryIO) -> Iterator[bytes]:
    """The payloads of a file's records but for those that are torn or damaged."""
    content, at = file.read(), 0
    while at < len(content):
        payload = _payload_at(content, at)
        if payload is not None:
            yield payload
            at += len(payload) + 16
            continue
        # The next place that may begin a record: a length of at most four bytes that is not 0.
        found = _BEGINNING.search(content, at + 1)
        if found is None:
            return
        at = found.start()


_BEGINNING = re.compile(rb"(?=(?!\0{4}).{4}\0{4})", re.DOTALL)


def _payload_at(content: bytes, at: int) -> bytes | None:
    head = content[at : at + 12]
    if len(head) < 12 or head[8:] != _masked_crc(head[:8]):
        return None
    (size,) = struct.unpack_from("<Q", head)
    body = content[at + 12 : at + 12 + size + 4]
    return body[:size] if len(body) == size + 4 and body[size:] == _masked_crc(body[:size]) else None


def frame(payload: bytes) -> bytes:
    """The payload as a record: its length and itself, each with a masked CRC-32C.

    Source: the TFRecord format, https://www.tensorflow.org/tutorials/load_data/tfrecord
    """
    size = _length(len(payload))
    return size + _masked_crc(size) + payload + _masked_crc(payload)


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return _crc((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _is_kept(event: Event, step: int, is_eval_owed: bool) -> bool:
    tag = event.summary.value[0].tag if event.summary.value else ""
    is_made_again = is_eval_owed and event.step == step and tag.startswith("eval/")
    return event.step <= step and not tag.startswith(_HPARAMS) and not is_made_again


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
