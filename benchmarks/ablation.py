"""What each detail of PPO is worth: python benchmarks/ablation.py

Trains without one detail at a time, over environments and seeds, and judges the final policy on
100 unseen episodes, without noise. What isn't a flag is changed from outside: a function or a class
of the script is replaced in the process that trains. Details that a preset doesn't have are added,
one at a time: their names begin with a plus. What is done stands in results/ablation.csv and is not
done again. All of it takes some hours; ``--quick`` makes one row in a few minutes, ``--table``
prints what there is.
"""

import csv
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from warnings import catch_warnings

import numpy as np
import torch
import tyro
from returns import commit, read, script_for
from scipy import stats
from torch import nn

RESULTS = Path(__file__).parent / "results" / "ablation.csv"
COLUMNS = ["environment", "detail", "seed", "mean", "steps", "seconds", "date", "commit"]

# Fewer steps than a preset's where these tell as much.
STEPS = {
    "CartPole-v1": 25_000,
    "Acrobot-v1": 100_000,
    "LunarLander-v3": 300_000,
    "LunarLanderContinuous-v3": 300_000,
    "HalfCheetah-v5": 200_000,
}


def time_limits_as_terminations(script) -> None:
    """An episode that a time limit cut off counts as ended: worth nothing afterwards."""
    honest = script.compute_gae
    script.compute_gae = lambda r, v, nv, terminations, dones, g, lam: honest(
        r, v, nv, dones, dones, g, lam
    )


def no_true_last_observation(script) -> None:
    """A cut-off episode goes on with the value of the next one's first observation."""
    honest = script.compute_gae
    script.compute_gae = lambda r, values, next_values, *rest: honest(
        r, values, torch.cat([values[1:], next_values[-1:]]), *rest
    )


def default_initialisation(script) -> None:
    """PyTorch's: uniform weights, and biases."""
    script.layer_init = lambda layer, std=1.0: layer


def large_last_layer(script) -> None:
    """The policy's last layer as large as the critic's: it begins with an opinion."""
    honest = script.layer_init
    script.layer_init = lambda layer, std=2**0.5: honest(layer, 1.0 if std == 0.01 else std)


