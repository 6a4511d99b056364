"""ppo_loss: its gradients, its statistics, the shapes that it insists on."""

import pytest
import torch
from conftest import ppo_cartpole
from torch import nn


class Fixed(nn.Module):
    """An agent whose answers are given: (log-probability, entropy, value)."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = answers

    def forward(self, obs, actions):
        return self.answers


def batch(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("new_logprob", "logprobs", "advantages", "entropy", "new_value", "values", "returns")
    draw = torch.randn(len(names), n, generator=generator, dtype=torch.float64)
    return dict(zip(names, draw))


def zeros(n=1):
    return {name: torch.zeros(n, dtype=torch.float64) for name in batch()}


def loss_of(tensors, clip_coef=0.2, **settings):
    """ppo_loss of an agent that answers what ``tensors`` says."""
    agent = Fixed(tensors["new_logprob"], tensors["entropy"], tensors["new_value"])
    args = ppo_cartpole.Args(**({"vf_coef": 0.0, "ent_coef": 0.0, "norm_adv": False} | settings))
    minibatch = {"obs": None, "actions": None, **tensors}
    return ppo_cartpole.ppo_loss(agent, minibatch, torch.tensor(clip_coef).double(), args)


def policy_gradient(ratio, advantage):
    """d loss / d new_logprob for one sample at the given probability ratio."""
    one = zeros()
    one["advantages"] += advantage
    one["new_logprob"] = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss_of(one)[0].backward()
    return one["new_logprob"].grad.item()


@pytest.mark.parametrize("ratio, advantage", [(1.3, 2.0), (1.21, 0.1), (0.7, -2.0), (0.79, -0.1)])
def test_gradient_is_zero_where_the_clip_binds(ratio, advantage):
    assert policy_gradient(ratio, advantage) == 0


@pytest.mark.parametrize(
    "ratio, advantage", [(1.3, -2.0), (0.7, 2.0), (1.1, 2.0), (0.9, -1.0), (1.0, 3.0)]
)
def test_gradient_is_there_on_the_other_side(ratio, advantage):
    """The clip is pessimistic: what made things worse can be undone from anywhere."""
    assert policy_gradient(ratio, advantage) == pytest.approx(-ratio * advantage)


def test_ratio_one_is_the_plain_policy_gradient():
    tensors = batch()
    tensors["new_logprob"] = tensors["logprobs"].clone().requires_grad_()
    loss_of(tensors)[0].backward()
    torch.testing.assert_close(tensors["new_logprob"].grad, -tensors["advantages"] / 64)


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_gradcheck(clip_vloss):
    tensors = batch()
    # Log-ratios of a standard deviation of 0.3 lie on both sides of the clip.
    tensors["new_logprob"] = tensors["logprobs"] + 0.3 * tensors["new_logprob"]
    inputs = [tensors[name].requires_grad_() for name in ("new_logprob", "entropy", "new_value")]

    def loss(new_logprob, entropy, new_value):
        new = {"new_logprob": new_logprob, "entropy": entropy, "new_value": new_value}
        settings = {"vf_coef": 0.5, "ent_coef": 0.01, "clip_vloss": clip_vloss}
        return loss_of(tensors | new, **settings)[0]

    assert torch.autograd.gradcheck(loss, inputs)


def test_advantages_are_normalised_in_each_minibatch():
    """But not a single one, which has no deviation."""
    tensors = batch()
    advantages = 5 * tensors["advantages"] + 3
    expected = (advantages - advantages.mean()) / advantages.std()
    loss, _ = loss_of(tensors | {"advantages": advantages}, norm_adv=True)
    torch.testing.assert_close(loss, loss_of(tensors | {"advantages": expected})[0])
    one = {name: tensor[:1] for name, tensor in tensors.items()}
    torch.testing.assert_close(loss_of(one, norm_adv=True)[0], loss_of(one)[0])


def test_terms_add_up():
    tensors = batch()
    loss, stats = loss_of(tensors, vf_coef=0.7, ent_coef=0.3)
    expected = stats["policy_loss"] + 0.7 * stats["value_loss"] - 0.3 * stats["entropy"]
    torch.testing.assert_close(loss, expected)
    squares = (tensors["new_value"] - tensors["returns"]) ** 2
    torch.testing.assert_close(stats["value_loss"], 0.5 * squares.mean())
    torch.testing.assert_close(stats["entropy"], tensors["entropy"].mean())


def test_statistics_against_numbers():
    """Four samples at ratios 1, 1.1, 1.5 and 0.5, worked out by hand."""
    ratio = torch.tensor([1.0, 1.1, 1.5, 0.5], dtype=torch.float64)
    _, stats = loss_of(zeros(4) | {"new_logprob": ratio.log()})
    assert stats["old_approx_kl"].item() == pytest.approx(-ratio.log().mean().item())
    assert stats["approx_kl"].item() == pytest.approx(((ratio - 1) - ratio.log()).mean().item())
    assert stats["clipfrac"] == 0.5


def test_approx_kl_estimates_the_kl():
    """Over many samples of the old policy it meets the divergence of two known distributions."""
    torch.manual_seed(0)
    old = torch.distributions.Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    new = torch.distributions.Categorical(torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64))
    sample = old.sample((200_000,))
    logprobs = {"new_logprob": new.log_prob(sample), "logprobs": old.log_prob(sample)}
    _, stats = loss_of(zeros(200_000) | logprobs)
    kl = torch.distributions.kl_divergence(old, new).item()
    assert stats["approx_kl"].item() == pytest.approx(kl, rel=0.02)


def test_value_clipping_is_pessimistic_and_stops_large_moves():
    tensors = zeros() | {"new_value": torch.tensor([1.0], dtype=torch.float64, requires_grad=True)}
    tensors["returns"] = torch.tensor([2.0], dtype=torch.float64)
    _, plain = loss_of(tensors, vf_coef=1.0)
    loss, clipped = loss_of(tensors, vf_coef=1.0, clip_vloss=True)
    assert plain["value_loss"].item() == pytest.approx(0.5)
    assert clipped["value_loss"].item() == pytest.approx(0.5 * 1.8**2)  # as if moved by 0.2 only
    loss.backward()
    assert tensors["new_value"].grad.item() == 0


@pytest.mark.parametrize("name", ["new_logprob", "entropy", "new_value"])
@pytest.mark.parametrize("wrong", [lambda x: x[:, None], lambda x: x.mean()])
def test_shapes_that_would_broadcast_are_refused(name, wrong):
    """A value of [batch, 1] or an entropy summed over the batch would train without a word."""
    tensors = batch()
    with pytest.raises(AssertionError):
        loss_of(tensors | {name: wrong(tensors[name])})
