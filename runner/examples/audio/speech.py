"""Owns speech as waves: sentences of Python's own documentation that espeak-ng speaks, or a folder of audio files.

Imports torch and the standard library only; soundfile, an extra, where a folder is read.
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
# Of espeak-ng's 0 to 200: its own 100 leaves no room for a decoder to overshoot.
AMPLITUDE = 60
SENTENCE = re.compile(r"[A-Z][A-Za-z ,;:'-]{38,118}[.?!]")


@dataclass(frozen=True)
class Source:
    """Where speech comes from and how it is cut; each sentence or file is in one split, by its own name.

    Args:
        path: a folder of .wav, .flac, .ogg or .mp3 files, also in folders within it; None: espeak-ng speaks.
        validation_fraction: share of the sentences or files that is for validation, 0 to 1.
        shortest_s: what is shorter, in seconds, is left out.
        longest_s: what is longer, in seconds, is cut into pieces as long as this.
        sample_rate: samples a second of the waves.

    Raises:
        ValueError: a setting is out of range.
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
        """All sentences, or the files' paths below the folder, in an order that looks random and never changes.

        Raises:
            FileNotFoundError: there are none, or nothing that could speak.
        """
        if self.path is None:
            find_espeak()
        found = list_sentences() if self.path is None else list_files(Path(self.path).expanduser())
        return sorted(found, key=lambda name: (_drawn("order", name), name))

    def key(self) -> list[Any]:
        """All that decides the waves, as plain values: equal keys, equal waves."""
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
        shortest, longest = (round(seconds * self.sample_rate) for seconds in (self.shortest_s, self.longest_s))
        return (piece[:longest] for piece in pieces if len(piece) >= shortest)

    def _speak(self, sentence: str) -> Iterator[Tensor]:
        wave, rate = speak(sentence)
        yield from resample(wave, rate, self.sample_rate).split(round(self.longest_s * self.sample_rate))

    def _read(self, path: Path) -> Iterator[Tensor]:
        soundfile = require_soundfile()
        try:
            with soundfile.SoundFile(path) as file:
                # Piece by piece: a recording of hours is neither held nor resampled whole.
                for block in file.blocks(round(self.longest_s * file.samplerate), dtype="float32", always_2d=True):
                    yield resample(torch.from_numpy(block).mean(1), file.samplerate, self.sample_rate)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"speech: {path} can't be read as audio: {error}") from error


