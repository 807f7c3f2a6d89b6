"""A dataset of speech: sentences of Python's documentation synthesized by espeak-ng, or a folder of audio files.

soundfile, an extra, is imported only to read a folder.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from runner.examples.audio.audio_codec import SAMPLE_RATE, from_pcm, read_wav, to_pcm

SPLITS = ("train", "validation")
SUFFIXES = (".flac", ".mp3", ".ogg", ".wav")
VOICES = ("en-us", "en-gb", "en-us+f2", "en-gb+f4", "en-us+m3", "en-gb-scotland+m7")
WORDS_PER_MINUTE = (140, 150, 160, 170)
# 0 to 200. espeak-ng's default of 100 leaves a decoder no room to overshoot.
AMPLITUDE = 60
SENTENCE = re.compile(r"[A-Z][A-Za-z ,;:'-]{38,118}[.?!]")


@dataclass(frozen=True)
class Source:
    """The source of speech, and the lengths of its pieces. The name of a sentence or file determines its split.

    Args:
        path: a folder of .wav, .flac, .ogg or .mp3 files, searched at any depth; None: espeak-ng.
        validation_fraction: share of the sentences or files that is for validation, 0 to 1.
        shortest_s: shorter pieces, in seconds, are left out.
        longest_s: longer speech, in seconds, is cut into pieces of this length.
        sample_rate: samples per second of the waves.

    Raises:
        ValueError: an argument is out of range.
    """

    path: str | None = None
    validation_fraction: float = 0.1
    shortest_s: float = 1.0
    longest_s: float = 6.0
    sample_rate: int = SAMPLE_RATE

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction <= 1:
            raise ValueError(f"speech: validation_fraction is 0 to 1, not {self.validation_fraction}")
        if not 0.1 <= self.shortest_s <= self.longest_s < math.inf:
            found = f"{self.shortest_s} and {self.longest_s}"
            raise ValueError(f"speech: expected 0.1 <= shortest_s <= longest_s, found {found}")
        if self.sample_rate < 1:
            raise ValueError(f"speech: sample_rate is at least 1, not {self.sample_rate}")

    def names(self) -> list[str]:
        """Returns all sentences, or the files' paths below the folder, in a pseudo-random order that never changes.

        Raises:
            FileNotFoundError: there are none, or espeak-ng is not installed.
        """
        if self.path is None:
            find_espeak()
        names = list_sentences() if self.path is None else list_files(Path(self.path).expanduser())
        return sorted(names, key=lambda name: (_hash("order", name), name))

    def key(self) -> list[Any]:
        """Returns the plain values that determine the waves: equal keys give equal waves."""
        settings = asdict(self)
        if self.path is None:
            version = subprocess.run([find_espeak(), "--version"], capture_output=True, check=True).stdout
            return [settings, version.decode(errors="replace"), VOICES, WORDS_PER_MINUTE, AMPLITUDE, self.names()]
        folder = Path(self.path).expanduser()
        stats = [(name, (folder / name).stat()) for name in self.names()]
        settings["path"] = str(folder.resolve())
        return [settings, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]

    def waves(self, name: str) -> Iterator[Tensor]:
        """Yields the pieces of a sentence or file, float32 [samples] at `sample_rate` each."""
        pieces = self._speak(name) if self.path is None else self._read(Path(self.path).expanduser() / name)
        shortest = round(self.shortest_s * self.sample_rate)
        longest = round(self.longest_s * self.sample_rate)
        return (piece[:longest] for piece in pieces if len(piece) >= shortest)

    def _speak(self, sentence: str) -> Iterator[Tensor]:
        wave, rate = speak(sentence)
        yield from resample(wave, rate, self.sample_rate).split(round(self.longest_s * self.sample_rate))

    def _read(self, path: Path) -> Iterator[Tensor]:
        soundfile = require_soundfile()
        try:
            with soundfile.SoundFile(path) as file:
                # In blocks, because a recording can last for hours.
                for block in file.blocks(round(self.longest_s * file.samplerate), dtype="float32", always_2d=True):
                    yield resample(torch.from_numpy(block).mean(1), file.samplerate, self.sample_rate)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"speech: {path} can't be read as audio: {error}") from error


class Speech(Dataset[dict[str, Tensor]]):
    """The pieces of speech of one split, shortest first, stored as 16-bit samples.

    Args:
        split: "train" or "validation".
        source: the source of speech; None: espeak-ng, with the defaults of `Source`.
        minutes: minimum of audio to read, if the source has as much; None: all.
    Attributes:
        names: the sentence or file of each piece.
        samples: int16 [samples] of each piece.

    Raises:
        ValueError: an argument is out of range, or the split is empty.
        FileNotFoundError: espeak-ng is not installed, or the folder has no audio files.
        ImportError: the source is a folder, and soundfile is not installed.
    """

    def __init__(self, split: str = "train", source: Source | None = None, minutes: float | None = 5.0) -> None:
        if split not in SPLITS:
            raise ValueError(f"Speech: split is one of {', '.join(SPLITS)}, not {split!r}")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"Speech: minutes is above 0, or None for all, not {minutes}")
        source = source or Source()
        names = source.names()
        is_validation = split == "validation"
        in_split = [name for name in names if in_validation(name, source.validation_fraction) == is_validation]
        max_samples = math.inf if minutes is None else 60 * minutes * source.sample_rate
        pieces: list[tuple[str, Tensor]] = []
        num_samples = 0
        named_waves = ((name, wave) for name in in_split for wave in source.waves(name))
        for name, wave in named_waves:
            pieces.append((name, to_pcm(wave)))
            num_samples += len(wave)
            if num_samples >= max_samples:
                break
        if not pieces:
            kind = "sentences" if source.path is None else "files"
            raise ValueError(
                f"Speech: the {split} split has {len(in_split)} of {len(names)} {kind} and no piece of "
                f"{source.shortest_s:g} s or more; change validation_fraction or shortest_s, or give it more audio"
            )
        # Sorted by length, so that a batch of neighbours needs little padding.
        pieces.sort(key=lambda piece: len(piece[1]))
        self.sample_rate = source.sample_rate
        self.names = [name for name, _ in pieces]
        self.samples = [samples for _, samples in pieces]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one piece: `wave`, float32 [samples] from -1 to 1."""
        return {"wave": from_pcm(self.samples[index])}


