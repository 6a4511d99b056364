"""Environments as people have them: odd observations, odd actions, odd infos, no time limit."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, ppo_cartpole, ppo_continuous_mlp, tiny_args
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

FLAT = Box(-1, 1, (3,))
MATRIX = Box(np.float32([[-2, 0]]), np.float32([[2, 1]]))


class Odd(gym.Env):
    """Episodes of 8 steps in any spaces; ends never with ``limit=None``."""

    def __init__(self, observations, actions, info=None, limit=8):
        self.observation_space, self.action_space = observations, actions
        self.info, self.limit = info or {}, limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        return self.observation_space.sample(), 1.0, self.time == self.limit, False, dict(self.info)


def trained(script, tmp_path, **kwargs):
    """Trains on Odd and returns the returns of the evaluation."""
    gym.register("Odd-v0", Odd, kwargs={"observations": FLAT, "actions": Discrete(2)} | kwargs)
    try:
        return script.train(tiny_args(script, tmp_path, env_id="Odd-v0"))[0]
    finally:
        del gym.registry["Odd-v0"]


@pytest.mark.parametrize(
    "space",
    [
        Discrete(5, start=-2),
        MultiDiscrete([3, 2]),
        MultiBinary(4),
        Tuple((Discrete(3), Box(-1, 1, (2,)))),
        Dict(joints=Box(-np.inf, np.inf, (3,)), camera=Box(0, 255, (2, 2), np.uint8)),
        Box(0, 255, (128,), np.uint8),
        Box(-1, 1, (3,), np.float64),
    ],
    ids=str,
)
def test_observations_become_vectors_of_floats(mlp_script, tmp_path, space):
    actions = Discrete(2) if mlp_script is ppo_cartpole else FLAT
    assert trained(mlp_script, tmp_path, observations=space, actions=actions).tolist() == [8, 8]


def test_an_image_is_refused(mlp_script, tmp_path):
    image = Box(0, 255, (64, 64, 3), np.uint8)
    actions = Discrete(2) if mlp_script is ppo_cartpole else FLAT
    with pytest.raises(mlp_script.InputError, match=r"must be a flat Box: .*\(64, 64, 3\)"):
        trained(mlp_script, tmp_path, observations=image, actions=actions)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "space", [MATRIX, Box(-1, 1, ()), Box(0, 1, (2, 2, 1), np.float64)], ids=str
)
def test_box_actions_have_any_shape(tmp_path, space):
    assert trained(ppo_continuous_mlp, tmp_path, actions=space).tolist() == [8, 8]


@pytest.mark.parametrize("space", [Box(-9, 9, (3,), np.int64), MultiBinary(3)], ids=str)
def test_other_actions_are_refused_before_anything_is_created(mlp_script, tmp_path, space):
    with pytest.raises(mlp_script.InputError, match="actions must be") as refused:
        trained(mlp_script, tmp_path, actions=space)
    assert str(space) in str(refused.value) and not list(tmp_path.iterdir())


def test_an_info_may_have_a_key_episode(mlp_script, tmp_path):
    actions = Discrete(2) if mlp_script is ppo_cartpole else FLAT
    trained(mlp_script, tmp_path, actions=actions, info={"episode": 3})


def test_an_evaluation_ends_where_episodes_never_do(mlp_script, tmp_path):
    """Each is cut after 10,000 steps."""
    actions = Discrete(2) if mlp_script is ppo_cartpole else FLAT
    returns = trained(mlp_script, tmp_path, actions=actions, limit=None)
    assert returns.tolist() == [10_000, 10_000]


class Exits(Odd):
    """Calls sys.exit(), as a game does whose window is closed."""

    def step(self, action):
        raise SystemExit(0)


@pytest.mark.parametrize("async_envs", [False, True])
def test_an_environment_that_exits_is_a_failure(mlp_script, tmp_path, async_envs):
    """Not a run that ended well: sys.exit() alone would end with status 0 and no word."""
    actions = Discrete(2) if mlp_script is ppo_cartpole else FLAT
    gym.register("Exits-v0", Exits, kwargs={"observations": FLAT, "actions": actions})
    args = tiny_args(mlp_script, tmp_path, env_id="Exits-v0", async_envs=async_envs)
    with pytest.raises(mlp_script.RunError, match=r"sys\.exit\(\)|process of the environments"):
        mlp_script.train(args)


ROBOT = """
import gymnasium
from gymnasium.envs.classic_control import {base} as Base
gymnasium.register("Robot-v0", entry_point=Base, max_episode_steps=10)
"""


def test_a_module_of_the_current_folder_is_found(mlp_script, tmp_path):
    """Without PYTHONPATH, though the script lies elsewhere."""
    base = "CartPoleEnv" if mlp_script is ppo_cartpole else "PendulumEnv"
    (tmp_path / "robot.py").write_text(ROBOT.format(base=base))
    flags = ["--env-id", "robot:Robot-v0", "--num-envs", "2", "--num-steps", "8"]
    flags += ["--num-minibatches", "1", "--total-timesteps", "32", "--eval-episodes", "1"]
    command = [sys.executable, str(ROOT / f"{mlp_script.__name__}.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "evaluation: mean" in done.stdout, done.stderr
