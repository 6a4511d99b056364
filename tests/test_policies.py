"""The three policies against torch.distributions, and what they promise of observations and
actions."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS

BOX = gym.spaces.Box(-1, 1, (5,), np.float32)
PIXELS = gym.spaces.Box(0, 255, (4, 48, 48), np.uint8)
SPACES = {
    "ppo_cartpole": (BOX, gym.spaces.Discrete(3)),
    "ppo_carracing": (PIXELS, gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 1]))),
    "ppo_continuous_mlp": (BOX, gym.spaces.Box(-0.5, 0.5, (2,), np.float32)),
}


def make_agent(name, seed=0, **changes):
    torch.manual_seed(seed)
    agent = SCRIPTS[name].Agent(*SPACES[name], SCRIPTS[name].Args(**changes))
    for parameter in agent.parameters():  # heads start near zero, where a policy has no shape
        parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def some_obs(name, batch=64):
    space = SPACES[name][0]
    space.seed(0)
    return torch.from_numpy(np.stack([space.sample() for _ in range(batch)]))


def distribution(name, agent, obs):
    """The policy as torch.distributions has it."""
    if name == "ppo_cartpole":
        return torch.distributions.Categorical(logits=agent.get_logits(obs))
    if name == "ppo_carracing":
        policy = agent.get_policy(agent.get_features(obs))
        policy = torch.distributions.Beta(policy.concentration1, policy.concentration0)
    else:
        policy = torch.distributions.Normal(agent.get_mean(obs), agent.actor_logstd.exp())
    return torch.distributions.Independent(policy, 1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_logprob_and_entropy(name):
    agent, obs = make_agent(name), some_obs(name)
    action = agent.sample_actions(obs)
    logprob, entropy, value = agent(obs, action)
    policy = distribution(name, agent, obs)
    torch.testing.assert_close(logprob, policy.log_prob(action), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, policy.entropy(), rtol=1e-4, atol=1e-5)
    assert logprob.shape == entropy.shape == value.shape == (64,)
    torch.testing.assert_close(value, agent.get_value(obs))


@pytest.mark.parametrize("name", SCRIPTS)
def test_samples_follow_the_distribution(name):
    """Mean and variance of many samples at one observation, within 5 standard errors."""
    agent, n = make_agent(name), 4000
    obs = some_obs(name, 1).expand(n, *SPACES[name][0].shape)
    with torch.no_grad():
        action = agent.sample_actions(obs).float()
        policy = distribution(name, agent, obs[:1])
    if name == "ppo_cartpole":
        frequency = torch.stack([(action == k).float().mean() for k in range(3)])
        torch.testing.assert_close(frequency, policy.probs[0], rtol=0, atol=5 * 0.5 / n**0.5)
    else:
        mean, std = policy.mean[0], policy.variance[0].sqrt()
        assert ((action.mean(0) - mean).abs() < 5 * std / n**0.5).all()
        torch.testing.assert_close(action.std(0), std, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_samples_have_the_probabilities_that_the_loss_sees(name):
    """Entropy is the mean of -log p over samples only if both are of one distribution: a policy
    that sampling and evaluate_actions() don't share would differ here, and nowhere else."""
    agent, n = make_agent(name), 20_000 if name != "ppo_carracing" else 4000
    obs = some_obs(name, 1).expand(n, *SPACES[name][0].shape)
    with torch.no_grad():
        logprob, entropy, _ = agent.evaluate_actions(obs, agent.sample_actions(obs))
    assert (-logprob.mean() - entropy.mean()).abs() < 5 * logprob.std() / n**0.5


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluation_plays_without_noise_and_within_the_space(name):
    agent, obs = make_agent(name), some_obs(name)
    action = agent.best_actions(obs)
    assert torch.equal(action, agent.best_actions(obs))
    policy = distribution(name, agent, obs)
    expected = policy.probs.argmax(-1) if name == "ppo_cartpole" else policy.mean
    torch.testing.assert_close(action, expected)
    for actions in (action, agent.sample_actions(obs)):
        taken = agent.env_actions(actions.detach())
        assert all(SPACES[name][1].contains(one) for one in taken)


@pytest.mark.parametrize("name", SCRIPTS)
def test_observations_may_have_any_dtype(name):
    agent, obs = make_agent(name), some_obs(name)
    if name == "ppo_carracing":
        assert obs.dtype == torch.uint8
        torch.testing.assert_close(agent.get_value(obs.float()), agent.get_value(obs))
    else:
        whole = (100 * obs).round()
        for dtype in (torch.float64, torch.int64, torch.int8):
            torch.testing.assert_close(agent.get_value(whole.to(dtype)), agent.get_value(whole))


def test_in_a_mirror_the_driver_steers_the_other_way():
    """And nothing else differs: the lever, the value, how sure the policy is."""
    agent, obs = make_agent("ppo_carracing"), some_obs("ppo_carracing")
    seen = agent.get_policy(agent.get_features(obs))
    mirrored = agent.get_policy(agent.get_features(obs.flip(-1)))
    torch.testing.assert_close(mirrored.mean[:, 0], 1 - seen.mean[:, 0])
    assert (seen.mean[:, 0] - 0.5).abs().max() > 0.01
    torch.testing.assert_close(mirrored.mean[:, 1], seen.mean[:, 1])
    torch.testing.assert_close(mirrored.entropy(), seen.entropy())
    torch.testing.assert_close(agent.get_value(obs.flip(-1)), agent.get_value(obs))