def in_validation(name: str, fraction: float) -> bool:
    """Returns whether a sentence or file is for validation, by its name: True for `fraction` of all names."""
    return _hash("split", name) < fraction * 2**32


def _hash(purpose: str, name: str) -> int:
    """Returns a 32-bit hash of a name, the same on every machine and independent for each purpose."""
    digest = hashlib.blake2s(f"{purpose} {name}".encode(errors="surrogateescape"), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def list_sentences() -> list[str]:
    """Returns sentences of 40 to 120 letters, without code or digits, of Python's installed language reference.

    Raises:
        FileNotFoundError: this Python is installed without its documentation.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise FileNotFoundError(
            "speech: this Python has no pydoc_data.topics, the text that is spoken; set path to a folder of audio files"
        ) from error
    paragraphs = (" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text))
    sentences = (sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.?!])\s+", paragraph))
    return sorted({sentence for sentence in sentences if SENTENCE.fullmatch(sentence)})


def list_files(folder: Path) -> list[str]:
    """Returns the paths of the audio files below `folder`, relative to it.

    Raises:
        FileNotFoundError: there are none.
    """
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise FileNotFoundError(f"speech: no {', '.join(SUFFIXES)} file under {folder}; set path to where they are")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def find_espeak() -> str:
    """Returns the path of espeak-ng.

    Raises:
        FileNotFoundError: it is not installed.
    """
    path = shutil.which("espeak-ng")
    if path is None:
        raise FileNotFoundError(
            "speech: espeak-ng, which speaks the default data, is not installed; "
            "apt-get install espeak-ng (Debian), or set path to a folder of audio files"
        )
    return path


def speak(sentence: str) -> tuple[Tensor, int]:
    """Synthesizes a sentence with espeak-ng: float32 [samples], and the sample rate.

    The sentence determines voice and speed.

    Raises:
        OSError: espeak-ng failed.
    """
    number = _hash("voice", sentence)
    voice = VOICES[number % len(VOICES)]
    speed = WORDS_PER_MINUTE[number // len(VOICES) % len(WORDS_PER_MINUTE)]
    command = [find_espeak(), "--stdout", "--stdin", "-v", voice, "-s", str(speed), "-a", str(AMPLITUDE)]
    done = subprocess.run(command, input=sentence.encode(), capture_output=True)
    if done.returncode or not done.stdout:
        raise OSError(f"speech: {' '.join(command)} failed: {done.stderr.decode(errors='replace').strip()}")
    return read_wav(io.BytesIO(done.stdout))


def resample(wave: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resamples `wave` with a Fourier transform, without delay or aliasing.

    float [samples] to float32 [ceil(samples * new_rate / rate)].
    """
    if rate == new_rate or not len(wave):
        return wave.float()
    down, up = rate // math.gcd(rate, new_rate), new_rate // math.gcd(rate, new_rate)
    # The signal is padded to blocks of `down` samples, so that the ratio of the lengths is exact, and to an even number
    # of blocks, so that both lengths are even. At least one block is silence: to a Fourier transform, the end of the
    # signal is next to its beginning.
    num_blocks = 2 * (len(wave) // (2 * down) + 2)
    spectrum = torch.fft.rfft(wave.double(), n=num_blocks * down)
    num_bins = min(num_blocks * down, num_blocks * up) // 2 + 1
    # The last 2% of the band fade out, because a sharp edge would ring.
    fade = num_bins // 50
    spectrum = spectrum[:num_bins]
    spectrum[num_bins - fade :] *= torch.linspace(1, 0, fade, dtype=torch.float64)
    resampled = torch.fft.irfft(spectrum, n=num_blocks * up) * (up / down)
    return resampled[: -(-len(wave) * up // down)].float()


def require_soundfile() -> Any:
    """Imports and returns the soundfile package.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: libsndfile is missing
        raise ImportError(
            'speech: a folder of audio files needs soundfile; pip install "exact-runner[audio]"'
        ) from error
