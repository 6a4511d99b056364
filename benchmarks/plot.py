"""Draws the README's pictures from the results in this folder: python benchmarks/plot.py

    learning_curves.png      results/curves.csv, made by returns.py --train
    learning_seconds.png     the same against seconds
    ablation.png             results/ablation.csv, made by ablation.py
    throughput.png           results/throughput.csv, made by throughput.py

Lines are means over seeds, bands their 95% intervals. The background is transparent and the text
grey, so that both can be read on light pages and dark ones; the colours are Okabe and Ito's, which
colour-blind people can tell apart.
"""

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ablation import DETAILS, welch_interval
from returns import read
from scipy import stats

FOLDER = Path(__file__).parent / "results"
COLOURS = {"ours": "#0072b2", "SB3": "#e69f00"}  # Okabe and Ito's blue and orange
GREY = "#808080"
STYLE = {
    "font.size": 8,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "savefig.transparent": True,
    "savefig.dpi": 130,
}


def rows(name: str) -> list[dict[str, str]]:
    path = FOLDER / name
    return read(path) if path.exists() else []


def draw_band(axes, curves: list[np.ndarray], colour: str, label: str) -> None:
    """The mean of ``curves [points, (x, return)]`` over seeds, and its 95% interval."""
    end = min(curve[-1, 0] for curve in curves)
    start = max(curve[0, 0] for curve in curves)
    x = np.linspace(start, end, 60)
    y = np.stack([np.interp(x, curve[:, 0], curve[:, 1]) for curve in curves])
    axes.plot(x, y.mean(0), color=colour, label=label, linewidth=1.5)
    if len(y) > 1:
        half = stats.t.ppf(0.975, len(y) - 1) * stats.sem(y)
        low, high = np.clip([y.mean(0) - half, y.mean(0) + half], y.min(), y.max())
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_curves(path: Path, column: str, unit: str) -> None:
    """A panel for each environment: the return of training's episodes, which are noisy, against
    ``column`` of the curves."""
    points = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows("curves.csv"):
        point = float(row[column]), float(row["return"])
        points[row["environment"]][row["who"]][row["seed"]].append(point)
    if not points:
        return
    across = min(4, len(points))
    down = -(-len(points) // across)
    size = 2.4 * across, 1.9 * down + 0.3
    figure, grid = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(points) :]:
        axes.axis("off")
    labels = {}
    for axes, (env_id, sides) in zip(grid.flat, points.items()):
        for who in sorted(sides, key=list(COLOURS).index):
            draw_band(axes, [np.array(c) for c in sides[who].values()], COLOURS[who], who)
        axes.set_title(env_id, color=GREY)
        axes.xaxis.set_major_locator(plt.MaxNLocator(3))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else short(x))
        labels |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    names = {"ours": "this project", "SB3": "Stable-Baselines3, zoo"}
    figure.supxlabel(unit, fontsize=8)
    figure.supylabel("return of training episodes", fontsize=8)
    handles, texts = labels.values(), [names[label] for label in labels]
    figure.legend(handles, texts, loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path)
    print(path)


def short(x: float) -> str:
    return f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"


def draw_ablation(path: Path) -> None:
    """What is left without each detail: a panel for each environment, a line for each detail."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows("ablation.csv"):
        found[row["environment"]][row["detail"]].append(float(row["mean"]))
    if not found:
        return
    details = [detail for detail in DETAILS if any(detail in means for means in found.values())]
    height = 0.19 * len(details) + 0.8
    figure, grid = plt.subplots(
        1, len(found), figsize=(2 + 1.6 * len(found), height), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axes, (env_id, means) in zip(grid.flat, found.items()):
        whole = np.array(means["nothing"])
        axes.axvline(whole.mean(), color=GREY, linewidth=0.8, linestyle=":")
        for y, detail in enumerate(details):
            values = np.array(means.get(detail, []))
            if len(values) == 0 or np.isnan(values).any():
                continue
            half = 0.0
            if len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
            low, high = welch_interval(values, whole) if len(values) > 1 else (0, 0)
            colour = COLOURS["SB3"] if low > 0 or high < 0 else COLOURS["ours"]
            low, high = max(values.mean() - half, values.min()), values.mean() + half
            high = min(high, values.max())
            axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.5)
            axes.plot(values.mean(), y, "o", color=colour, markersize=4)
        axes.set_title(env_id, color=GREY, fontsize=7)
        axes.xaxis.set_major_locator(plt.MaxNLocator(3))
    names = [d if d[0] == "+" else f"without {d}" for d in details[1:]]
    grid[0, 0].set_yticks(range(len(details)), ["whole", *names])
    grid[0, 0].invert_yaxis()
    figure.supxlabel(
        "mean return of 100 unseen episodes; orange: differs from the whole at 95%", fontsize=8
    )
    figure.savefig(path)
    print(path)


def draw_throughput(path: Path) -> None:
    """Bars of steps per second: a group for each number of environments and size of network."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows("throughput.csv"):
        where = f"{row['environment']}\n{row['envs']} envs, {row['units']} units"
        found[where][row["what"]].append(float(row["steps/s"]))
    if not found:
        return
    figure, axes = plt.subplots(figsize=(9.6, 2.6), layout="constrained")
    shown = {"ours": "this project", "compiled": "with --compile", "sb3": "Stable-Baselines3"}
    colours = [COLOURS["ours"], "#56b4e9", COLOURS["SB3"]]
    for offset, (what, colour) in enumerate(zip(shown, colours)):
        heights = [np.median(speeds[what]) for speeds in found.values()]
        x = np.arange(len(found)) + 0.27 * (offset - 1)
        axes.bar(x, heights, 0.25, color=colour, label=shown[what])
    axes.set_xticks(range(len(found)), found, fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("environment steps per second")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(path)
    print(path)


def main() -> None:
    plt.rcParams.update(STYLE)
    draw_curves(FOLDER / "learning_curves.png", "step", "environment steps")
    draw_curves(FOLDER / "learning_seconds.png", "seconds", "seconds, evaluation not included")
    draw_ablation(FOLDER / "ablation.png")
    draw_throughput(FOLDER / "throughput.png")


if __name__ == "__main__":
    main()
