"""Prints environment steps per second of whole training loops, side by side.

    python benchmarks/throughput.py

Three train the same environment with the same settings and networks: "ours", this project's
script, "SB3", Stable-Baselines3's PPO, and "plain", PPO as single files mostly have it, in plain()
below. "Compiled" is ours with --compile, measured after the first iteration, in which it compiles.
The "floor" steps the same environments with random actions and does nothing else. "Collecting" is
the time that ours takes for its steps alone, policy included, in multiples of the floor's. The
column "native" is the floor of CartPole's own vector environment, which the scripts don't use: its
step after an episode's end must not be learned from. MiB are the process's peak, imports included;
rows with more environments and larger networks show how both grow.

They take turns, each in a process of its own, with torch on one thread, the fastest for all of
them. Speeds and ratios are medians over the rounds, without imports and the making of environments.
What is measured stands in results/throughput.csv and is not measured again, so that a table that
was stopped goes on; ``--table`` prints what there is.
"""

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

RESULTS = Path(__file__).parent / "results" / "throughput.csv"


@dataclass
class Args:
    what: str = "all"  # one of MEASURES, to measure it once; all: the table
    setting: int = 0  # which of SETTINGS, where one is measured
    rounds: int = 3  # how often each is measured for the table
    quick: bool = False  # only one round of the first row, kept nowhere
    table: bool = False  # measure nothing, print the table


@dataclass
class Settings:
    env_id: str
    num_envs: int
    num_steps: int
    num_minibatches: int
    update_epochs: int
    iterations: int
    hidden_size: int = 64  # units in each of the two hidden layers

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def key(self) -> tuple[str, str, str]:
        """The first columns of its rows."""
        return self.env_id, str(self.num_envs), str(self.hidden_size)


SETTINGS = [
    Settings("CartPole-v1", 4, 128, 4, 4, 60),
    Settings("LunarLanderContinuous-v3", 8, 2048, 32, 10, 2),
    Settings("CartPole-v1", 1, 128, 4, 4, 40),
    Settings("CartPole-v1", 16, 128, 4, 4, 40),
    Settings("CartPole-v1", 64, 128, 4, 4, 40),
    Settings("CartPole-v1", 256, 128, 4, 4, 40),
    Settings("CartPole-v1", 1024, 128, 4, 4, 10),
    Settings("LunarLanderContinuous-v3", 8, 256, 8, 10, 5, hidden_size=256),
    Settings("LunarLanderContinuous-v3", 8, 256, 8, 10, 5, hidden_size=1024),
]


