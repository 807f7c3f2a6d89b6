"""`runner.tracking.media`: the samples of a WAV file, and the bins of a histogram."""

import io
import wave

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runner.tracking.media import Audio, read_histogram
from runner.tracking.tracker import TrackerThread


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


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda values: torch.tensor(values, dtype=torch.bfloat16)])
def test_a_histogram_counts_the_finite_numbers(make):
    histogram = read_histogram("h", make([[0.0, 1.0, 1.0], [64.0, float("nan"), float("inf")]]))
    assert histogram.counts == [1, 2, *[0] * 61, 1]
    assert (histogram.low, histogram.high, histogram.num) == (0, 64, 4)
    assert (histogram.total, histogram.total_squares) == (66, 4098)
    assert histogram.edges == [*range(65)]


def test_a_histogram_of_one_number_has_one_bin_and_of_none_is_none():
    assert read_histogram("h", torch.full((3, 2), 2.0)).counts == [6]
    assert read_histogram("h", np.full(5, 2)).counts == [5]
    assert read_histogram("h", torch.tensor([float("nan")])) is None
    assert read_histogram("h", []) is None


def test_a_histogram_of_what_is_no_real_number_names_it():
    for values in (torch.zeros(2, dtype=torch.complex64), np.array(["a"])):
        with pytest.raises(TypeError, match="histogram 'h': expected real numbers, found"):
            read_histogram("h", values)


def test_tensorboard_reads_a_histogram(tmp_path):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    tracker = TrackerThread(tmp_path)
    tracker.histogram(3, "weights/layer", values)
    tracker.histogram(3, "nothing", torch.full((2,), float("nan")))
    tracker.close()
    reader = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    reader.Reload()
    assert reader.Tags()["histograms"] == ["weights/layer"]
    (event,) = reader.Histograms("weights/layer")
    found, exact = event.histogram_value, values.double()
    assert (event.step, found.num) == (3, 1000)
    assert (found.min, found.max) == (exact.min().item(), exact.max().item())
    assert (found.sum, found.sum_squares) == (exact.sum().item(), exact.square().sum().item())
    counts, edges = np.histogram(exact, 64)
    assert found.bucket == counts.tolist()
    assert found.bucket_limit == pytest.approx(edges[1:])
