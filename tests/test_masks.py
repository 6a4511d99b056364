"""Action masks of ppo_cartpole.py: what info["action_mask"] forbids is never done nor learned."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ppo_cartpole as script
from conftest import tiny_args


class Gates(gym.Env):
    """Six actions of which each observation allows a random part; another one is an error."""

    def __init__(self, dtype=np.float32):
        self.observation_space = gym.spaces.Box(0, 9, (3,), dtype)
        self.action_space = gym.spaces.Discrete(6)

    def look(self):
        self.mask = self.np_random.integers(0, 2, 6).astype(np.int8)
        self.mask[self.np_random.integers(6)] = 1
        obs = self.np_random.integers(0, 9, 3).astype(self.observation_space.dtype)
        return obs, {"action_mask": self.mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.look()

    def step(self, action):
        if not self.mask[action]:
            raise AssertionError(f"action {action} of {self.mask}")
        self.time += 1
        obs, info = self.look()
        return obs, 1.0, False, self.time == 8, info


gym.register("Gates-v0", Gates, disable_env_checker=True)


def gates_args(tmp_path, **changes):
    return tiny_args(script, tmp_path, **({"env_id": "Gates-v0"} | changes))


@pytest.mark.parametrize("changes", [{}, {"async_envs": True}, {"norm_obs": True}], ids=str)
def test_a_masked_action_is_never_sent(tmp_path, changes):
    """Not in collecting and not in evaluation: the environment would raise."""
    returns, _ = script.train(gates_args(tmp_path, total_timesteps=512, **changes))
    assert returns.tolist() == [8, 8]


def test_without_masks_it_is_sent(tmp_path):
    with pytest.raises(AssertionError, match="action"):
        script.train(gates_args(tmp_path, total_timesteps=512, action_masks=False))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
def test_the_mask_stands_behind_the_observation(tmp_path, dtype):
    gates = gym.make("Gates-v0", dtype=dtype)
    env = script.make_env(gates_args(tmp_path, env_kwargs={"dtype": dtype}), training=True)
    expected, info = gates.reset(seed=5)
    obs, _ = env.reset(seed=5)
    for _ in range(5):
        assert obs.dtype == dtype and env.observation_space.contains(obs)
        assert obs.tolist() == [*expected, *info["action_mask"]]
        action = int(info["action_mask"].argmax())
        expected, *_, info = gates.step(action)
        obs, *_ = env.step(action)


@pytest.fixture(params=[False, True], ids=["plain", "norm_obs"])
def masked(request, tmp_path):
    """An agent, observations without their masks, and the masks."""
    args = gates_args(tmp_path, norm_obs=request.param)
    env = script.make_env(args, training=True)
    torch.manual_seed(0)
    agent = script.Agent(env.observation_space, env.action_space, args)
    for parameter in agent.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    obs = 9 * torch.rand(64, 3)
    masks = torch.rand(64, 6) < 0.5
    masks[torch.arange(64), torch.randint(6, (64,))] = True
    masks[:, 4] = False  # one action that is never valid
    masks[:, 5] = True
    return agent, obs, masks


def test_probabilities_are_those_of_the_valid_actions(masked):
    agent, obs, masks = masked
    everything = torch.cat([obs, torch.ones(64, 6)], 1)
    probs = agent.get_logits(everything).softmax(-1) * masks
    expected = probs / probs.sum(-1, keepdim=True)
    seen = torch.cat([obs, masks.float()], 1)
    new = agent.get_logits(seen).softmax(-1)
    torch.testing.assert_close(new, expected)
    assert (new[~masks] == 0).all()
    for actions in (agent.sample_actions(seen.repeat(50, 1)), agent.best_actions(seen)):
        rows = torch.arange(len(actions)) % 64
        assert masks[rows, actions].all()
    policy = torch.distributions.Categorical(probs=expected)
    actions = policy.sample()
    logprob, entropy, value = agent.evaluate_actions(seen, actions)
    torch.testing.assert_close(logprob, policy.log_prob(actions))
    torch.testing.assert_close(entropy, policy.entropy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, agent.get_value(everything))  # which sees no mask


def test_masked_actions_have_no_gradient(masked):
    agent, obs, masks = masked
    seen = torch.cat([obs, masks.float()], 1)
    logprob, entropy, _ = agent.evaluate_actions(seen, agent.sample_actions(seen))
    (logprob + entropy).sum().backward()
    gradient = agent.actor.weight.grad
    assert (gradient[4] == 0).all() and gradient.isfinite().all()
    assert all((gradient[action] != 0).any() for action in (0, 1, 2, 3, 5))


def test_an_environment_without_masks_is_left_as_it_is(tmp_path):
    env = script.make_env(tiny_args(script, tmp_path), training=True)
    assert env.observation_space.shape == (4,)