def ours(s: Settings, compile: bool = False) -> float:
    """Steps per second of the script that fits, by its own clock, which starts once it has made the
    environments. Prints those of collecting alone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import ppo_cartpole
    import ppo_continuous_mlp

    script = ppo_continuous_mlp if "Continuous" in s.env_id else ppo_cartpole
    settings = asdict(s) | {"total_timesteps": s.iterations * s.batch_size, "eval_episodes": 1}
    del settings["iterations"]
    if script is ppo_cartpole:
        del settings["hidden_size"]
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"cuda": False, "num_threads": 1, "compile": compile, "log_dir": Path(folder)}
        _, run = script.train(script.Args(**settings))
        log = EventAccumulator(str(run)).Reload()
    first, *_, last = log.Scalars("charts/SPS")
    if compile:
        return (last.step - first.step) / (last.wall_time - first.wall_time)
    print(last.value / np.median([point.value for point in log.Scalars("time/collect_fraction")]))
    return last.value


def sb3(s: Settings) -> float:
    """Steps per second of stable_baselines3.PPO.learn."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(s.env_id, s.num_envs)
    sizes = {"n_steps": s.num_steps, "batch_size": s.batch_size // s.num_minibatches}
    sizes["policy_kwargs"] = {"net_arch": 2 * [s.hidden_size]}
    model = PPO("MlpPolicy", envs, n_epochs=s.update_epochs, **sizes)
    start = time.perf_counter()
    model.learn(s.iterations * s.batch_size)
    return s.iterations * s.batch_size / (time.perf_counter() - start)


def plain(s: Settings) -> float:
    """Steps per second of PPO as single files mostly have it: torch.distributions, values and
    log-probabilities computed at every step, .item() for the log in every minibatch."""

    def make() -> gym.Env:
        env = gym.wrappers.RecordEpisodeStatistics(gym.make(s.env_id))
        if isinstance(env.action_space, gym.spaces.Box):
            env = gym.wrappers.NormalizeObservation(gym.wrappers.ClipAction(env))
            env = gym.wrappers.NormalizeReward(env)
        return env

    def mlp(num_outputs: int) -> nn.Module:
        size = s.hidden_size
        hidden = [nn.Linear(num_inputs, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh()]
        return nn.Sequential(*hidden, nn.Linear(size, num_outputs))

    def get_policy(obs: torch.Tensor) -> torch.distributions.Distribution:
        if discrete:
            return torch.distributions.Categorical(logits=actor(obs))
        normal = torch.distributions.Normal(actor(obs), log_std.exp())
        return torch.distributions.Independent(normal, 1)

    mode = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([make] * s.num_envs, autoreset_mode=mode)
    discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)
    num_inputs, shape = envs.single_observation_space.shape[0], envs.single_action_space.shape
    actor = mlp(int(envs.single_action_space.n) if discrete else shape[0])
    critic = mlp(1)
    log_std = nn.Parameter(torch.zeros(shape))
    parameters = [*actor.parameters(), *critic.parameters(), log_std]
    optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5)
    all_obs = torch.zeros(s.num_steps, s.num_envs, num_inputs)
    actions = torch.zeros(s.num_steps, s.num_envs, *shape)
    logprobs, rewards, values, dones = torch.zeros(4, s.num_steps, s.num_envs)
    obs, done = torch.Tensor(envs.reset(seed=1)[0]), torch.zeros(s.num_envs)
    returns_seen, rng = [], np.random.default_rng(1)
    start = time.perf_counter()
    for _ in range(s.iterations):
        for step in range(s.num_steps):
            all_obs[step], dones[step] = obs, done
            with torch.no_grad():
                policy = get_policy(obs)
                action = policy.sample()
                logprobs[step], values[step] = policy.log_prob(action), critic(obs).flatten()
            actions[step] = action
            next_obs, reward, terminations, truncations, infos = envs.step(action.numpy())
            rewards[step] = torch.tensor(reward).view(-1)
            obs = torch.Tensor(next_obs)
            done = torch.Tensor(np.logical_or(terminations, truncations))
            if "final_info" in infos:
                returns_seen += infos["final_info"]["episode"]["r"].tolist()
        with torch.no_grad():
            next_value, advantage = critic(obs).flatten(), 0
            advantages = torch.zeros_like(rewards)
            for t in reversed(range(s.num_steps)):
                alive = 1 - (done if t == s.num_steps - 1 else dones[t + 1])
                following = next_value if t == s.num_steps - 1 else values[t + 1]
                delta = rewards[t] + 0.99 * following * alive - values[t]
                advantages[t] = advantage = delta + 0.99 * 0.95 * alive * advantage
            returns = advantages + values
        batch = (all_obs, actions, logprobs, advantages, returns, values)
        batch = [tensor.flatten(0, 1) for tensor in batch]
        indices, clipfracs = np.arange(s.batch_size), []
        minibatch_size = s.batch_size // s.num_minibatches
        for _ in range(s.update_epochs):
            rng.shuffle(indices)
            for first in range(0, s.batch_size, minibatch_size):
                rows = indices[first : first + minibatch_size]
                mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns, mb_values = (
                    tensor[rows] for tensor in batch
                )
                policy = get_policy(mb_obs)
                logratio = policy.log_prob(mb_actions) - mb_logprobs
                ratio = logratio.exp()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfracs.append(((ratio - 1.0).abs() > 0.2).float().mean().item())
                mb_advantages = mb_advantages - mb_advantages.mean()
                mb_advantages = mb_advantages / (mb_advantages.std() + 1e-8)
                unclipped_loss = -mb_advantages * ratio
                clipped_loss = -mb_advantages * torch.clamp(ratio, 0.8, 1.2)
                policy_loss = torch.max(unclipped_loss, clipped_loss).mean()
                new_values = critic(mb_obs).flatten()
                clipped_values = mb_values + torch.clamp(new_values - mb_values, -0.2, 0.2)
                value_loss = (new_values - mb_returns) ** 2
                value_loss = torch.max(value_loss, (clipped_values - mb_returns) ** 2).mean()
                loss = policy_loss + 0.25 * value_loss - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        approx_kl.item(), loss.item()
    return s.iterations * s.batch_size / (time.perf_counter() - start)


