"""Sounds, pictures and histograms for TensorBoard and for files."""

from __future__ import annotations

import io
import wave as wave_format
from dataclasses import dataclass
from typing import Any

import numpy as np

_FULL_SCALE = 32768
_NUM_BINS = 64


@dataclass(frozen=True)
class Audio:
    """A sound of one channel.

    Args:
        wave: float `[samples]`, -1 to 1; a tensor or an array. Values outside are clipped, NaN is silence.
        sample_rate: samples per second.
    Raises:
        ValueError: the wave is not `[samples]`, or the rate is no whole number above 0.
    """

    wave: Any
    sample_rate: int

    def __post_init__(self) -> None:
        shape = list(getattr(self.wave, "shape", np.shape(self.wave)))
        if len(shape) != 1:
            raise ValueError(f"audio: expected [samples], found {shape}")
        if not isinstance(self.sample_rate, (int, np.integer)) or not 0 < self.sample_rate < 2**31:
            raise ValueError(f"audio: expected a sample rate above 0, a whole number, found {self.sample_rate!r}")

    @property
    def num_samples(self) -> int:
        return len(self.wave)

    def encode(self) -> bytes:
        """Returns the bytes of a WAV file."""
        wave = self.wave.detach().float().cpu().numpy() if hasattr(self.wave, "detach") else np.asarray(self.wave)
        clipped = np.clip(np.nan_to_num(wave.astype(np.float64)), -1, 1)
        samples = np.minimum(np.round(clipped * _FULL_SCALE), _FULL_SCALE - 1).astype("<i2")
        buffer = io.BytesIO()
        with wave_format.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(int(self.sample_rate))
            file.writeframes(samples.tobytes())
        return buffer.getvalue()


def read_picture(name: str, picture: Any) -> Any:
    """Returns a Matplotlib figure as the bytes of a PNG, or a copy of an array or tensor, uint8 `[height, width, 3]`.

    Raises:
        ValueError: an array has another type or shape.
    """
    if hasattr(picture, "savefig"):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png")
        return buffer.getvalue()
    array = np.array(picture.detach().cpu().numpy() if hasattr(picture, "detach") else picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"image {name!r}: expected uint8 [height, width, 3], found {found}; convert it first")
    return array


def to_pil(picture: Any) -> Any:
    """Returns a picture, as `read_picture` returns it, as Pillow's image."""
    from PIL.Image import fromarray
    from PIL.Image import open as decode

    return decode(io.BytesIO(picture)) if isinstance(picture, bytes) else fromarray(picture)


def read_wave(wav: bytes) -> Any:
    """Returns the samples of a WAV file, as `Audio.encode` returns it: int16 [samples]."""
    with wave_format.open(io.BytesIO(wav)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@dataclass(frozen=True)
class Histogram:
    """A summary of numbers.

    Args:
        counts: of the numbers in bins of equal width from `low` to `high`.
        low: the smallest number.
        high: the largest.
        num: how many numbers there are.
        total: their sum.
        total_squares: the sum of their squares.
    """

    counts: list[float]
    low: float
    high: float
    num: int
    total: float
    total_squares: float

    @property
    def edges(self) -> list[float]:
        """The edges of the bins, one more than there are bins."""
        num_bins = len(self.counts)
        inner = [self.low + (self.high - self.low) * number / num_bins for number in range(1, num_bins)]
        return [self.low, *inner, self.high]


def read_histogram(name: str, values: Any) -> Histogram | None:
    """Returns a histogram of an array or tensor of any shape; None if none of its numbers is finite.

    Numbers that are not finite are left out. Those of a tensor are counted on its device.

    Raises:
        TypeError: the values are no real numbers.
    """
    if isinstance(values, Histogram):
        return values
    if hasattr(values, "histc"):
        return _count_tensor(name, values.detach())
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"histogram {name!r}: expected real numbers, found {array.dtype}")
    array = array.astype(np.float64).ravel()
    array = array[np.isfinite(array)]
    if not array.size:
        return None
    low, high = float(array.min()), float(array.max())
    counts = np.histogram(array, _NUM_BINS, (low, high))[0].tolist() if low < high else [array.size]
    return Histogram(counts, low, high, array.size, float(array.sum()), float(np.square(array).sum()))


def _count_tensor(name: str, tensor: Any) -> Histogram | None:
    if tensor.is_complex():
        raise TypeError(f"histogram {name!r}: expected real numbers, found {tensor.dtype}")
    tensor = tensor.float() if tensor.device.type != "cpu" else tensor.double()  # some devices have no float64
    tensor = tensor.flatten()
    tensor = tensor[tensor.isfinite()]
    if not tensor.numel():
        return None
    low, high = tensor.min().item(), tensor.max().item()
    counts = tensor.histc(_NUM_BINS, low, high).tolist() if low < high else [float(tensor.numel())]
    return Histogram(counts, low, high, tensor.numel(), tensor.sum().item(), tensor.square().sum().item())
