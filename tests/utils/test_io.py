"""`runner.utils.io`: a value is loaded equal, in both formats, or refused before anything is written."""

import enum
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import safe_open

from runner.utils import io
from runner.utils.files import atomic_path
from runner.utils.serialization import flatten, format_key

FORMATS = [".pt", ".pth", ".sft", ".safetensors"]
each_format = pytest.mark.parametrize("suffix", [".pt", ".sft"])

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]
LEARNABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64)

# ── equality ──


def bits_of(tensor):
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).tolist()


def same(a, b):
    """Equality in type and value: bits of floats, order of dicts, dtype, shape and flags of tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        is_alike = (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
        return is_alike and bits_of(a) == bits_of(b)
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, np.generic):
        return (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())
    if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
        return False
    if isinstance(a, dict):
        return same([*a.items()], [*b.items()])
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return same((a.real, a.imag), (b.real, b.imag))
    return a == b


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in([*value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def ties_in(value):
    """For each pair of tensors: one object, one view of the same memory, or neither."""
    tensors = [*tensors_in(value)]

    def tie(a, b):
        if a is b:
            return "object"
        views = {(t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj()) for t in (a, b)}
        return "view" if a.numel() and len(views) == 1 else "none"

    return [tie(a, b) for i, a in enumerate(tensors) for b in tensors[:i]]


def round_trip(value, suffix, metadata=None):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "value" + suffix)
        io.save(value, path, metadata)
        assert os.listdir(folder) == [path.name]
        return io.load(path)


# ── any value ──

texts = st.text(st.characters(exclude_categories=()), max_size=6) | st.sampled_from(["", "a.b", "123", "__metadata__"])
numbers = st.one_of(
    st.booleans(),
    st.integers(),
    st.builds(lambda sign, bits: sign << bits, st.sampled_from([-1, 1, 3]), st.integers(0, 20_000)),
    st.floats(),
    st.complex_numbers(),
)
plain_keys = st.one_of(texts, numbers, st.none(), st.binary(max_size=4))
dtypes_of_numpy = (
    npst.scalar_dtypes()
    | npst.unicode_string_dtypes()
    | npst.byte_string_dtypes()
    | npst.array_dtypes(npst.scalar_dtypes(), max_size=2)
)
scalars_of_numpy = npst.scalar_dtypes().flatmap(npst.from_dtype).filter(lambda x: isinstance(x, np.generic))
arrays = npst.arrays(dtypes_of_numpy, npst.array_shapes(min_dims=0, min_side=0, max_side=2))
odd_keys = st.one_of(
    scalars_of_numpy,
    st.sampled_from([torch.device("cuda:1"), torch.float32, torch.sparse_csr, torch.per_channel_affine]),
    st.frozensets(plain_keys, max_size=2),
    st.lists(st.integers(0, 9), max_size=2).map(torch.Size),
)
keys = plain_keys | odd_keys | st.tuples(plain_keys, st.tuples(plain_keys | odd_keys))
plain_values = st.one_of(
    plain_keys,
    st.binary(max_size=4).map(bytearray),
    st.lists(st.integers(0, 2**40), max_size=3).map(torch.Size),
    st.sampled_from(DTYPES),
    odd_keys,
    arrays,
)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    num_bytes = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    if dtype.itemsize > 1 and len(shape) > 1:
        tensor = draw(st.sampled_from([tensor, tensor.t() if len(shape) == 2 else tensor.mT, tensor[..., ::2]]))
    if dtype.is_complex:
        tensor = draw(st.sampled_from([tensor, tensor.conj()]))
    requires_grad = dtype in LEARNABLE and draw(st.booleans())
    if draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


@st.composite
def values(draw):
    pool = draw(st.lists(tensors(), max_size=3))
    leaves = plain_values
    if pool:
        members = st.integers(0, len(pool) - 1).map(lambda index: pool[index])  # no repr of a tensor
        leaves |= members | members.map(torch.Tensor.detach)

    def containers(inner):
        pairs = st.lists(st.tuples(keys, inner), max_size=4)
        items = st.lists(inner, max_size=4)
        mappings = pairs.map(dict) | pairs.map(OrderedDict) | pairs.map(dict).map(Counter)
        factories = st.sampled_from([None, int, list, dict, Counter])
        mappings |= st.builds(defaultdict, factories, pairs.map(dict))
        return mappings | items | items.map(tuple) | st.sets(keys, max_size=3)

    return draw(st.recursive(leaves, containers, max_leaves=12))


@settings(max_examples=250, deadline=None)
@given(values())
def test_load_gives_back_what_was_saved_in_type_value_and_ties_in_both_formats(value):
    for suffix in (".pt", ".sft"):
        loaded = round_trip(value, suffix)
        assert same(value, loaded), suffix
        assert ties_in(value) == ties_in(loaded), suffix


@each_format
def test_an_integer_too_long_for_text_is_a_key_of_a_tensor_also_inside_tuples(suffix):
    value = {key: torch.ones(1) for key in (1 << 14285, (1 << 14285,), (None, (3 << 14285, 1)))}
    assert same(value, round_trip(value, suffix))


@pytest.mark.parametrize("key", [7, "a", (), (1,), (1, "a"), (None, (b"x", 1.5, (True,))), -(1 << 4000)])
def test_other_keys_are_formatted_by_repr(key):
    assert format_key(key) == repr(key)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(texts.filter(lambda text: text.isprintable() and text != "__metadata__"), tensors()))
def test_a_flat_dict_of_tensors_has_the_same_keys_for_any_safetensors_reader(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "flat.safetensors")
        io.save(value, path)
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(value)


@each_format
def test_the_comparison_of_these_tests_distinguishes_similar_values(suffix):
    pairs = [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), ((1,), [1]), ({1: 2, 3: 4}, {3: 4, 1: 2})]
    pairs += [(torch.zeros(2), torch.zeros(2, dtype=torch.int32)), (torch.zeros(1), torch.zeros(()))]
    pairs += [(torch.zeros(1), torch.nn.Parameter(torch.zeros(1))), ({}, OrderedDict()), (torch.Size([1]), (1,))]
    for a, b in pairs:
        assert same(a, round_trip(a, suffix))
        assert same(b, round_trip(b, suffix))
        assert not same(round_trip(a, suffix), round_trip(b, suffix))


@each_format
@pytest.mark.parametrize("value", [{}, [], (), "", b"", None, torch.zeros(0), torch.Size([]), {"": {}}, [[()]]])
def test_empty_values_come_back_as_they_are(suffix, value):
    assert same(round_trip(value, suffix), value)


@each_format
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex32], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (4,), (2, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_comes_back_in_every_shape(suffix, dtype, shape):
    data = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.uint8) % 2
    value = data.view(dtype).reshape(shape)
    assert same(round_trip([1, value], suffix), [1, value])


@each_format
def test_the_deepest_nesting_is_loaded_and_a_deeper_one_is_refused(suffix):
    value = {}
    for _ in range(99):
        value = {"a": value}
    assert same(round_trip(value, suffix), value)
    with pytest.raises(ValueError, match="nested over 100 deep"):
        round_trip([value], suffix)


@each_format
@pytest.mark.parametrize("bits", [62, 63, 64, 2038, 2039, 2040, 2041, 100_000])
def test_an_integer_of_any_size_comes_back(suffix, bits):
    numbers = [sign * ((1 << bits) + shift) for sign in (-1, 1) for shift in (-1, 0, 1)]
    assert same(round_trip({n: n for n in numbers}, suffix), {n: n for n in numbers})
    assert same(round_trip({n: torch.ones(1) for n in numbers}, suffix), {n: torch.ones(1) for n in numbers})


@each_format
def test_keys_used_by_the_file_format_are_ordinary_keys(suffix):
    value = {"runner.structure": "{}", "tensors": {}, "__metadata__": torch.ones(2), "format": 1}
    assert same(round_trip(value, suffix), value)
    flat = {
        "runner.structure": torch.ones(1),
        "__metadata__": torch.ones(2),
        "\ud800": torch.zeros(1),
        "?": torch.ones(3),
    }
    assert same(round_trip(flat, suffix), flat)
    colliding = {"a.b": torch.ones(1), "a": {"b": torch.ones(2)}, "1": torch.ones(3), 1: torch.ones(4)}
    assert same(round_trip(colliding, suffix), colliding)


# ── ties, views, storages ──


@each_format
def test_tied_weights_stay_tied_and_are_stored_once(suffix, tmp_path):
    weight = torch.nn.Parameter(torch.randn(100, 100))
    value = {"embed": weight, "head": weight, "state": {"embed": weight.detach(), "head": weight.data}}
    io.save(value, tmp_path / f"tied{suffix}")
    loaded = io.load(tmp_path / f"tied{suffix}")
    assert loaded["embed"] is loaded["head"]
    assert loaded["state"]["embed"] is not loaded["state"]["head"]
    with torch.no_grad():
        loaded["embed"].fill_(7)
    assert loaded["state"]["embed"].eq(7).all()
    assert loaded["state"]["head"].eq(7).all()
    assert (tmp_path / f"tied{suffix}").stat().st_size < 1.2 * weight.nbytes


@settings(max_examples=40, deadline=None)
@given(
    owners=st.dictionaries(
        st.text(max_size=3).filter(lambda name: name != "__metadata__"), st.integers(0, 2), max_size=5
    ),
    are_objects_shared=st.booleans(),
)
def test_with_repeated_ties_a_file_has_every_name_and_loads_as_the_value_with_its_ties(owners, are_objects_shared):
    tensors = [torch.arange(3.0) + number for number in range(3)]
    value = {name: tensors[n] if are_objects_shared else tensors[n].detach() for name, n in owners.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ties.sft"
        io.save(value, path, {"step": "3"}, repeats_ties=True)
        stored, loaded = safetensors.torch.load_file(path), io.load(path)
        assert io.read_metadata(path) == {"step": "3"}
    assert stored.keys() == value.keys()
    assert list(loaded) == list(value)
    for name, tensor in value.items():
        assert torch.equal(stored[name], tensor)
        assert torch.equal(loaded[name], tensor)
        for other, number in owners.items():
            assert (loaded[name].data_ptr() == loaded[other].data_ptr()) is (owners[name] == number)


@each_format
def test_views_that_overlap_come_back_as_copies(suffix):
    base = torch.arange(12.0)
    value = [base, base[2:6], base[4:8], base.view(3, 4), base.view(3, 4).t(), base.view(torch.int32)]
    loaded = round_trip(value, suffix)
    assert same(loaded, value)
    assert set(ties_in(loaded)) == {"none"}
    loaded[0].zero_()
    assert same(loaded[1:], value[1:])
    assert all(tensor.is_contiguous() for tensor in loaded)


@each_format
def test_a_small_view_does_not_carry_its_large_storage(suffix, tmp_path):
    io.save({"row": torch.zeros(1000, 1000)[3]}, tmp_path / f"row{suffix}")
    assert (tmp_path / f"row{suffix}").stat().st_size < 10_000


@each_format
def test_a_tensor_of_a_graph_comes_back_as_a_leaf(suffix):
    hidden = torch.ones(2, requires_grad=True) * 3
    loaded = round_trip(hidden, suffix)
    assert loaded.is_leaf
    assert loaded.requires_grad
    assert loaded.tolist() == [3, 3]


@each_format
def test_saving_changes_nothing_in_the_value(suffix):
    weight = torch.nn.Parameter(torch.randn(3, 3))
    value = {"w": weight, "t": weight.t(), "n": [1]}
    before = weight.detach().clone()
    round_trip(value, suffix)
    assert value["w"] is weight
    assert weight.requires_grad
    assert weight.eq(before).all()


@each_format
def test_loaded_tensors_are_independent_of_the_file(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    io.save({"a": torch.zeros(100_000)}, path)
    content = path.read_bytes()
    first = io.load(path)["a"]
    first.fill_(1)
    assert path.read_bytes() == content
    second = io.load(path)["a"]
    io.save({"a": torch.full((100_000,), 5.0)}, path)
    path.unlink()
    assert second.eq(0).all()


@each_format
def test_an_optimizer_resumes_from_its_saved_state(suffix):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    loaded = round_trip(state, suffix)
    assert same(loaded, state)
    optimizer.load_state_dict(loaded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_format
def test_a_gpu_tensor_is_loaded_to_map_location(suffix, tmp_path):
    weight = torch.randn(4, 4, device="cuda")
    io.save({"w": weight, "tied": weight.detach(), "t": weight.t()}, tmp_path / f"x{suffix}")
    assert same(io.load(tmp_path / f"x{suffix}")["w"], weight.cpu())
    loaded = io.load(tmp_path / f"x{suffix}", map_location="cuda")
    assert loaded["w"].is_cuda
    assert loaded["w"].data_ptr() == loaded["tied"].data_ptr()
    assert loaded["t"].cpu().eq(weight.t().cpu()).all()


@each_format
def test_map_location_is_the_device_of_the_tensors(suffix, tmp_path):
    io.save([torch.ones(3)], tmp_path / f"x{suffix}")
    assert io.load(tmp_path / f"x{suffix}", map_location="meta")[0].is_meta
    assert io.load(tmp_path / f"x{suffix}", map_location=torch.device("cpu"))[0].tolist() == [1, 1, 1]


# ── composites of dense tensors ──


def quietly(make):
    """Makes a kind of tensor that torch calls a prototype in a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def per_channel():
    ranges = torch.tensor([0.1, 0.2]), torch.tensor([0, 3])
    return torch.quantize_per_channel(torch.arange(6.0).reshape(2, 3), *ranges, 0, torch.quint8)