def floor(s: Settings, mode: str = "sync") -> float:
    """Steps per second of the bare vector environment under random actions; nan where there is none
    in ``mode``."""
    if mode == "vector_entry_point" and gym.spec(s.env_id).vector_entry_point is None:
        return np.nan
    envs = gym.make_vec(s.env_id, s.num_envs, vectorization_mode=mode)
    envs.action_space.seed(1)
    actions = [envs.action_space.sample() for _ in range(100)]
    envs.reset(seed=1)
    steps = max(500, 20_000 // s.num_envs)
    start = time.perf_counter()
    for step in range(steps):
        envs.step(actions[step % 100])
    return steps * s.num_envs / (time.perf_counter() - start)


MEASURES = {
    "ours": ours,
    "compiled": partial(ours, compile=True),
    "sb3": sb3,
    "plain": plain,
    "floor": floor,
    "native": partial(floor, mode="vector_entry_point"),
}


def measure_apart(what: str, setting: int) -> list[str]:
    """Measures one in a process of its own. Returns the lines that it prints, the last of them
    steps per second and MiB; those of "ours" end in collecting's steps per second and these."""
    command = [sys.executable, __file__, "--what", what, "--setting", str(setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.check_output(command, text=True, env=environment).splitlines()


def measure(setting: int, round: int) -> list[list[str]]:
    """One round of one line of the table: rows of the results, one for each of MEASURES and one for
    collecting."""
    key, rows = (*SETTINGS[setting].key, str(round)), []
    for what in MEASURES:
        lines = measure_apart(what, setting)
        rows.append([*key, what, *lines[-2:]])
        if what == "ours":
            rows.append([*key, "collecting", lines[-3], lines[-1]])
    return rows


def print_table(rows: list[list[str]]) -> None:
    """A line for each environment, number of environments and size: medians over the rounds."""
    names = ["environment", "envs", "units", "ours, steps/s", "x SB3", "x plain"]
    names += ["compiled, steps/s", "x SB3", "x plain"]
    names += ["floor, steps/s", "collecting, x floor", "native", "ours, MiB", "SB3, MiB"]
    print("| " + " | ".join(names) + " |")
    print("| --- " * len(names) + "|")
    found = defaultdict(lambda: defaultdict(list))
    for *setting, _, what, speed, peak in rows:
        found[tuple(setting)][what].append([float(speed), float(peak)])
    for setting, measured in found.items():
        speeds = {what: np.array(pairs)[:, 0] for what, pairs in measured.items()}
        cells = list(setting)
        for name in ("ours", "compiled"):
            cells.append(f"{np.median(speeds[name]):.0f}")
            cells.append(f"{np.median(speeds[name] / speeds['sb3']):.1f}")
            cells.append(f"{np.median(speeds[name] / speeds['plain']):.1f}")
        cells.append(f"{np.median(speeds['floor']):.0f}")
        cells.append(f"{np.median(speeds['floor'] / speeds['collecting']):.2f}")
        cells.append(f"{np.median(speeds['native']):.0f}")
        cells += [f"{np.median(measured[name], axis=0)[1]:.0f}" for name in ("ours", "sb3")]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.what != "all":
        torch.set_num_threads(1)
        print(MEASURES[args.what](SETTINGS[args.setting]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if args.quick:
        print_table(measure(0, 1))
        return
    if not RESULTS.exists():
        RESULTS.write_text("environment,envs,units,round,what,steps/s,MiB\n")
    with RESULTS.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    done = {tuple(row[:4]) for row in rows}
    for setting, s in enumerate(SETTINGS):
        for round in range(1, args.rounds + 1):
            if args.table or (*s.key, str(round)) in done:
                continue
            new = measure(setting, round)
            rows += new
            with RESULTS.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(new)
    print_table(rows)


if __name__ == "__main__":
    main()
