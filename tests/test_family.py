"""The three files are one family: shared text, the same requirements, no side effect on import."""

import ast
import difflib
import itertools
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

# What differs by nature; everything else that has a name in more than one script has one text.
OWN = {"Args", "PRESETS", "make_env", "Agent", "CALL"}


def definitions(name):
    """Every top-level definition of a script, by name, as source text with its decorators."""
    source = (ROOT / f"{name}.py").read_text()
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "".join(lines[start - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = "".join(lines[node.lineno - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("other", ["ppo_carracing", "ppo_continuous_mlp"])
def test_shared_names_have_the_same_text(other):
    first, second = definitions("ppo_cartpole"), definitions(other)
    shared = (first.keys() & second.keys()) - OWN
    assert {"compute_gae", "ppo_loss", "anneal", "collect", "update", "train", "evaluate", "main"} <= shared
    for name in shared:
        diff = difflib.unified_diff(
            first[name].splitlines(), second[name].splitlines(), "ppo_cartpole", other, lineterm=""
        )
        assert first[name] == second[name], "\n".join(diff)
    assert set(SCRIPTS[other].CALL) - {"stock_env"} == set(SCRIPTS["ppo_cartpole"].CALL)


def test_chapters_come_in_the_same_order():
    orders = [[name for name in definitions(script)] for script in SCRIPTS]
    for order in orders[1:]:
        common = [name for name in order if name in orders[0]]
        assert common == [name for name in orders[0] if name in order]


def test_arguments_of_one_name_mean_the_same():
    """Same type, same words; only defaults and what describes the default environment differ."""
    texts = {}
    for script in SCRIPTS:
        source = definitions(script)["Args"]
        body = ast.parse(source).body[0].body
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and field.target.id != "env_id":
                text = ast.unparse(field.annotation), doc.value.value
                assert texts.setdefault(field.target.id, text) == text


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_equals_requirements(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    metadata = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in block))
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert metadata["dependencies"] == [line for line in requirements if line and not line.startswith("#")]
    assert metadata["requires-python"] == ">=3.11"


@pytest.mark.parametrize("name", SCRIPTS)
def test_import_has_no_side_effect(name, tmp_path):
    """No output, no file, no parsed flag, no changed thread count or random state, no TensorBoard loaded."""
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
def test_every_flag_and_public_function_is_documented(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field, doc in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(doc, ast.Expr), field.target.id


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