def test_normal_clips_for_the_environment_only():
    agent, obs = make_agent("ppo_continuous_mlp"), some_obs("ppo_continuous_mlp")
    action = agent.sample_actions(obs)
    logprob = agent.evaluate_actions(obs, action)[0]
    outside = (action.abs() > 1).any(-1)
    assert outside.any()
    expected = distribution("ppo_continuous_mlp", agent, obs).log_prob(action)
    torch.testing.assert_close(logprob[outside], expected[outside], rtol=1e-4, atol=1e-5)


def test_normal_acts_in_units_of_the_box():
    script = SCRIPTS["ppo_continuous_mlp"]
    space = gym.spaces.Box(np.float32([2, -np.inf]), np.float32([10, np.inf]))
    agent = script.Agent(BOX, space, script.Args(log_std_init=-1.0, hidden_size=8))
    actions = torch.tensor([[-1, -1], [0, 0], [0.5, 7], [1, 1], [3, 300], [-3, -3]])
    expected = [[2, -1], [6, 0], [8, 7], [10, 1], [10, 300], [2, -3]]
    assert agent.env_actions(actions).tolist() == expected
    assert agent.env_actions(actions).dtype == np.float32
    assert agent.actor_logstd.tolist() == [-1, -1] and agent.critic[-1].in_features == 8


def test_beta_survives_the_edge_of_its_interval():
    agent, obs = make_agent("ppo_carracing"), some_obs("ppo_carracing")
    agent.actor.bias.data[:2] = 20.0  # alpha = e^20: float32 can't tell its peak from 1
    action = agent.sample_actions(obs)
    logprob = agent.evaluate_actions(obs, action)[0]
    assert action.max() == pytest.approx(1 - 1e-6, abs=1e-7) and logprob.isfinite().all()
    policy = agent.get_policy(agent.get_features(obs))
    assert min(policy.concentration1.min(), policy.concentration0.min()) >= 1  # a single peak


def test_discrete_actions_may_start_anywhere():
    script = SCRIPTS["ppo_cartpole"]
    agent = script.Agent(BOX, gym.spaces.Discrete(3, start=-1), script.Args())
    assert agent.env_actions(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]


def test_share_backbone():
    shared, separate = make_agent("ppo_cartpole", share_backbone=True), make_agent("ppo_cartpole")
    assert shared.actor_trunk is shared.critic_trunk
    assert separate.actor_trunk is not separate.critic_trunk

    def size(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert size(separate) - size(shared) == size(shared.actor_trunk)


@pytest.mark.parametrize("name", SCRIPTS)
def test_initialisation(name):
    """Orthogonal layers of gain sqrt(2), an almost constant policy, no bias (Huang et al. 2022,
    detail 2)."""
    torch.manual_seed(0)
    agent = SCRIPTS[name].Agent(*SPACES[name], SCRIPTS[name].Args())
    layers = [m for m in agent.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(layers) >= 6
    for layer in layers:
        weight = layer.weight.flatten(1)
        weight = weight if len(weight) <= weight.shape[1] else weight.T
        gram = weight @ weight.T
        gain = gram.diagonal().mean()
        torch.testing.assert_close(gram, gain * torch.eye(len(gram)), rtol=0, atol=1e-5)
        assert any(gain.item() == pytest.approx(g) for g in (2.0, 1.0, 1e-4))
        assert (layer.bias == 0).all()


def test_wrong_spaces_are_refused():
    """With the space that was found, and the script that would take the actions."""
    for name, right_script in [
        ("ppo_cartpole", "ppo_continuous_mlp"),
        ("ppo_continuous_mlp", "ppo_cartpole"),
    ]:
        script = SCRIPTS[name]
        with pytest.raises(script.InputError, match=right_script):
            script.Agent(*SPACES[right_script], script.Args())
        with pytest.raises(script.InputError, match=r"vectors.*\(4, 48, 48\)"):
            script.Agent(PIXELS, SPACES[name][1], script.Args())


def test_running_norm_is_the_mean_and_variance_of_all_it_saw(mlp_script):
    torch.manual_seed(0)
    norm = mlp_script.RunningNorm((3,))
    chunks = [5 + 3 * torch.randn(steps, 4, 3) for steps in (1, 7, 50)]
    for chunk in chunks:
        norm.update(chunk)
    seen = torch.cat([chunk.reshape(-1, 3) for chunk in chunks])
    torch.testing.assert_close(norm.mean, seen.mean(0))
    torch.testing.assert_close(norm.var, seen.var(0, correction=0))
    assert norm.count == len(seen)
    normed = norm(seen)
    torch.testing.assert_close(normed.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.std(0, correction=0), torch.ones(3))
    assert norm(torch.full((1, 3), 1e9)).max() == 10
    assert norm.state_dict().keys() == {"mean", "var", "count"}
