"""Owns speech as codes: a codec is fitted to the training speech, and both splits are encoded, once, for all who ask.

Imports torch, the standard library and the runner's own file formats.
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

# Part of every key: raise it when the same settings give other waves or codes than before.
FORMAT = 1
_MOST_HELD = 2


class Codec(Protocol):
    """What turns audio into codes and back.

    One that also has `fit(waves)` is fitted to the training speech first. One that also has `key`, a string that
    with the audio decides its codes, is shared by the datasets of a process and its work kept on disk; with `fit`, its
    `state_dict` too.
    """

    num_codebooks: int
    card: int
    sample_rate: int
    frame_rate: float

    def encode(self, wave: Tensor) -> Tensor:
        """float32 [batch, samples] to int64 [batch, codebooks, frames]."""

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [batch, codebooks, frames] to float32 [batch, samples]."""


@dataclass
class Encoded:
    """A codec and, by split, the pieces of speech: names, int16 [samples] each, int64 [codebooks, frames] each."""

    codec: Codec
    names: dict[str, list[str]]
    samples: dict[str, list[Tensor]]
    codes: dict[str, list[Tensor]]

    @property
    def fingerprint(self) -> str:
        """Changes with the codes of the training speech, and what the codec was fitted to: the same for both splits."""
        state = self.codec.state_dict() if hasattr(self.codec, "fit") else {}  # type: ignore[attr-defined]
        digest = hashlib.sha256()
        for tensor in (*state.values(), *self.codes["train"]):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class SpeechCodes(Dataset[dict[str, Tensor]]):
    """Speech of one split as a codec's codes, shortest first; `lengths`, int64 [pieces], counts the frames of each.

    The work is done once: the second split of the same settings in a process finds it in memory, and another process
    on disk, so that a run that resumes and the ranks of a run have the same codes bit for bit.

    Args:
        split: "train" or "validation".
        path: a folder of audio files; None: sentences that espeak-ng speaks.
        minutes: of training speech, where there is as much; None: all.
        validation_minutes: of validation speech, where there is as much; None: all.
        validation_fraction: share of the sentences or files that is for validation, 0 to 1.
        shortest_s: what is shorter, in seconds, is left out.
        longest_s: what is longer, in seconds, is cut into pieces as long as this.
        codec: what encodes; None: `MelCodec()`.
        cache: keeps waves, codes and codec in the user's cache folder: $XDG_CACHE_HOME/runner, or ~/.cache/runner.

    Raises:
        ValueError: an argument is out of range, or a split is empty.
        FileNotFoundError: espeak-ng is not installed, or the folder has no audio files.
        ImportError: a folder is to be read, and soundfile is not installed.
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
        """One piece: `codes`, int64 [codebooks, frames]."""
        return {"codes": self.codes[index].clone()}

    def wave(self, index: int) -> Tensor:
        """What the piece sounded like before it was encoded: float32 [samples] from -1 to 1."""
        return from_pcm(self.samples[index])


class Pad:
    """Makes a batch of pieces of any lengths: a collate."""

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor | list[int]]:
        """Returns `codes`, int64 [batch, codebooks, most frames], and `lengths`, a list of ints.

        The codes of a piece end with its length; what follows is 0, which is also a code.
        """
        codes = [sample["codes"] for sample in samples]
        padded = torch.nn.utils.rnn.pad_sequence([each.T for each in codes], batch_first=True)
        return {"codes": padded.transpose(1, 2).contiguous(), "lengths": [each.shape[1] for each in codes]}


_held: dict[str, Encoded] = {}


def find_encoded(source: Source, minutes: dict[str, float | None], codec: Any, cache: bool) -> Encoded:
    """Speech and its codes, from memory, from the cache, or made now; `codec` is not fitted where another was."""
    own_key = getattr(codec, "key", None)
    if own_key is None:
        return encode_speech(source, minutes, codec)
    settings = json.dumps([FORMAT, source.key(), minutes, own_key], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    if key not in _held:
        path = cache_folder() / f"speech_{key}.safetensors" if cache else None
        found = encode_speech(source, minutes, codec) if path is None else _find_on_disk(path, source, minutes, codec)
        while len(_held) >= _MOST_HELD:  # a sweep in one process goes through many settings
            del _held[next(iter(_held))]
        _held[key] = found
    return _held[key]


def cache_folder() -> Path:
    """Where what is made once is kept. No config says so: one that came out of a file would choose where to write."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runner"


def encode_speech(source: Source, minutes: dict[str, float | None], codec: Any) -> Encoded:
    """Speech of both splits, and its codes by `codec`, which is fitted to the training speech if it can be."""
    speech = {split: Speech(split, source, minutes[split]) for split in SPLITS}
    if hasattr(codec, "fit"):
        codec.fit([sample["wave"] for sample in map(speech["train"].__getitem__, range(len(speech["train"])))])
    codes = {split: [_encode(codec, from_pcm(s)) for s in speech[split].samples] for split in SPLITS}
    names, samples = ({s: getattr(speech[s], what) for s in SPLITS} for what in ("names", "samples"))
    return Encoded(codec, names, samples, codes)


@torch.no_grad()
def _encode(codec: Codec, wave: Tensor) -> Tensor:
    # Each alone: what it is batched with must not reach its codes.
    codes = codec.encode(wave[None])
    if codes.ndim != 3 or codes.shape[:2] != (1, codec.num_codebooks) or codes.is_floating_point():
        raise ValueError(
            f"SpeechCodes: {type(codec).__name__}.encode gave {codes.dtype} {list(codes.shape)} for a wave "
            f"[1, {len(wave)}]; expected integers [1, {codec.num_codebooks}, frames]"
        )
    return codes[0].long().cpu().contiguous()


def _find_on_disk(path: Path, source: Source, minutes: dict[str, float | None], codec: Any) -> Encoded:
    """What lies at `path`, or is made now and put there; processes that want the same wait for the first."""
    with _locked(path):
        with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # not there, or broken: made again
            return _load(path, codec)
        encoded = encode_speech(source, minutes, codec)
        parts = {"names": encoded.names, "samples": encoded.samples, "codes": encoded.codes}
        fitted = codec.state_dict() if hasattr(codec, "fit") else {}
        state = {name: tensor.cpu() for name, tensor in fitted.items()}
        with suppress(OSError):  # a disk that is full or read-only costs the next process time, and this one nothing
            io.save({**parts, "codec": state}, path)
        return encoded


def _load(path: Path, codec: Any) -> Encoded:
    stored = io.load(path)
    state, parts = stored["codec"], {name: stored[name] for name in ("names", "samples", "codes")}
    if hasattr(codec, "fit"):
        codec.load_state_dict(state)
    return Encoded(cast(Codec, codec), **parts)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process is in such a block for the same path, where its file system has locks."""
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
