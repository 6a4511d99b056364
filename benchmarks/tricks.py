"""What the tricks in the scripts that save time are worth: python benchmarks/tricks.py

Each is timed beside the plain way, taking turns, with one thread of the CPU; the figures are
medians, and how many times as long the plain way takes.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributions import Categorical

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_cartpole as script


def compare(name: str, ours: Callable, plain: Callable, rounds: int) -> None:
    """Prints the time of a call of each, and the median of their ratios."""
    times = []
    for _ in range(rounds + 1):
        for part in (ours, plain):
            start = time.perf_counter()
            part()
            times.append(time.perf_counter() - start)
    times = np.array(times[2:]).reshape(rounds, 2)  # the first round warms up
    ours_ms, plain_ms = 1000 * np.median(times, axis=0)
    ratio = np.median(times[:, 1] / times[:, 0])
    print(f"{name:42s} {ours_ms:8.3f} ms   plain {plain_ms:8.3f} ms   {ratio:.2f} x", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    args = script.Args(num_envs=4, num_steps=128, num_minibatches=4, cuda=False)
    envs = script.make_envs(args, args.num_envs, training=True)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-6, eps=1e-5, fused=True)
    obs, _ = envs.reset(seed=args.seed)
    rollout, obs, _ = script.collect(agent, envs, obs, args.num_steps)
    obs = torch.tensor(obs)

    def update(settings: script.Args) -> None:
        script.update(agent, optimizer, rollout, 0.2, settings)

    @torch.inference_mode()
    def evaluate_step_by_step() -> None:
        for step in range(args.num_steps):
            agent.evaluate_actions(rollout["obs"][step], rollout["actions"][step])

    @torch.inference_mode()
    def evaluate_at_once() -> None:
        agent.evaluate_actions(rollout["obs"].flatten(0, 1), rollout["actions"].flatten(0, 1))

    @torch.inference_mode()
    def sample() -> None:
        agent.sample_actions(obs)

    @torch.inference_mode()
    def sample_categorical() -> None:
        Categorical(logits=agent.get_logits(obs)).sample()

    tiny_bonus = replace(args, ent_coef=1e-30)
    compare(
        "update, no entropy gradient at weight 0",
        lambda: update(args),
        lambda: update(tiny_bonus),
        100,
    )
    compare("a step's sampling, by Gumbel-max", sample, sample_categorical, 2000)
    compare("a rollout's values, in one pass", evaluate_at_once, evaluate_step_by_step, 100)


if __name__ == "__main__":
    main()
