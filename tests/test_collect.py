"""collect() and update() on environments whose every step is known."""

import numpy as np
import pytest
import torch
from conftest import make_agent, suitable, tiny_args


class Teller(torch.nn.Module):
    """An agent whose value tells what it saw: 100 * (marked as last) + 10 * episode + time."""

    def __init__(self, agent):
        super().__init__()
        self.agent = agent
        self.sample_actions, self.env_actions = agent.sample_actions, agent.env_actions

    def get_value(self, obs):
        return obs @ torch.tensor([1.0, 10.0, 100.0])

    def evaluate_actions(self, obs, actions):
        logprob, entropy, _ = self.agent.evaluate_actions(obs, actions)
        return logprob, entropy, self.get_value(obs)


def prepared(script, tmp_path, env, **changes):
    """Settings, environments and an agent for one of conftest's clocks."""
    env_id = suitable(script, env)
    args = tiny_args(script, tmp_path, **({"env_id": env_id, "reward_scale": 1.0} | changes))
    envs = script.make_envs(args, args.num_envs, training=True)
    torch.manual_seed(0)
    return args, envs, make_agent(script, args, envs)


def collected(script, tmp_path, env, num_steps=12, **changes):
    _, envs, agent = prepared(script, tmp_path, env, norm_reward=False, **changes)
    try:
        return script.collect(Teller(agent), envs, envs.reset(seed=1)[0], num_steps)
    finally:
        envs.close()


@pytest.mark.parametrize("async_envs", [False, True])
def test_truncation_bootstraps_from_the_true_last_observation(mlp_script, tmp_path, async_envs):
    rollout, obs, episodes = collected(mlp_script, tmp_path, "Limited", async_envs=async_envs)
    times = torch.tensor([0, 1, 2, 3, 4] * 3)[:12].float()
    number = torch.tensor([0] * 5 + [1] * 5 + [2] * 2).float()
    expected = torch.stack([times, number, torch.zeros(12)], -1)
    for env in range(2):
        assert torch.equal(rollout["obs"][:, env], expected)
    last = (times == 4).float()
    values = {"terminations": 0 * last, "dones": last, "rewards": torch.ones(12)}
    for name, value in values.items():
        torch.testing.assert_close(rollout[name][:, 0], value)
    # A step led to time + 1 of the same episode; the mark shows on an episode's last observation.
    assert torch.equal(rollout["next_values"][:, 0], times + 1 + 10 * number + 100 * last)
    assert episodes == [(5.0, 5)] * 4
    assert obs.tolist() == [[2, 2, 0]] * 2


def test_termination_is_no_truncation(mlp_script, tmp_path):
    rollout, _, episodes = collected(mlp_script, tmp_path, "Mortal")
    last = (torch.arange(12) % 4 == 3).float()
    assert torch.equal(rollout["terminations"][:, 0], last)
    assert torch.equal(rollout["dones"][:, 0], last)
    assert episodes == [(4.0, 4)] * 6


def test_termination_at_the_time_limit_is_a_termination(mlp_script, tmp_path):
    rollout, _, _ = collected(mlp_script, tmp_path, "Both", num_steps=5)
    assert rollout["terminations"][-1].tolist() == [1, 1] and rollout["dones"].sum() == 2


def test_truncation_on_the_last_step_of_a_rollout(mlp_script, tmp_path):
    rollout, obs, _ = collected(mlp_script, tmp_path, "Limited", num_steps=5)
    assert rollout["next_values"][-1].tolist() == [105, 105]  # not the value of the reset
    assert obs.tolist() == [[0, 1, 0]] * 2


def test_advantages_do_not_see_the_time_limit(mlp_script, tmp_path):
    """Reward 1 for ever and a critic that knows it: with the true last values, no surprise."""
    rollout, _, _ = collected(mlp_script, tmp_path, "Limited")
    constant = torch.full_like(rollout["values"], 10.0)
    inputs = rollout["rewards"], constant, constant, rollout["terminations"], rollout["dones"]
    advantages, _ = mlp_script.compute_gae(*inputs, 0.9, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-6)


def test_a_value_of_one_column_fits_and_one_for_all_environments_does_not(mlp_script, tmp_path):
    _, envs, agent = prepared(mlp_script, tmp_path, "Mortal")
    obs, teller = envs.reset(seed=1)[0], Teller(agent)
    teller.get_value = lambda obs: agent.get_value(obs).mean()
    with pytest.raises(RuntimeError, match="shape"):
        mlp_script.collect(teller, envs, obs, 4)


def test_reward_scaling_leaves_reported_returns_alone(mlp_script, tmp_path):
    _, envs, agent = prepared(mlp_script, tmp_path, "Limited", norm_reward=True)
    rollout, _, episodes = mlp_script.collect(agent, envs, envs.reset(seed=1)[0], 40)
    assert episodes == [(5.0, 5)] * 16
    scale = 1 / np.sqrt(envs.return_rms.var + 1e-8)
    expected = torch.full((2,), scale, dtype=torch.float32)
    torch.testing.assert_close(rollout["rewards"][-1], expected)
    assert abs(scale - 1) > 0.05
    assert rollout["rewards"].abs().max() < 2  # at the start too, when variance is next to 0


def test_update_starts_at_ratio_one_and_lowers_the_loss(mlp_script, tmp_path):
    sizes = {"num_minibatches": 1, "update_epochs": 1, "norm_reward": False}
    args, envs, agent = prepared(mlp_script, tmp_path, "Mortal", **sizes)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    rollout, _, _ = mlp_script.collect(agent, envs, envs.reset(seed=1)[0], 64)
    first = mlp_script.update(agent, optimizer, rollout, 0.2, args)
    assert first["clipfrac"] == 0 and abs(first["approx_kl"]) < 1e-6 and first["grad_norm"] > 0
    for _ in range(20):
        losses = mlp_script.update(agent, optimizer, rollout, 0.2, args)
    assert losses["value_loss"] < 0.5 * first["value_loss"]


def test_an_epoch_sees_every_row_once(mlp_script, tmp_path):
    """Also rows that a copy of the script added to its rollout."""
    args, envs, agent = prepared(mlp_script, tmp_path, "Mortal", num_minibatches=4, update_epochs=1)
    rollout, _, _ = mlp_script.collect(agent, envs, envs.reset(seed=1)[0], 16)
    rollout["mine"] = torch.arange(32.0).view(16, 2)
    seen = []

    def backward_fn(agent, minibatch, clip_coef, args):
        seen.append(minibatch)
        return mlp_script.backward(agent, minibatch, clip_coef, args)

    optimizer = torch.optim.Adam(agent.parameters())
    mlp_script.update(agent, optimizer, rollout, 0.2, args, backward_fn)
    assert [len(minibatch["obs"]) for minibatch in seen] == [8] * 4
    rows = torch.cat([minibatch["mine"] for minibatch in seen])
    assert sorted(rows.tolist()) == list(range(32)) and rows.tolist() != list(range(32))


def test_target_kl_ends_an_update(mlp_script, tmp_path):
    steps = {}
    for target_kl in (None, 1e-9):
        changes = {"update_epochs": 6, "target_kl": target_kl}
        args, envs, agent = prepared(mlp_script, tmp_path, "Mortal", **changes)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        rollout, _, _ = mlp_script.collect(agent, envs, envs.reset(seed=1)[0], 8)
        mlp_script.update(agent, optimizer, rollout, 0.2, args)
        steps[target_kl] = next(iter(optimizer.state.values()))["step"].item()
    assert steps == {None: 12, 1e-9: 2}