def shared_network(script) -> None:
    """One trunk for actor and critic."""

    class Agent(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            if hasattr(self, "actor_mean"):
                self.critic[0] = self.actor_mean[0]
            else:
                self.critic_trunk = self.actor_trunk

    script.Agent = Agent


def adams_own_epsilon(script) -> None:
    """1e-8 instead of 1e-5."""
    adam = torch.optim.Adam
    torch.optim.Adam = lambda parameters, eps, **rest: adam(parameters, eps=1e-8, **rest)


def advantages_again(script) -> None:
    """Values and advantages are computed again before each epoch."""
    honest = script.update

    def update(agent, optimizer, rollout, clip_coef, args, backward_fn):
        goes_on = rollout["next_values"][:-1] == rollout["values"][1:]
        for epoch in range(args.update_epochs):
            if epoch:
                with torch.no_grad():
                    values = agent.get_value(rollout["obs"].flatten(0, 1))
                values = values.view_as(rollout["rewards"])
                next_values = rollout["next_values"].clone()
                next_values[:-1] = torch.where(goes_on, values[1:], next_values[:-1])
                rollout = rollout | {"values": values, "next_values": next_values}
            one = replace(args, update_epochs=1)
            losses = honest(agent, optimizer, rollout, clip_coef, one, backward_fn)
        return losses

    script.update = update


def deviation_by_state(script) -> None:
    """A normal policy whose standard deviation depends on the observation."""

    class Agent(script.Agent):
        def __init__(self, observation_space, action_space, args):
            super().__init__(observation_space, action_space, args)
            last = nn.Linear(args.hidden_size, self.actor_mean[1].out_features)
            self.log_std = script.layer_init(last, 0.01)

        def get_both(self, obs):
            features = self.actor_mean[0](self.obs_norm(obs.float()))
            log_std = self.actor_logstd + self.log_std(features)
            return self.actor_mean[1](features), log_std.clamp(-5, 2)

        def sample_actions(self, obs):
            mean, log_std = self.get_both(obs)
            return mean + log_std.exp() * torch.randn_like(mean)

        def evaluate_actions(self, obs, actions):
            mean, log_std = self.get_both(obs)
            policy = torch.distributions.Normal(mean, log_std.exp(), validate_args=False)
            logprob = policy.log_prob(actions).sum(-1)
            return logprob, policy.entropy().sum(-1), self.get_value(obs)

        forward = evaluate_actions

    script.Agent = Agent


# What takes a detail away: settings, or a function that changes the script.
DETAILS = {
    "nothing": {},
    "time limits told from terminations": time_limits_as_terminations,
    "the true last observation": no_true_last_observation,
    "GAE: lambda 1": {"gae_lambda": 1.0},
    "GAE: lambda 0": {"gae_lambda": 0.0},
    "several epochs": {"update_epochs": 1},
    "clipping of the ratio": {"clip_coef": 1e9},
    "normalised advantages": {"norm_adv": False},
    "annealing of the learning rate": {"anneal_lr": False},
    "annealing of the clip range": {"anneal_clip": False},
    "orthogonal initialisation": default_initialisation,
    "the last layer's 0.01": large_last_layer,
    "separate networks": shared_network,
    "Adam's epsilon of 1e-5": adams_own_epsilon,
    "clipping of the gradient": {"max_grad_norm": 1e9},
    "entropy bonus": {"ent_coef": 0.0},
    "normalised observations": {"norm_obs": False},
    "scaled rewards": {"norm_reward": False, "reward_scale": 1.0},
    "+ normalised observations": {"norm_obs": True},
    "+ scaled rewards": {"norm_reward": True, "reward_scale": 1.0},
    "+ annealing of the clip range": {"anneal_clip": True},
    "+ clipping of the value": {"clip_vloss": True},
    "+ advantages again at each epoch": advantages_again,
    "+ a deviation for each observation": deviation_by_state,
}


@dataclass
class Args:
    envs: tuple[str, ...] = tuple(STEPS)  # environments, of these or any other that has a preset
    details: tuple[str, ...] = tuple(DETAILS)  # of these
    seeds: tuple[int, ...] = (41, 42, 43, 44, 45)  # one run each
    jobs: int = 2  # runs side by side, of one thread each
    quick: bool = False  # one row: CartPole without normalised advantages
    table: bool = False  # train nothing, print the table


def is_idle(env_id: str, detail: str) -> bool:
    """Whether ``detail`` changes nothing in ``env_id``, as where its flag already says so."""
    script = script_for(env_id)
    if detail == "+ a deviation for each observation":
        return not hasattr(script.preset(env_id), "log_std_init")
    if detail == "+ scaled rewards":  # where they are, reward_scale alone makes no difference
        return script.preset(env_id).norm_reward
    changes, settings = DETAILS[detail], vars(script.preset(env_id))
    if not isinstance(changes, dict) or not changes:
        return False
    return all(settings[name] == value for name, value in changes.items())


def run_one(env_id: str, detail: str, seed: int) -> None:
    """In a process of its own: trains and prints the mean return."""
    script = script_for(env_id)
    changes = DETAILS[detail]
    if callable(changes):
        changes(script)
        changes = {}
    steps = STEPS.get(env_id, script.preset(env_id).total_timesteps)
    fixed = {"seed": seed, "total_timesteps": steps, "cuda": False, "num_threads": 1}
    args = script.preset(env_id, log_dir=Path("runs/ablation"), **fixed, **changes)
    with redirect_stdout(sys.stderr):
        returns, _ = script.train(args)
    print(returns.mean())


def run(job: tuple[str, str, int]) -> None:
    """Trains once and adds a row to the results; numbers that aren't finite are a row of nan."""
    env_id, detail, seed = job
    start = time.time()
    command = [sys.executable, __file__, "--one", env_id, detail, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "finite" not in done.stderr and " is nan" not in done.stderr:
        raise RuntimeError(done.stderr)
    mean = "nan" if done.returncode else f"{float(done.stdout.split()[-1]):.1f}"
    steps = STEPS.get(env_id, script_for(env_id).preset(env_id).total_timesteps)
    row = [env_id, detail, seed, mean, steps, f"{time.time() - start:.0f}", date.today(), commit()]
    with RESULTS.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


def welch_interval(without: list[float], whole: list[float]) -> tuple[float, float]:
    """The 95% interval of the difference of two means; (0, 0) where all values are the same."""
    if np.ptp([*without, *whole]) == 0:
        return 0.0, 0.0
    with catch_warnings(action="ignore"):  # it dislikes seeds that agree
        return tuple(stats.ttest_ind(without, whole, equal_var=False).confidence_interval())


def difference(without: list[float], whole: list[float]) -> str:
    """What a detail's absence makes of the mean, with its 95% interval (Welch)."""
    if min(len(without), len(whole)) < 2:
        return ""
    failed = sum(np.isnan(without))
    if failed:
        return f"{failed} of {len(without)} runs fail"
    low, high = welch_interval(without, whole)
    if low == high:
        return "the same"
    text = f"{np.mean(without) - np.mean(whole):+.1f} ({low:+.1f} to {high:+.1f})"
    return text if low > 0 or high < 0 else f"{text}, not significant"


def print_table(args: Args) -> None:
    """A row for each detail, a column for each environment."""
    found = {}
    for row in read(RESULTS):
        found.setdefault((row["environment"], row["detail"]), []).append(float(row["mean"]))
    print("| without | " + " | ".join(args.envs) + " |")
    print("| --- " * (1 + len(args.envs)) + "|")
    for detail in args.details:
        cells = [detail]
        for env_id in args.envs:
            means = found.get((env_id, detail), [])
            whole = found.get((env_id, "nothing"), [])
            text = f"{np.mean(means):.1f}" if means else ""
            cells.append(text if detail == "nothing" else difference(means, whole))
        if any(cells[1:]):
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        run_one(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        args.envs, args.details = ("CartPole-v1",), ("nothing", "normalised advantages")
    if not RESULTS.exists():
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    if not args.table:
        done = {(row["environment"], row["detail"], int(row["seed"])) for row in read(RESULTS)}
        queue = [(e, d, seed) for e in args.envs for seed in args.seeds for d in args.details]
        queue = [job for job in queue if job not in done and not is_idle(*job[:2])]
        print(f"runs left: {len(queue)}", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run, queue))
    print_table(args)


if __name__ == "__main__":
    main()
