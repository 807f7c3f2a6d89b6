"""`runner.tracking.media`: the samples of a WAV file."""

import io
import wave

import numpy as np
import pytest
import torch

from runner.tracking.media import Audio


def read(content):
    with wave.open(io.BytesIO(content)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").tolist(), file.getframerate()


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda values: torch.tensor(values, requires_grad=True)])
def test_samples_are_rounded_clipped_and_never_wrapped(make):
    audio = Audio(make([0.0, 0.5, -0.5, 1.0, -1.0, 7.0, -7.0, float("nan"), float("inf")]), 8000)
    assert read(audio.encode()) == ([0, 16384, -16384, 32767, -32768, 32767, -32768, 0, 32767], 8000)
    assert audio.num_samples == 9


@pytest.mark.parametrize(
    ("wave", "rate", "message"),
    [
        (torch.zeros(1, 4), 8000, r"audio: expected \[samples\], found \[1, 4\]"),
        (torch.zeros(4), 0, "audio: expected a sample rate above 0, a whole number, found 0"),
        (torch.zeros(4), 8000.5, "audio: expected a sample rate above 0, a whole number, found 8000.5"),
    ],
)
def test_an_invalid_sound_is_an_error_when_it_is_made(wave, rate, message):
    with pytest.raises(ValueError, match=message):
        Audio(wave, rate)
