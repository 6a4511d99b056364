"""The three files are one family: shared text, the same requirements, no side effect on import."""

import ast
import difflib
import subprocess
import sys
import tokenize
import tomllib
from io import StringIO

import pytest
from conftest import ROOT, SCRIPTS

# What differs by nature. Everything else of one name has one text in all scripts; `train` too, but
# for the lines below.
OWN = {"Args", "PRESETS", "make_env", "Agent", "NOT_SAVED", "check_args"}
OF_ONE_SCRIPT = {
    "mlp": [
        "                if args.norm_obs:",
        '                    agent.obs_norm.update(rollout["obs"])',
    ]
}
CEILINGS = {  # lines of a file, last line of train
    "ppo_cartpole": (985, 510),
    "ppo_continuous_mlp": (970, 492),
    "ppo_carracing": (1100, 626),
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def definitions(name):
    """Every top-level definition of a script, by name, as source text with its decorators."""
    lines, found = source(name).splitlines(keepends=True), {}
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "".join(lines[start - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = "".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def without_own_lines(text):
    own = {line for lines in OF_ONE_SCRIPT.values() for line in lines}
    return [line for line in text.splitlines() if line not in own and line]


@pytest.mark.parametrize("other", ["ppo_carracing", "ppo_continuous_mlp"])
def test_shared_names_have_the_same_text(other):
    first, second = definitions("ppo_cartpole"), definitions(other)
    shared = (first.keys() & second.keys()) - OWN
    core = {"compute_gae", "ppo_loss", "collect", "update", "train", "evaluate", "Run", "main"}
    assert core | {"make_envs", "load_agent", "WorkerEnvs", "set_up", "parse_args"} <= shared
    for name in shared:
        texts = without_own_lines(first[name]), without_own_lines(second[name])
        diff = difflib.unified_diff(*texts, "ppo_cartpole", other, lineterm="")
        assert texts[0] == texts[1], "\n".join(diff)


def test_what_differs_differs_as_it_should():
    scripts = SCRIPTS.values()
    assert {frozenset(script.NOT_SAVED - {"stock_env"}) for script in scripts} == {
        frozenset(SCRIPTS["ppo_cartpole"].NOT_SAVED)
    }
    checks = [definitions(name)["check_args"].replace(' "hidden_size",', "") for name in SCRIPTS]
    assert len(set(checks)) == 1


def test_chapters_come_in_the_same_order():
    banners = [
        [line for line in source(name).splitlines() if line[:4] == "# --"] for name in SCRIPTS
    ]
    assert banners[0] == banners[1] == banners[2] and len(banners[0]) == 9
    orders = [list(definitions(name)) for name in SCRIPTS]
    for order in orders[1:]:
        common = [name for name in order if name in orders[0]]
        assert common == [name for name in orders[0] if name in order]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_read_in_one_sitting(name):
    """Lines of the file and their width, which ruff doesn't mind where a line ends with an
    address; the end of train; the longest function."""
    lines, last_line_of_train = CEILINGS[name]
    assert len(source(name).splitlines()) <= lines
    assert max(map(len, source(name).splitlines())) <= 100
    functions = [n for n in ast.walk(ast.parse(source(name))) if isinstance(n, ast.FunctionDef)]
    ends = {function.name: function.end_lineno for function in functions}
    assert ends["train"] < last_line_of_train
    assert max(function.end_lineno - function.lineno + 1 for function in functions) <= 75


def flags(name):
    """Type and comment of each field of Args, by name; None where a field has no comment."""
    text = definitions(name)["Args"]
    tokens = tokenize.generate_tokens(StringIO(text).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(text).body[0].body if isinstance(node, ast.AnnAssign)]
    return {f.target.id: (ast.unparse(f.annotation), comments.get(f.lineno)) for f in fields}


def test_every_flag_is_one_line_that_says_what_it_means():
    """A flag of one name has one meaning; only what describes the environment differs."""
    texts = {}
    for name in SCRIPTS:
        for flag, (kind, comment) in flags(name).items():
            assert comment is not None, flag
            if flag not in ("env_id", "total_timesteps", "num_threads"):
                assert texts.setdefault(flag, (kind, comment)) == (kind, comment)


@pytest.mark.parametrize("name", SCRIPTS)
def test_presets_are_in_the_order_of_the_flags(name):
    order = list(flags(name))
    for settings in SCRIPTS[name].PRESETS.values():
        assert list(settings) == sorted(settings, key=order.index)


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_equals_requirements(name):
    lines = source(name).splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    block = "\n".join(line.removeprefix("#").removeprefix(" ") for line in block)
    metadata = tomllib.loads(block)
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert metadata["dependencies"] == [line for line in requirements if line[:1] not in ("", "#")]
    assert metadata["requires-python"] == ">=3.11"


@pytest.mark.parametrize("name", SCRIPTS)
def test_import_has_no_side_effect(name, tmp_path):
    """No output, no file, no flag parsed, no thread count or random state changed."""
    program = f"""
import random, signal, sys
import numpy, torch
def state():
    rng = torch.get_rng_state().sum().item(), random.getstate(), numpy.random.get_state()[1].sum()
    return torch.get_num_threads(), signal.getsignal(signal.SIGINT), rng
before = state()
import {name}
assert state() == before
assert "tensorboard" not in sys.modules
"""
    command = [sys.executable, "-c", program, "--no-such-flag"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_public_function_is_documented(name):
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    command = [sys.executable, "-m", "ruff", *command, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
