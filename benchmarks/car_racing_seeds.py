"""Trains ppo_carracing.py with its defaults, seed after seed, and tests each agent on Gymnasium's
own CarRacing-v3.

    python benchmarks/car_racing_seeds.py --seeds 1 2 3

While a run trains, its weights are copied every minute. "Minutes to 900" is the age of the first
copy that scores a mean of 900 or more on the first 30 unseen tracks, among the copies whose
training returns have reached a mean of 700. A finished run is kept and not trained again, one that
was stopped goes on; a row of results/car_racing_seeds.csv is not made again, and its run's curve
stands in results/curves.csv. `--jobs 2` gets more done on two cores, but shows longer minutes.
"""

import csv
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro
from returns import commit, curve_of, machine, read, write_curve

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_carracing as script

RESULTS = Path(__file__).parent / "results" / "car_racing_seeds.csv"
SHOWN = ["seed", "mean", "std", "median", "worst", "% above 900", "frames per lap"]
SHOWN += ["minutes to 900", "minutes in all"]
COLUMNS = [*SHOWN, "steps", "date", "commit", "machine"]


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)  # one run each
    tracks: int = 100  # unseen tracks of the final evaluation
    jobs: int = 1  # runs side by side, which share the cores
    folder: Path = Path("runs/car_racing_seeds")  # where the runs are kept
    quick: bool = False  # only a short run of the first seed, judged on 4 tracks and kept nowhere


def train(seed: int, folder: Path, *flags: str) -> None:
    """Runs the script to its end, with a copy of its weights every minute in ``folder``/copies."""
    copies = folder / "copies"
    copies.mkdir(parents=True, exist_ok=True)
    begun = list(folder.glob("CarRacing*/latest.pt"))
    which = ["--resume", str(begun[0].parent)] if begun else ["--seed", str(seed)]
    command = [sys.executable, script.__file__, *which, "--log-dir", str(folder), *flags]
    start = time.time() - 60 * max((int(copy.stem) + 1 for copy in copies.iterdir()), default=0)
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            time.sleep(1)
            seconds = time.time() - start
            for latest in folder.glob("CarRacing*/latest.pt"):
                copy = copies / f"{int(seconds // 60):03d}.pt"
                if not copy.exists() and time.time() - latest.stat().st_mtime < 2:
                    shutil.copy(latest, copy)
    if process.returncode:
        sys.exit(f"the run of seed {seed} failed: see above")
    (folder / "minutes").write_text(f"{seconds / 60:.1f}\n")


def play(path: Path, tracks: int, stock: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths, in frames, on the first unseen tracks."""
    args = script.saved_args(path, evaluate=path, eval_episodes=tracks, stock_env=stock, cuda=False)
    returns, steps = script.evaluate(script.load_agent(args), args)
    return returns, steps * script.ACTION_REPEAT


def reaches_900(copy: Path) -> bool:
    """Whether these weights score a mean of 900 on 30 unseen tracks. Not played where their
    training returns are far from it."""
    recent = script.load_checkpoint(copy)["recent_returns"]
    return np.mean(recent) >= 700 and play(copy, 30, stock=False)[0].mean() >= 900


def judge(seed: int, folder: Path, tracks: int) -> dict:
    """A finished run's row of the results."""
    (run,) = folder.glob("CarRacing*")
    args = script.saved_args(run)
    write_curve((args.env_id, "ours", seed), curve_of(run), args.total_timesteps)
    returns, frames = play(run, tracks, stock=True)
    above = 100 * (returns > 900).mean()
    figures = [returns.mean(), returns.std(), np.median(returns), returns.min(), above]
    copies = sorted(folder.glob("copies/*.pt"))
    reached = next((int(copy.stem) + 1 for copy in copies if reaches_900(copy)), "never")
    row = [seed, *(f"{figure:.1f}" for figure in [*figures, frames.mean()]), reached]
    row += [(folder / "minutes").read_text().strip(), args.total_timesteps]
    return dict(zip(COLUMNS, [*row, date.today(), commit(), machine()]))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        with TemporaryDirectory() as name:
            folder = Path(name) / "run"
            train(args.seeds[0], folder, "--total-timesteps", "8192", "--eval-episodes", "4")
            returns, _ = play(next(folder.glob("CarRacing*")), 4, stock=True)
        print(f"seed {args.seeds[0]}, 8192 steps: {returns.mean():.1f}")
        return
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    done = {int(row["seed"]) for row in read(RESULTS)}
    todo = [seed for seed in args.seeds if seed not in done]
    threads = max((os.cpu_count() or 1) // args.jobs, 1)

    def finish(seed: int) -> None:
        if not (args.folder / str(seed) / "minutes").exists():
            train(seed, args.folder / str(seed), "--num-threads", str(threads))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(finish, todo))
    for seed in todo:
        row = judge(seed, args.folder / str(seed), args.tracks)
        with RESULTS.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
    print("| " + " | ".join(SHOWN) + " |")
    print("| --- " * len(SHOWN) + "|")
    for row in read(RESULTS):
        if int(row["seed"]) in args.seeds:
            print("| " + " | ".join(row[column] for column in SHOWN) + " |")


if __name__ == "__main__":
    main()
