"""Saved configs and overrides that name something to call, import, read, start or find elsewhere."""

import json

import yaml

from attacks.plants import (
    ESCAPES,
    EXPORT,
    OWN,
    attack,
    command_of,
    read_config,
    rewrite_tensors,
    set_config,
    write_canary,
)

BOTH = (OWN, "untrusted")


def _code(decoy):
    return f"open({str(decoy / 'canary')!r}, 'w').close()"


def _called(name, make, *commands, key="model", of=("untrusted",)):
    """Adds an attack whose config has a node that would leave the canary."""

    def plant(run, decoy):
        set_config(run, {key: make(decoy)})

    attack(*commands, of=of, name=f"target_{name}")(plant)


def _with(target, *arguments, **given):
    return lambda decoy: {"_target_": target, "_args_": [each(decoy) for each in arguments], **given}


_SHELL = (("os.system", command_of), ("subprocess.call", lambda decoy: ["touch", str(decoy / "canary")]))
for _target, _argument in (
    *_SHELL,
    ("subprocess.getoutput", command_of),
    ("posix.system", command_of),
    ("builtins.eval", _code),
    ("builtins.exec", _code),
    ("timeit.timeit", _code),
    ("cProfile.run", _code),
    ("code.InteractiveInterpreter", _code),
    ("runpy.run_path", lambda decoy: str(decoy / "tool")),
    ("runner.launch.launcher.os.system", command_of),
    ("runner.launch.launcher.shutil.rmtree", lambda decoy: str(decoy / "notes")),
    ("runner.utils.files.remove_tree", lambda decoy: str(decoy / "notes")),
    ("runner.utils.files.disk.unlink", lambda decoy: str(decoy / "bashrc")),
    ("runner.examples.digits.importlib.import_module", lambda decoy: "evil"),
    ("torch.nn.modules.module.torch.hub.load", lambda decoy: str(decoy)),
    ("torch.nn.modules.module.inspect.os.system", command_of),
    ("torch.nn.functional.warnings.sys.modules", command_of),
    ("torch.nn.Module.__init__.__globals__", command_of),
    ("torch.nn.Module.__subclasses__", command_of),
    ("torch.__builtins__.eval", _code),
    ("torch.load", lambda decoy: str(decoy / "bashrc")),
    ("torch.utils.cpp_extension.load_inline", _code),
    ("own.os.system", command_of),
    ("own.random.os.system", command_of),
    ("own.numpy.f2py.crackfortran.os.system", command_of),
    ("own..os.system", command_of),
    ("own.Model.__init__.__globals__", command_of),
    ("hydra.utils.call", lambda decoy: {"_target_": "os.system", "_args_": [command_of(decoy)]}),
    ("hydra.utils.instantiate", lambda decoy: {"_target_": "os.system", "_args_": [command_of(decoy)]}),
    ("hydra._internal.utils._locate", lambda decoy: "os.system"),
    (ESCAPES, command_of),
    ("\ud800", command_of),
    ("a" * 1_000_000, command_of),
    ("os.system\x00", command_of),
    ("own." + "a." * 50_000 + "b", command_of),
):
    _short = _target if _target.isascii() and _target.isprintable() and len(_target) < 60 else f"odd_{len(_target)}"
    _called(_short, _with(_target, _argument), "evaluate")

for _number, _target in enumerate((7, True, None, ["os.system"], {"_target_": "os.system"}, "", ".", "os")):
    _called(f"of_type_{_number}", _with(_target, command_of), "evaluate")

_EVIL = _with("os.system", command_of)
for _key in (
    "optimizer",
    "scheduler",
    "sampler",
    "pattern",
    "feeder",
    "report",
    "data.train",
    "data.eval",
    "data.collate",
    "distributed.strategy",
    "trainer.callbacks",
    "tracking.stdin",
    "checkpoint.format",
    "optimizations.unsloth",
    "optimizations.compile.backend",
    "distributed.nproc_per_node",
    "name",
):
    _called(f"in_{_key}", _EVIL, "resume", key=_key)

