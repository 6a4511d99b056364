"""Trains ppo_carracing.py with its defaults, seed after seed, and judges each driver on Gymnasium's own CarRacing-v3.

    python benchmarks/car_racing_seeds.py --seeds 1 2 3

While a run trains, its weights are set aside every minute. "Minutes to 900" is the age of the first ones that drive
the first 30 unseen tracks at a mean of 900 or more, among those whose training returns have reached a mean of 700. A
run that was finished once is kept and not trained again.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_carracing as script


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """one run each"""
    tracks: int = 100
    """unseen tracks of the final evaluation"""
    folder: Path = Path("runs/car_racing_seeds")
    """where the runs are kept"""


def train(seed: int, folder: Path) -> None:
    """Runs the script to its end, with a copy of its weights every minute under ``folder``/copies."""
    copies = folder / "copies"
    shutil.rmtree(folder, ignore_errors=True)
    copies.mkdir(parents=True)
    command = [sys.executable, script.__file__, "--num-envs", "8", "--seed", str(seed), "--log-dir", str(folder)]
    start = time.time()
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
    checkpoint = script.load_checkpoint(path)
    args = script.adopt_args(script.Args(), checkpoint)
    args = replace(args, eval_episodes=tracks, stock_env=stock, cuda=False)
    returns, steps = script.evaluate(args, checkpoint["agent"], path.parent, torch.device("cpu"))
    return returns, steps * args.action_repeat


def reaches_900(copy: Path) -> bool:
    """Whether these weights drive 30 unseen tracks at a mean of 900; hopeless ones aren't tried."""
    recent = script.load_checkpoint(copy)["recent_returns"]
    return np.mean(recent) >= 700 and play(copy, 30, stock=False)[0].mean() >= 900


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    folders = {seed: args.folder / str(seed) for seed in args.seeds}
    for seed, folder in folders.items():
        if not (folder / "minutes").exists():
            train(seed, folder)
    print("| seed | mean | std | median | worst | % above 900 | frames per lap | minutes to 900 | minutes in all |")
    print("| --- " * 9 + "|", flush=True)
    for seed, folder in folders.items():
        (run,) = folder.glob("CarRacing*")
        returns, frames = play(run, args.tracks, stock=True)
        above = 100 * (returns > 900).mean()
        cells = [returns.mean(), returns.std(), np.median(returns), returns.min(), above, frames.mean()]
        reached = (int(copy.stem) + 1 for copy in sorted(folder.glob("copies/*.pt")) if reaches_900(copy))
        minutes = f"{next(reached, 'never')} | {(folder / 'minutes').read_text().strip()}"
        print(f"| {seed} | " + " | ".join(f"{cell:.1f}" for cell in cells) + f" | {minutes} |", flush=True)


if __name__ == "__main__":
    main()
