"""Trains our scripts and Stable-Baselines3's PPO over environments and seeds; prints one table.

    python benchmarks/returns.py --envs CartPole-v1 Acrobot-v1

Ours runs with the settings that ``--env-id`` picks, SB3 with those of its zoo and as many
environment steps. Each figure is the mean over 100 unseen episodes, of the environment's own
reward, the policy played without noise. Each run's result is kept in returns.csv, beside this file,
and the run is not repeated: to have it anew, as after a change of its settings, delete its line
there and in results/curves.csv, which has its training returns.
What is left, and how long it takes, is said first. Without ``--train`` there is only the table.
"""

import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from warnings import catch_warnings

import gymnasium as gym
import numpy as np
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_cartpole
import ppo_continuous_mlp

# From rl-baselines3-zoo, hyperparams/ppo.yml, which has older versions of some environments. What
# is not named here is SB3's default.
LANDER = {
    "n_envs": 16, "n_steps": 1024, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4,
    "ent_coef": 0.01,
}  # fmt: skip
MUJOCO = {"normalize": True, "n_envs": 1, "n_steps": 512}
MLP_256 = {"log_std_init": -2, "ortho_init": False, "net_arch": [256, 256]}  # ReLU: see train_sb3
ZOO = {
    "CartPole-v1": {
        "n_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98,
        "n_epochs": 20, "learning_rate": lambda left: 1e-3 * left,
        "clip_range": lambda left: 0.2 * left,
    },
    "Acrobot-v1": {
        "normalize": True, "n_envs": 16, "n_steps": 256, "gae_lambda": 0.94, "n_epochs": 4,
    },
    "MountainCar-v0": {
        "normalize": True, "n_envs": 16, "n_steps": 16, "gae_lambda": 0.98, "n_epochs": 4,
    },
    "LunarLander-v3": LANDER,
    "LunarLanderContinuous-v3": LANDER,
    "BipedalWalker-v3": {
        "normalize": True, "n_envs": 32, "n_steps": 2048, "gamma": 0.999, "clip_range": 0.18,
    },
    "Pendulum-v1": {
        "n_envs": 4, "n_steps": 1024, "gamma": 0.9, "learning_rate": 1e-3, "use_sde": True,
        "sde_sample_freq": 4,
    },
    "MountainCarContinuous-v0": {
        "normalize": True, "n_envs": 1, "n_steps": 8, "batch_size": 256, "gamma": 0.9999,
        "learning_rate": 7.77e-5, "ent_coef": 0.00429, "clip_range": 0.1, "gae_lambda": 0.9,
        "max_grad_norm": 5, "vf_coef": 0.19, "use_sde": True,
        "policy_kwargs": {"log_std_init": -3.29, "ortho_init": False},
    },
    "HalfCheetah-v5": {
        **MUJOCO, "batch_size": 64, "gamma": 0.98, "learning_rate": 2.0633e-5,
        "ent_coef": 0.000401762, "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92,
        "max_grad_norm": 0.8, "vf_coef": 0.58096, "policy_kwargs": MLP_256,
    },
    "Hopper-v5": {
        **MUJOCO, "batch_size": 32, "gamma": 0.999, "learning_rate": 9.80828e-5,
        "ent_coef": 0.00229519, "n_epochs": 5, "gae_lambda": 0.99, "max_grad_norm": 0.7,
        "vf_coef": 0.835671, "policy_kwargs": MLP_256,
    },
    "Walker2d-v5": {
        **MUJOCO, "batch_size": 32, "learning_rate": 5.05041e-5, "ent_coef": 0.000585045,
        "clip_range": 0.1, "n_epochs": 20, "max_grad_norm": 1, "vf_coef": 0.871923,
    },
    "Ant-v5": {"normalize": True, "n_envs": 1},
    "Humanoid-v5": {
        **MUJOCO, "batch_size": 256, "gamma": 0.95, "learning_rate": 3.56987e-5,
        "ent_coef": 0.00238306, "clip_range": 0.3, "n_epochs": 5, "gae_lambda": 0.9,
        "max_grad_norm": 2, "vf_coef": 0.431892, "policy_kwargs": MLP_256,
    },
    "Swimmer-v5": {"normalize": True, "n_envs": 1, "gamma": 0.9999},
    "Reacher-v5": {
        **MUJOCO, "batch_size": 32, "gamma": 0.9, "learning_rate": 1.04019e-4,
        "ent_coef": 7.52585e-8, "clip_range": 0.3, "n_epochs": 5, "gae_lambda": 1.0,
        "max_grad_norm": 0.9, "vf_coef": 0.950368,
    },
    "InvertedPendulum-v5": {
        "normalize": True, "n_envs": 1, "n_steps": 32, "gamma": 0.999, "learning_rate": 2.22425e-4,
        "ent_coef": 1.37976e-7, "clip_range": 0.4, "n_epochs": 5, "gae_lambda": 0.9,
        "max_grad_norm": 0.3, "vf_coef": 0.19816,
    },
    "InvertedDoublePendulum-v5": {
        "normalize": True, "n_envs": 1, "n_steps": 128, "batch_size": 512, "gamma": 0.98,
        "learning_rate": 1.55454e-4, "ent_coef": 1.05057e-6, "clip_range": 0.4, "gae_lambda": 0.8,
        "vf_coef": 0.695929,
    },
}  # fmt: skip
TOYS = ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1")  # the zoo has none of them
RESULTS = Path(__file__).with_suffix(".csv")
CURVES = Path(__file__).parent / "results" / "curves.csv"
COLUMNS = ["environment", "who", "seed", "mean", "steps", "seconds", "date", "commit", "machine"]


