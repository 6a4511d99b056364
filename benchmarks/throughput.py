"""Prints environment steps per second of whole training loops, side by side: python benchmarks/throughput.py

This project's scripts, Stable-Baselines3's PPO and the loop that people know from single-file PPOs (plain() below)
train the same environment with the same settings and networks; the floor steps the same environments with random
actions and does nothing else. "Native" is the floor of CartPole's own vector environment, which the scripts do not
offer: its step after an episode's end must not be learned from. All take turns, each in a process of its own, torch on
one thread (which is the fastest for all of them). Speeds and ratios are medians over the rounds, after imports and the
making of environments. "Collecting" is the time that ours takes for the steps alone, policy included, in multiples of
the floor's. "Compiled" is ours with --compile, after the first iteration, which is when it compiles.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass
class Settings:
    env_id: str
    num_envs: int
    num_steps: int
    num_minibatches: int
    update_epochs: int
    iterations: int


@dataclass
class Args:
    what: str = "all"
    """ours, compiled, sb3, plain, floor or native: measures this one once; all: the table"""
    setting: int = 0
    """which of SETTINGS"""
    rounds: int = 3
    """how often each is measured"""


SETTINGS = [Settings("CartPole-v1", 4, 128, 4, 4, 60), Settings("LunarLanderContinuous-v3", 8, 2048, 32, 10, 2)]
SETTINGS += [Settings("CartPole-v1", num_envs, 128, 4, 4, 40) for num_envs in (1, 16, 64, 256)]


def ours(s: Settings, compile: bool = False) -> float:
    """Steps per second of the script that fits: by its own clock, which starts when the environments stand."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import ppo_cartpole
    import ppo_continuous_mlp

    script = ppo_continuous_mlp if "Continuous" in s.env_id else ppo_cartpole
    with tempfile.TemporaryDirectory() as folder:
        sizes = vars(s) | {"total_timesteps": s.iterations * s.num_envs * s.num_steps, "compile": compile}
        del sizes["iterations"]
        run = script.train(script.Args(**sizes, cuda=False, num_threads=1, eval_episodes=1, log_dir=Path(folder)))
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
    size = s.num_envs * s.num_steps
    model = PPO("MlpPolicy", envs, n_steps=s.num_steps, batch_size=size // s.num_minibatches, n_epochs=s.update_epochs)
    start = time.perf_counter()
    model.learn(s.iterations * size)
    return s.iterations * size / (time.perf_counter() - start)


def plain(s: Settings) -> float:
    """Steps per second of PPO as it is mostly written: torch.distributions, a loop for GAE, .item() for the log."""

    def make() -> gym.Env:
        env = gym.wrappers.RecordEpisodeStatistics(gym.make(s.env_id))
        if isinstance(env.action_space, gym.spaces.Box):
            env = gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(gym.wrappers.ClipAction(env)))
        return env

    def mlp(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))

    def distribution(obs: torch.Tensor) -> torch.distributions.Distribution:
        if discrete:
            return torch.distributions.Categorical(logits=actor(obs))
        normal = torch.distributions.Normal(actor(obs), log_std.exp())
        return torch.distributions.Independent(normal, 1)

    envs = gym.vector.SyncVectorEnv([make] * s.num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)
    inputs, shape = envs.single_observation_space.shape[0], envs.single_action_space.shape
    actor, critic = mlp(int(envs.single_action_space.n) if discrete else shape[0]), mlp(1)
    log_std = nn.Parameter(torch.zeros(shape))
    parameters = [*actor.parameters(), *critic.parameters(), log_std]
    optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5)
    size = s.num_envs * s.num_steps
    all_obs, actions = torch.zeros(s.num_steps, s.num_envs, inputs), torch.zeros(s.num_steps, s.num_envs, *shape)
    logprobs, rewards, values, dones = (torch.zeros(s.num_steps, s.num_envs) for _ in range(4))
    obs, done = torch.Tensor(envs.reset(seed=1)[0]), torch.zeros(s.num_envs)
    returns_seen, rng = [], np.random.default_rng(1)
    start = time.perf_counter()
    for _ in range(s.iterations):
        for step in range(s.num_steps):
            all_obs[step], dones[step] = obs, done
            with torch.no_grad():
                policy = distribution(obs)
                action = policy.sample()
                logprobs[step], values[step] = policy.log_prob(action), critic(obs).flatten()
            actions[step] = action
            next_obs, reward, terminations, truncations, infos = envs.step(action.numpy())
            rewards[step] = torch.tensor(reward).view(-1)
            obs, done = torch.Tensor(next_obs), torch.Tensor(np.logical_or(terminations, truncations))
            if "final_info" in infos:
                returns_seen += infos["final_info"]["episode"]["r"].tolist()
        with torch.no_grad():
            next_value, trace, advantages = critic(obs).flatten(), 0, torch.zeros_like(rewards)
            for t in reversed(range(s.num_steps)):
                alive = 1 - (done if t == s.num_steps - 1 else dones[t + 1])
                following = next_value if t == s.num_steps - 1 else values[t + 1]
                delta = rewards[t] + 0.99 * following * alive - values[t]
                advantages[t] = trace = delta + 0.99 * 0.95 * alive * trace
            returns = advantages + values
        columns = [x.flatten(0, 1) for x in (all_obs, actions, logprobs, advantages, returns, values)]
        indices, clipfracs = np.arange(size), []
        for _ in range(s.update_epochs):
            rng.shuffle(indices)
            for first in range(0, size, size // s.num_minibatches):
                mb = indices[first : first + size // s.num_minibatches]
                mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns, mb_values = (x[mb] for x in columns)
                policy = distribution(mb_obs)
                logratio = policy.log_prob(mb_actions) - mb_logprobs
                ratio = logratio.exp()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfracs.append(((ratio - 1.0).abs() > 0.2).float().mean().item())
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                losses = -mb_advantages * ratio, -mb_advantages * torch.clamp(ratio, 0.8, 1.2)
                new_values = critic(mb_obs).flatten()
                moved = mb_values + torch.clamp(new_values - mb_values, -0.2, 0.2)
                value_loss = torch.max((new_values - mb_returns) ** 2, (moved - mb_returns) ** 2)
                loss = torch.max(*losses).mean() + 0.25 * value_loss.mean() - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        approx_kl.item(), loss.item()
    return s.iterations * size / (time.perf_counter() - start)


def floor(s: Settings, mode: str = "sync") -> float:
    """Steps per second of the bare vector environment under random actions; nan where there is none in ``mode``."""
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


MEASURES = {"ours": ours, "compiled": partial(ours, compile=True), "sb3": sb3, "plain": plain, "floor": floor}
MEASURES["native"] = partial(floor, mode="vector_entry_point")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.what != "all":
        torch.set_num_threads(1)
        print(MEASURES[args.what](SETTINGS[args.setting]))
        return
    print("| environment | envs | ours, steps/s | x SB3 | x plain | compiled, steps/s | x SB3 | x plain | ", end="")
    print("floor, steps/s | collecting, x floor | native |\n" + "| --- " * 11 + "|")
    for index, s in enumerate(SETTINGS):
        speeds, collecting = {name: [] for name in MEASURES}, []
        for _ in range(args.rounds):
            for name, values in speeds.items():
                command = [sys.executable, __file__, "--what", name, "--setting", str(index)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                lines = process.stdout.splitlines()
                values.append(float(lines[-1]))
                if name == "ours":
                    collecting.append(float(lines[-2]))
        cells = []
        for name in ("ours", "compiled"):
            ratios = [np.median(np.array(speeds[name]) / speeds[peer]) for peer in ("sb3", "plain")]
            cells += [f"{np.median(speeds[name]):.0f}", *(f"{ratio:.1f}" for ratio in ratios)]
        print(
            f"| {s.env_id} | {s.num_envs} | {' | '.join(cells)} | {np.median(speeds['floor']):.0f} | "
            f"{np.median(np.array(speeds['floor']) / collecting):.2f} | {np.median(speeds['native']):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
