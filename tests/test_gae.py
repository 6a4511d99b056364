"""compute_gae against the plain loop, and against what can be worked out by hand."""

import pytest
import torch
from conftest import ppo_cartpole

compute_gae = ppo_cartpole.compute_gae  # the scripts' copies are equal: test_family.py


def loop_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """The definition, one step at a time from the end."""
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (1 - terminations[t]) * next_values[t] - values[t]
        later = advantages[t] = delta + gamma * gae_lambda * (1 - dones[t]) * later
    return advantages


def random_rollout(num_steps, num_envs, seed, end_rate=0.2):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(num_steps, num_envs, generator=generator, dtype=torch.float64)

    rewards, values = draw(), draw()
    terminations = (torch.rand(num_steps, num_envs, generator=generator) < end_rate).double()
    truncations = (torch.rand(num_steps, num_envs, generator=generator) < end_rate).double() * (1 - terminations)
    next_values = torch.cat([values[1:], draw()[:1]])
    next_values = torch.where(truncations.bool(), draw(), next_values)
    return rewards, values, next_values, terminations, terminations + truncations


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 8, 9, 31, 64, 100, 129, 1000])
@pytest.mark.parametrize("end_rate", [0.0, 0.02, 0.3, 1.0])
def test_scan_equals_loop(num_steps, end_rate):
    for seed in range(5):
        rollout = random_rollout(num_steps, 3, seed, end_rate)
        for gamma, gae_lambda in [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)]:
            advantages, returns = compute_gae(*rollout, gamma, gae_lambda)
            torch.testing.assert_close(advantages, loop_gae(*rollout, gamma, gae_lambda), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(returns, advantages + rollout[1])


def test_scan_leaves_its_inputs_alone():
    rollout = random_rollout(16, 2, 0)
    copies = [tensor.clone() for tensor in rollout]
    compute_gae(*rollout, 0.99, 0.95)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(rollout, copies))


def test_single_terminal_reward():
    """An episode of n steps that pays 1 at its end, a critic that says 0: A_t = (gamma lambda)^(n - 1 - t)."""
    n, gamma, gae_lambda = 10, 0.9, 0.8
    rewards, values, next_values = torch.zeros(n, 1), torch.zeros(n, 1), torch.zeros(n, 1)
    rewards[-1] = 1
    next_values[-1] = 7  # what comes after the end counts for nothing
    advantages, _ = compute_gae(rewards, values, next_values, rewards, rewards, gamma, gae_lambda)
    torch.testing.assert_close(advantages[:, 0], torch.tensor([(gamma * gae_lambda) ** (n - 1 - t) for t in range(n)]))


def test_truncation_is_invisible_where_life_goes_on():
    """Constant reward forever, a critic that knows it (1 / (1 - gamma)): no advantage anywhere, cut off or not."""
    gamma, shape = 0.99, (50, 4)
    rewards, values = torch.ones(shape, dtype=torch.float64), torch.full(shape, 100.0, dtype=torch.float64)
    never = torch.zeros(shape, dtype=torch.float64)
    dones = never.clone()
    dones[9::10] = 1
    advantages, _ = compute_gae(rewards, values, values, never, dones, gamma, 0.95)
    torch.testing.assert_close(advantages, never, rtol=0, atol=1e-11)
    advantages, _ = compute_gae(rewards, values, values, dones, dones, gamma, 0.95)  # as deaths they are losses
    assert (advantages[9::10] < -98).all()


def test_lambda_one_is_monte_carlo():
    rewards, values, _, terminations, _ = random_rollout(40, 3, 1)
    next_values = torch.cat([values[1:], values[:1]])
    terminations[-1] = 1
    _, returns = compute_gae(rewards, values, next_values, terminations, terminations, 0.97, 1.0)
    expected, later = torch.zeros_like(rewards), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(40)):
        later = expected[t] = rewards[t] + 0.97 * (1 - terminations[t]) * later
    torch.testing.assert_close(returns, expected)


def test_lambda_zero_is_one_step_td():
    rewards, values, next_values, terminations, _ = rollout = random_rollout(40, 3, 2)
    advantages, _ = compute_gae(*rollout, 0.97, 0.0)
    torch.testing.assert_close(advantages, rewards + 0.97 * (1 - terminations) * next_values - values)
