"""Documents and benchmarks: figures stand in committed results, files exist, code fits and runs."""

import ast
import csv
import re
import shlex
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, ppo_carracing, ppo_cartpole, ppo_continuous_mlp

sys.path.insert(0, str(ROOT / "benchmarks"))
import car_racing_ablation

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
SCRIPTS = {
    f"{script.__name__}.py": script for script in (ppo_cartpole, ppo_carracing, ppo_continuous_mlp)
}


# Student's t at 97.5%, by degrees of freedom.
T = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 6: 2.446912, 7: 2.364624, 8: 2.306004}


def tables(text: str = README) -> list[dict[str, str]]:
    """Each row of a document's tables, by its columns."""
    rows, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| "):
            columns = None
        elif columns is None:
            columns = cells
        elif set(cells) != {"---"}:
            rows.append(dict(zip(columns, cells)))
    return rows


def results(name: str) -> list[dict[str, str]]:
    """The rows of a committed table of benchmarks/, in the order of their seeds."""
    with open(ROOT / "benchmarks" / name, newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: int(row["seed"]))


def measured(environment: str, who: str, seeds=range(1, 6)) -> list[float]:
    """The mean returns of benchmarks/returns.csv with these seeds, in their order."""
    rows = [row for row in results("returns.csv") if int(row["seed"]) in seeds]
    rows = [row for row in rows if (row["environment"], row["who"]) == (environment, who)]
    return [float(row["mean"]) for row in rows]


def assert_interval(cell: str, means: list[float]) -> None:
    """``cell`` is the mean of ``means`` ± half of its 95% interval."""
    mean, half = map(float, cell.split(" ± "))
    assert mean == pytest.approx(statistics.mean(means), abs=0.051)
    error = statistics.stdev(means) / len(means) ** 0.5
    assert half == pytest.approx(T[len(means) - 1] * error, abs=0.06)


def test_each_return_in_the_readme_is_a_measured_one():
    rows = [row for row in tables() if "steps" in row]
    assert len(rows) == 17  # four more stand in a sentence
    for row in rows:
        environment = row["environment"]
        sides = {who: measured(environment, who) for who in ("ours", "SB3") if row.get(who)}
        assert "ours" in sides
        for who, means in sides.items():
            assert_interval(row[who], means)
        if "SB3" in sides:
            difference = statistics.mean(sides["ours"]) - statistics.mean(sides["SB3"])
            assert float(row["difference"].split(",")[0]) == pytest.approx(difference, abs=0.051)


def test_each_return_says_which_run_it_is_of():
    for row in results("returns.csv"):
        assert all(row.values()), row  # steps, seconds, date, commit and machine among them
    for environment in {row["environment"] for row in tables() if "steps" in row}:
        assert len(measured(environment, "ours")) == 5
        assert len(measured(environment, "SB3")) == 3


def test_the_returns_that_stand_in_a_sentence_are_measured_too():
    sentence = README.replace("\n", " ").split("The zoo has no settings for ")[1]
    names, figures = sentence.split(" of at most ")[0].split(": ")
    environments, figures = re.findall(r"\w+-v\d", names), re.findall(r"-?\d+\.\d", figures)
    assert len(environments) == len(figures) == 4
    for environment, figure in zip(environments, figures):
        mean = statistics.mean(measured(environment, "ours"))
        assert float(figure) == pytest.approx(mean, abs=0.051)


def test_each_return_on_other_seeds_is_a_measured_one():
    rows = [row for row in tables(BENCHMARKS) if "seeds 11 to 15" in row]
    assert len(rows) == 21
    for row in rows:
        assert_interval(row["seeds 1 to 5"], measured(row["environment"], "ours"))
        assert_interval(row["seeds 11 to 15"], measured(row["environment"], "ours", range(11, 16)))