@dataclass
class Args:
    envs: tuple[str, ...] = (*ZOO, *TOYS)  # environments, of these
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run of ours each
    sb3_seeds: tuple[int, ...] = (1, 2, 3)  # one run of Stable-Baselines3's each
    train: bool = False  # train what isn't in returns.csv yet
    jobs: int = 1  # runs side by side
    quick: bool = False  # only one CartPole run of ours and one of SB3's, kept nowhere


@cache
def script_for(env_id: str):
    """The script that takes the actions of ``env_id``."""
    discrete = isinstance(gym.make(env_id).action_space, gym.spaces.Discrete)
    return ppo_cartpole if discrete else ppo_continuous_mlp


def run_ours(env_id: str, seed: int, log_dir: Path, *flags: str) -> tuple[float, Path]:
    """Trains ours; the mean return that the script prints at the end, and the run's folder."""
    command = [sys.executable, script_for(env_id).__file__, "--env-id", env_id, *flags]
    command += ["--seed", str(seed), "--log-dir", str(log_dir)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = {line.split(":")[0]: line for line in output.splitlines()}
    folder = Path(lines["checkpoint"].split(maxsplit=1)[1]).parent
    return float(lines["evaluation"].split()[2]), folder


def curve_of(folder: Path) -> list[tuple[int, float, float]]:
    """(step, seconds since the start, mean training return) for each iteration that has one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    start = events.FirstEventTimestamp()
    points = events.Scalars("charts/episodic_return")
    return [(point.step, point.wall_time - start, point.value) for point in points]


def write_curve(run: tuple, points: list[tuple[int, float, float]], steps: int) -> None:
    """Adds means over each 2% of a run to the curves."""
    if not CURVES.exists():
        CURVES.parent.mkdir(exist_ok=True)
        CURVES.write_text("environment,who,seed,step,seconds,return\n")
    parts = {}
    for point in points:
        parts.setdefault(min(50 * point[0] // steps, 49), []).append(point)
    with CURVES.open("a", newline="") as file:
        for part in parts.values():
            step, seconds, mean = np.mean(part, axis=0)
            row = [*run, f"{step:.0f}", f"{seconds:.1f}", f"{mean:.2f}"]
            csv.writer(file, lineterminator="\n").writerow(row)


def train_sb3(env_id: str, seed: int) -> tuple[float, list[tuple[int, float, float]]]:
    """Mean return of SB3's PPO under the zoo's settings, on the same episodes as ours; the curve's
    points are its training episodes."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    settings = dict(ZOO[env_id])
    normalize, n_envs = settings.pop("normalize", False), settings.pop("n_envs")
    if settings.get("policy_kwargs") is MLP_256:
        settings["policy_kwargs"] = MLP_256 | {"activation_fn": torch.nn.ReLU}
    envs = make_vec_env(env_id, n_envs, seed=seed)
    envs = VecNormalize(envs, gamma=settings.get("gamma", 0.99)) if normalize else envs
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    points, start = [], time.time()

    def note_episodes(local: dict, _) -> bool:
        ended = [info["episode"]["r"] for info in local["infos"] if "episode" in info]
        points.extend((model.num_timesteps, time.time() - start, total) for total in ended)
        return True

    model.learn(script_for(env_id).preset(env_id).total_timesteps, note_episodes)
    env, returns = gym.make(env_id), []
    for episode in range(100):
        obs, _ = env.reset(seed=1_000_000 + episode)
        total, done = 0.0, False
        while not done:
            seen = envs.normalize_obs(obs) if normalize else obs
            action, _ = model.predict(seen, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    return float(np.mean(returns)), points


def machine() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0]}" if names else f"{os.cpu_count()} cores"


def commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of a table of results."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def train(env_id: str, who: str, seed: int, lock: Lock) -> None:
    """One run, and its line in returns.csv."""
    start = time.time()
    if who == "ours":
        mean, folder = run_ours(env_id, seed, Path("runs/returns"))
        seconds, points = time.time() - start, curve_of(folder)
    else:  # in a process of its own, for runs side by side
        command = [sys.executable, __file__, "--sb3-run", env_id, str(seed)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        mean, points = json.loads(output.splitlines()[-1])
        seconds = time.time() - start
    steps = script_for(env_id).preset(env_id).total_timesteps
    row = {
        "environment": env_id,
        "who": who,
        "seed": seed,
        "mean": f"{mean:.1f}",
        "steps": steps,
        "seconds": f"{seconds:.0f}",
        "date": date.today(),
        "commit": commit(),
        "machine": machine(),
    }
    with lock:
        write_curve((env_id, who, seed), points, steps)
        with RESULTS.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
    print(f"{env_id} {who} seed {seed}: {mean:.1f}", file=sys.stderr, flush=True)


def interval(means: list[float]) -> str:
    """The mean of one mean for each seed, and half its 95% interval (Student's t)."""
    if len(means) < 2:
        return " ".join(f"{mean:.1f}" for mean in means)
    half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
    return f"{np.mean(means):.1f} ± {half:.1f}"


def print_table(args: Args) -> None:
    """A row for each environment: means over seeds with their 95% intervals."""
    columns = ["environment", "steps", "ours", "SB3", "difference"]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    rows = read()
    for env_id in args.envs:
        sides = []
        for who, seeds in (("ours", args.seeds), ("SB3", args.sb3_seeds)):
            found = [r for r in rows if (r["environment"], r["who"]) == (env_id, who)]
            sides.append([float(r["mean"]) for r in found if int(r["seed"]) in seeds])
        ours, theirs = sides
        difference = ""
        if min(len(ours), len(theirs)) > 1:
            with catch_warnings(action="ignore"):  # it dislikes seeds that agree
                p = stats.ttest_ind(ours, theirs, equal_var=False).pvalue  # Welch's t-test
            significant = "" if p < 0.05 else ", not significant"
            difference = f"{np.mean(ours) - np.mean(theirs):+.1f}{significant}"
        steps = script_for(env_id).preset(env_id).total_timesteps
        cells = [env_id, str(steps), interval(ours), interval(theirs), difference]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--sb3-run"]:
        print(json.dumps(train_sb3(sys.argv[2], int(sys.argv[3]))))
        return
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        with TemporaryDirectory() as folder:
            mean, _ = run_ours("CartPole-v1", 1, Path(folder))
        print(f"CartPole-v1, seed 1: ours {mean:.1f}, SB3 {train_sb3('CartPole-v1', 1)[0]:.1f}")
        return
    if args.train:
        rows = read()
        done = {(row["environment"], row["who"], int(row["seed"])) for row in rows}
        queue = [(env_id, "ours", seed) for env_id in args.envs for seed in args.seeds]
        queue += [(env, "SB3", seed) for env in args.envs if env in ZOO for seed in args.sb3_seeds]
        queue = [run for run in queue if run not in done]
        hours, unknown = 0.0, 0
        for env_id, who, _ in queue:
            same = [r for r in rows if (r["environment"], r["who"]) == (env_id, who)]
            known = [float(r["seconds"]) for r in same if r["seconds"]]
            hours += np.mean(known) / 3600 if known else 0
            unknown += not known
        note = f"runs left: {len(queue)}, {hours / args.jobs:.1f} hours"
        print(f"{note}, and {unknown} of unknown length", file=sys.stderr, flush=True)
        lock = Lock()
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: train(*run, lock), queue))
    print_table(args)


if __name__ == "__main__":
    main()
