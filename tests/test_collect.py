"""collect() and update() on environments whose every step is known beforehand."""

import numpy as np
import pytest
import torch
from conftest import tiny_args


class Teller(torch.nn.Module):
    """An agent whose value tells what it looked at: 100 * (marked as last) + 10 * episode + time."""

    def __init__(self, agent):
        super().__init__()
        self.agent, self.sample, self.env_action = agent, agent.sample, agent.env_action

    def get_value(self, obs):
        return obs @ torch.tensor([1.0, 10.0, 100.0])

    def evaluate_actions(self, obs, actions):
        logprob, entropy, _ = self.agent.evaluate_actions(obs, actions)
        return logprob, entropy, self.get_value(obs)


def prepared(script, tmp_path, env, **changes):
    """Everything that collect() and update() take, for one of conftest's environments."""
    kind = "Box" if script.__name__ == "ppo_continuous_mlp" else ""
    args = tiny_args(script, tmp_path, env_id=f"{env}{kind}-v0", reward_scale=1.0, **changes)
    envs = script.make_envs(args, args.num_envs, training=True)
    torch.manual_seed(0)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    return args, envs, agent, script.make_rollout(args, envs, torch.device("cpu"))


def collected(script, tmp_path, env, num_steps=12, **changes):
    _, envs, agent, rollout = prepared(script, tmp_path, env, num_steps=num_steps, norm_reward=False, **changes)
    obs, episodes = script.collect(Teller(agent), envs, rollout, envs.reset(seed=1)[0])
    envs.close()
    return rollout, obs, episodes


@pytest.mark.parametrize("async_envs", [False, True])
def test_truncation_bootstraps_from_the_true_last_observation(mlp_script, tmp_path, async_envs):
    rollout, obs, episodes = collected(mlp_script, tmp_path, "Limited", async_envs=async_envs)
    times = torch.tensor([0, 1, 2, 3, 4] * 3)[:12].float()
    number = torch.tensor([0] * 5 + [1] * 5 + [2] * 2).float()
    expected = torch.stack([times, number, torch.zeros(12)], -1)
    for env in range(2):
        assert torch.equal(rollout["obs"][:, env], expected)
    last = (times == 4).float()
    for name, value in {"terminations": 0 * last, "dones": last, "rewards": torch.ones(12)}.items():
        torch.testing.assert_close(rollout[name][:, 0], value)
    # the observation that a step led to has time + 1 and the same episode; the mark shows on an episode's last one
    assert torch.equal(rollout["next_values"][:, 0], times + 1 + 10 * number + 100 * last)
    assert episodes == [(5.0, 5)] * 4
    assert obs.tolist() == [[2, 2, 0]] * 2


def test_termination_is_no_truncation(mlp_script, tmp_path):
    rollout, _, episodes = collected(mlp_script, tmp_path, "Mortal")
    last = (torch.arange(12) % 4 == 3).float()
    assert torch.equal(rollout["terminations"][:, 0], last) and torch.equal(rollout["dones"][:, 0], last)
    assert episodes == [(4.0, 4)] * 6


def test_termination_at_the_time_limit_is_a_termination(mlp_script, tmp_path):
    rollout, _, _ = collected(mlp_script, tmp_path, "Both", num_steps=5)
    assert rollout["terminations"][-1].tolist() == [1, 1] and rollout["dones"].sum() == 2


def test_truncation_on_the_last_step_of_a_rollout(mlp_script, tmp_path):
    rollout, obs, _ = collected(mlp_script, tmp_path, "Limited", num_steps=5)
    assert rollout["next_values"][-1].tolist() == [105, 105]  # not the value of the reset observation
    assert obs.tolist() == [[0, 1, 0]] * 2


def test_advantages_do_not_see_the_time_limit(mlp_script, tmp_path):
    """Reward 1 forever and a critic that knows it: with next_values from final_obs nothing is a surprise."""
    rollout, _, _ = collected(mlp_script, tmp_path, "Limited")
    constant = torch.full_like(rollout["values"], 10.0)
    inputs = (rollout["rewards"], constant, constant, rollout["terminations"], rollout["dones"])
    advantages, _ = mlp_script.compute_gae(*inputs, 0.9, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-6)


def test_reward_scaling_leaves_reported_returns_alone(mlp_script, tmp_path):
    _, envs, agent, rollout = prepared(mlp_script, tmp_path, "Limited", num_steps=40, norm_reward=True)
    _, episodes = mlp_script.collect(agent, envs, rollout, envs.reset(seed=1)[0])
    assert episodes == [(5.0, 5)] * 16
    scale = 1 / np.sqrt(envs.return_rms.var + 1e-8)
    torch.testing.assert_close(rollout["rewards"][-1], torch.full((2,), scale, dtype=torch.float32))
    assert abs(scale - 1) > 0.05
    assert rollout["rewards"].abs().max() < 2  # at the start too, when there is next to no variance yet


def test_update_starts_at_ratio_one_and_lowers_the_loss(mlp_script, tmp_path):
    sizes = {"num_steps": 64, "num_minibatches": 1, "update_epochs": 1, "norm_reward": False}
    args, envs, agent, rollout = prepared(mlp_script, tmp_path, "Mortal", **sizes)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    mlp_script.collect(agent, envs, rollout, envs.reset(seed=1)[0])
    first = mlp_script.update(agent, optimizer, rollout, args, 0.2)
    assert first["clipfrac"] == 0 and abs(first["approx_kl"]) < 1e-6 and first["grad_norm"] > 0
    losses = [mlp_script.update(agent, optimizer, rollout, args, 0.2)["value_loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * first["value_loss"]


def test_target_kl_ends_an_update(mlp_script, tmp_path):
    steps = {}
    for target_kl in (None, 1e-9):
        args, envs, agent, rollout = prepared(mlp_script, tmp_path, "Mortal", update_epochs=6, target_kl=target_kl)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        mlp_script.collect(agent, envs, rollout, envs.reset(seed=1)[0])
        mlp_script.update(agent, optimizer, rollout, args, 0.2)
        steps[target_kl] = next(iter(optimizer.state.values()))["step"].item()
    assert steps == {None: 12, 1e-9: 2}
