"""What each piece of ppo_carracing.py's recipe is worth: python benchmarks/car_racing_ablation.py

Trains the default run without one piece at a time, seed after seed, and judges each driver on 100
unseen tracks that serve nothing else. A piece is taken away by an edit of the script's text, so
that each run is an ordinary run of an ordinary script.
Each run takes one core and 20 to 30 minutes; what is done stands in results/car_racing_ablation.csv
and is not done again, and a run that was stopped goes on. `--table` only prints what there is.
"""

import csv
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "car_racing_ablation.csv"
FIRST_TRACK = 20_000_000  # seed of the first of the tracks that judge
RECIPE = "a012891"  # the first commit of the recipe that is taken apart; older results stay

BFLOAT16 = """\
        with torch.autocast("cpu", torch.bfloat16):
            features = self.trunk(both.bfloat16().div_(255))
        return features.float().unflatten(0, (2, -1))"""

MIRROR_CONV = """\
class MirrorConv(nn.Conv2d):
    def __init__(self, paired, in_channels, out_channels, *size):
        super().__init__(in_channels, out_channels // 2, *size)
        self.paired = paired

    def forward(self, x):
        mirrored = self.weight.flip(-1)
        if self.paired:
            mirrored = mirrored.roll(self.in_channels // 2, 1)
        weight = torch.cat([self.weight, mirrored])
        return nn.functional.conv2d(x, weight, self.bias.repeat(2), self.stride)


class Agent(nn.Module):"""

HIDDEN = "\n        self.hidden = layer_init(nn.Linear(num_features, 256))"

PAIRED_FEATURES = """\
        maps = self.trunk(both.float().div_(255))
        mirrored = maps.flip(-1).roll(32, 1)
        return self.hidden(torch.stack([maps, mirrored]).flatten(2)).relu()"""


# One pass through filters that come in mirrored pairs (Cohen and Welling 2016), instead of one for
# the image and one for its mirror image.
MIRRORED_FILTERS = [
    ("class Agent(nn.Module):", MIRROR_CONV),
    ("nn.Conv2d(observation_space.shape[0], 32, 4, stride=4)", "MirrorConv(0, 4, 32, 4, 4)"),
    ("nn.Conv2d(32, 64, 3, stride=2)", "MirrorConv(1, 32, 64, 3, 2)"),
    ("nn.Conv2d(64, 64, 3)", "MirrorConv(1, 64, 64, 3)"),
    (" nn.Flatten(),", ""),
    ("convolutions(torch.zeros(1, *observation_space.shape)).shape[1]", "9 * 64"),
    (".extend([layer_init(nn.Linear(num_features, 256)), nn.ReLU()])", HIDDEN),
    ("torch.cat([obs, obs.flip(-1)])", "obs[..., 2:-2]"),  # so that the filters reach both edges
    ("        return self.trunk(both.float().div_(255)).unflatten(0, (2, -1))", PAIRED_FEATURES),
]


# Each piece: what is taken away, and by which edits of the script, (old text, new text).
PIECES = {
    "nothing": [],
    "mirror": [
        ("both = torch.cat([obs, obs.flip(-1)])", "both = obs"),
        (".unflatten(0, (2, -1))", ".unsqueeze(0)"),
        ("        seen, mirrored = self.actor(features)\n", ""),
        ("mean = (seen + mirrored[:, [2, 1, 0, 3]]) / 2", "mean = self.actor(features)[0]"),
    ],
    "float32, but bfloat16": [
        ("        return self.trunk(both.float().div_(255)).unflatten(0, (2, -1))", BFLOAT16)
    ],
    "learning rate 4e-4, but 2e-4": [
        ("learning_rate: float = 4e-4", "learning_rate: float = 2e-4")
    ],
    "8 epochs, but 5": [("update_epochs: int = 8", "update_epochs: int = 5")],
    "4 minibatches, but 8": [("num_minibatches: int = 4", "num_minibatches: int = 8")],
    "64 filters in the middle, but 32": [
        ("nn.Conv2d(32, 64, 3, stride=2)", "nn.Conv2d(32, 32, 3, stride=2)"),
        ("nn.Conv2d(64, 64, 3)", "nn.Conv2d(32, 64, 3)"),
    ],
    "entropy bonus to the end, but annealed": [
        ("args.ent_coef * entropy", "args.ent_coef * clip_coef / args.clip_coef * entropy")
    ],
    "two passes, but mirrored filters": MIRRORED_FILTERS,
    "price of tiles passed over": [("PRICE_PASSED_OVER = 20", "PRICE_PASSED_OVER = 0")],
    "patience": [("PATIENCE = 38", "PATIENCE = 10**9")],
    "patience, laps as truncations": [
        ("PATIENCE = 38", "PATIENCE = 10**9"),
        ("reward, False, True, info", "reward, True, False, info"),
    ],
    "price, patience, laps as truncations": [
        ("PRICE_PASSED_OVER = 20", "PRICE_PASSED_OVER = 0"),
        ("PATIENCE = 38", "PATIENCE = 10**9"),
        ("reward, False, True, info", "reward, True, False, info"),
    ],
    "tiles scaled by the track": [("reward * len(self.unwrapped.track) / USUAL_TILES", "reward")],
    "laps as truncations": [("reward, False, True, info", "reward, True, False, info")],
    "speed on the dashboard": [("    small[42:] = min(2 * frame[84:, 12:14].mean(), 255)\n", "")],
    "entropy bonus": [("ent_coef: float = 0.015", "ent_coef: float = 0.0")],
    "lever": [
        (
            "np.float32([-1, 0]), np.float32([1, 1])",
            "np.float32([-1, 0, 0]), np.float32([1, 1, 1])",
        ),
        ("np.float32([a[0], a[1], BRAKE * (1 - a[1])])", "a"),
        ("mirrored[:, [2, 1, 0, 3]]", "mirrored[:, [3, 1, 2, 0, 4, 5]]"),
    ],
}

