"""Builds datasets: map-style ones, mixes and streams, each checked for what its kind needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from runner.config.errors import ConfigError
from runner.config.schema import Resume
from runner.config.spec import ExperimentSpec
from runner.run.build.instantiate import explain_errors, make_object
from runner.utils.sampler.mix import Mix
from runner.utils.sampler.stream import find_shuffle_buffer, has_state, is_stream

_RANDOM_SAMPLER = "runner.utils.sampler.RandomSampler"


def make_training_dataset(spec: ExperimentSpec) -> Any:
    """Returns the dataset of `data.train`, or the `Mix` of `data.mix`.

    Raises:
        ConfigError: it can't be built, is empty, or can't be resumed.
    """
    if spec.data.mix is None:
        return make_dataset(spec.seed, "data.train", spec.data.train, needs_state=spec.data.resume is Resume.state)
    datasets, weights = {}, {}
    for name, entry in spec.data.mix.items():
        key = f"data.mix.{name}.dataset"
        datasets[name] = make_dataset(spec.seed, key, entry["dataset"], needs_state=False)
        weights[name] = entry.get("weight", 1)
        if is_stream(datasets[name]):
            kind = type(datasets[name]).__name__
            remedy = "mix streams in a dataset of your own, such as datasets.interleave_datasets, as data.train"
            raise ConfigError(
                f"{key}: expected a dataset with __len__ and __getitem__, found the stream {kind}; {remedy}"
            )
    return explain_errors("data.mix", lambda: Mix(datasets, weights))


def make_dataset(seed: int, key: str, node: Any, *, needs_state: bool) -> Any:
    """Returns a map-style dataset that is not empty, or a stream.

    Args:
        needs_state: a stream must save and load its position.
    """
    dataset = make_object(seed, key, node)
    if is_stream(dataset):
        _check_stream(key, dataset, needs_state)
        return dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        expected = "expected a dataset with __len__ and __getitem__, or an iterable one"
        raise ConfigError(f"{key}: {expected}; found {type(dataset).__name__}")
    if not explain_errors(key, lambda: len(dataset), node):
        raise ConfigError(f"{key}: the dataset is empty")
    return dataset


def _check_stream(key: str, dataset: Any, needs_state: bool) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader) and dataset.batch_sampler is not None:
        remedy = "give its dataset (or its batch_size=None); data.batch_size and data.num_workers are settings here"
        raise ConfigError(f"{key}: expected samples, found the batches of a {kind}; {remedy}")
    if getattr(dataset, "_distributed", None) is not None:
        remedy = "leave split_dataset_by_node out: each rank reads the stream and takes its slice of each batch"
        raise ConfigError(f"{key}: expected the whole stream, found the share of one rank; {remedy}")
    if needs_state and not has_state(dataset):
        remedy = "add them, or set data.resume=skip: a resumed run then reads the stream again up to its position"
        if hasattr(dataset, "reset") and hasattr(dataset, "get_state"):
            remedy = "wrap this node of torchdata: {_target_: torchdata.nodes.Loader, root: ...}"
        expected = "expected a stream with state_dict() and load_state_dict(), for a position in it"
        raise ConfigError(f"{key}: {expected}; found {kind} without them; {remedy}")


def check_unused_sampler(spec: ExperimentSpec, dataset: Any) -> None:
    """Checks that no sampler was chosen for a dataset that has its own order.

    Raises:
        ConfigError: one was chosen that is not the default.
    """
    node = spec.sampler or {"_target_": _RANDOM_SAMPLER}
    if node["_target_"] == _RANDOM_SAMPLER and not node.get("replacement"):
        return
    key = "data.mix" if isinstance(dataset, Mix) else "data.train"
    found = f"sampler={str(node['_target_']).rpartition('.')[2]}"
    expected = (
        f"expected sampler=random, the default, which is not used: {key} ({type(dataset).__name__}) has its own order"
    )
    raise ConfigError(f"{found}: {expected}")


def describe_stream(spec: ExperimentSpec, dataset: Any) -> list[str]:
    """Returns notes about the order of a stream and about inexact resumes; none for another dataset."""
    if not is_stream(dataset):
        return []
    place = f"data.train ({type(dataset).__name__})"
    notes = [f"{place} is a stream: it is read in its own order, and sampler is not used"]
    if spec.data.num_workers > 1:
        notes.append(f"data.num_workers={spec.data.num_workers}: one worker reads the stream, because it has one order")
    if spec.data.resume is Resume.skip:
        notes.append(
            f"data.resume=skip: a resumed run reads {place} again up to its position; it equals an uninterrupted run "
            "only if the stream yields the same samples again"
        )
    elif (size := find_shuffle_buffer(dataset)) is not None:
        notes.append(
            f"{place}: its state lacks the samples in its shuffle buffer, up to {size} (datasets#7444), which a "
            "resumed run skips; data.resume=skip reads the stream again instead, which is exact"
        )
    return notes


def pins_memory(spec: ExperimentSpec, device: torch.device) -> bool:
    """Returns whether batches are moved to a device from pinned memory; by default they are for CUDA."""
    if spec.data.pin_memory is None:
        return device.type == "cuda"
    return spec.data.pin_memory and device.type != "cpu"