EYE = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0], [0.0] * 4, [0.0, 5.0, 6.0, 0.0]])
COMPOSITES = {
    "coo": lambda: EYE.to_sparse(),
    "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (3, 4)),
    "hybrid": lambda: torch.stack([EYE, EYE]).to_sparse(1).requires_grad_(),
    "parameter": lambda: torch.nn.Parameter(EYE.to_sparse()),
    "empty": lambda: torch.zeros(0, 3).to_sparse(),
    "csr": lambda: EYE.to_sparse_csr(),
    "csc": lambda: EYE.to_sparse_csc(),
    "bsr": lambda: EYE.to_sparse_bsr((2, 2)),
    "bsc": lambda: EYE.to_sparse_bsc((2, 2)),
    "per_tensor": lambda: torch.quantize_per_tensor(EYE, 0.1, 2, torch.qint8),
    "qint32": lambda: torch.quantize_per_tensor(EYE, 0.3, -2, torch.qint32),
    "per_channel": per_channel,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)]),
    "nested nothing": lambda: torch.nested.nested_tensor([]),
    "meta": lambda: torch.empty(2, 3, dtype=torch.bfloat16, device="meta").t(),
}


def alike(a, b):
    """Equality of tensors that are not dense: by their dense parts."""
    if (type(a), a.dtype, a.layout, a.requires_grad) != (type(b), b.dtype, b.layout, b.requires_grad):
        return False
    if a.is_nested:
        return all(map(torch.equal, a.unbind(), b.unbind())) and a.size(0) == b.size(0)
    if a.shape != b.shape:
        return False
    if a.is_meta:
        return b.is_meta and a.stride() == b.stride()
    if a.is_quantized:
        is_alike = torch.equal(a.int_repr(), b.int_repr()) and a.qscheme() == b.qscheme()
        return is_alike and torch.equal(a.dequantize(), b.dequantize())
    a, b = a.detach(), b.detach()
    if a.layout is torch.sparse_coo:
        is_alike = a.is_coalesced() == b.is_coalesced() and torch.equal(a._indices(), b._indices())
        return is_alike and torch.equal(a._values(), b._values())
    return torch.equal(a.values(), b.values()) and torch.equal(a.to_dense(), b.to_dense())