JUDGE = """
import json, sys
from contextlib import redirect_stdout
from pathlib import Path
from ppo_carracing import ACTION_REPEAT, evaluate, load_agent, saved_args
run, first, tracks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
args = saved_args(run, evaluate=run, eval_seed=first, eval_episodes=tracks, cuda=False)
agent = load_agent(args)
with redirect_stdout(None):
    returns, steps = evaluate(agent, args)
print(json.dumps([returns.tolist(), (steps * ACTION_REPEAT).tolist()]))
"""


@dataclass
class Args:
    pieces: tuple[str, ...] = tuple(PIECES)  # what to take away, one at a time
    seeds: tuple[int, ...] = (11, 12, 13)  # one run each
    tracks: int = 100  # unseen tracks that judge a driver
    jobs: int = 2  # runs side by side, of one thread each
    table: bool = False  # train nothing, print the table
    total_timesteps: int = 240_000  # of each run; the default run has a quarter more
    folder: Path = Path("runs/car_racing_ablation")  # where the runs are kept
    quick: bool = False  # only a short run without the mirror, judged on 4 tracks and kept nowhere


def edited(piece: str) -> str:
    """The script's text without ``piece``. Each edit must fit one place."""
    text = (ROOT / "ppo_carracing.py").read_text()
    for old, new in PIECES[piece]:
        assert text.count(old) == 1, f"{piece}: {old!r} stands {text.count(old)} times"
        text = text.replace(old, new)
    return text


def run(piece: str, seed: int, args: Args) -> list[str]:
    """Trains without ``piece``, or goes on, and judges. Returns mean, deviation, worst track and
    frames a lap over the tracks, and the minutes of training."""
    folder = args.folder / f"{piece.replace(' ', '_')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "ppo_carracing.py"
    if not script.exists():  # a run that goes on does so with the text that it began with
        script.write_text(edited(piece))
    begun = [path.parent for path in folder.glob("CarRacing*/latest.pt")]
    flags = ["--resume", str(begun[0])] if begun else ["--seed", str(seed)]
    flags += ["--num-threads", "1", "--eval-episodes", str(args.tracks)]
    flags += ["--total-timesteps", str(args.total_timesteps)]
    start = time.time()
    with open(folder / "log", "a") as log:
        command = [sys.executable, str(script), "--log-dir", str(folder), *flags]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    minutes = (time.time() - start) / 60 if not begun else np.nan
    (latest,) = folder.glob("CarRacing*/latest.pt")
    command = [sys.executable, "-c", JUDGE, str(latest.resolve()), str(FIRST_TRACK)]
    command.append(str(args.tracks))
    done = subprocess.run(command, check=True, cwd=folder, capture_output=True, text=True)
    returns, frames = json.loads(done.stdout)
    figures = np.mean(returns), np.std(returns), np.min(returns), np.mean(frames), minutes
    return [f"{figure:.1f}" for figure in figures]


def keep(piece: str, seed: int, args: Args) -> None:
    """Adds a row to the results."""
    row = [RECIPE, piece, seed, *run(piece, seed, args)]
    with open(RESULTS, "a", newline="") as file:
        csv.writer(file).writerow(row)


def rows() -> list[dict[str, str]]:
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def print_table() -> None:
    """A row for each piece: means over its seeds, and the 95% interval of the mean return."""
    from scipy import stats

    columns = [
        "recipe",
        "without",
        "seeds",
        "mean",
        "95% interval",
        "worst track",
        "frames a lap",
        "minutes",
    ]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    done = rows()
    for recipe, piece in dict.fromkeys((row["recipe"], row["without"]) for row in done):
        ours = [row for row in done if (row["recipe"], row["without"]) == (recipe, piece)]
        means = np.array([float(row["mean"]) for row in ours])
        interval = "one run"
        if len(means) > 1:
            half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
            interval = f"{means.mean() - half:.1f} to {means.mean() + half:.1f}"
        worst = min(float(row["worst"]) for row in ours)
        frames = np.mean([float(row["frames"]) for row in ours])
        minutes = np.nanmedian([float(row["minutes"]) for row in ours])
        seeds = " ".join(sorted(row["seed"] for row in ours))
        cells = [recipe, piece, seeds, f"{means.mean():.1f}", interval, f"{worst:.1f}"]
        print("| " + " | ".join([*cells, f"{frames:.0f}", f"{minutes:.0f}"]) + " |")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        with TemporaryDirectory() as folder:
            short = replace(args, total_timesteps=8192, tracks=4, folder=Path(folder))
            print(f"without the mirror, 8192 steps: {run('mirror', args.seeds[0], short)[0]}")
        return
    if not RESULTS.exists():
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("recipe,without,seed,mean,std,worst,frames,minutes\n")
    if not args.table:
        done = {(row["without"], int(row["seed"])) for row in rows() if row["recipe"] == RECIPE}
        queue = [(piece, seed) for seed in args.seeds for piece in args.pieces]
        queue = [job for job in queue if job not in done]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: keep(*job, args), queue))
    print_table()


if __name__ == "__main__":
    main()
