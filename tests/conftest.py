"""What several tests need: the scripts as modules, and environments whose every step is known beforehand."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ppo_carracing  # noqa: E402
import ppo_cartpole  # noqa: E402
import ppo_continuous_mlp  # noqa: E402

SCRIPTS = {"ppo_cartpole": ppo_cartpole, "ppo_carracing": ppo_carracing, "ppo_continuous_mlp": ppo_continuous_mlp}


class Clock(gym.Env):
    """Shows [steps since reset, number of the episode, 0], pays 1 a step, and marks an episode's last observation.

    It terminates after ``life`` steps; a time limit, where it is registered with one, may come first.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, life=10**9, limit=10**9, discrete=True, render_mode=None):
        self.action_space = gym.spaces.Discrete(2) if discrete else gym.spaces.Box(-0.5, 0.5, (2,), np.float32)
        self.life, self.limit, self.episode, self.render_mode = life, limit, -1, render_mode
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return np.array([0, self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        terminated, truncated = self.time >= self.life, self.time >= self.limit
        obs = np.array([self.time, self.episode, terminated or truncated], np.float32)
        return obs, 1.0, terminated, truncated, {}


for name, kwargs in {"Limited": {"limit": 5}, "Mortal": {"life": 4}, "Both": {"life": 5, "limit": 5}}.items():
    gym.register(f"{name}-v0", entry_point=Clock, kwargs=kwargs, disable_env_checker=True)
    gym.register(f"{name}Box-v0", entry_point=Clock, kwargs=kwargs | {"discrete": False}, disable_env_checker=True)


@pytest.fixture(params=SCRIPTS, scope="session")
def script(request):
    """Each script in turn."""
    return SCRIPTS[request.param]


@pytest.fixture(params=["ppo_cartpole", "ppo_continuous_mlp"], scope="session")
def mlp_script(request):
    """Each script that learns from vectors in turn."""
    return SCRIPTS[request.param]


def tiny_args(script, tmp_path, **changes):
    """Settings under which a script trains within a second or two."""
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 64}
    places = {"log_dir": tmp_path / "runs", "eval_episodes": 2, "cuda": False, "checkpoint_interval": 1}
    return script.Args(**(sizes | places | changes))
