"""ppo_loss: its gradients, its statistics, and the schedules."""

import pytest
import torch
from conftest import ppo_cartpole

ppo_loss, anneal = ppo_cartpole.ppo_loss, ppo_cartpole.anneal


def batch(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, generator=generator, dtype=torch.float64)  # noqa: E731
    names = ("new_logprob", "logprob", "advantages", "entropy", "new_value", "value", "returns")
    return {name: draw() for name in names}


def loss_of(tensors, clip_coef=0.2, vf_coef=0.0, ent_coef=0.0, clip_vloss=False):
    return ppo_loss(**tensors, clip_coef=clip_coef, vf_coef=vf_coef, ent_coef=ent_coef, clip_vloss=clip_vloss)


def policy_gradient(ratio, advantage):
    """d loss / d new_logprob for one sample at the given probability ratio."""
    one = {name: torch.zeros(1, dtype=torch.float64) for name in batch()}
    one["advantages"] += advantage
    one["new_logprob"] = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss_of(one)[0].backward()
    return one["new_logprob"].grad.item()


@pytest.mark.parametrize("ratio, advantage", [(1.3, 2.0), (1.21, 0.1), (0.7, -2.0), (0.79, -0.1)])
def test_gradient_is_zero_where_the_clip_binds(ratio, advantage):
    assert policy_gradient(ratio, advantage) == 0


@pytest.mark.parametrize("ratio, advantage", [(1.3, -2.0), (0.7, 2.0), (1.1, 2.0), (0.9, -1.0), (1.0, 3.0)])
def test_gradient_is_there_on_the_other_side(ratio, advantage):
    """The clip is pessimistic: what made things worse must be undone from anywhere."""
    assert policy_gradient(ratio, advantage) == pytest.approx(-ratio * advantage)


def test_ratio_one_is_the_plain_policy_gradient():
    tensors = batch()
    tensors["new_logprob"] = tensors["logprob"].clone().requires_grad_()
    loss_of(tensors)[0].backward()
    torch.testing.assert_close(tensors["new_logprob"].grad, -tensors["advantages"] / 64)


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_gradcheck(clip_vloss):
    tensors = batch()
    tensors["new_logprob"] = tensors["logprob"] + 0.3 * tensors["new_logprob"]  # on both sides of the clip
    inputs = [tensors[name].requires_grad_() for name in ("new_logprob", "entropy", "new_value")]

    def loss(new_logprob, entropy, new_value):
        changed = tensors | {"new_logprob": new_logprob, "entropy": entropy, "new_value": new_value}
        return loss_of(changed, vf_coef=0.5, ent_coef=0.01, clip_vloss=clip_vloss)[0]

    assert torch.autograd.gradcheck(loss, inputs)


def test_terms_add_up():
    tensors = batch()
    loss, stats = loss_of(tensors, vf_coef=0.7, ent_coef=0.3)
    torch.testing.assert_close(loss, stats["policy_loss"] + 0.7 * stats["value_loss"] - 0.3 * stats["entropy"])
    torch.testing.assert_close(stats["value_loss"], 0.5 * ((tensors["new_value"] - tensors["returns"]) ** 2).mean())
    torch.testing.assert_close(stats["entropy"], tensors["entropy"].mean())


def test_statistics_against_numbers():
    """Four samples at ratios 1, 1.1, 1.5 and 0.5, worked out by hand."""
    ratio = torch.tensor([1.0, 1.1, 1.5, 0.5], dtype=torch.float64)
    tensors = {name: torch.zeros(4, dtype=torch.float64) for name in batch()} | {"new_logprob": ratio.log()}
    stats = loss_of(tensors)[1]
    assert stats["old_approx_kl"].item() == pytest.approx(-ratio.log().mean().item())
    assert stats["approx_kl"].item() == pytest.approx(((ratio - 1) - ratio.log()).mean().item())
    assert stats["clipfrac"] == 0.5


def test_approx_kl_estimates_the_kl():
    """Over many samples of the old policy the estimate meets the divergence of two known distributions."""
    torch.manual_seed(0)
    old = torch.distributions.Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    new = torch.distributions.Categorical(torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64))
    sample = old.sample((200_000,))
    tensors = {name: torch.zeros(200_000, dtype=torch.float64) for name in batch()}
    tensors |= {"new_logprob": new.log_prob(sample), "logprob": old.log_prob(sample)}
    kl = torch.distributions.kl_divergence(old, new).item()
    assert loss_of(tensors)[1]["approx_kl"].item() == pytest.approx(kl, rel=0.02)


def test_value_clipping_is_pessimistic_and_stops_large_moves():
    zeros = {name: torch.zeros(1, dtype=torch.float64) for name in batch()}
    moved = zeros | {"new_value": torch.tensor([1.0], dtype=torch.float64, requires_grad=True)}
    moved["returns"] = torch.tensor([2.0], dtype=torch.float64)
    plain, clipped = (loss_of(moved, vf_coef=1.0, clip_vloss=clip)[1]["value_loss"].item() for clip in (False, True))
    assert plain == pytest.approx(0.5)
    assert clipped == pytest.approx(0.5 * 1.8**2)  # as if the value had moved by 0.2 only
    loss_of(moved, vf_coef=1.0, clip_vloss=True)[0].backward()
    assert moved["new_value"].grad.item() == 0


def test_anneal_at_both_ends():
    assert anneal(3e-4, 0.0) == 3e-4
    assert anneal(0.2, 0.5) == pytest.approx(0.1)
    assert anneal(3e-4, 1.0) == 0
    assert anneal(0.2, 0.75, enabled=False) == 0.2
