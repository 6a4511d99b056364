"""Learning is tested by learning: short seeded runs that must reach a return on unseen seeds."""

import pytest
import torch
from conftest import make_agent, ppo_carracing, ppo_cartpole, ppo_continuous_mlp


def trained_return(script, tmp_path, **changes):
    """Trains and returns the mean return of the evaluation at the end."""
    return script.train(script.Args(log_dir=tmp_path, cuda=False, **changes))[0].mean()


def untrained_return(script, tmp_path, episodes):
    """The same evaluation of fresh weights."""
    args = script.Args(log_dir=tmp_path, cuda=False, eval_episodes=episodes)
    envs = script.make_envs(args, 1, training=False)
    torch.manual_seed(args.seed)
    agent = make_agent(script, args, envs)
    envs.close()
    return script.evaluate(agent, args)[0].mean()


def test_cartpole(tmp_path):
    assert trained_return(ppo_cartpole, tmp_path, eval_episodes=50) >= 475


def preset_return(tmp_path, env_id, **changes):
    """The same with what PRESETS has for ``env_id``."""
    args = ppo_cartpole.preset(env_id, log_dir=tmp_path, cuda=False, **changes)
    return ppo_cartpole.train(args)[0].mean()


def test_frozen_lake(tmp_path):
    """Without slipping the goal is reached always, and soon."""
    changes = {"env_kwargs": {"is_slippery": False}, "total_timesteps": 50_000}
    assert preset_return(tmp_path, "FrozenLake-v1", **changes) == 1


@pytest.mark.slow
def test_slippery_frozen_lake(tmp_path):
    """The best policy reaches the goal in 74 of 100 episodes in the long run."""
    assert preset_return(tmp_path, "FrozenLake-v1", eval_episodes=1000) >= 0.7


@pytest.mark.slow
def test_cliff_walking(tmp_path):
    """The shortest path, along the edge, has 13 steps."""
    assert preset_return(tmp_path, "CliffWalking-v1") == -13


@pytest.mark.slow
def test_taxi(tmp_path):
    """With action masks; the shortest ways give 8.0 on these episodes."""
    assert preset_return(tmp_path, "Taxi-v4") >= 7.5


def test_lunar_lander_continuous(tmp_path):
    sizes = {"total_timesteps": 65_536, "num_envs": 8, "num_steps": 256, "num_minibatches": 32}
    before = untrained_return(ppo_continuous_mlp, tmp_path, 20)
    after = trained_return(ppo_continuous_mlp, tmp_path, **sizes, eval_episodes=20)
    assert before < 0 and after > before + 120


def test_car_racing(tmp_path):
    """A default run's first twelfth, at the rates that it has there, driven without noise."""
    rates = {"total_timesteps": 20_480, "anneal_lr": False, "anneal_clip": False}
    assert trained_return(ppo_carracing, tmp_path, **rates, eval_episodes=10) >= 200
