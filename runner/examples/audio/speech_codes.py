"""A dataset of speech as the codes of a codec, which is fitted to the training split.

The codec and the codes are cached in memory and on disk, so that all processes and runs share them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from runner.examples.audio.audio_codec import MelCodec, from_pcm
from runner.examples.audio.speech import SPLITS, Source, Speech
from runner.utils import io

# Part of every cache key: increase it when the same settings give other waves or codes than before.
FORMAT = 1
_MAX_NUM_CACHED = 2  # in memory


class Codec(Protocol):
    """Converts audio to codes and back.

    A codec that has `fit(waves)` is fitted to the training speech first. A codec that has `key`, a string that together
    with the audio determines its codes, is shared by the datasets of a process, and its codes (and its `state_dict`, if
    it has `fit`) are cached on disk.
    """

    num_codebooks: int
    card: int
    sample_rate: int
    frame_rate: float

    def encode(self, wave: Tensor) -> Tensor:
        """Encodes float32 [batch, samples] to int64 [batch, codebooks, frames]."""

    def decode(self, codes: Tensor) -> Tensor:
        """Decodes int64 [batch, codebooks, frames] to float32 [batch, samples]."""


@dataclass
class EncodedSpeech:
    """A codec, and the pieces of speech by split.

    Attributes:
        names: the sentence or file of each piece.
        samples: int16 [samples] of each piece.
        codes: int64 [codebooks, frames] of each piece.
    """

    codec: Codec
    names: dict[str, list[str]]
    samples: dict[str, list[Tensor]]
    codes: dict[str, list[Tensor]]

    @property
    def fingerprint(self) -> str:
        """A hash of the training codes and the codec's state, the same for both splits."""
        state = self.codec.state_dict() if hasattr(self.codec, "fit") else {}  # type: ignore[attr-defined]
        digest = hashlib.sha256()
        for tensor in (*state.values(), *self.codes["train"]):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class SpeechCodes(Dataset[dict[str, Tensor]]):
    """Speech of one split as a codec's codes, shortest first.

    The speech is encoded once. The other split of the same settings in the process takes it from memory, and other
    processes from disk, so a resumed run and all ranks of a run have the same codes bit for bit.

    Args:
        split: "train" or "validation".
        path: a folder of audio files; None: sentences synthesized by espeak-ng.
        minutes: minutes of training speech, if the source has as much; None: all.
        validation_minutes: minutes of validation speech, if the source has as much; None: all.
        validation_fraction: share of the sentences or files that is for validation, 0 to 1.
        shortest_s: shorter pieces, in seconds, are left out.
        longest_s: longer speech, in seconds, is cut into pieces of this length.
        codec: the codec; None: `MelCodec()`.
        cache: keeps waves, codes and codec in the user's cache folder: $XDG_CACHE_HOME/runner, or ~/.cache/runner.
    Attributes:
        lengths: int64 [pieces], the number of frames of each piece.

    Raises:
        ValueError: an argument is out of range, or a split is empty.
        FileNotFoundError: espeak-ng is not installed, or the folder has no audio files.
        ImportError: the source is a folder, and soundfile is not installed.
    """

    def __init__(
        self,
        split: str = "train",
        path: str | None = None,
        minutes: float | None = 5.0,
        validation_minutes: float | None = 0.7,
        validation_fraction: float = 0.1,
        shortest_s: float = 1.0,
        longest_s: float = 6.0,
        codec: Any = None,
        cache: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"SpeechCodes: split is one of {', '.join(SPLITS)}, not {split!r}")
        codec = MelCodec() if codec is None else codec
        source = Source(path, validation_fraction, shortest_s, longest_s, int(codec.sample_rate))
        encoded = find_encoded(source, {"train": minutes, "validation": validation_minutes}, codec, cache)
        self.codec = encoded.codec
        self.sample_rate = source.sample_rate
        self.names = encoded.names[split]
        self.samples = encoded.samples[split]
        self.codes = encoded.codes[split]
        self.lengths = torch.tensor([codes.shape[1] for codes in self.codes])
        self.fingerprint = encoded.fingerprint

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one piece: `codes`, int64 [codebooks, frames]."""
        return {"codes": self.codes[index].clone()}

    def wave(self, index: int) -> Tensor:
        """Returns the audio of a piece before it was encoded: float32 [samples] from -1 to 1."""
        return from_pcm(self.samples[index])


class Pad:
    """A collate function that pads pieces of any lengths to one batch."""

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor | list[int]]:
        """Returns `codes`, int64 [batch, codebooks, longest frames], and `lengths`, a list of ints.

        The padding is 0, which is also a valid code, so `lengths` is needed to ignore it.
        """
        codes = [sample["codes"] for sample in samples]
        padded = torch.nn.utils.rnn.pad_sequence([piece.T for piece in codes], batch_first=True)
        return {"codes": padded.transpose(1, 2).contiguous(), "lengths": [piece.shape[1] for piece in codes]}


_cached: dict[str, EncodedSpeech] = {}


def find_encoded(source: Source, minutes: dict[str, float | None], codec: Any, cache: bool) -> EncodedSpeech:
    """Returns speech and its codes from memory or disk, or encodes it.

    `codec` is fitted only when the speech is encoded: from memory comes another codec that was fitted to it.
    """
    codec_key = getattr(codec, "key", None)
    if codec_key is None:
        return encode_speech(source, minutes, codec)
    settings = json.dumps([FORMAT, source.key(), minutes, codec_key], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    if key not in _cached:
        path = cache_folder() / f"speech_{key}.safetensors" if cache else None
        encoded = (
            encode_speech(source, minutes, codec) if path is None else _load_or_encode(path, source, minutes, codec)
        )
        while len(_cached) >= _MAX_NUM_CACHED:  # a sweep in one process uses many settings
            del _cached[next(iter(_cached))]
        _cached[key] = encoded
    return _cached[key]


def cache_folder() -> Path:
    """Returns the user's cache folder. No config sets it, because an untrusted one could choose where to write."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runner"


