"""Documents and benchmarks: figures stand in committed results, files exist, code fits and runs."""

import ast
import csv
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, ppo_carracing, ppo_cartpole, ppo_continuous_mlp

sys.path.insert(0, str(ROOT / "benchmarks"))
import car_racing_ablation

README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
SCRIPTS = {
    f"{script.__name__}.py": script for script in (ppo_cartpole, ppo_carracing, ppo_continuous_mlp)
}


def returns(environment: str, who: str) -> list[str]:
    """The mean returns of benchmarks/returns.csv, by seed."""
    with open(ROOT / "benchmarks" / "returns.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["environment"] == environment]
    rows = [row for row in rows if row["who"] == who]
    return [row["mean"] for row in sorted(rows, key=lambda row: int(row["seed"]))]


def tables() -> list[list[str]]:
    """The cells of each row of the README's tables."""
    lines = [line for line in README.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_return_in_the_readme_is_a_measured_one():
    rows = [row for row in tables() if re.fullmatch(r"[A-Za-z]+-v\d.*", row[0])]
    assert len(rows) > 10
    for environment, *cells in rows:
        for cell in cells:
            seeds = re.fullmatch(r"-?\d+\.\d( -?\d+\.\d)+", cell)
            if seeds:
                known = [returns(environment, who) for who in ("ours", "SB3")]
                given = cell.split()
                assert given in [of_one[: len(given)] for of_one in known], (environment, cell)


def test_the_readme_is_short_and_what_it_links_exists():
    assert len(README.splitlines()) <= 200
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if not link.startswith("http"):
                assert (ROOT / document).parent.joinpath(link).exists(), (document, link)
        for test in re.findall(r"`(test_\w+\.py)`", text):
            assert (ROOT / "tests" / test).exists(), test
        for path in re.findall(r"\b((?:benchmarks|tests|pretrained)/\w+\.\w+)", text):
            assert (ROOT / path).exists(), (document, path)


def commands() -> list[str]:
    """Each call of a script in the documents, as it is typed after ``python``."""
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    text = re.sub(r"\s*#.*", "", text)
    script = r"\b(ppo_(?:cartpole|carracing|continuous_mlp)\.py --[^`\n]*)"
    return sorted(set(re.findall(script, text)))


@pytest.mark.parametrize("command", commands())
def test_each_command_of_the_documents_is_understood(command, monkeypatch):
    """Its flags exist and take what they are given. The runs that it names needn't exist."""
    name, *flags = shlex.split(command)
    script = SCRIPTS[name]
    monkeypatch.setattr(script, "saved_args", lambda path: script.Args())
    monkeypatch.setattr(sys, "argv", [name, *flags])
    assert isinstance(script.parse_args(), script.Args)


def snippet(text: str, begins: str) -> str:
    """The indented block of ``text`` whose first line begins so."""
    lines = text[text.index(f"    {begins}") :].splitlines()
    block = []
    for line in lines:
        if line and not line.startswith("    "):
            break
        block.append(line[4:])
    return "\n".join(block)


def test_the_readme_s_python_runs(tmp_path):
    code = snippet(README, "from ppo_cartpole import")
    for whole, short in (  # the same in seconds
        ("learning_rate=5e-4", "learning_rate=5e-4, total_timesteps=4096, eval_episodes=4"),
        ("total_timesteps=1_000_000", "total_timesteps=8192, eval_episodes=4"),
    ):
        assert code.count(whole) == 1
        code = code.replace(whole, short)
    code += "\nprint(len(returns), folder)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 runs/Acrobot-v1__ppo_cartpole__2__")


@pytest.mark.parametrize("piece", car_racing_ablation.PIECES)
def test_each_piece_of_carracing_s_recipe_can_be_taken_away(piece):
    """The edits of the ablation fit the script as it is."""
    ast.parse(car_racing_ablation.edited(piece))
