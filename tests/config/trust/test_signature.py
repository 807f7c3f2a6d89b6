import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import run_folder
from runner.config.errors import ConfigError
from runner.config.trust import signature
from runner.config.trust.signature import Origin, SignatureError

FILES = {"config.yaml": b"seed: 0\n", "overrides.yaml": b"[]\n", "hydra.yaml": b"hydra: {}\n", "weights.json": b"{}"}


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """The folder of this user's state, in which there is no key yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def write(run, files=FILES):
    (run / ".hydra").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (run / ".hydra" / name).write_bytes(content)


@pytest.fixture
def origin(tmp_path):
    (tmp_path / "project" / "conf").mkdir(parents=True)
    folder = tmp_path / "project"
    return Origin(str(folder), [str(folder / "conf")], [str(folder)], {})


@pytest.fixture
def run(tmp_path, origin):
    """A signed run."""
    folder = tmp_path / "project" / "run"
    folder.mkdir()
    signature.sign(folder, origin, FILES)
    write(folder)
    return folder


def why_untrusted(run):
    with pytest.raises(SignatureError) as caught:
        signature.check_signature(run)
    return str(caught.value)


def test_a_signed_run_tells_where_it_was_started(run, origin):
    assert signature.check_signature(run) == origin


def test_a_run_is_the_users_own_through_a_link_and_by_a_relative_path(run, origin, tmp_path, monkeypatch):
    (tmp_path / "newest").symlink_to(run)
    monkeypatch.chdir(run.parent)
    assert (
        signature.check_signature(tmp_path / "newest")
        == signature.check_signature(run.relative_to(run.parent))
        == origin
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [lambda path: path.write_text("x: 1\n"), lambda path: path.unlink()])
def test_each_file_is_signed(run, name, harm):
    harm(run / ".hydra" / name)
    assert why_untrusted(run) == f".hydra/{name} was modified after it was signed"


@pytest.mark.parametrize("key", ["run", "directory", "config_dirs", "python_path", "links", "run_id", "digests"])
def test_each_field_of_the_signature_is_signed(run, key):
    path = run / ".hydra" / signature.NAME
    content = json.loads(path.read_text())
    content[key] = {"evil": "/"} if isinstance(content[key], dict) else "/evil"
    path.write_text(json.dumps(content))
    assert "its signature was modified" in why_untrusted(run)


def test_a_copy_of_a_signed_run_elsewhere_is_untrusted(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    assert why_untrusted(tmp_path / "copy") == f"it was signed in {run}, and lies elsewhere now"


def test_a_run_whose_working_directory_is_gone_is_untrusted(run, tmp_path, origin):
    signature.sign(run, replace(origin, directory=str(tmp_path / "gone")), FILES)
    assert why_untrusted(run) == f"it was started in {tmp_path / 'gone'}, which is gone"


def test_a_run_of_another_user_is_untrusted(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert "another user" in why_untrusted(run)  # who has no key yet
    signature.sign_present(tmp_path / "project")
    assert "another user" in why_untrusted(run)


def test_a_run_that_nobody_signed_is_untrusted(run):
    (run / ".hydra" / signature.NAME).unlink()
    assert why_untrusted(run) == "nobody has signed it"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(content=JSON | st.binary())
def test_nothing_that_stands_for_a_signature_is_more_than_a_reason(content):
    text = content.decode("utf-8", "surrogateescape") if isinstance(content, bytes) else json.dumps(content)
    with pytest.raises(SignatureError):
        signature.check_text("text", text)


@pytest.mark.parametrize("text", ["[" * 100_000, "{" + '"a":' * 50_000, "1" * 100_000, "\x00", ""])
def test_a_damaged_signature_is_a_reason(run, text):
    (run / ".hydra" / signature.NAME).write_text(text)
    assert "damaged" in why_untrusted(run)


def test_a_pipe_in_the_place_of_a_signature_or_a_config_is_a_reason(run):
    for name in (signature.NAME, "config.yaml"):
        path = run / ".hydra" / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert "expected a regular file" in why_untrusted(run)
        path.unlink()
        path.write_bytes(kept)


def test_until_all_files_of_a_resume_are_written_both_old_and_new_ones_are_signed(run, origin):
    new = {"config.yaml": b"seed: 1\n", "overrides.yaml": b"[seed=1]\n"}  # hydra.yaml stays
    signature.sign(run, origin, new)
    assert signature.check_signature(run) == origin
    write(run, {"config.yaml": new["config.yaml"]})
    assert signature.check_signature(run) == origin
    write(run, new)
    assert signature.check_signature(run) == origin
    write(run, {"hydra.yaml": b"hydra: {x: 1}\n"})
    assert "hydra.yaml was modified" in why_untrusted(run)


def test_a_new_run_signs_nothing_that_lay_there_before(run, origin, tmp_path):
    folder = tmp_path / "project" / "new"
    write(folder, {"config.yaml": b"evil: 1\n"})
    signature.sign(folder, origin, FILES)
    assert "config.yaml was modified" in why_untrusted(folder)


def test_vouching_signs_a_moved_project_and_finds_its_directories_below_the_current_one(run, tmp_path, monkeypatch):
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "moved")])
    run = tmp_path / "moved" / "run"
    vouched = signature.sign_present(run)
    assert signature.check_signature(run) == vouched
    assert vouched.directory == str(tmp_path / "moved")
    assert vouched.config_dirs == [str(tmp_path / "moved" / "conf")]
    assert str(tmp_path / "moved") in vouched.python_path


def test_vouching_keeps_directories_that_are_there_where_the_run_alone_was_moved(run, origin, tmp_path, monkeypatch):
    shutil.move(run, tmp_path / "away")
    monkeypatch.chdir(tmp_path)
    vouched = signature.sign_present(tmp_path / "away", [str(tmp_path / "project" / "more")])
    assert vouched.directory == origin.directory
    assert vouched.config_dirs == [str(tmp_path / "project" / "more"), *origin.config_dirs]
    assert set(origin.python_path) <= set(vouched.python_path)
    assert signature.check_signature(tmp_path / "away") == vouched


def test_vouching_records_the_links_of_the_folder(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (run / "exports").symlink_to("../../disk")
    assert signature.sign_present(run).links == {"exports": str(tmp_path / "disk")}
    assert signature.check_signature(run).links == {"exports": str(tmp_path / "disk")}


def test_a_link_that_was_made_after_signing_is_not_recorded(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (run / "exports").symlink_to(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert signature.check_signature(run).links == {}


def test_the_runs_own_checkpoints_are_known_where_they_were_moved_to(run, origin, tmp_path):
    (run / "checkpoints").mkdir()
    signature.mark_checkpoints(run)
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert signature.check_signature(run).links == {"checkpoints": str(tmp_path / "disk")}
    other = run.with_name("other")
    other.mkdir()
    signature.sign(other, replace(origin, run_id="other"), FILES)
    write(other)
    (other / "checkpoints").symlink_to(tmp_path / "disk")
    assert signature.check_signature(other).links == {}


def test_an_untrusted_runs_checkpoints_are_not_marked(run):
    (run / "checkpoints").mkdir()
    (run / ".hydra" / "config.yaml").write_text("evil: 1\n")
    signature.mark_checkpoints(run)
    assert not list((run / "checkpoints").iterdir())


def test_a_signed_text_tells_where_it_is_from(origin):
    with pytest.raises(FileNotFoundError):
        signature.sign_text("config", origin)  # nothing was signed by this user
    signature._read_key(make=True)
    signed = signature.sign_text("config", replace(origin, links={"a": "/b"}))
    assert signature.check_text("config", signed) == origin
    with pytest.raises(SignatureError, match="modified"):
        signature.check_text("another", signed)
    with pytest.raises(SignatureError, match="modified"):
        signature.check_text("config", signed.replace("project", "evil"))
    with pytest.raises(SignatureError, match="nobody"):
        signature.check_text("config", None)


def test_a_run_signature_is_not_one_of_a_text_nor_the_other_way_round(run, origin):
    with pytest.raises(SignatureError, match="another version"):
        signature.check_text("config", (run / ".hydra" / signature.NAME).read_text())
    (run / ".hydra" / signature.NAME).write_text(signature.sign_text("config", origin))
    assert "another version" in why_untrusted(run)


def test_the_key_is_for_its_user_alone(run, state):
    key = state / "runner" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert len(key.read_bytes()) == 32
    key.chmod(0o640)
    assert "that nobody else can read" in why_untrusted(run)
    with pytest.raises(OSError, match="nobody else can read"):
        signature.sign(run, signature.find_origin([]), FILES)
    key.chmod(0o600)
    key.write_bytes(b"short")
    assert "expected 32 bytes" in why_untrusted(run)


def test_a_link_in_the_place_of_the_key_is_not_followed(run, state, tmp_path):
    (state / "runner" / "key").rename(tmp_path / "key")
    (state / "runner" / "key").symlink_to(tmp_path / "key")
    assert "can't be read" in why_untrusted(run)


def test_processes_that_make_the_key_at_once_use_the_same(state):
    program = "from runner.config.trust import signature; print(signature._read_key(make=True).hex())"
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert os.listdir(state / "runner") == ["key"]


def test_the_key_lies_in_the_home_folder_where_no_other_place_is_set(tmp_path, monkeypatch, origin):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert signature._key_path() == tmp_path / "home" / ".local" / "state" / "runner" / "key"


def test_the_fields_of_an_origin_are_plain(origin):
    assert Origin(**json.loads(json.dumps(asdict(origin)))) == origin


def test_a_file_that_is_read_is_the_one_that_was_checked(run):
    path = run / ".hydra" / "config.yaml"
    signature.check_signature(run)
    assert signature.is_as_checked(path, FILES["config.yaml"])
    assert not signature.is_as_checked(path, b"evil: 1\n")
    path.write_bytes(b"evil: 1\n")
    with pytest.raises(ConfigError, match="modified while it was read"):
        run_folder.read_config(run)
    why_untrusted(run)
    assert run_folder.read_config(run) == {"evil": 1}  # as what is known to be untrusted


def test_a_file_that_was_modified_meanwhile_is_not_signed(run, origin):
    (run / ".hydra" / "hydra.yaml").write_bytes(b"evil: 1\n")
    with pytest.raises(SignatureError, match=r"hydra\.yaml was modified"):
        signature.sign(run, origin, {"config.yaml": b"seed: 1\n", "overrides.yaml": b"[]\n", "weights.json": b"{}"})
    assert "hydra.yaml was modified" in why_untrusted(run)


def test_signing_the_present_follows_no_link(run, tmp_path):
    (run / ".hydra" / signature.NAME).rename(tmp_path / "kept")
    (tmp_path / "diary").write_text("dear diary")
    (run / ".hydra" / signature.NAME).symlink_to(tmp_path / "diary")
    signature.sign_present(run)
    assert (tmp_path / "diary").read_text() == "dear diary"
    assert not (run / ".hydra" / signature.NAME).is_symlink()
    (run / ".hydra").rename(tmp_path / "hydra")
    (run / ".hydra").symlink_to(tmp_path / "hydra")
    before = (tmp_path / "hydra" / signature.NAME).read_bytes()
    with pytest.raises(SignatureError, match="a link, which is not followed"):
        signature.sign_present(run)
    assert (tmp_path / "hydra" / signature.NAME).read_bytes() == before


def test_directories_are_found_where_they_were_moved_with_the_run_typed_from_anywhere(run, tmp_path, monkeypatch):
    (tmp_path / "project").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    signed = signature.sign_present(tmp_path / "moved" / "run")
    assert signed.directory == str(tmp_path / "moved")
    assert signed.config_dirs == [str(tmp_path / "moved" / "conf")]
    assert str(tmp_path / "moved") in signed.python_path
