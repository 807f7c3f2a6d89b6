"""Saved configs that are small and expand to much, or that are no YAML of a config at all."""

from attacks.plants import ESCAPES, OWN, attack, deep, link, read_config, set_config

BOTH = (OWN, "untrusted")
_TEN = range(10)


def _bomb(run, levels, join):
    """Puts texts in the config, each of which holds the one before it several times."""
    nodes = {"a0": "x"} | {f"a{number}": join(f"${{model.b.a{number - 1}}}") for number in range(1, levels)}
    set_config(run, {"model.b": nodes})


@attack("evaluate", "export", "resume", of=BOTH)
def bomb_of_interpolated_lists(run, decoy):
    _bomb(run, 9, lambda before: [before] * 10)


@attack("evaluate", "resume")
def bomb_of_doubled_texts(run, decoy):
    _bomb(run, 40, lambda before: before * 2)


@attack("evaluate", "resume")
def bomb_of_interpolated_mappings(run, decoy):
    _bomb(run, 9, lambda before: {f"k{number}": before for number in _TEN})


@attack("evaluate")
def bomb_of_relative_interpolations(run, decoy):
    nodes = {"a0": "x"} | {f"a{number}": [f"${{..a{number - 1}}}"] * 10 for number in range(1, 9)}
    set_config(run, {"model.b": nodes})


@attack("evaluate")
def bomb_in_a_part_that_is_not_built(run, decoy):
    nodes = {"a0": "x"} | {f"a{number}": [f"${{scheduler.a{number - 1}}}"] * 10 for number in range(1, 9)}
    set_config(run, {"scheduler": nodes})


@attack("evaluate")
def bomb_of_names_by_hydra(run, decoy):
    path = run / ".hydra" / "hydra.yaml"
    nodes = {"a0": "x"} | {f"a{number}": f"${{hydra:job.a{number - 1}}}" * 2 for number in range(1, 40)}
    lines = "".join(f"    {key}: {value}\n" for key, value in nodes.items())
    path.write_text(path.read_text().replace("  job:\n", f"  job:\n{lines}", 1))
    set_config(run, {"name": "${hydra:job.a39}"})


@attack("resume")
def bomb_in_an_override(run, decoy):
    lines = ["- experiment=mine", "- +model.a0=x"]
    for number in range(1, 9):
        before = f"${{model.a{number - 1}}}"
        lines.append(f"- +model.a{number}=[{','.join([before] * 10)}]")
    (run / ".hydra" / "overrides.yaml").write_text("\n".join(lines) + "\n")


@attack("evaluate", "resume")
def interpolations_in_a_cycle(run, decoy):
    set_config(run, {"model.a": "${model.b}", "model.b": "${model.c}", "model.c": ["${model.a}"], "name": "${name}"})


def _name(short, text, *commands):
    attack(*commands, name=f"interpolation_{short}")(lambda run, decoy: set_config(run, {"model.width": text}))


_name("of_the_environment", "${oc.env:ATTACK_SECRET}", "evaluate", "resume")
_name("of_the_environment_in_a_name", "${oc.env:${oc.env:HOME}_${name}}", "evaluate")
_name("that_decodes", "${oc.decode:'${oc.env:ATTACK_SECRET}'}", "evaluate")
_name("that_creates", "${oc.create:{_target_: os.system}}", "evaluate")
_name("of_an_unknown_resolver", "${eval:'1'}", "evaluate")
_name("of_the_folder", "${hydra:runtime.cwd}", "evaluate", "resume")
_name("of_all_of_hydra", "${hydra:}", "evaluate")
_name("that_is_deep", "${a." * 2000 + "x" + "}" * 2000, "evaluate", "resume")
_name("that_is_very_deep", "${" * 100_000 + "x" + "}" * 100_000, "evaluate")
_name("that_is_long", "${seed}" * 150_000, "evaluate", "resume")
_name("of_many_keys", "${" + "a." * 100_000 + "a}", "evaluate")
_name("of_many_arguments", "${now:" + "1," * 100_000 + "1}", "evaluate")
_name("of_a_long_time", "${now:" + "%c" * 50_000 + "}", "evaluate")
_name("that_is_not_closed", "${" * 5000, "evaluate")
_name("of_escapes", "${" + ESCAPES + "}", "evaluate")
_name("of_quotes", "${now:'" + "\\'" * 20_000 + "'}", "evaluate")
_name("of_a_class", "${seed.__class__.__init__.__globals__}", "evaluate")
_name("of_many_parents", "${" + "." * 100_000 + "a}", "evaluate")


@attack("evaluate", "resume")
def many_interpolations(run, decoy):
    set_config(run, {"model.width": ["${seed}"] * 50_000})


def _text(short, text, *commands, where="config.yaml", of=("untrusted",)):
    """Adds an attack whose file is another text: the run's own is put in the place of OWN."""

    def plant(run, decoy):
        path = run / ".hydra" / where
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        path.write_bytes(content.replace(b"OWN", path.read_bytes()).replace(b"CANARY", str(decoy / "canary").encode()))

    attack(*commands, of=of, name=f"yaml_{short}")(plant)