@each_format
@pytest.mark.parametrize("kind", COMPOSITES)
def test_sparse_quantized_and_nested_tensors_come_back(suffix, kind):
    value = quietly(COMPOSITES[kind])
    found = round_trip({"a": value, "same": value, "other": torch.ones(2)}, suffix)
    assert alike(value, found["a"])
    assert found["same"] is found["a"]
    assert torch.equal(found["other"], torch.ones(2))


@each_format
def test_storages_and_numbers_of_numpy_come_back(suffix):
    typed = torch.TypedStorage(wrap_storage=torch.arange(3.0).untyped_storage(), dtype=torch.float32, _internal=True)
    untyped, found = round_trip([torch.arange(4.0)[1:].untyped_storage(), typed], suffix)
    assert untyped.tolist() == torch.arange(4.0).untyped_storage().tolist()
    assert (found.dtype, found._untyped_storage.tolist()) == (torch.float32, typed._untyped_storage.tolist())
    numbers = [
        np.longlong(3),
        np.longdouble("0.1"),
        np.str_(""),
        np.bytes_(b""),
        np.str_("é"),
        np.datetime64("nat", "s"),
    ]
    numbers += [np.zeros(1, [("a", "i4"), ("b", "U2")])[0], np.bool_(True), np.complex64(1j)]
    assert same(numbers, round_trip(numbers, suffix))
    arrays = [np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(6)[::-2], np.broadcast_to(1.5, (2, 3))]
    arrays += [np.array("text"), np.arange(3, dtype=">i2"), np.zeros((0, 3)), np.array([b"ab", b"c"])]
    found = round_trip(arrays, suffix)
    assert same(arrays, found)
    assert all(array.flags.writeable for array in found)