_called("in_engines", lambda decoy: {"x": {"model": _EVIL(decoy)}}, "evaluate", "resume", key="engines")
_called("partial", lambda decoy: _EVIL(decoy) | {"_partial_": True}, "evaluate")
_called(
    "in_arguments", lambda decoy: {"_target_": "own.Model", "_args_": [_EVIL(decoy)]}, "evaluate", "export", of=BOTH
)
_called("in_keyword", lambda decoy: {"_target_": "own.Model", "width": _EVIL(decoy)}, "resume", of=BOTH)
_called("in_list", lambda decoy: {"_target_": "own.Model", "width": [[_EVIL(decoy)]]}, "evaluate")
_called("not_recursive", lambda decoy: _EVIL(decoy) | {"_recursive_": False, "_convert_": "all"}, "evaluate")
_called(
    "of_replaced_module",
    lambda decoy: [{"match": "torch.nn.Linear", "with": "os.system", "arguments": {"command": command_of(decoy)}}],
    "evaluate",
    "resume",
    key="optimizations.replace",
)
_called(
    "of_matched_module",
    lambda decoy: [{"match": "evil.Model", "with": "torch.nn.Linear"}],
    "export",
    key="optimizations.replace",
)
_called("of_target_in_two_keys", lambda decoy: {"_target_": "own.Model", "a": {"_target_": "${b}"}}, "evaluate")
_called("interpolated", lambda decoy: {"_target_": "${name}", "_args_": [command_of(decoy)]}, "evaluate")


@attack("resume", "evaluate")
def target_put_together(run, decoy):
    set_config(run, {"name": "os.sys", "model": {"_target_": "${name}tem", "_args_": [command_of(decoy)]}})


@attack("resume", "evaluate", "requeue", of=BOTH)
def trust_that_the_config_gives_itself(run, decoy):
    write_canary(run / "evil.py", decoy)
    trusted = {"allow_targets": ["os", "evil"], "resume_allow_changes": True, "resume": "null", "sign": True}
    set_config(run, trusted | {"model": _EVIL(decoy)})


@attack("evaluate", "resume")
def hydra_in_the_config(run, decoy):
    set_config(run, {"hydra": {"callbacks": {"x": _EVIL(decoy)}, "run": {"dir": "decoy"}}, "defaults": ["/etc"]})


@attack("evaluate_export")
def target_in_an_export(run, decoy):
    def change(header):
        config = json.loads(header["__metadata__"]["config"])
        config["model"] = _EVIL(decoy)
        header["__metadata__"]["config"] = json.dumps(config)

    rewrite_tensors(run / EXPORT, change)


@attack("resume", "evaluate", "export", of=BOTH)
def config_that_resumes_another_folder(run, decoy):
    set_config(run, {"resume": str(decoy / "copy"), "name": "../../decoy/copy"})


@attack("evaluate", "resume", "export", of=BOTH)
def weights_that_the_config_names(run, decoy):
    (run / "weights.pt").write_bytes(b"cos\nsystem\n(V" + command_of(decoy).encode() + b"\ntR.")
    start = {"init_from": str(run / "weights.pt"), "model.width": 8, "model.weights": str(decoy / "bashrc")}
    set_config(run, start | {"engines": {"model": {"init_from": str(decoy / "copy")}}})


def _overridden(name, *overrides):
    """Adds an attack by the overrides that a run says it was started with."""

    def plant(run, decoy):
        write_canary(decoy / "evil" / "evil.py", decoy)
        lines = [each.replace("DECOY", str(decoy)).replace("COMMAND", command_of(decoy)) for each in overrides]
        (run / ".hydra" / "overrides.yaml").write_text(yaml.dump(["experiment=mine", *lines], width=1 << 30))

    attack("resume", of=BOTH if name == "sets_run_dir" else ("untrusted",), name=f"override_{name}")(plant)


_overridden("sets_run_dir", "hydra.run.dir=DECOY/notes")
_overridden("adds_run_dir", "++hydra.run.dir=DECOY/notes", "+hydra.sweep.dir=DECOY/notes")
_overridden("chooses_launcher", "hydra/launcher=basic", "hydra/sweeper=basic", "hydra/job_logging=default")
_overridden("sets_search_path", "hydra.searchpath=[file://DECOY/evil]")
_overridden("adds_callback", "+hydra.callbacks.x={_target_: os.system, command: 'COMMAND'}")
_overridden("changes_folder", "++hydra.job.chdir=true", "hydra.output_subdir=DECOY/notes")
_overridden("sets_environment", "+hydra.job.env_set.LD_PRELOAD=DECOY/tool")
_overridden("is_an_option", "--config-dir=DECOY/evil")
_overridden("is_a_multirun", "--multirun", "-m", "seed=1,2")
_overridden("is_another_package", "+model@hydra.callbacks.x=byte_gpt")
_overridden("goes_up", "experiment=../../decoy/evil")
_overridden("is_absolute", "experiment=/DECOY/evil")
_overridden("names_target", "model._target_=os.system", "+model.command='COMMAND'")
_overridden("names_node", "model={_target_: os.system, command: 'COMMAND'}")
_overridden("trusts", "allow_targets=[os,evil]", "model._target_=evil.Model")
_overridden("resumes", "resume=DECOY/copy")
_overridden("reads_environment", "name=${oc.env:ATTACK_SECRET}", "+model.x=${oc.env:ATTACK_SECRET}")
_overridden("decodes", "+model.x=${oc.decode:${oc.env:ATTACK_SECRET}}")
_overridden("sweeps", "seed=choice(1,2)", "optimizer.lr=interval(0,1)", "seed=range(1,1000000000)")
_overridden("globs", "experiment=glob(*)")
_overridden("deletes", "~hydra", "~model", "~trainer")
_overridden("is_deep", "+model.x=" + "[" * 2000 + "]" * 2000)
_overridden("is_long", "+model.x=[" + "1," * 100_000 + "1]")
_overridden("doubles", "+model.x=" + "{a: " * 300 + "1" + "}" * 300)
_overridden("escapes", f"+model.x={ESCAPES}", f"{ESCAPES}=1")
_overridden("is_many", *(f"+model.x{number}={number}" for number in range(5000)))
_overridden("casts", "seed=int(1e999)", "+model.x=json_str({})", "seed=sort(3,1)")


