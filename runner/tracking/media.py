"""Sounds and pictures for TensorBoard and for files."""

from __future__ import annotations

import io
import wave as wave_format
from dataclasses import dataclass
from typing import Any

import numpy as np

_FULL_SCALE = 32768


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
