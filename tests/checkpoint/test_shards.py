import json
import multiprocessing
import os
import pickle
import resource
import struct
import threading
import traceback
from datetime import timedelta

import pytest
import torch
import torch._dynamo  # sharding imports it: once here, rather than in each rank of each test
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from runner.checkpoint import shards
from runner.utils.distributed import RankError
from runner.utils.serialization import SFT_DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12 on

A, B = "shard-00000.safetensors", "shard-00001.safetensors"


def run_ranks(folder, num_ranks, work):
    """Runs work(mesh) in processes that are ranks of a gloo group; an error in one fails the test."""
    store = folder / f"store{num_ranks}-{len(list(folder.iterdir()))}"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run_rank, args=(store, rank, num_ranks, work)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    told = [path.read_text() for path in sorted(folder.glob(f"{store.name}.rank*"))]
    assert [process.exitcode for process in processes] == [0] * num_ranks, "\n".join(told)


def _run_rank(store, rank, num_ranks, work):
    torch.set_num_threads(1)
    try:
        meeting = dist.FileStore(str(store), num_ranks)
        timeout = timedelta(seconds=30)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=num_ranks, timeout=timeout)
        work(init_device_mesh("cpu", (num_ranks,)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        store.with_name(f"{store.name}.rank{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


class Net(nn.Module):
    """A net whose shards are uneven or empty; one weight is tied, one frozen, one buffer a plain number."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[0].bias.requires_grad_(False)
        self.register_buffer("num_seen", torch.tensor(3))

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x * self.scale)


def train(mesh, num_steps=2):
    """Returns the weights and optimizer state of a net sharded over the mesh, by name."""
    torch.manual_seed(0)
    net = Net()
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(num_steps):
        torch.manual_seed(step)
        net(torch.randint(11, (12,))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = optimizer.state_dict()["state"].items()
    state = {f"optimizer/{index}.{key}": value for index, values in moments for key, value in values.items()}
    return net.state_dict() | state


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def bits(tensors):
    """Returns dtype, shape and bytes of each tensor, for a comparison bit for bit."""
    found = {}
    for name, tensor in tensors.items():
        flat = whole(tensor.detach()).contiguous().reshape(-1)
        found[name] = tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()
    return found


def make_tensors(mesh):
    """Returns every dtype as DTensor, replicated and plain tensor, 0-d and without elements, under odd names."""
    tensors = {}
    for dtype in SFT_DTYPES:
        length = 5 if mesh.size() > 2 else 3  # 5 over 4 ranks: 2, 2, 1 and nothing
        values = torch.arange(1, 1 + length * 2 * dtype.itemsize, dtype=torch.uint8) % (
            2 if dtype is torch.bool else 60
        )
        value = values.view(dtype).reshape(-1)[: length * 2].reshape(length, 2)
        tensors[f"{dtype}.shard"] = DTensor.from_local(
            value.tensor_split(_ends(length, mesh.size()))[mesh.get_local_rank()].clone(),
            mesh,
            [Shard(0)],
            shape=value.shape,
            stride=value.stride(),
        )
        tensors[f"{dtype}/replica"] = DTensor.from_local(value.clone(), mesh, [Replicate()], run_check=False)
        tensors[f"{dtype} plain"] = value.clone()
        tensors[f"{dtype} 0-d"] = value[0, 0].clone()
        tensors[f"{dtype} empty"] = value[:0].clone()
    tensors |= {"": torch.ones(1), "../ü\n\"'": torch.ones(1), "a view": torch.arange(6.0).reshape(2, 3).T}
    tensors["columns"] = distribute_tensor(torch.arange(10.0).reshape(2, 5), mesh, [Shard(1)])
    tensors["no rows"] = distribute_tensor(torch.zeros(0, 3), mesh, [Shard(0)])
    return tensors


def _ends(length, num_parts):
    size = -(-length // num_parts)
    return [size * index for index in range(1, num_parts)]


def fresh(path):
    path.mkdir()
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_the_ranks_of_a_sharded_net_write_is_read_whole_bit_for_bit(tmp_path, num_ranks):
    folder = fresh(tmp_path / "shards")

    def work(mesh):
        state = train(mesh)
        assert state["scale"].to_local().numel() == (mesh.get_local_rank() == 0)  # the others have nothing of it
        expected = bits(state)
        shards.write(state, folder)
        assert bits(shards.read(folder)) == expected

    run_ranks(tmp_path, num_ranks, work)
    assert names_in(folder) == [*(f"shard-{rank:05d}.safetensors" for rank in range(num_ranks)), "shards.json"]
    found = shards.read(folder)  # here there is no process group
    assert found["optimizer/0.step"].item() == 2.0
    assert torch.equal(found["head.weight"], found["embedding.weight"])
    assert found["num_seen"].item() == 3
    moment = found["optimizer/1.exp_avg"]
    assert moment.shape == (11, 6)
    assert moment.any(dim=1).all()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_dtype_placement_shape_and_name_comes_back(tmp_path, num_ranks):
    folder = fresh(tmp_path / "shards")

    def work(mesh):
        tensors = make_tensors(mesh)
        shards.write(tensors, folder)
        own = {name: value for name, value in tensors.items() if ".shard" not in name}
        local = {name: value.to_local() for name, value in tensors.items() if ".shard" in name}
        whole_of = shards.read(folder)
        assert whole_of.keys() == tensors.keys()
        assert bits({name: whole_of[name] for name in own}) == bits(own)
        start = mesh.get_local_rank() * -(-whole_of["torch.uint8.shard"].shape[0] // mesh.size())
        spans = {name: slice(start, start + len(value)) for name, value in local.items()}
        assert bits({name: whole_of[name][span] for name, span in spans.items()}) == bits(local)

    run_ranks(tmp_path, num_ranks, work)


def test_what_several_ranks_hold_is_written_once_and_the_work_is_shared(tmp_path):
    folder = fresh(tmp_path / "shards")
    run_ranks(tmp_path, 4, lambda mesh: shards.write({str(i): torch.ones(1000) for i in range(8)}, folder))
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) < 2 * 4000 + 1000


def test_a_rank_with_nothing_to_write_writes_no_file(tmp_path):
    folder = fresh(tmp_path / "shards")
    run_ranks(tmp_path, 4, lambda mesh: shards.write({"lonely": distribute_tensor(torch.ones(1), mesh)}, folder))
    assert names_in(folder) == ["shard-00000.safetensors", "shards.json"]


def test_a_thread_writes_in_a_group_of_its_own_while_the_ranks_train(tmp_path):
    folders = [fresh(tmp_path / f"shards{count}") for count in range(5)]

    def work(mesh):
        group = dist.new_group(backend="gloo")
        state = train(mesh)
        errors = []

        def save():
            try:
                for path in folders:
                    shards.write(state, path, group)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=save)
        thread.start()
        train(mesh, num_steps=4)
        thread.join(30)
        assert not thread.is_alive()
        assert errors == []
        dist.barrier()
        expected = bits(state)
        assert all(bits(shards.read(folder)) == expected for folder in folders)

    run_ranks(tmp_path, 2, work)


def test_torchs_own_reader_reads_it(tmp_path):
    folder = fresh(tmp_path / "shards")

    def work(mesh):
        state = train(mesh)
        shards.write(state, folder)
        found = {name: torch.zeros_like(value) for name, value in state.items()}
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)))
        assert bits(found) == bits(state)

    run_ranks(tmp_path, 2, work)


def test_a_disk_that_is_full_for_one_rank_raises_on_every_rank(tmp_path):
    folder = fresh(tmp_path / "shards")

    def work(mesh):
        if mesh.get_local_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        state = {"weight": distribute_tensor(torch.ones(5000), mesh, [Shard(0)])}
        with pytest.raises(OSError, match=r"rank 1: File too large: .*shard-00001\.safetensors"):
            shards.write(state, folder)
        (folder / f"shard-{mesh.get_local_rank():05d}.safetensors").unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dist.barrier()
        shards.write(state, folder)  # the ranks are still in step
        assert bits(shards.read(folder)) == bits(state)

    run_ranks(tmp_path, 2, work)


def test_a_folder_that_is_not_there_raises_on_every_rank(tmp_path):
    def work(mesh):
        with pytest.raises(FileNotFoundError, match=r"rank 0: No such file or directory: .*none"):
            shards.write({"weight": torch.ones(3)}, tmp_path / "none")

    run_ranks(tmp_path, 2, work)


def test_what_cannot_be_stored_on_one_rank_raises_on_every_rank_before_anything_is_written(tmp_path):
    folder = fresh(tmp_path / "shards")

    def work(mesh):
        is_second = mesh.get_local_rank() == 1
        for bad, message in [
            (object(), "'bad' is a object, expected a tensor"),
            (torch.zeros(2, dtype=torch.complex128), "'bad' is complex128 as torch.strided"),
            (torch.zeros(2).to_sparse(), "'bad' is float32 as torch.sparse_coo"),
        ]:
            with pytest.raises(RankError, match=f"rank 1: TypeError: {message}"):
                shards.write({"good": torch.zeros(3), "bad": bad if is_second else torch.zeros(2)}, folder)
        lame = DTensor.from_local(torch.zeros(3 - is_second, 2), mesh, [Shard(0)], shape=(6, 2), stride=(2, 1))
        with pytest.raises(
            RankError, match=r"rank 1: ValueError: 'lame' has a part \[2, 2\], its placement says \[3, 2\]"
        ):
            shards.write({"lame": lame}, folder)

    run_ranks(tmp_path, 2, work)
    assert names_in(folder) == []


def test_ranks_that_hold_other_tensors_are_told(tmp_path):
    folder = fresh(tmp_path / "shards")

    def work(mesh):
        own = mesh.get_local_rank()
        for tensors in ({"weight": torch.zeros(3 + own)}, {f"weight{own}": torch.zeros(3)}):
            with pytest.raises(ValueError, match="not the same on every rank"):
                shards.write(tensors, folder)

    run_ranks(tmp_path, 2, work)
    assert names_in(folder) == []


def test_some_of_the_ranks_write_what_they_hold_and_no_less(tmp_path):
    folder = fresh(tmp_path / "shards")

    def work(_):
        group, alone = dist.new_group([1, 2]), dist.new_group([1])
        mesh = DeviceMesh("cpu", [1, 2])
        if dist.get_rank() == 0:
            return
        state = {"weight": distribute_tensor(torch.arange(5.0), mesh, [Shard(0)]), "step": torch.tensor(1)}
        if dist.get_rank() == 1:
            with pytest.raises(ValueError, match="'weight' have 0-3 of its 0-5 in dimension 0"):
                shards.write(state, folder, alone)
        shards.write(state, folder, group)

    run_ranks(tmp_path, 3, work)
    assert names_in(folder) == [A, B, "shards.json"]
    found = shards.read(folder)
    assert found["weight"].tolist() == [0, 1, 2, 3, 4]
    assert found["step"].item() == 1


def test_lazy_and_strided_views_are_written_as_they_read_and_every_tensor_lies_aligned(tmp_path):
    number = torch.tensor([[1 + 2j, 3 - 4j]])
    tensors = {
        "conj": number.conj(),
        "neg": torch._neg_view(torch.arange(3.0)),
        "t": number.T,
        "rows": torch.arange(9.0)[::3],
    }
    tensors |= {"odd": torch.ones(3, dtype=torch.uint8), "tied": number}
    shards.write(tensors, tmp_path)
    found = shards.read(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    content = (tmp_path / A).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_safetensors_cannot_hold_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"__metadata__|surrogates"):
        shards.write({name: torch.ones(1)}, tmp_path)
    assert names_in(tmp_path) == []


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from([*SFT_DTYPES])), max_size=4))
def test_one_process_reads_what_it_wrote(tmp_path_factory, spec):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {}
    for name, (shape, dtype) in spec.items():
        flat = torch.arange(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8) % 2
        tensors[name] = flat.view(dtype).reshape(shape)
    shards.write(tensors, folder)
    assert bits(shards.read(folder)) == bits(tensors)


# What a stranger may have put there. A layout is written by hand: files by name, of pieces as
# (name, dtype, shape, start, bytes), beside the index.


def forge(folder, files, known, /, **changes):
    for name, pieces in files.items():
        starts = {piece[0]: {"saved_offsets": piece[3]} for piece in pieces}
        header, end, data = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(starts)}}, 0, b""
        for tensor, dtype, shape, _, content in pieces:
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
            end, data = end + len(content), data + content
        encoded = json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    described = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in known.items()}
    document = {"format": 1, "files": [*files], "tensors": described} | changes
    (folder / "shards.json").write_text(json.dumps(document))


def row(start, *, name="w", dtype="U8", length=1, width=2):
    return (name, dtype, [length, width], [start, 0], bytes(length * width))


def test_a_layout_made_by_hand_is_read(tmp_path):
    forge(tmp_path, {A: [row(0)], B: [row(1, length=2)]}, {"w": ("U8", [3, 2])})
    assert torch.equal(shards.read(tmp_path)["w"], torch.zeros(3, 2, dtype=torch.uint8))


HUGE = 1 << 40
LIES = {
    "a hole at the end": ({A: [row(0)]}, {"w": ("U8", [2, 2])}, "shards.json: .*'w' have 0-1 of its 0-2"),
    "a hole at the start": ({A: [row(1)]}, {"w": ("U8", [2, 2])}, "shards.json: .*'w' have 1-2 of its 0-2"),
    "a hole within": ({A: [row(0)], B: [row(2)]}, {"w": ("U8", [3, 2])}, "have 0-1, 2-3 of its 0-3"),
    "a hole in a corner": (
        {
            A: [("w", "U8", [1, 1], [0, 0], b"1")],
            B: [("w", "U8", [1, 1], [1, 1], b"1")],
            "shard-00002.safetensors": [("w", "U8", [1, 1], [0, 1], b"1")],
        },
        {"w": ("U8", [2, 2])},
        "shards.json: 'w' has 3 pieces of 4",
    ),
    "nothing of a tensor": (
        {A: [row(0)]},
        {"w": ("U8", [1, 2]), "v": ("U8", [])},
        "shards.json: 'v' has 0 pieces of 1",
    ),
    "an overlap": ({A: [row(0, length=2)], B: [row(1)]}, {"w": ("U8", [2, 2])}, "have 0-2, 1-2 of its 0-2"),
    "one piece twice": ({A: [row(0)], B: [row(0)]}, {"w": ("U8", [1, 2])}, f"{B}: .*that {A} has too"),
    "a piece out of bounds": ({A: [row(0, length=3)]}, {"w": ("U8", [2, 2])}, f"{A}: .*not within"),
    "a piece far out": ({A: [row(HUGE)]}, {"w": ("U8", [2, 2])}, f"{A}: .*not within"),
    "a negative start": ({A: [row(-1)]}, {"w": ("U8", [1, 2])}, f"{A}: .*begins at"),
    "a start that is no integer": ({A: [row(0.0)]}, {"w": ("U8", [1, 2])}, f"{A}: .*begins at"),
    "a start that is true": ({A: [row(True)]}, {"w": ("U8", [2, 2])}, f"{A}: .*begins at"),
    "a start of another rank": ({A: [("w", "U8", [1, 2], [0], b"12")]}, {"w": ("U8", [1, 2])}, f"{A}: .*begins at"),
    "an empty piece": ({A: [row(0), row(1, name="v", length=0)]}, {"w": ("U8", [1, 2]), "v": ("U8", [1, 2])}, "within"),
    "a piece of an empty tensor": ({A: [row(0)]}, {"w": ("U8", [0, 2])}, f"{A}: .*not within"),
    "a piece of another dtype": ({A: [row(0)]}, {"w": ("I8", [1, 2])}, f"{A}: .*as U8, shards.json says I8"),
    "a piece of fewer dimensions": ({A: [row(0)]}, {"w": ("U8", [2])}, f"{A}: .*begins at"),
    "a tensor that is not named": ({A: [row(0), row(0, name="v")]}, {"w": ("U8", [1, 2])}, f"{A}: holds 'v', which"),
    "a giant": ({A: [row(0)]}, {"w": ("U8", [HUGE, HUGE])}, "shards.json: .*overflow"),
    "a giant in one dimension": ({A: [row(0)]}, {"w": ("U8", [HUGE, 2])}, "shards.json: .*have 0-1 of its"),
    "a giant of no elements": ({}, {"w": ("U8", [HUGE, HUGE, 0])}, "shards.json: .*overflow"),
    "a dimension beyond an integer": ({A: [row(0)]}, {"w": ("U8", [1 << 63, 0])}, "shards.json: 'w' has the shape"),
    "a negative dimension": ({A: [row(0)]}, {"w": ("U8", [-1, 2])}, "shards.json: 'w' has the shape"),
    "a shape that is none": ({A: [row(0)]}, {"w": ("U8", "12")}, "shards.json: 'w' has the shape"),
    "a dtype that is none": ({A: [row(0)]}, {"w": ("__class__", [1, 2])}, "shards.json: .*KeyError: '__class__'"),
    "a dtype that is a list": ({A: [row(0)]}, {"w": ([], [1, 2])}, "shards.json: .*TypeError"),
}


@pytest.mark.parametrize("lie", LIES)
def test_pieces_that_are_not_the_tensor_are_refused(tmp_path, lie):
    files, tensors, message = LIES[lie]
    forge(tmp_path, files, tensors)
    with pytest.raises(ValueError, match=message):
        shards.read(tmp_path)


GOOD = ({A: [row(0)], B: [row(1)]}, {"w": ("U8", [2, 2])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is not of format 1"),
        ({"format": None}, "is not of format 1"),
        ({"files": None}, "TypeError"),
        ({"files": [A, "../" + B]}, "lists '../shard-00001.safetensors'"),
        ({"files": [A, "/etc/passwd"]}, "lists '/etc/passwd'"),
        ({"files": [A, ".metadata"]}, "lists '.metadata'"),
        ({"files": [A, 1]}, "lists 1"),
        ({"files": [A, B, A]}, "that .* has too"),
        ({"files": [A]}, "have 0-1 of its 0-2"),
        ({"files": [A, B, "shard-00009.safetensors"]}, r"shard-00009\.safetensors: is missing"),
        ({"tensors": []}, "AttributeError"),
        ({"tensors": {"w": None}}, "TypeError"),
        ({"tensors": {"w": {"dtype": "U8"}}}, "KeyError"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, changes, message):
    forge(tmp_path, *GOOD, **changes)
    with pytest.raises(ValueError, match=message):
        shards.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, '{"format": 1, "format": 1}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    forge(tmp_path, *GOOD)
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(ValueError, match=r"shards\.json"):
        shards.read(tmp_path)


@pytest.mark.parametrize("name", [A, "shards.json"])
def test_a_missing_file_a_link_and_a_pipe_are_refused(tmp_path, name):
    forge(tmp_path, *GOOD)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / name).rename(elsewhere)
    for put in (lambda path: None, lambda path: path.symlink_to(elsewhere), os.mkfifo):
        (tmp_path / name).unlink(missing_ok=True)
        put(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: is missing"):
            shards.read(tmp_path)


def test_a_file_cut_short_anywhere_or_with_junk_after_it_is_refused(tmp_path):
    forge(tmp_path, *GOOD)
    content = (tmp_path / A).read_bytes()
    for harmed in (*(content[:length] for length in range(0, len(content), 5)), content[:-1], content + b" "):
        (tmp_path / A).write_bytes(harmed)
        with pytest.raises(ValueError, match=A):
            shards.read(tmp_path)


@pytest.mark.parametrize("info", [None, "", "{", "[]", "[" * 100_000, "{}", '{"w": []}', '{"w": {"saved_offsets": 1}}'])
def test_a_file_that_does_not_tell_where_its_pieces_begin_is_refused(tmp_path, info):
    forge(tmp_path, *GOOD)
    metadata = {} if info is None else {"__metadata__": {"DCP_SHARDING_INFO": info}}
    encoded = json.dumps(metadata | {"w": {"dtype": "U8", "shape": [1, 2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / A).write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"12")
    with pytest.raises(ValueError, match=A):
        shards.read(tmp_path)


def test_a_pickle_beside_the_shards_is_not_read(tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    forge(tmp_path, *GOOD)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    shards.read(tmp_path)
    torch.save(Hostile(), tmp_path / A)
    with pytest.raises(ValueError, match=A):
        shards.read(tmp_path)
    assert not canary.exists()


def test_a_folder_that_has_shards_already_is_left_as_it_is(tmp_path):
    shards.write({"weight": torch.ones(1)}, tmp_path)
    with pytest.raises(FileExistsError, match=A):
        shards.write({"weight": torch.zeros(1)}, tmp_path)
    assert shards.read(tmp_path)["weight"].item() == 1.0


def test_only_the_pieces_that_are_needed_are_opened(tmp_path, monkeypatch):
    pieces = {A: [row(0)], B: [row(1), ("v", "U8", [1], [0], b"1")]}
    forge(tmp_path, pieces, {"w": ("U8", [2, 2]), "v": ("U8", [1])})
    opened = []
    real = shards.safe_open
    scanned = shards._scan(tmp_path)
    monkeypatch.setattr(shards, "_scan", lambda folder: scanned)
    monkeypatch.setattr(
        shards, "safe_open", lambda path, **settings: opened.append(path.name) or real(path, **settings)
    )
    tensors = shards.read(tmp_path, lambda name: name == "v")
    assert opened == [B]
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"v": [ord("1")]}
