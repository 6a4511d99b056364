"""compute_gae against its defining sum, and against what can be worked out by hand."""

import pytest
import torch
from conftest import ppo_cartpole

compute_gae = ppo_cartpole.compute_gae  # the scripts' copies are equal: test_family.py


def defining_sum(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Schulman et al. 2015, eq. 16: A_t is the sum of (gamma lambda)^l delta_t+l over l, up to the
    episode's end or the rollout's."""
    num_steps, num_envs = rewards.shape
    advantages = torch.zeros_like(rewards)
    for env in range(num_envs):
        for t in range(num_steps):
            for later in range(t, num_steps):
                future = 0.0 if terminations[later, env] else gamma * next_values[later, env]
                delta = rewards[later, env] + future - values[later, env]
                advantages[t, env] += (gamma * gae_lambda) ** (later - t) * delta
                if dones[later, env]:
                    break
    return advantages


def random_rollout(num_steps, num_envs, seed, end_rate=0.2):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(num_steps, num_envs, generator=generator, dtype=torch.float64)

    def ends():
        return (torch.rand(num_steps, num_envs, generator=generator) < end_rate).double()

    rewards, values, terminations = draw(), draw(), ends()
    truncations = ends() * (1 - terminations)
    next_values = torch.cat([values[1:], draw()[:1]])
    next_values = torch.where(truncations.bool(), draw(), next_values)
    return rewards, values, next_values, terminations, terminations + truncations


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 31, 64])
@pytest.mark.parametrize("end_rate", [0.0, 0.02, 0.3, 1.0])
def test_recurrence_equals_the_defining_sum(num_steps, end_rate):
    for gamma, gae_lambda in [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)]:
        rollout = random_rollout(num_steps, 3, num_steps, end_rate)
        advantages, returns = compute_gae(*rollout, gamma, gae_lambda)
        expected = defining_sum(*rollout, gamma, gae_lambda)
        torch.testing.assert_close(advantages, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(returns, advantages + rollout[1])


def test_inputs_are_left_alone():
    rollout = random_rollout(16, 2, 0)
    copies = [tensor.clone() for tensor in rollout]
    compute_gae(*rollout, 0.99, 0.95)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(rollout, copies))


def test_single_terminal_reward():
    """n steps that pay 1 at the end, a critic that says 0: A_t = (gamma lambda)^(n - 1 - t)."""
    n, gamma, gae_lambda = 10, 0.9, 0.8
    rewards, values, next_values = torch.zeros(n, 1), torch.zeros(n, 1), torch.zeros(n, 1)
    rewards[-1] = 1
    next_values[-1] = 7  # what comes after the end counts for nothing
    advantages, _ = compute_gae(rewards, values, next_values, rewards, rewards, gamma, gae_lambda)
    expected = torch.tensor([(gamma * gae_lambda) ** (n - 1 - t) for t in range(n)])
    torch.testing.assert_close(advantages[:, 0], expected)


def test_a_time_limit_is_no_loss_where_life_goes_on():
    """Reward 1 for ever and a critic that knows it (1 / (1 - gamma)): no advantage anywhere."""
    gamma, shape = 0.99, (50, 4)
    rewards = torch.ones(shape, dtype=torch.float64)
    values, never = 100 * rewards, 0 * rewards
    dones = never.clone()
    dones[9::10] = 1
    advantages, _ = compute_gae(rewards, values, values, never, dones, gamma, 0.95)
    torch.testing.assert_close(advantages, never, rtol=0, atol=1e-11)
    advantages, _ = compute_gae(rewards, values, values, dones, dones, gamma, 0.95)
    assert (advantages[9::10] < -98).all()  # as deaths they are losses


def test_lambda_one_is_monte_carlo():
    rewards, values, _, terminations, _ = random_rollout(40, 3, 1)
    next_values = torch.cat([values[1:], values[:1]])
    terminations[-1] = 1
    inputs = rewards, values, next_values, terminations, terminations
    _, returns = compute_gae(*inputs, 0.97, 1.0)
    expected, later = torch.zeros_like(rewards), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(40)):
        later = expected[t] = rewards[t] + 0.97 * (1 - terminations[t]) * later
    torch.testing.assert_close(returns, expected)


def test_lambda_zero_is_one_step_td():
    rewards, values, next_values, terminations, _ = rollout = random_rollout(40, 3, 2)
    advantages, _ = compute_gae(*rollout, 0.97, 0.0)
    expected = rewards + 0.97 * (1 - terminations) * next_values - values
    torch.testing.assert_close(advantages, expected)
