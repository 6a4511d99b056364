"""Trains a script and Stable-Baselines3's PPO over environments and seeds, and prints one table.

    python benchmarks/returns.py --envs CartPole-v1 Acrobot-v1 --seeds 1 2 3

Ours runs with the settings that ``--env-id`` picks, SB3 with those of its zoo and as many
environment steps. Each figure is the mean over 100 unseen episodes, of the environment's own
reward, the policy played without noise. Each run's result is kept in returns.csv, beside this file,
and the run is not repeated: to have it anew, as after a change of its settings, delete its line.
"""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

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
}  # fmt: skip
RESULTS = Path(__file__).with_suffix(".csv")


@dataclass
class Args:
    envs: tuple[str, ...] = tuple(ZOO)  # environments, of those in ZOO
    seeds: tuple[int, ...] = (1, 2, 3)  # one run each
    sb3: bool = True  # train Stable-Baselines3 too


def script_for(env_id: str):
    """The script that takes the actions of ``env_id``."""
    discrete = isinstance(gym.make(env_id).action_space, gym.spaces.Discrete)
    return ppo_cartpole if discrete else ppo_continuous_mlp


def train_ours(env_id: str, seed: int) -> float:
    """Mean return that the script prints at the end of a run."""
    command = [sys.executable, script_for(env_id).__file__, "--env-id", env_id]
    command += ["--seed", str(seed), "--log-dir", "runs/returns"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    lines = output.splitlines()
    return next(float(line.split()[2]) for line in lines if line.startswith("evaluation:"))


def train_sb3(env_id: str, seed: int) -> float:
    """Mean return of SB3's PPO under the zoo's settings, on the same episodes as ours."""
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
    model.learn(script_for(env_id).preset(env_id).total_timesteps)
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
    return float(np.mean(returns))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not RESULTS.exists():
        RESULTS.write_text("environment,who,seed,mean\n")
    with RESULTS.open(newline="") as file:
        _, *rows = csv.reader(file)
    means = {(env_id, who, int(seed)): float(mean) for env_id, who, seed, mean in rows}
    rivals = {"ours": train_ours, "SB3": train_sb3} if args.sb3 else {"ours": train_ours}
    print("| environment | steps |" + "".join(f" {who}, per seed | {who} |" for who in rivals))
    print("| --- " * (2 + 2 * len(rivals)) + "|", flush=True)
    for env_id in args.envs:
        cells = [env_id, str(script_for(env_id).preset(env_id).total_timesteps)]
        for who, train in rivals.items():
            for seed in args.seeds:
                run = (env_id, who, seed)
                if run not in means:
                    means[run] = round(train(env_id, seed), 1)
                    with RESULTS.open("a", newline="") as file:
                        csv.writer(file, lineterminator="\n").writerow([*run, means[run]])
            results = [means[env_id, who, seed] for seed in args.seeds]
            cells += [" ".join(f"{result:.1f}" for result in results), f"{np.mean(results):.1f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
