"""Learning is tested by learning: short seeded runs that must reach a return on unseen seeds."""

import torch
from conftest import ppo_carracing, ppo_cartpole, ppo_continuous_mlp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def trained_return(script, tmp_path, **changes):
    """Trains and returns the mean return of the evaluation at the end."""
    folder = script.train(script.Args(log_dir=tmp_path, cuda=False, **changes))
    return EventAccumulator(str(folder)).Reload().Scalars("eval/return_mean")[-1].value


def untrained_return(script, tmp_path, episodes):
    """The same evaluation of fresh weights."""
    args = script.Args(log_dir=tmp_path, cuda=False, eval_episodes=episodes)
    envs = script.make_envs(args, 1, training=False)
    torch.manual_seed(args.seed)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    return script.evaluate(args, agent.state_dict(), tmp_path, torch.device("cpu"))[0].mean()


def test_cartpole(tmp_path):
    assert trained_return(ppo_cartpole, tmp_path, eval_episodes=50) >= 475


def test_lunar_lander_continuous(tmp_path):
    sizes = {"total_timesteps": 65_536, "num_envs": 8, "num_steps": 256, "num_minibatches": 32}
    before = untrained_return(ppo_continuous_mlp, tmp_path, 20)
    after = trained_return(ppo_continuous_mlp, tmp_path, **sizes, eval_episodes=20)
    assert before < 0 and after > before + 120


def test_car_racing(tmp_path):
    """The start of a default run, driven by the mean: a seventh of its steps, at the rates that they have there."""
    changes = {"total_timesteps": 20_480, "anneal_lr": False, "anneal_clip": False, "eval_episodes": 10}
    assert trained_return(ppo_carracing, tmp_path, **changes) >= 200