def encode_speech(source: Source, minutes: dict[str, float | None], codec: Any) -> EncodedSpeech:
    """Encodes the speech of both splits; fits `codec` to the training speech first, if it has `fit`."""
    speech = {split: Speech(split, source, minutes[split]) for split in SPLITS}
    names = {split: speech[split].names for split in SPLITS}
    samples = {split: speech[split].samples for split in SPLITS}
    if hasattr(codec, "fit"):
        codec.fit([from_pcm(piece) for piece in samples["train"]])
    codes = {}
    for split in SPLITS:
        codes[split] = [_encode(codec, from_pcm(piece)) for piece in samples[split]]
    return EncodedSpeech(codec, names, samples, codes)


@torch.no_grad()
def _encode(codec: Codec, wave: Tensor) -> Tensor:
    # Encoded alone, so that the codes of a piece do not depend on other pieces.
    codes = codec.encode(wave[None])
    if codes.ndim != 3 or codes.shape[:2] != (1, codec.num_codebooks) or codes.is_floating_point():
        raise ValueError(
            f"SpeechCodes: {type(codec).__name__}.encode gave {codes.dtype} {list(codes.shape)} for a wave "
            f"[1, {len(wave)}]; expected integers [1, {codec.num_codebooks}, frames]"
        )
    return codes[0].long().cpu().contiguous()


def _load_or_encode(path: Path, source: Source, minutes: dict[str, float | None], codec: Any) -> EncodedSpeech:
    """Loads the cache file at `path`, or encodes the speech and writes it. Other processes wait for the first."""
    with _locked(path):
        with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # missing or damaged: encoded again
            return _load(path, codec)
        encoded = encode_speech(source, minutes, codec)
        parts = {"names": encoded.names, "samples": encoded.samples, "codes": encoded.codes}
        state_dict = codec.state_dict() if hasattr(codec, "fit") else {}
        state = {name: tensor.cpu() for name, tensor in state_dict.items()}
        with suppress(OSError):  # the disk is full or read-only: the next process encodes again
            io.save({**parts, "codec": state}, path)
        return encoded


def _load(path: Path, codec: Any) -> EncodedSpeech:
    stored = io.load(path)
    parts = {name: stored[name] for name in ("names", "samples", "codes")}
    state = stored["codec"]
    if hasattr(codec, "fit"):
        codec.load_state_dict(state)
    return EncodedSpeech(cast(Codec, codec), **parts)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock on a path within the block, so that one process at a time encodes, if the file system has locks."""
    file = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            os.close(file)