_text("that_calls", 'OWNx: !!python/object/apply:os.system ["touch CANARY"]\n', "evaluate", "resume")
_text("that_makes", "OWNx: !!python/object/new:subprocess.Popen [[touch, CANARY]]\n", "evaluate")
_text("that_imports", "OWNx: !!python/module:evil\ny: !!python/name:os.system\n", "evaluate")
_text(
    "of_aliases",
    "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\nOWN",
    "evaluate",
    "resume",
)
_text("that_holds_itself", "a: &a [*a]\nOWN", "evaluate")
_text("that_merges", "a: &a {b: 1}\nc:\n  <<: *a\nOWN", "evaluate")
_text("that_merges_itself", "a: &a\n  <<: *a\nOWN", "evaluate")
_text("of_unused_anchors", "".join(f"a{number}: &b{number} 1\n" for number in range(10_000)) + "OWN", "evaluate")
_text("that_is_deep", "OWNx: " + deep("[", "]"), "evaluate", "resume")
_text("that_is_a_deep_mapping", "OWNx: " + deep("{a: ", "}", 3000), "evaluate")
_text("of_deep_blocks", "OWNx:\n" + "".join(" " * depth + "-\n" for depth in range(1, 1500)), "evaluate")
_text("of_deep_sequences", "OWNx:\n " + "- " * 20_000 + "a\n", "evaluate")
_text("of_many_keys", "".join(f"k{number}: 1\n" for number in range(200_000)) + "OWN", "evaluate")
_text("of_50_mb", "OWNx: " + "a" * 50_000_000, "evaluate", "resume")
_text("with_a_mark", b"\xef\xbb\xbfOWN", "evaluate")
_text("with_a_zero", "OWNx: 'a\x00b'\n", "evaluate", "resume")
_text("of_other_bytes", b"OWNx: \xff\xfe\x80\n", "evaluate", "resume")
_text("of_wide_characters", "OWNx: 1\n".encode("utf-16"), "evaluate")
_text("with_a_surrogate", 'OWNx: "\\ud800"\n', "evaluate", "resume")
_text("with_a_surrogate_as_the_name", 'OWN\nname: "\\ud800"\n', "evaluate")
_text("with_a_key_twice", "OWNname: other\n", "evaluate", "resume")
_text("of_escaped_keys", 'OWN"\\e]0;owned\\a\\nFORGED LINE": 1\n', "evaluate", "resume")
_text("with_escapes_in_an_error", b"OWN\x1b]0;owned\x07: [\n", "evaluate")
_text("of_a_long_number", "OWNx: " + "9" * 100_000, "evaluate", "resume")
_text("of_a_long_hexadecimal_number", "OWNx: 0x" + "9" * 1_000_000, "evaluate")
_text("of_sixties", "OWNx: " + "1:" * 50_000 + "1\n", "evaluate")
_text("of_a_time_that_is_none", "OWNx: 2001-99-99\ny: 9999-12-31T99:99:99Z\n", "evaluate")
_text("of_other_keys", "OWN? [a, b]\n: 1\n? {a: b}\n: 2\nnull: 3\n1.5: 4\ntrue: 5\n", "evaluate")
_text(
    "of_other_types",
    "OWNx: !!set {a, b}\ny: !!binary aGVsbG8=\nz: !!omap [a: 1]\nw: !!timestamp 2001-01-01\n",
    "evaluate",
)
_text("that_is_empty", "", "evaluate", "resume")
_text("that_is_a_list", "[a, b]", "evaluate", "resume")
_text("that_is_a_word", "word", "evaluate", "resume")
_text("of_two_documents", "OWN---\na: 1\n", "evaluate")
_text("of_many_documents", "---\n" * 100_000, "evaluate")
_text("of_many_comments", "# " * 2_000_000 + "\nOWN", "evaluate")
_text("of_a_long_directive", "%" + "A" * 1_000_000 + "\n---\nOWN", "evaluate")
_text("of_a_long_indicator", "OWNx: |99999999999\n a\n", "evaluate")
_text("of_aliased_hydra", "hydra: &a {job: [*a]}\n", "resume", where="hydra.yaml")
_text("of_deep_hydra", "hydra: " + deep("[", "]"), "resume", where="hydra.yaml")
_text("of_deep_overrides", deep("[", "]"), "resume", where="overrides.yaml")
_text(
    "of_overrides_that_call", '- !!python/object/apply:os.system ["touch CANARY"]\n', "resume", where="overrides.yaml"
)
_text("of_overrides_in_a_mapping", "a: b\n", "resume", where="overrides.yaml")
_text("of_overrides_of_bytes", b"- \xff\xfe\n", "resume", where="overrides.yaml")


@attack("sweep")
def sweep_job_with_another_config(run, decoy):
    config = read_config(run)
    assert config
    set_config(run, {"model._target_": "os.system"})


@attack("sweep")
def sweep_job_with_a_config_that_expands(run, decoy):
    _bomb(run, 9, lambda before: [before] * 10)


@attack("sweep")
def sweep_with_another_config(run, decoy):
    (run.parent / "multirun.yaml").write_text("hydra: " + deep("[", "]"))
    link(run.parent / "1-experiment=mine,seed=1", decoy / "notes")
