import pytest

from runner.launch.environment import ProcessEnvironment, is_distributed_launch, read_environment

STEP = {  # of srun -n 4 on node-3 and node-4
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "node-[3-4],other",
}


def test_without_variables_it_is_alone():
    assert read_environment({}) == ProcessEnvironment()
    assert not is_distributed_launch({})


def test_torchs_variables():
    environ = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host",
        "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_RUN_ID": "id",
    }  # fmt: skip
    assert read_environment(environ) == ProcessEnvironment(3, 4, 1, 2, "host", 29500, True, 2, "id")
    assert is_distributed_launch(environ)


def test_slurms_variables_fill_what_is_missing():
    place = read_environment(STEP)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert place.address == "node-3"
    assert place.port == read_environment(STEP | {"SLURM_PROCID": "0"}).port >= 20000
    assert place.port != read_environment(STEP | {"SLURM_STEP_ID": "1"}).port
    assert read_environment(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}).address == "10.0.0.1"
    assert read_environment(STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}).local_world_size == 3
    assert is_distributed_launch(STEP)


def test_a_batch_script_is_one_process_whatever_its_allocation():
    script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}
    assert read_environment(script) == ProcessEnvironment()
    assert not is_distributed_launch(script)
    submitted_from_a_step = STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    assert read_environment(submitted_from_a_step) == ProcessEnvironment()
    assert not is_distributed_launch(submitted_from_a_step)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK or SLURM_PROCID='one': expected a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 processes, but no MASTER_ADDR"),
    ],
)
def test_what_does_not_say_where_it_stands_is_an_error(environ, said):
    with pytest.raises(ValueError, match=said):
        read_environment(environ)