@attack("resume")
def overrides_that_are_no_texts(run, decoy):
    (run / ".hydra" / "overrides.yaml").write_text("- 1\n- [a]\n- {a: b}\n- null\n- {experiment: mine}\n")


@attack("resume")
def overrides_with_an_alias(run, decoy):
    (run / ".hydra" / "overrides.yaml").write_text("- &a experiment=mine\n- *a\n")


def _set(short, /, *commands, of=("untrusted",), **values):
    attack(*commands, of=of, name=f"setting_{short}")(
        lambda run, decoy: set_config(run, {key.replace("__", "."): value for key, value in values.items()})
    )


_set("workers", "evaluate", "export", "resume", data__num_workers=40)
_set("many_workers", "evaluate", data__num_workers=10**9)
_set("processes", "evaluate", "resume", distributed__nproc_per_node=64)
_set("restarts", "resume", distributed__max_restarts=10**9, distributed__timeout_s=1e-9)
_set(
    "machines",
    "evaluate",
    "resume",
    distributed__nnodes=2,
    distributed__rdzv_endpoint="127.0.0.1:9",
    distributed__rdzv_timeout_s=1e9,
)
_set("meta_device", "evaluate", "resume", "export", distributed__device="meta")
_set("odd_device", "evaluate", "export", distributed__device=ESCAPES)
_set("backend", "resume", distributed__backend="os.system")
_set("steps", "evaluate", trainer__steps=10**18)
_set("batch_size", "evaluate", data__batch_size=10**12)
_set("batch_size_of_training", "resume", data__batch_size=10**12)
_set("accumulate", "resume", trainer__accumulate=10**9)
_set("seed", "evaluate", "resume", seed=10**400)
_set("keep", "resume", trainer__keep_last=-(10**9), trainer__keep_best=10**9)
_set("infinite", "evaluate", "resume", trainer__clip_norm=float("inf"), optimizer__lr=float("nan"))
_set("name", "resume", "evaluate", of=BOTH, name=ESCAPES)
_set("name_of_a_path", "resume", "export", name="../../decoy/notes")
_set("best_metric", "resume", trainer__best_metric=f"../../decoy/{ESCAPES}")
_set(
    "compiler", "evaluate", "resume", optimizations__compile__scope="whole", optimizations__compile__backend="os.system"
)
_set("compiler_mode", "evaluate", optimizations__compile={"scope": "blocks", "mode": ESCAPES})
_set("device_map", "evaluate", optimizations__device_map__budgets={"/dev/zero": 10**30, "cpu": "1e999GB"})
_set("pattern_of_names", "evaluate", optimizations__freeze=["(a+)+$", "*" * 50, "[" * 10_000])
_set("unknown_key", "evaluate", "resume", **{ESCAPES: 1})
_set("stdin", "resume", tracking__stdin=True)


def _engines(name, engine, *commands):
    def plant(run, decoy):
        set_config(run, {"engines": {engine: {}}})

    attack(*commands, name=f"engine_{name}")(plant)


_engines("of_a_path", "../../decoy/notes/x", "evaluate", "export", "resume")
_engines("of_an_absolute_path", "/tmp/x", "export")
_engines("of_escapes", ESCAPES, "export", "evaluate")
_engines("of_structure", "structure", "resume")
_engines("of_a_long_name", "x" * 100_000, "resume")


@attack("evaluate", "resume")
def ten_thousand_engines(run, decoy):
    set_config(run, {"engines": {f"e{number}": {} for number in range(10_000)}})


@attack("evaluate")
def config_of_other_types(run, decoy):
    other = {
        "trainer": 5,
        "data": [1],
        "name": ["a"],
        "model": "text",
        "optimizations": None,
        "tracking": {"stdin": {}},
    }
    config = read_config(run) | other
    (run / ".hydra" / "config.yaml").write_text(yaml.dump(config))
