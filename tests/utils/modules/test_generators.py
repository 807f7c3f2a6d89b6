import functools
import random
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from runner.utils.modules.generators import ObjectGenerators

KINDS = {
    "torch": (torch.Generator, lambda held: torch.rand(3, generator=held).tolist()),
    "random": (lambda: random.Random(0), lambda held: [held.random(), held.gauss(0, 1)]),
    "numpy": (lambda: np.random.default_rng(0), lambda held: [held.integers(2**20, dtype=np.uint32), held.random()]),
    "numpy, legacy": (lambda: np.random.RandomState(0), lambda held: [held.rand(), held.randn()]),
    "numpy, legacy around another": (
        lambda: np.random.RandomState(np.random.PCG64(0)), lambda held: [held.rand(), held.randn()],
    ),
    **{
        f"numpy, {bits.__name__}": (lambda bits=bits: np.random.Generator(bits(0)), lambda held: [held.normal()])
        for bits in (np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM)
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_generator_are_a_function_of_the_seed(kind):
    make, draw = KINDS[kind]
    generator = make()
    held = ObjectGenerators(data=types.SimpleNamespace(own=generator))
    assert (held.paths, held.unseeded) == (["data.own"], [])
    drawn = {}
    for seed in (1, 2, 2**62, 1, 2):
        held.seed(seed)
        values = draw(generator)
        assert drawn.setdefault(seed, values) == values
        draw(generator)
    assert len({str(values) for values in drawn.values()}) == 3


class Slots:
    __slots__ = ("empty", "own")

    def __init__(self, own):
        self.own = own


class Attribute:
    def __init__(self, own):
        self.own = own


def closure(own):
    return lambda: own.random()


def default(own):
    def draw(generator=own, *, other=None):
        return generator.random()

    return draw


def of_class(own):
    return type("OfClass", (), {"own": own})()


def of_global(own):
    namespace = {"own": own, "__name__": "elsewhere"}
    exec("class OfGlobal:\n def draw(self):\n  return [own.random() for _ in 'a']", namespace)
    return namespace["OfGlobal"]()


def of_module(own):
    module = types.ModuleType("augmentations")
    module.own = own
    namespace = {"augmentations": module, "__name__": "elsewhere"}
    exec("def draw():\n return augmentations.own.random()", namespace)
    return namespace["draw"]


PLACES = {
    "a list": lambda own: [None, own],
    "a dict": lambda own: {"a": 1, "b": own},
    "a tuple in a set": lambda own: {(1, own)},
    "an attribute": Attribute,
    "a slot": Slots,
    "a subset": lambda own: Subset(Attribute(own), [0]),
    "a concatenation": lambda own: ConcatDataset([[1], AttributeOfOne(own)]),
    "a partial": lambda own: functools.partial(print, own, end=""),
    "a bound method": lambda own: own.normal,
    "a method of an object": lambda own: AttributeOfOne(own).__len__,
    "a closure": closure,
    "a default": default,
    "a class": of_class,
    "a global of a method": of_global,
    "a module that a function uses": of_module,
    "the generator itself": lambda own: own,
}


class AttributeOfOne(Attribute):
    def __len__(self):
        return 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("is_deep", [False, True])
def test_a_generator_is_found_anywhere_in_an_object(place, is_deep):
    own = np.random.default_rng(0)
    held = PLACES[place](own)
    found = ObjectGenerators(
        data=Subset(ConcatDataset([[held], AttributeOfOne([Slots(held)])]), [0]) if is_deep else held
    )
    assert len(found.paths) == 1, found.paths
    found.seed(1)
    first = own.random()
    found.seed(1)
    assert own.random() == first


def test_a_generator_in_two_places_is_seeded_once_and_a_cycle_ends():
    own, rest = np.random.default_rng(0), []
    rest += [rest, {"own": own, "rest": rest}, np.random.Generator(own.bit_generator)]
    assert len(ObjectGenerators(data=rest).paths) == 1


def test_global_generators_are_not_found():
    held = [torch.default_generator, random._inst, np.random.mtrand._rand, np.random.rand, random.random, random]
    found = ObjectGenerators(data=held)
    assert found.paths == found.unseeded == []


def test_two_generators_of_a_dataset_draw_different_numbers_and_a_third_changes_neither():
    def drawn(count):
        own = [np.random.default_rng(0) for _ in range(count)]
        ObjectGenerators(data=own).seed(5)
        return [each.random() for each in own]

    assert drawn(3)[:2] == drawn(2)
    assert len(set(drawn(3))) == 3


class OwnBits(np.random.PCG64):
    def __init__(self):
        super().__init__(3)


@pytest.mark.parametrize("held", [random.SystemRandom(), np.random.Generator(OwnBits())])
def test_a_generator_that_cannot_be_seeded_is_listed(held):
    found = ObjectGenerators(data=Subset(Attribute(held), [0]))
    assert (found.paths, found.unseeded) == ([], ["data.dataset.own"])
    found.seed(1)


def test_a_long_container_of_generators_is_listed_as_partly_searched():
    files = [(f"{i}.png", i) for i in range(1500)]
    many = [random.Random(i) for i in range(1001)]
    assert ObjectGenerators(data=Attribute(files)).unseeded == []
    assert ObjectGenerators(data=Attribute(many)).unseeded == ["data.own[1000:]"]


class Surprising:
    def __getattr__(self, name):
        raise RuntimeError(f"asked for {name}")

    @property
    def drawn(self):
        raise RuntimeError("called")


class Lazy(dict):
    def items(self):
        raise RuntimeError("called")


class LazySlots(Surprising):
    __slots__ = ()


def test_the_search_for_generators_calls_no_method_of_an_object():
    assert ObjectGenerators(data=[Surprising(), Lazy(a=1), LazySlots(), Slots.__new__(Slots)]).paths == []


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_plain_values_contain_no_generator(nest):
    found = ObjectGenerators(data=nest)
    assert found.paths == found.unseeded == []