# ── unsupported values ──


class Color(enum.IntEnum):
    RED = 1


def jagged():
    return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)


UNSTORABLE = {
    "NestedTensor": lambda: quietly(jagged),
    "quantized": lambda: quietly(lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint4x2)),
    "int4": lambda: torch.empty(2, dtype=torch.int4),
    "numpy.ndarray": lambda: np.array([object()]),
    "numpy.matrix": lambda: np.ones((1, 1)).view(np.matrix),
    "numpy.void": lambda: np.zeros(1, [("a", object)])[0],
    "UninitializedParameter": torch.nn.UninitializedParameter,
    "defaultdict of": lambda: defaultdict(lambda: 1),
    "deque": lambda: deque([1]),
    "object": object,
    "function": lambda: quietly,
    "Color": lambda: Color.RED,
    "Point": lambda: namedtuple("Point", "x y")(1, 2),
    "range": lambda: range(3),
    "Odd": lambda: torch.ones(2).as_subclass(type("Odd", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_an_unsupported_value_is_refused_with_its_key_path_before_writing(name, tmp_path):
    messages = set()
    for suffix in FORMATS:
        with pytest.raises(TypeError, match=r'^value\["a"\]\[3\]\[None\] is a .*' + name) as caught:
            io.save({"a": [0, 1, 2, {None: UNSTORABLE[name]()}]}, tmp_path / "new" / f"x{suffix}")
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert not (tmp_path / "new").exists()


@each_format
@pytest.mark.parametrize(
    "key", [Color.RED, frozenset([Path()]), (1, (range(2),)), object()], ids=lambda key: type(key).__name__
)
def test_a_key_that_cannot_be_stored_is_an_error(suffix, key, tmp_path):
    with pytest.raises(TypeError, match=r'^value\["a"\] has a key of '):
        io.save({"a": {key: 1}}, tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())


@each_format
def test_a_container_that_holds_itself_is_an_error(suffix, tmp_path):
    value = {"a": [1]}
    value["a"].append(value)
    with pytest.raises(ValueError, match=r'^value\["a"\]\[1\], a dict, holds itself'):
        io.save(value, tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())


@each_format
def test_a_container_used_twice_comes_back_as_two(suffix):
    shared = [1]
    loaded = round_trip([shared, shared, (), ()], suffix)
    assert loaded == [[1], [1], (), ()]
    assert loaded[0] is not loaded[1]


# ── paths and metadata ──


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_file_has_exactly_the_given_path(suffix, tmp_path):
    (tmp_path / "v1.pt").write_bytes(b"another")
    (tmp_path / "v1.safetensors").write_bytes(b"another")
    path = tmp_path / "runs of today" / f"v1.5{suffix}"
    path.parent.mkdir()
    io.save({"a": 1}, str(path))
    assert io.load(path) == {"a": 1}
    assert os.listdir(path.parent) == [f"v1.5{suffix}"]
    assert (tmp_path / "v1.pt").read_bytes() == (tmp_path / "v1.safetensors").read_bytes() == b"another"


@pytest.mark.parametrize("name", ["model.pt", "model.sft", "model.json"])
def test_a_folder_that_does_not_exist_is_an_error_and_is_not_made(name, tmp_path):
    path = tmp_path / "deleted" / name
    with pytest.raises(FileNotFoundError):
        (io.write_json if path.suffix == ".json" else io.save)({}, path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["v1.5", "model", "model.PT", "model.json", ".pt", "model.pt.bak"])
def test_an_unknown_suffix_is_an_error_that_lists_the_known(name, tmp_path):
    for act in (lambda path: io.save({}, path), io.load, io.read_metadata):
        with pytest.raises(ValueError, match=r"use one of \.pt, \.pth, \.sft, \.safetensors"):
            act(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_missing_file_is_not_found(suffix, tmp_path):
    for read in (io.load, io.read_metadata):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / f"x{suffix}")


@each_format
@pytest.mark.parametrize("metadata", [{}, {"step": "12", "": "é\n", "format": "pt"}, {"format": "mine"}])
def test_metadata_comes_back_beside_the_value(suffix, metadata, tmp_path):
    path = tmp_path / f"x{suffix}"
    io.save({"a": torch.ones(2), "b": b""}, path, metadata)
    assert io.read_metadata(path) == metadata
    assert same(io.load(path), {"a": torch.ones(2), "b": b""})


@each_format
def test_metadata_that_is_not_text_is_an_error(suffix, tmp_path):
    for metadata in ({"step": 1}, {1: "a"}):
        with pytest.raises(TypeError, match="metadata maps strings to strings"):
            io.save({}, tmp_path / f"x{suffix}", metadata)
    for metadata in ({"runner.structure": "a"}, {"a": "\ud800"}):
        with pytest.raises(ValueError, match=r"metadata|surrogates"):
            io.save({}, tmp_path / f"x{suffix}", metadata)
    assert not list(tmp_path.iterdir())


# ── other programs ──


def test_other_programs_read_our_safetensors(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    io.save(model.state_dict(), tmp_path / "m.safetensors", {"note": "n"})
    loaded = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(same(loaded[key], tensor) for key, tensor in model.state_dict().items())
    with safe_open(tmp_path / "m.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["note"] == "n"
        assert file.get_tensor("0.weight").tolist() == model[0].weight.tolist()


def test_a_tied_model_loads_by_the_safetensors_library(tmp_path):
    def tied():
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    first, second = tied(), tied()
    io.save(first.state_dict(), tmp_path / "m.safetensors")
    assert safetensors.torch.load_model(second, tmp_path / "m.safetensors") == (set(), [])
    assert same(first.state_dict(), second.state_dict())


def test_safetensors_of_other_programs_load_as_flat_dicts(tmp_path):
    value = {"b": torch.randn(2, 3), "a.b": torch.zeros(0), "": torch.ones((), dtype=torch.bfloat16)}
    safetensors.torch.save_file(value, tmp_path / "m.safetensors", {"format": "pt"})
    loaded = io.load(tmp_path / "m.safetensors")
    assert loaded.keys() == value.keys()
    assert all(same(loaded[key], value[key]) for key in value)
    assert io.read_metadata(tmp_path / "m.safetensors") == {"format": "pt"}


def test_torch_reads_our_pt_and_we_read_torchs(tmp_path):
    value = {"w": torch.nn.Parameter(torch.randn(2)), "n": [1, 2.5, None, "x", (True, b"b")]}
    io.save(value, tmp_path / "a.pt", {"note": "n"})
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), value)
    assert same(torch.load(tmp_path / "a.pt", weights_only=True, mmap=True), value)
    torch.save(value, tmp_path / "b.pt")
    assert same(io.load(tmp_path / "b.pt"), value)
    assert io.read_metadata(tmp_path / "b.pt") == {}
    torch.save(value, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    assert same(io.load(tmp_path / "c.pth"), value)


# ── hostile and broken files ──


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def dump_plain(value, path):
    with open(path, "wb") as stream:
        pickle.dump(value, stream)


@pytest.mark.parametrize("write", [torch.save, dump_plain])
def test_a_pickle_is_executed_only_with_allow_pickle(write, tmp_path):
    path, canary = tmp_path / "x.pt", tmp_path / "canary"
    write({"a": Hostile(str(canary))}, path)
    with pytest.raises(ValueError, match=r"x\.pt: not read.*pass allow_pickle=True"):
        io.load(path)
    assert not canary.exists()
    if write is torch.save:
        io.load(path, allow_pickle=True)
        assert canary.exists()


@each_format
def test_a_truncated_file_is_an_error_that_names_it(suffix, tmp_path):
    path = tmp_path / f"whole{suffix}"
    io.save({"a": torch.arange(20), "b": "text"}, path, {"note": "n"})
    content = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"whole{suffix}: "):
            io.load(path)


@each_format
@pytest.mark.parametrize("content", [b"hello, world", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04 and more", b"{}"])
def test_garbage_is_an_error_that_names_the_file(suffix, content, tmp_path):
    (tmp_path / f"x{suffix}").write_bytes(content)
    for read in (io.load, io.read_metadata):
        with pytest.raises(ValueError, match=rf"x\{suffix}: "):
            read(tmp_path / f"x{suffix}")


def write_with_structure(path, structure, **tensors):
    safetensors.torch.save_file(tensors, path, {"runner.structure": structure})


def document(tree, objects=(), raw=None, version=1):
    parts = {"version": version, "raw": raw or {}, "objects": list(objects), "tree": tree}
    return json.dumps(parts)


def deep(levels):
    tree = []
    for _ in range(levels):
        tree = [tree]
    return tree


def composite(kind, facts, **parts):
    return document({"tensor": 0}, [{"kind": kind, "parts": parts or {"values": "here"}, "facts": facts}])


BROKEN = {
    "missing tensor": (document({"tensor": 0}, [{"name": "gone"}]), "gone"),
    "unnamed tensor": (document(None), r"does not name: \['here'\]"),
    "no such object": (document({"tensor": 1}, [{"name": "here"}]), "IndexError"),
    "not json": ("{", "JSONDecodeError"),
    "not a document": ("[]", "TypeError"),
    "no text and no tensor": ("", "KeyError"),
    "newer": (document({"tensor": 0}, [{"name": "here"}], version=3), "newer"),
    "unknown kind": (document({"exec": "x"}, [{"name": "here"}]), "exec"),
    "two kinds": (document({"tuple": [], "list": []}, [{"name": "here"}]), "ValueError"),
    "list as a key": (document({"dict": [[[1], 2]]}, [{"name": "here"}]), "unhashable"),
    "a key twice": (document({"dict": [["a", 1], ["a", 2]]}, [{"name": "here"}]), "twice"),
    "no dtype": (document({"dtype": "load"}, [{"name": "here"}]), "load"),
    "wrong shape": (document({"tensor": 0}, [{"name": "here"}], {"here": ["int8", [99]]}), "RuntimeError"),
    "over 100 deep": (document(deep(101), [{"name": "here"}]), "deep"),
    "over the stack": ("[" * 100_000, "nested over"),
    "no kind": (composite("exec", {}), "exec"),
    "an array of another size": (
        composite("ndarray", {"dtype": "'<f8'", "shape": [1 << 40]}, bytes="here"),
        "12 bytes",
    ),
    "an array of objects": (composite("ndarray", {"dtype": "'O'", "shape": [1]}, bytes="here"), "no dtype"),
    "a dtype that is code": (composite("ndarray", {"dtype": "print()", "shape": [1]}, bytes="here"), "malformed"),
    "indices outside": (
        composite("sparse_coo", {"shape": [2], "is_coalesced": False}, indices="here", values="here"),
        "RuntimeError",
    ),
    "rows outside": (
        composite("sparse_csr", {"shape": [2, 2]}, crow_indices="here", col_indices="here", values="here"),
        "RuntimeError",
    ),
    "no such axis": (
        composite("per_channel", {"axis": 7}, values="here", scales="here", zero_points="here"),
        "axis 7",
    ),
    "a factory that runs": (document({"defaultdict": ["eval", []]}, [{"name": "here"}]), "eval"),
    "an element twice": (document({"set": ["a", "a"]}, [{"name": "here"}]), "twice"),
    "a grad for integers": (document({"tensor": 0}, [{"name": "here", "requires_grad": True}]), "RuntimeError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_structure_that_does_not_fit_is_an_error_that_names_the_file(case, tmp_path):
    structure, found = BROKEN[case]
    write_with_structure(tmp_path / "x.sft", structure, here=torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"x\.sft: its 'runner\.structure' does not fit.*{found}"):
        io.load(tmp_path / "x.sft")


def test_a_structure_inside_a_pt_is_checked_too(tmp_path):
    torch.save({"runner.structure": "{", "tensors": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: its 'runner\.structure' does not fit"):
        io.load(tmp_path / "x.pt")


def test_a_large_structure_moves_from_the_header_into_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "_MAX_INLINE_BYTES", 1000)
    value = {"text": "é" * 5000, "w": torch.ones(3), "runner.structure": torch.zeros(2)}
    io.save(value, tmp_path / "x.sft", {"note": "n"})
    with safe_open(tmp_path / "x.sft", framework="pt") as file:
        assert len(file.metadata()["runner.structure"]) == 0
    assert same(io.load(tmp_path / "x.sft"), value)
    assert io.read_metadata(tmp_path / "x.sft") == {"note": "n"}


def test_a_header_beyond_the_readers_limit_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(flatten, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match=r"x\.sft: its header is .* readers take 1,000: save it as \.pt"):
        io.save([torch.ones(1)] * 1 + [torch.ones(1) for _ in range(50)], tmp_path / "x.sft")
    assert not list(tmp_path.iterdir())


# ── atomic writes ──

WRITES = {
    "x.pt": lambda path, value: io.save(value, path),
    "x.sft": lambda path, value: io.save(value, path),
    "x.json": lambda path, value: io.write_json({"n": len(value["t"])}, path),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(name, broken, tmp_path, monkeypatch):
    WRITES[name](tmp_path / name, {"t": torch.ones(3)})
    before = (tmp_path / name).read_bytes()

    def fail(*_, **__):
        raise OSError("no disk")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="no disk"):
        WRITES[name](tmp_path / name, {"t": torch.ones(4)})
    monkeypatch.undo()
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", WRITES)
def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(name, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def recorded_replace(source, target, **folders):
        events.append("replace")
        replace(source, target, **folders)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    WRITES[name](tmp_path / name, {"t": torch.ones(3)})
    assert events == [(tmp_path / name).stat().st_ino, "replace", tmp_path.stat().st_ino]


def test_an_interrupt_inside_a_write_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")

    def write_half():
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


FULL_DISK = """
import os, resource, sys, torch
from runner.utils import io
os.chdir(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"t": torch.zeros(1_000_000)}
for write, value, name in ((io.save, big, "x.pt"), (io.save, big, "x.sft"), (io.write_json, "a" * 200_000, "x.json")):
    try:
        write(value, name)
    except OSError as error:
        print(error.strerror)
"""


def test_a_full_disk_is_an_error_and_leaves_the_old_files(tmp_path):
    for name, write in WRITES.items():
        write(tmp_path / name, {"t": torch.ones(3)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root()})
    assert answer.stdout.splitlines() == ["File too large"] * 3, answer.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def root():
    return os.pathsep.join([str(Path(io.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])


@pytest.mark.parametrize("name", WRITES)
def test_permissions_are_those_of_any_new_file(name, tmp_path):
    previous = os.umask(0o027)
    try:
        WRITES[name](tmp_path / name, {"t": torch.ones(3)})
    finally:
        os.umask(previous)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    io.write_json([1], tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert io.read_json(tmp_path / "real.json") == [1]


def test_the_longest_possible_file_name_is_written(tmp_path):
    for name in ("n" * 251 + ".sft", "é" * 125 + ".sft"):
        io.save(1, tmp_path / name)
        assert io.load(tmp_path / name) == 1


# ── JSON ──

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(json_values, st.sampled_from([None, 0, 2]))
def test_json_comes_back_in_type_and_value(value, indent):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "v1.5")
        io.write_json(value, path, indent)
        assert same(io.read_json(path), without_nan_payloads(value))
        assert path.read_bytes().endswith(b"\n")


def without_nan_payloads(value):
    """JSON has one NaN; all other floats are exact."""
    if isinstance(value, dict):
        return {key: without_nan_payloads(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan_payloads(item) for item in value]
    return math.nan if isinstance(value, float) and math.isnan(value) else value


def test_json_is_pretty_or_compact_and_floats_and_letters_are_as_written(tmp_path):
    value = {"lr": 0.00012345, "name": "é中", "steps": [1, 2]}
    io.write_json(value, tmp_path / "x.json", indent=None)
    assert (tmp_path / "x.json").read_text("utf-8") == '{"lr":0.00012345,"name":"é中","steps":[1,2]}\n'
    io.write_json(value, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text("utf-8").startswith('{\n  "lr": 0.00012345,\n')
    assert io.read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{\n  "a": 1,\n  "b": oops\n}', r"x\.json, line 3, column 8: not JSON"),
        ("", r"x\.json, line 1, column 1: not JSON"),
        ("[1]]", r"x\.json, line 1, column 4: not JSON"),
        ('{"a": {"b": 1, "b": 2}}', r"x\.json: .*key 'b' is twice"),
        ("9" * 5000, r"x\.json: not read as JSON"),
        ("[" * 100_000, r"x\.json: not read as JSON"),
    ],
)
def test_broken_json_is_an_error_with_line_and_column(text, found, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=found):
        io.read_json(tmp_path / "x.json")


def test_json_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "x.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"x\.json: not read as JSON"):
        io.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "value", [(1,), {1}, np.float64(1), Color.RED, torch.ones(1), OrderedDict(), b"a", Path("a")], ids=repr
)
def test_json_refuses_values_that_it_would_change(value, tmp_path):
    with pytest.raises(TypeError, match=r'^value\["a"\]\[1\] is a .*, which JSON does not have'):
        io.write_json({"a": [0, value]}, tmp_path / "new" / "x.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "key", [1, None, True, 1.5, 10**5000], ids=lambda key: hex(key)[:6] if type(key) is int else str(key)
)
def test_json_refuses_a_key_that_is_not_a_string(key, tmp_path):
    with pytest.raises(TypeError, match=r"^value\[0\] has the key .*JSON keys are strings"):
        io.write_json([{key: 1}], tmp_path / "x.json")


def test_json_refuses_values_that_contain_themselves_or_too_long_integers(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="holds itself"):
        io.write_json(loop, tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"^value\[0\] is an integer of over 4300 digits"):
        io.write_json([10**5000], tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt", ".sft"])
def test_a_snapshot_keeps_the_value_and_its_ties(tmp_path, suffix):
    weight = torch.arange(12.0).reshape(3, 4)
    value = {"a": weight, "tied": weight, "turned": weight.T, "view": weight[1:], "rest": [1, "x", (2.5, None)]}
    io.save(value, tmp_path / f"direct{suffix}")
    snapshot = io.HostSnapshot(value)
    weight.zero_()
    value["rest"].append("later")
    io.write_new(snapshot, tmp_path / f"late{suffix}")
    found, expected = io.load(tmp_path / f"late{suffix}"), io.load(tmp_path / f"direct{suffix}")
    assert found["rest"] == expected["rest"] == [1, "x", (2.5, None)]
    assert found["tied"] is found["a"]
    for name in ("a", "turned", "view"):
        assert torch.equal(found[name], expected[name])
    with pytest.raises(FileExistsError):
        io.write_new(snapshot, tmp_path / f"late{suffix}")


def test_a_snapshot_refuses_unsupported_values_at_once():
    with pytest.raises(TypeError, match=r'value\["a"\]'):
        io.HostSnapshot({"a": object()})