def test_what_the_scripts_reach_with_no_flag_is_measured():
    """CartPole with twenty seeds, CarRacing and LunarLanderContinuous with five."""
    cells = {
        row["script"]: row["with no flag, on 2 CPU cores"] for row in tables() if "policy" in row
    }
    cartpole = cells["[`ppo_cartpole.py`](ppo_cartpole.py)"]
    assert cartpole.startswith("500.0 ± 0.0 with each of the seeds 1 to 10 and 21 to 30")
    assert measured("CartPole-v1", "ours", [*range(1, 11), *range(21, 31)]) == [500.0] * 20
    lander = cells["[`ppo_continuous_mlp.py`](ppo_continuous_mlp.py)"]
    figures = [float(figure) for figure in re.findall(r"\d+\.\d", lander)]
    assert figures == measured("LunarLanderContinuous-v3", "ours")
    racing = cells["[`ppo_carracing.py`](ppo_carracing.py)"].split(" with ")[0]
    rows = results("results/car_racing_seeds.csv")
    assert [row["seed"] for row in rows] == list("12345")
    assert re.findall(r"\d+\.\d", racing) == [row["mean"] for row in rows]


# Which details of benchmarks/ablation.py a row of "PPO in 14 details" shows, by its number, and
# what takes a detail's place, as the row calls it.
ABLATED = {
    "2": {"PyTorch's": "orthogonal initialisation", "last layer 1": "the last layer's 0.01"},
    "3": {"": "Adam's epsilon of 1e-5"},
    "4": {
        "rate fixed": "annealing of the learning rate",
        "clip fixed": "annealing of the clip range",
        "clip falling, not fixed": "+ annealing of the clip range",
    },
    "5": {"λ = 0": "GAE: lambda 0", "λ = 1": "GAE: lambda 1"},
    "6": {
        "the reset's value": "the true last observation",
        "death": "time limits told from terminations",
    },
    "7": {"one epoch": "several epochs"},
    "8": {"": "normalised advantages"},
    "9": {"": "clipping of the ratio"},
    "10": {"clipped": "+ clipping of the value"},
    "11": {"": "entropy bonus"},
    "12": {"": "clipping of the gradient"},
    "13": {"one trunk": "separate networks"},
    "14": {"observations": "normalised observations", "rewards": "scaled rewards"},
}


def is_significant(a: list[float], b: list[float]) -> bool:
    """Whether the means of ``a`` and ``b`` differ, by Welch's test at 95%. The benchmarks ask
    SciPy, which the tests do without."""
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    if sum(parts) == 0:
        return a[0] != b[0]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b)))
    low = int(freedom)
    share = (1 / low - 1 / freedom) * low * (low + 1)  # quantiles are nearly linear in 1 / freedom
    quantile = T[low] + share * (T.get(low + 1, T[low]) - T[low])
    return abs(statistics.mean(a) - statistics.mean(b)) > quantile * sum(parts) ** 0.5


def worth(row: str, found: dict[tuple[str, str], list[float]]) -> str:
    """A row's cell: returns with and without the detail, where they differ significantly; of those
    ``found`` for each environment and detail."""
    texts, details = [], ABLATED.get(row, {})
    if not any(detail in details.values() for _, detail in found):
        return "not measured"
    for label, detail in details.items():
        changes = []
        for (environment, name), means in found.items():
            whole = found[environment, "nothing"]
            if name == detail and is_significant(means, whole):
                with_it, without = statistics.mean(whole), statistics.mean(means)
                changes.append(f"{environment[:-3]} {with_it:.0f} → {without:.0f}")
        if changes:
            texts.append(f"{label}: {', '.join(changes)}" if label else ", ".join(changes))
    return "; ".join(texts) or "not significant"


def test_what_each_detail_is_worth_is_measured():
    rows = [row for row in tables() if "detail" in row]
    assert len(rows) == 14
    found = {}
    for result in results("results/ablation.csv"):
        key = result["environment"], result["detail"]
        found.setdefault(key, []).append(float(result["mean"]))
    assert all(len(means) == 5 for means in found.values())
    for row in rows:
        assert row["without it"] == worth(row["detail"].split(".")[0], found), row["detail"]


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