class Speech(Dataset[dict[str, Tensor]]):
    """Speech of one split, shortest first, as 16-bit samples: `names` says of what sentence or file each is.

    Args:
        split: "train" or "validation".
        source: where it comes from; None: espeak-ng, with the defaults of `Source`.
        minutes: of audio, at least, where the source has as much; None: all.

    Raises:
        ValueError: an argument is out of range, or the split is empty.
        FileNotFoundError: espeak-ng is not installed, or the folder has no audio files.
        ImportError: a folder is to be read, and soundfile is not installed.
    """

    def __init__(self, split: str = "train", source: Source | None = None, minutes: float | None = 5.0) -> None:
        if split not in SPLITS:
            raise ValueError(f"Speech: split is one of {', '.join(SPLITS)}, not {split!r}")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"Speech: minutes is above 0, or None for all, not {minutes}")
        source = source or Source()
        every = source.names()
        chosen = [name for name in every if in_validation(name, source.validation_fraction) == (split == "validation")]
        wanted = math.inf if minutes is None else 60 * minutes * source.sample_rate
        pieces: list[tuple[str, Tensor]] = []
        total = 0
        for name, wave in ((each, wave) for each in chosen for wave in source.waves(each)):
            pieces.append((name, to_pcm(wave)))
            total += len(wave)
            if total >= wanted:
                break
        if not pieces:
            what = "sentences" if source.path is None else "files"
            raise ValueError(
                f"Speech: the {split} split has {len(chosen)} of {len(every)} {what} and no piece of "
                f"{source.shortest_s:g} s or more; change validation_fraction or shortest_s, or give it more audio"
            )
        # Neighbours are as long as each other: a batch of neighbours is hardly padded.
        pieces.sort(key=lambda piece: len(piece[1]))
        self.sample_rate = source.sample_rate
        self.names = [name for name, _ in pieces]
        self.samples = [samples for _, samples in pieces]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One piece: `wave`, float32 [samples] from -1 to 1."""
        return {"wave": from_pcm(self.samples[index])}


def in_validation(name: str, fraction: float) -> bool:
    """Says whether a sentence or file is for validation: by its name alone, the same everywhere."""
    return _drawn("split", name) < fraction * 2**32


def _drawn(purpose: str, name: str) -> int:
    """Returns an integer of 32 bits, well spread even for names that are alike."""
    digest = hashlib.blake2s(f"{purpose} {name}".encode(errors="surrogateescape"), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def list_sentences() -> list[str]:
    """Sentences of 40 to 120 letters, without code or digits, of the language reference that Python ships with.

    Raises:
        FileNotFoundError: this Python comes without its documentation.
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
    """Paths, relative to `folder`, of the audio files in it and below.

    Raises:
        FileNotFoundError: there are none.
    """
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise FileNotFoundError(f"speech: no {', '.join(SUFFIXES)} file under {folder}; set path to where they are")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def find_espeak() -> str:
    """Path of espeak-ng.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = shutil.which("espeak-ng")
    if found is None:
        raise FileNotFoundError(
            "speech: espeak-ng, which speaks the default data, is not installed; "
            "apt-get install espeak-ng (Debian), or set path to a folder of audio files"
        )
    return found


def speak(sentence: str) -> tuple[Tensor, int]:
    """`sentence`, float32 [samples], and its sample rate; voice and speed vary with the sentence, by nothing else.

    Raises:
        OSError: espeak-ng failed.
    """
    draw = _drawn("voice", sentence)
    voice = VOICES[draw % len(VOICES)]
    speed = WORDS_PER_MINUTE[draw // len(VOICES) % len(WORDS_PER_MINUTE)]
    command = [find_espeak(), "--stdout", "--stdin", "-v", voice, "-s", str(speed), "-a", str(AMPLITUDE)]
    spoken = subprocess.run(command, input=sentence.encode(), capture_output=True)
    if spoken.returncode or not spoken.stdout:
        raise OSError(f"speech: {' '.join(command)} failed: {spoken.stderr.decode(errors='replace').strip()}")
    return read_wav(io.BytesIO(spoken.stdout))


def resample(wave: Tensor, rate: int, new_rate: int) -> Tensor:
    """`wave`, float [samples] at `rate`, at `new_rate`: its spectrum, cut above what both rates hold, without a delay.

    float32 [ceil(samples * new_rate / rate)].
    """
    if rate == new_rate or not len(wave):
        return wave.float()
    down, up = rate // math.gcd(rate, new_rate), new_rate // math.gcd(rate, new_rate)
    # Whole blocks make the ratio of the lengths exact, an even number of them both even; one more is silence between
    # the end and the beginning, which are neighbours to a Fourier transform.
    num_blocks = 2 * (len(wave) // (2 * down) + 2)
    spectrum = torch.fft.rfft(wave.double(), n=num_blocks * down)
    kept = min(num_blocks * down, num_blocks * up) // 2 + 1
    # The last 2% of the band fade: a sharp edge would ring.
    fade = kept // 50
    spectrum = spectrum[:kept]
    spectrum[kept - fade :] *= torch.linspace(1, 0, fade, dtype=torch.float64)
    resampled = torch.fft.irfft(spectrum, n=num_blocks * up) * (up / down)
    return resampled[: -(-len(wave) * up // down)].float()


def require_soundfile() -> Any:
    """The soundfile package.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise ImportError(
            'speech: a folder of audio files needs soundfile; pip install "exact-runner[audio]"'
        ) from error
