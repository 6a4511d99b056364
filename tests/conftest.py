"""What several tests need: the scripts as modules, environments whose every step is known."""

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

MODULES = (ppo_cartpole, ppo_carracing, ppo_continuous_mlp)
SCRIPTS = {module.__name__: module for module in MODULES}


class Clock(gym.Env):
    """Shows [steps since reset, number of the episode, 0], pays 1 a step, and marks an episode's
    last observation. It terminates after ``life`` steps and is truncated after ``limit``."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, life=10**9, limit=10**9, discrete=True, render_mode=None):
        box = gym.spaces.Box(-0.5, 0.5, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2) if discrete else box
        self.life, self.limit, self.episode, self.render_mode = life, limit, -1, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.episode = 0 if seed is not None else self.episode + 1
        return np.array([0, self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        terminated, truncated = self.time >= self.life, self.time >= self.limit
        obs = np.array([self.time, self.episode, terminated or truncated], np.float32)
        return obs, 1.0, terminated, truncated, {}


def register(name, entry_point, **kwargs):
    """Registers a clock with Discrete actions as NAME-v0 and one with a Box as NAMEBox-v0."""
    for suffix, discrete in (("", True), ("Box", False)):
        options = kwargs | {"discrete": discrete}
        gym.register(f"{name}{suffix}-v0", entry_point, kwargs=options, disable_env_checker=True)


register("Limited", Clock, limit=5)
register("Mortal", Clock, life=4)
register("Both", Clock, life=5, limit=5)
register("Long", Clock, limit=200)


@pytest.fixture(params=SCRIPTS, scope="session")
def script(request):
    """Each script in turn."""
    return SCRIPTS[request.param]


@pytest.fixture(params=["ppo_cartpole", "ppo_continuous_mlp"], scope="session")
def mlp_script(request):
    """Each script that learns from vectors in turn."""
    return SCRIPTS[request.param]


def suitable(script, name):
    """The id of a clock with the actions that ``script`` learns."""
    return f"{name}{'' if script.__name__ == 'ppo_cartpole' else 'Box'}-v0"


def tiny_args(script, tmp_path, **changes):
    """Settings under which a script trains within a second or two."""
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2}
    call = {"total_timesteps": 64, "log_dir": tmp_path / "runs", "eval_episodes": 2, "cuda": False}
    return script.Args(**(sizes | call | {"checkpoint_interval": 1} | changes))


def make_agent(script, args, envs):
    return script.Agent(envs.single_observation_space, envs.single_action_space, args)
