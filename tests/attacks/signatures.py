"""Signatures that are forged, copied or edited, and modules in folders that a command might import from."""

import json
import shutil

from attacks.plants import OWN, attack, clear, command_of, deep, link, read_config, set_config, write_canary

SIGNATURE = ".hydra/signature.json"
MODULES = (
    "yaml",
    "torch",
    "numpy",
    "sitecustomize",
    "usercustomize",
    "runner",
    "own",
    "crc32c",
    "json",
    "hydra",
    "evil",
)


def _edit(folder, /, **fields):
    """Sets fields of a signature; where there is none yet, of one that looks like it."""
    path = folder / SIGNATURE
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {"format": 1, "run": str(folder), "run_id": "0" * 32, "signature": "0" * 64}
    path.write_text(json.dumps(content | fields))


def _put_evil(run, decoy):
    """Makes a config that names a canary, in a module of the folder's own."""
    write_canary(run / "evil" / "evil.py", decoy)
    write_canary(run / "evil" / "own.py", decoy)
    set_config(run, {"model": {"_target_": "evil.Model"}})


@attack("resume", "evaluate", "export")
def folder_without_a_signature(run, decoy):
    clear(run / SIGNATURE)
    _put_evil(run, decoy)


@attack("resume", "evaluate", "export", of=(OWN,))
def signed_config_that_was_changed(run, decoy):
    set_config(run, {"model": {"_target_": "os.system", "command": command_of(decoy)}})


@attack("resume", of=(OWN,))
def signed_overrides_that_were_changed(run, decoy):
    with (run / ".hydra" / "overrides.yaml").open("a") as file:
        file.write("- model._target_=os.system\n- hydra.run.dir=decoy\n")


@attack("resume", "evaluate", of=(OWN,))
def signed_hydra_that_was_changed(run, decoy):
    path = run / ".hydra" / "hydra.yaml"
    path.write_text(path.read_text().replace("  job:\n", "  job:\n    x: ${oc.env:ATTACK_SECRET}\n", 1))


@attack("evaluate", "resume", "export", "evaluate_checkpoint")
def signature_of_another_run(run, decoy):
    shutil.copytree(decoy.parent / "other" / ".hydra", run / ".hydra", dirs_exist_ok=True)
    _put_evil(run, decoy)


@attack("export", "resume")
def signed_files_of_another_run(run, decoy):
    """They are whole; only the folder is another one."""
    shutil.copytree(decoy.parent / "other" / ".hydra", run / ".hydra", dirs_exist_ok=True)
    link(run / "exports", decoy / "notes")
    link(run / "metrics.jsonl", decoy / "diary.txt")


@attack("export", "resume", of=(OWN,))
def signature_of_links(run, decoy):
    _edit(run, links={"exports": str(decoy / "notes"), "metrics.jsonl": str(decoy / "diary.txt")})
    link(run / "exports", decoy / "notes")
    link(run / "metrics.jsonl", decoy / "diary.txt")


@attack("evaluate", "resume", of=(OWN, "untrusted"))
def signature_of_folders(run, decoy):
    _put_evil(run, decoy)
    folders = [str(run / "evil")]
    _edit(run, config_dirs=folders, paths=folders, directory=str(run / "evil"), path=folders, search_path=folders)


@attack("evaluate", "resume", of=(OWN,))
def signature_of_folders_alone(run, decoy):
    """The config is unchanged, and names `own`."""
    _put_evil(run, decoy)
    shutil.copy(decoy / "copy" / ".hydra" / "config.yaml", run / ".hydra" / "config.yaml")
    folders = [str(run / "evil")]
    _edit(run, config_dirs=folders, paths=folders, directory=str(run / "evil"), path=folders)


@attack("evaluate", "resume", "export")
def signature_of_another_place(run, decoy):
    _put_evil(run, decoy)
    _edit(run, run=str(run), directory=str(decoy.parent), host="")


for _number, _value in enumerate(("", None, [], True, 0, "0" * 64, "\ud800", {"a": 1}, "x" * 1_000_000)):

    def _plant(run, decoy, value=_value):
        _put_evil(run, decoy)
        _edit(run, signature=value, hmac=value, mac=value)

    attack("evaluate", name=f"signature_of_type_{_number}")(_plant)

for _short, _text in {
    "that_is_deep": deep("[", "]"),
    "that_is_a_list": "[]",
    "of_a_long_number": '{"format": ' + "9" * 5000 + "}",
    "of_infinity": '{"format": 1e999, "run": NaN}',
    "of_surrogates": '{"format": 1, "run": "\\ud800", "links": {"\\ud800": "\\ud800"}}',
    "of_other_types": '{"format": 1, "run": 5, "links": [1], "config_dirs": {"a": 1}, "paths": "x", "signature": "00"}',
    "that_is_empty": "",
    "of_50_mb": '{"x": "' + "a" * 50_000_000 + '"}',
}.items():
    attack("evaluate", "resume", of=(OWN,), name=f"signature_{_short}")(
        lambda run, decoy, text=_text: (run / SIGNATURE).write_text(text)
    )


@attack("evaluate", "resume", of=(OWN,))
def key_beside_the_signature(run, decoy):
    _put_evil(run, decoy)
    for place in (run, run / ".hydra", run / ".local" / "state" / "runner", run / "runner"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "key").write_bytes(b"0" * 32)


@attack("inside_evaluate", "inside_export", "inside_resume")
def modules_in_the_folder(run, decoy):
    for name in MODULES:
        write_canary(run / f"{name}.py", decoy)
    (run / "pyvenv.cfg").write_text(f"home = {decoy}\n")
    (run / "setup.cfg").write_text("")
    (run / "evil.pth").write_text("import evil\n")


@attack("evaluate", "resume", "export")
def modules_beside_the_checkpoints(run, decoy):
    for place in (run, run / "checkpoints", run / ".hydra"):
        for name in MODULES:
            write_canary(place / f"{name}.py", decoy)
    assert read_config(run)


@attack("resume", "evaluate")
def config_folder_in_the_folder(run, decoy):
    """As that of the user, with an experiment of the same name."""
    (run / "conf" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nmodel: {{_target_: os.system, command: '{command_of(decoy)}'}}\n"
    (run / "conf" / "experiment" / "mine.yaml").write_text(text)
    (run / "conf" / "config.yaml").write_text(text)
