# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[box2d]>=1.4,<2",
#     "numpy>=1.26",
#     "tensorboard>=2.16",
#     "tyro>=1.0",
#     "tqdm>=4.66",
#     "moviepy>=2.0",
# ]
# ///
"""PPO for discrete actions and vector observations: CartPole-v1, Acrobot-v1, LunarLander-v3.

    python ppo_cartpole.py                                   # train, then evaluate on unseen seeds
    tensorboard --logdir runs                                # watch it learn
    python ppo_cartpole.py --evaluate runs/NAME --render     # watch what it learned
    python ppo_cartpole.py --resume runs/NAME                # go on with a run that was stopped

PPO ends with `train`. Below it: evaluation, a run on disk, several processes, the command line.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (PPO); Schulman et al.
2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (GAE); Huang et
al. 2022, "The 37 Implementation Details of Proximal Policy Optimization" (details).
"""

import math
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from warnings import catch_warnings

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # Adam loads it too late: its defaults would hold the process group
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState, _async_worker
from gymnasium.wrappers.vector import NormalizeReward, TransformReward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# --- 1. Settings ----------------------------------------------------------------------------------


@dataclass
class Args:
    # Run
    seed: int = 1  # of weights, sampled actions and environments, which get seed, seed + 1, ...
    cuda: bool = field(default_factory=torch.cuda.is_available)  # train on the GPU
    torch_deterministic: bool = True  # let cuDNN use deterministic kernels only
    num_threads: int = 1  # torch's threads in an update; collecting always takes one
    compile: bool = False  # compile gradients, on a GPU into CUDA graphs; takes half a minute
    resume: Path | None = None  # go on with this run: its folder, or one of its checkpoints
    evaluate: Path | None = None  # play this run's folder or checkpoint instead of training
    eval_episodes: int = 100  # episodes of an evaluation, with --evaluate and after training
    eval_seed: int = 1_000_000  # seed of an evaluation's first episode; the others count up from it
    render: bool = False  # show the evaluation in a window
    capture_video: bool = False  # film the evaluation's first episode: an mp4 in the run's videos/

    # Environment
    env_id: str = "CartPole-v1"  # any with Discrete actions and observations that are vectors
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # its options
    num_envs: int = 16  # environments that are stepped side by side
    async_envs: bool = False  # a process for each; pays when a step takes more than about 0.1 ms
    action_masks: bool = True  # only actions that info["action_mask"] allows, where there is one

    # PPO
    total_timesteps: int = 25_000  # environment steps in all
    learning_rate: float = 3e-3  # Adam's step size at the start
    num_steps: int = 32  # steps per environment and rollout
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    anneal_clip: bool = True  # lower the clip range linearly to 0
    gamma: float = 0.995  # discount factor
    gae_lambda: float = 0.98  # GAE's lambda: 0 trusts the critic, 1 the sampled return
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalise advantages within each minibatch
    clip_coef: float = 0.2  # clip range of the probability ratio at the start
    clip_vloss: bool = False  # also clip how far a value may move in one update
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients are scaled down to this norm
    target_kl: float | None = None  # end an update after the epoch whose approx_kl exceeds this
    norm_obs: bool = False  # shift and scale observations by their running mean and deviation
    norm_reward: bool = False  # divide rewards by the running deviation of the discounted return
    reward_scale: float = 0.1  # multiplies rewards; too large if explained_variance stays near 0
    share_backbone: bool = False  # one trunk under actor and critic instead of two

    # Output
    exp_name: str = Path(__file__).stem  # the run's name in its folder
    log_dir: Path = Path("runs")  # where the folders of runs go
    checkpoint_interval: int = 10  # iterations (a rollout and its update) between two checkpoints

    def __post_init__(self):
        for settings in (vars(self), self.env_kwargs):
            for name, value in settings.items():
                if isinstance(value, np.generic):  # a checkpoint with it could not be read
                    settings[name] = value.item()

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


# What an environment wants instead, in the order of Args; a flag on the command line wins.
PRESETS = {
    "Acrobot-v1": {
        "num_envs": 8, "total_timesteps": 500_000, "learning_rate": 1e-3, "num_steps": 128,
        "anneal_clip": False, "gamma": 0.999, "num_minibatches": 16, "update_epochs": 8,
    },
    "MountainCar-v0": {
        "total_timesteps": 500_000, "learning_rate": 1e-3, "num_steps": 128, "gamma": 0.999,
        "num_minibatches": 16, "update_epochs": 8, "ent_coef": 0.01, "norm_obs": True,
    },
    "LunarLander-v3": {
        "total_timesteps": 1_000_000, "learning_rate": 1e-3, "num_steps": 512,
        "anneal_clip": False, "gamma": 0.999, "num_minibatches": 16, "update_epochs": 8,
        "ent_coef": 0.01, "norm_obs": True, "norm_reward": True,
    },
    "FrozenLake-v1": {"total_timesteps": 300_000, "ent_coef": 0.03},
    "CliffWalking-v1": {  # normalised, one fall would hide what the shorter path is worth
        "total_timesteps": 300_000, "num_steps": 128, "anneal_clip": False, "gamma": 0.999,
        "norm_adv": False, "ent_coef": 0.03,
    },
    "Taxi-v4": {"total_timesteps": 300_000, "num_steps": 128, "gamma": 0.99, "ent_coef": 0.03},
    "Blackjack-v1": {"total_timesteps": 100_000},
}  # fmt: skip


def preset(env_id: str, **changes) -> Args:
    """The settings for ``env_id``: the defaults, then what PRESETS says, then ``changes``."""
    return Args(**{"env_id": env_id, **PRESETS.get(env_id, {}), **changes})


# --- 2. Environment -------------------------------------------------------------------------------


class AppendActionMask(gym.Wrapper):
    """Appends ``info["action_mask"]`` to the observation, where Agent finds it."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        box = env.observation_space
        mask = np.ones(env.action_space.n, box.dtype)
        low, high = np.append(box.low, 0 * mask), np.append(box.high, mask)
        self.observation_space = gym.spaces.Box(low, high, dtype=box.dtype)
        self.observation_space.num_masked = len(mask)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return np.append(obs, info["action_mask"]).astype(obs.dtype), info

    def step(self, action):
        obs, *others, info = self.env.step(action)
        return np.append(obs, info["action_mask"]).astype(obs.dtype), *others, info


def make_env(args: Args, training: bool, video_folder: Path | None = None) -> gym.Env:
    """One environment. In training it reports its episodes' returns; else it may be seen."""
    options = {"render_mode": "human"} if args.render else {}
    if video_folder is not None:
        options = {"render_mode": "rgb_array"}
    env = gym.make(args.env_id, **args.env_kwargs, **options)
    if video_folder is not None:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda n: n == 0)
    space = env.observation_space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        env = gym.wrappers.TransformObservation(env, np.copy, space)  # some show one array, changed
    elif space.dtype != np.uint8 or math.prod(space.shape) <= 2048:  # else an image: Agent refuses
        env = gym.wrappers.FlattenObservation(env)
    if args.action_masks and "action_mask" in env.reset(seed=args.seed)[1]:
        env = AppendActionMask(env)
    if training:
        env = gym.wrappers.RecordEpisodeStatistics(env, stats_key="statistics")
    elif env.spec.max_episode_steps is None:  # a policy may go round in circles for ever
        env = gym.wrappers.TimeLimit(env, 10_000)
    return env


def make_envs(args: Args, num_envs: int, training: bool, video_folder: Path | None = None):
    """A gymnasium.vector.VectorEnv of ``num_envs`` environments; a video shows the first one.

    In training an episode's end and the next one's start share a step, SAME_STEP, with the true
    last observation in ``infos["final_obs"]``, and rewards are scaled. In evaluation nothing resets
    by itself, so that each episode can have its own seed.
    """
    env_fns = [partial(make_env, args, training)] * num_envs
    env_fns[0] = partial(make_env, args, training, video_folder)
    vectorize = WorkerEnvs if args.async_envs else SyncVectorEnv
    autoreset_mode = AutoresetMode.SAME_STEP if training else AutoresetMode.DISABLED
    envs = vectorize(env_fns, copy=False, autoreset_mode=autoreset_mode)
    if training:
        envs = TransformReward(envs, partial(np.multiply, args.reward_scale))
        if args.norm_reward:
            envs = NormalizeReward(envs, gamma=args.gamma)
            envs.return_rms.count = 100.0  # steps of variance 1, for the first returns hardly vary
    return envs


# --- 3. Agent -------------------------------------------------------------------------------------


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights of gain ``std``, no bias (Huang et al. 2022, detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class RunningNorm(nn.Module):
    """Shifts and scales observations by their mean and variance over all of training. These change
    only once an update is over, so that its probability ratios start at exactly 1."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merges the statistics of ``x [..., *shape]`` into the running ones (Chan et al. 1979)."""
        x = x.float().reshape(-1, *self.mean.shape)
        mean = all_reduce_mean(x.mean(0))
        var = all_reduce_mean(((x - mean) ** 2).mean(0))
        self.count += len(x) * WORLD_SIZE
        weight, delta = len(x) * WORLD_SIZE / self.count, mean - self.mean
        self.mean += weight * delta
        self.var.lerp_(var + (1 - weight) * delta**2, weight)


class Agent(nn.Module):
    """Actor and critic on vectors ``obs [batch, num_inputs]``; the policy is categorical."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
            hint = "images want a network of their own, as in ppo_carracing.py"
            raise InputError(f"observations must be vectors ({hint}): {observation_space}")
        if not isinstance(action_space, gym.spaces.Discrete):
            hint = "ppo_continuous_mlp.py takes a Box of floats"
            raise InputError(f"actions must be Discrete ({hint}): {action_space}")
        num_inputs, num_actions = observation_space.shape[0], int(action_space.n)
        self.num_masked = getattr(observation_space, "num_masked", 0)
        self.num_inputs = num_inputs = num_inputs - self.num_masked

        def trunk() -> nn.Module:
            first, second = nn.Linear(num_inputs, 64), nn.Linear(64, 64)
            return nn.Sequential(layer_init(first), nn.Tanh(), layer_init(second), nn.Tanh())

        self.obs_norm = RunningNorm(observation_space.shape) if args.norm_obs else nn.Identity()
        self.actor_trunk = trunk()
        self.critic_trunk = self.actor_trunk if args.share_backbone else trunk()
        self.actor = layer_init(nn.Linear(64, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(64, 1), std=1.0)
        self.first_action = int(action_space.start)

    def get_logits(self, obs: Tensor) -> Tensor:
        """The policy: unnormalised log-probabilities ``[batch, num_actions]``."""
        logits = self.actor(self.actor_trunk(self.obs_norm(obs.float())[:, : self.num_inputs]))
        if self.num_masked:  # a probability of exactly 0
            logits = logits.masked_fill(obs[:, self.num_inputs :] == 0, -1e8)
        return logits

    def get_value(self, obs: Tensor) -> Tensor:
        """V(obs) ``[batch]``."""
        inputs = self.obs_norm(obs.float())[:, : self.num_inputs]
        return self.critic(self.critic_trunk(inputs)).squeeze(-1)

    def sample_actions(self, obs: Tensor) -> Tensor:
        """Draws an action ``[batch]`` for each of ``obs``."""
        logits = self.get_logits(obs)
        # The Gumbel-max trick. Categorical draws from the same probabilities in twice the time.
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)

    def best_actions(self, obs: Tensor) -> Tensor:
        """The actions that an evaluation plays, ``[batch]``: the most probable ones."""
        return self.get_logits(obs).argmax(-1)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What an update asks of ``actions``: log-probability, entropy and value, ``[batch]``."""
        log_probs = self.get_logits(obs).log_softmax(-1)
        logprob = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return logprob, entropy, self.get_value(obs)

    forward = evaluate_actions  # the method that DistributedDataParallel calls

    def env_actions(self, actions: Tensor) -> np.ndarray:
        """``actions`` as the environment takes them."""
        return actions.cpu().numpy() + self.first_action

    def log_policy(self, writer, rollout: dict[str, Tensor], global_step: int) -> None:
        """Shows in TensorBoard what share of a rollout's actions each one had."""
        counts = rollout["actions"].flatten().bincount(minlength=self.actor.out_features)
        for action, share in enumerate((counts / counts.sum()).tolist()):
            writer.add_scalar(f"policy/share_{action}", share, global_step)


# --- 4. PPO ---------------------------------------------------------------------------------------


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16).

    Tensors are floats ``[num_steps, num_envs]``: ``next_values[t]`` is the value of what step t led
    to, before any reset; ``terminations`` is 1 where an episode really ended, ``dones`` also where
    a time limit cut it off. Returns (advantages, returns); returns are the critic's targets.

        delta_t = r_t + gamma (1 - termination_t) V(s_t+1) - V(s_t)
        A_t = delta_t + gamma lambda (1 - done_t) A_t+1
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    decays = gamma * gae_lambda * (1 - dones)
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values


def ppo_loss(agent, minibatch, clip_coef, args):
    """PPO's objective (Schulman et al. 2017, eq. 9) as a loss.

    ``minibatch`` has rows of a rollout: obs, actions, logprobs, values, advantages, returns, each
    ``[batch, ...]``. Returns the loss and, detached, what is logged. approx_kl is (r - 1) - log r,
    never negative and less noisy than -log r (http://joschu.net/blog/kl-approx.html).
    """
    new_logprob, entropy, new_value = agent(minibatch["obs"], minibatch["actions"])
    advantages, returns = minibatch["advantages"], minibatch["returns"]
    assert new_logprob.shape == entropy.shape == new_value.shape == returns.shape  # [batch]
    if args.norm_adv and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    logratio = new_logprob - minibatch["logprobs"]
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # eq. 7

    value_loss = (new_value - returns) ** 2
    if args.clip_vloss:
        old_value = minibatch["values"]
        clipped_value = old_value + (new_value - old_value).clamp(-clip_coef, clip_coef)
        value_loss = torch.max(value_loss, (clipped_value - returns) ** 2)
    value_loss = 0.5 * value_loss.mean()

    entropy = entropy.mean()
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:  # its gradient is 4% of an update: not computed where its weight is 0
        loss = loss - args.ent_coef * entropy
    with torch.no_grad():
        stats = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "old_approx_kl": -logratio.mean(),
            "approx_kl": ((ratio - 1) - logratio).mean(),
            "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        }
    return loss, stats


@torch.inference_mode()
def collect(agent, envs, obs, num_steps):
    """Plays ``num_steps`` steps in every environment; ``obs`` is what they showed last, an array.

    Returns the rollout, tensors ``[num_steps, num_envs, ...]`` on the agent's device; what the
    environments show now; and the (return, length) of each episode that ended.
    """
    device = next(agent.parameters()).device
    rewards, terminations, dones = np.zeros((3, num_steps, envs.num_envs), np.float32)
    all_obs, all_actions, cut_off, episodes = [], [], [], []
    for step in range(num_steps):
        all_obs.append(torch.tensor(obs, device=device))  # a copy: environments reuse the array
        actions = agent.sample_actions(all_obs[-1])
        all_actions.append(actions)
        obs, rewards[step], terminated, truncated, infos = envs.step(agent.env_actions(actions))
        terminations[step], dones[step] = terminated, terminated | truncated
        if "final_info" in infos:
            ended, episode = infos["_final_info"], infos["final_info"]["statistics"]
            episodes += zip(episode["r"][ended].tolist(), episode["l"][ended].tolist())
            for env in np.flatnonzero(truncated & ~terminated).tolist():
                last_obs = torch.tensor(infos["final_obs"][env], device=device)
                cut_off.append((step, env, last_obs))

    rollout = {"obs": torch.stack(all_obs), "actions": torch.stack(all_actions)}
    rollout["rewards"] = torch.tensor(rewards, device=device)
    rollout["terminations"] = torch.tensor(terminations, device=device)
    rollout["dones"] = torch.tensor(dones, device=device)
    # One pass over all steps costs less than one for each: for 128 of 4 CartPoles, a fortieth.
    inputs = rollout["obs"].flatten(0, 1), rollout["actions"].flatten(0, 1)
    logprobs, _, values = agent.evaluate_actions(*inputs)
    rollout["logprobs"] = logprobs.view(num_steps, envs.num_envs)
    rollout["values"] = values.view(num_steps, envs.num_envs)
    # A step leads to the next step's observation; but the last step to the one in hand, and a step
    # that a time limit cut off to the one that the reset hid (Pardo et al. 2018, "Time Limits in
    # Reinforcement Learning").
    last_values = agent.get_value(torch.tensor(obs, device=device)).view(1, envs.num_envs)
    rollout["next_values"] = torch.cat([rollout["values"][1:], last_values])
    if cut_off:
        steps, indices, last_obs = map(list, zip(*cut_off))
        rollout["next_values"][steps, indices] = agent.get_value(torch.stack(last_obs))
    return rollout, obs, episodes


def backward(agent, minibatch, clip_coef, args):
    """Leaves the gradients of ``ppo_loss`` in the agent, scaled down to a norm of
    ``max_grad_norm``. Returns what is logged. This is what ``--compile`` compiles."""
    loss, stats = ppo_loss(agent, minibatch, clip_coef, args)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    return stats | {"grad_norm": grad_norm}


def update(agent, optimizer, rollout, clip_coef, args, backward_fn=backward):
    """Improves the agent on one rollout, in epochs of shuffled minibatches. Returns what is logged:
    means; explained_variance is how much of the returns the critic foresaw, 1 all, 0 nothing."""
    inputs = map(rollout.get, ("rewards", "values", "next_values", "terminations", "dones"))
    advantages, returns = compute_gae(*inputs, args.gamma, args.gae_lambda)
    batch = rollout | {"advantages": advantages, "returns": returns}
    batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    all_stats = []
    clip_coef = torch.tensor(clip_coef, device=returns.device)  # a new float would be compiled anew
    for _ in range(args.update_epochs):
        shuffled = torch.randperm(returns.numel(), device=returns.device)
        for rows in shuffled.chunk(args.num_minibatches):
            minibatch = {name: tensor[rows] for name, tensor in batch.items()}
            optimizer.zero_grad()
            stats = backward_fn(agent, minibatch, clip_coef, args)
            optimizer.step()
            # Stacked now: a CUDA graph writes the next minibatch's into the same memory.
            all_stats.append(torch.stack([*stats.values()]))
        if args.target_kl is not None and all_reduce_mean(stats["approx_kl"]) > args.target_kl:
            break
    explained_variance = 1 - (returns - rollout["values"]).var() / returns.var()
    losses = dict(zip(stats, torch.stack(all_stats).mean(0).tolist()))
    return losses | {"explained_variance": explained_variance.item()}


# --- 5. Training ----------------------------------------------------------------------------------


def train(args: Args) -> tuple[np.ndarray, Path]:
    """Trains to ``args.total_timesteps``, then evaluates. Returns (returns, the run's folder).

    Raises InputError where ``args`` can't be used, RunError where a run fails, SystemExit after a
    signal. Under torchrun each process steps a share of the environments; the first one writes.
    """
    device = set_up(args)
    num_envs = args.num_envs // WORLD_SIZE
    with open_envs(args, num_envs, training=True) as envs:
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
        optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
        run = Run(args, agent, optimizer, envs)  # a new one, or the one of --resume
        learner = DistributedDataParallel(agent) if WORLD_SIZE > 1 else agent
        backward_fn = torch.compile(backward, mode="reduce-overhead") if args.compile else backward
        # A checkpoint has no episodes in flight: a resumed run starts new ones, from new seeds.
        obs, _ = envs.reset(seed=args.seed + run.iteration * args.num_envs + RANK * num_envs)
        with run:
            for iteration in range(run.iteration + 1, args.num_iterations + 1):
                remaining = 1 - (iteration - 1) / args.num_iterations
                learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
                clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
                optimizer.param_groups[0]["lr"] = learning_rate

                start = time.perf_counter()
                torch.set_num_threads(1)  # idle ones spin, and starve the environments' processes
                rollout, obs, episodes = collect(agent, envs, obs, args.num_steps)
                collect_seconds = time.perf_counter() - start

                torch.set_num_threads(args.num_threads)
                losses = update(learner, optimizer, rollout, clip_coef, args, backward_fn)
                losses["clip_coef"] = clip_coef
                if args.norm_obs:
                    agent.obs_norm.update(rollout["obs"])

                run.log(iteration, rollout, episodes, losses, learning_rate, collect_seconds)
                run.checkpoint()
                if run.stop_requested:
                    break
    return run.finish()


# --- 6. Evaluation --------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(agent, args, folder=Path()):
    """Plays ``args.eval_episodes`` episodes without noise, each from its own seed; prints a line.

    Returns (returns, lengths in steps), both ``[eval_episodes]``. Films into ``folder``/videos.
    """
    device = next(agent.parameters()).device
    torch.set_num_threads(1)
    num_envs = 1 if args.render else min(args.num_envs, args.eval_episodes)
    video_folder = folder / "videos" if args.capture_video else None
    with open_envs(args, num_envs, False, video_folder) as envs:
        totals, steps, played = np.zeros(num_envs), np.zeros(num_envs), []
        seeds = args.eval_seed + np.arange(num_envs)  # of the episodes that are being played
        obs, _ = envs.reset(seed=seeds.tolist())
        while seeds.min() < args.eval_seed + args.eval_episodes:
            actions = agent.best_actions(torch.tensor(obs, device=device))
            obs, rewards, terminated, truncated, _ = envs.step(agent.env_actions(actions))
            totals += rewards
            steps += 1
            done = terminated | truncated
            if done.any():
                played += zip(seeds[done], totals[done], steps[done])
                totals[done] = steps[done] = 0
                seeds[done] = seeds.max() + 1 + np.arange(done.sum())
                obs, _ = envs.reset(seed=seeds.tolist(), options={"reset_mask": done})
    _, returns, lengths = np.array(sorted(played)[: args.eval_episodes]).T
    spread = f"median {np.median(returns):.1f} min {returns.min():.1f} max {returns.max():.1f}"
    which = f"episodes {len(returns)} first-seed {args.eval_seed}"
    say(f"evaluation: mean {returns.mean():.1f} std {returns.std():.1f} {spread} {which}")
    return returns, lengths


def load_agent(args: Args) -> nn.Module:
    """The agent of ``args.evaluate``, a run's folder or a checkpoint. Raises InputError."""
    device = set_up(args)
    with open_envs(replace(args, async_envs=False, render=False), 1, training=False) as envs:
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    load_checkpoint(args.evaluate, agent)
    return agent


# --- 7. A run on disk -----------------------------------------------------------------------------

# What describes a call and not the agent: never saved, always from the command line.
NOT_SAVED = {
    "cuda", "num_threads", "compile", "resume", "evaluate", "eval_episodes", "eval_seed", "render",
    "capture_video", "log_dir",
}  # fmt: skip


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes ``checkpoint`` whole or not at all: a crash leaves the old file. Raises RunError."""
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's where the disk is full
        raise RunError(f"{path} can't be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(path: Path, agent: nn.Module | None = None) -> dict:
    """Reads a checkpoint, or latest.pt of a folder, and ``agent``'s weights. Raises InputError."""
    path = Path(path, "latest.pt") if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # data, never code
        source = f"{checkpoint['script']}.py for {checkpoint['args']['env_id']}"
    except Exception as error:
        raise InputError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from error
    try:
        if agent is not None:
            agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        raise InputError(f"{path}: weights of {source} don't fit here") from error
    return checkpoint


def saved_args(path: Path, **changes) -> Args:
    """The settings of a run's folder or checkpoint, then ``changes``. Raises InputError."""
    saved = load_checkpoint(path)["args"] | changes
    return Args(**{name: saved[name] for name in saved if name in Args.__dataclass_fields__})


class Run:
    """A training run's folder, TensorBoard log, progress bar, checkpoints and signals.

    A new one, or that of ``args.resume``; ``iteration`` is the last one done. Under ``with``,
    SIGINT or SIGTERM ends it after the iteration in hand; a second one ends it at once.
    """

    def __init__(self, args, agent, optimizer, envs):
        self.args, self.agent, self.optimizer, self.envs = args, agent, optimizer, envs
        self.settings = {k: v for k, v in asdict(args).items() if k not in NOT_SAVED}
        self.device = next(agent.parameters()).device
        self.rng = torch.cuda if self.device.type == "cuda" else torch  # its random state is saved
        self.folder, self.iteration, self.global_step = None, 0, 0
        self.recent_returns, self.best_return = deque(maxlen=100), -math.inf
        self.signals, self.stop_requested = [], False
        if args.resume is None:
            return
        checkpoint = load_checkpoint(args.resume, agent)
        optimizer.load_state_dict(checkpoint["optimizer"])
        path = Path(args.resume)
        self.folder = path if path.is_dir() else path.parent
        self.global_step = checkpoint["global_step"]
        self.iteration = self.global_step // args.batch_size
        self.recent_returns.extend(checkpoint["recent_returns"])
        self.best_return = checkpoint["best_return"]
        if args.norm_reward:
            vars(envs.return_rms).update(checkpoint["return_rms"] or {})
        if RANK == 0 and self.device.type in checkpoint["rng_state"]:
            self.rng.set_rng_state(checkpoint["rng_state"][self.device.type])

    def advice(self) -> str:
        if self.folder is None or not (self.folder / "latest.pt").exists():
            return "no checkpoint was written"
        command = f"python {Path(__file__).name} --resume {shlex.quote(str(self.folder))}"
        return f"go on from the last checkpoint with {command}"

    def __enter__(self):
        if RANK == 0:
            self.folder = self.folder or self.make_folder()
            self.writer = self.open_writer()
        total = self.args.num_iterations * self.args.batch_size
        hidden = RANK > 0 or None  # None: shown on a terminal only
        self.bar = tqdm(total=total, initial=self.global_step, unit=" steps", disable=hidden)
        self.handlers, self.first_step = {}, self.global_step
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.handlers[signum] = signal.signal(signum, self.on_signal)
        self.start = self.last_log = self.last_line = time.perf_counter()
        return self

    def on_signal(self, signum: int, frame) -> None:
        self.signals.append(signum)
        signal.signal(signum, signal.default_int_handler)  # a second one: KeyboardInterrupt

    def __exit__(self, kind, error, traceback) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.bar.close()
        if error is None and WORLD_SIZE > 1:
            time.sleep(0.1)  # torch's threads need the GIL to end, and who frees them holds it
            dist.destroy_process_group()
        if error is not None:
            error.add_note(self.advice())
        if WORLD_SIZE > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RunError(f"process {RANK} lost another; {self.advice()}") from error

    def make_folder(self) -> Path:
        """Makes runs/ENV__SCRIPT__SEED__TIME, CleanRL's pattern. Raises InputError."""
        name = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}__".replace("/", "_")
        seconds = int(time.time())
        while (folder := Path(self.args.log_dir, f"{name}{seconds}")).exists():
            seconds += 1  # another run started in the same second
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--log-dir {folder.parent}: {error.strerror}") from error
        return folder

    def open_writer(self):
        """Opens TensorBoard's log, with the settings as text and for its HPARAMS tab."""
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard import SummaryWriter  # slow to load, and not for evaluations
        from torch.utils.tensorboard.summary import hparams

        writer = SummaryWriter(str(self.folder), purge_step=self.global_step + 1)
        rows = "\n".join(f"|{name}|{value}|" for name, value in self.settings.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        settings = {k: v if type(v) in (int, float) else str(v) for k, v in self.settings.items()}
        metrics = {"eval/return_mean": 0.0, "charts/episodic_return": 0.0}
        experiment, session, _ = hparams(settings, metrics)
        plugin = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(plugin.content)
        for info in data.experiment.hparam_infos:  # the tab's first columns are what "differs"
            info.differs = info.name in ("env_id", "learning_rate", "num_envs", "seed")
        plugin.content = data.SerializeToString()
        writer.file_writer.add_summary(experiment)
        writer.file_writer.add_summary(session)
        return writer

    def log(self, iteration, rollout, episodes, losses, learning_rate, collect_seconds) -> None:
        """Checks an iteration's numbers and shows them. Raises RunError."""
        for name in ("obs", "rewards"):
            for step, env, *_ in (~rollout[name].isfinite()).nonzero().tolist():
                step = self.global_step + step * self.args.num_envs
                raise RunError(f"{name} of environment {env} at step {step} are not finite")
        for name, value in losses.items():
            if not math.isfinite(value) and name != "explained_variance":  # nan at equal returns
                step = self.global_step + self.args.batch_size
                raise RunError(f"{name} is {value} in the update after step {step}")
        self.iteration, self.global_step = iteration, iteration * self.args.batch_size
        self.recent_returns.extend(episode_return for episode_return, _ in episodes)
        if RANK > 0:
            return
        now, step = time.perf_counter(), self.global_step
        sps = (step - self.first_step) / (now - self.start)
        charts = {"learning_rate": learning_rate, "SPS": sps}
        if episodes:
            charts["episodic_return"], charts["episodic_length"] = np.mean(episodes, axis=0)
        scalars = {f"charts/{name}": value for name, value in charts.items()}
        scalars |= {f"losses/{name}": value for name, value in losses.items()}
        scalars["time/collect_fraction"] = collect_seconds / (now - self.last_log)
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        self.agent.log_policy(self.writer, rollout, step)
        mean_return = np.mean(self.recent_returns or math.nan)
        self.bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
        self.bar.update(self.args.batch_size)
        if iteration == 10 and not self.recent_returns:
            say(f"no episode ended in {step} steps: there are no returns to show")
        if self.bar.disable and now - self.last_line > 10:  # no terminal: a line every 10 seconds
            self.last_line, total = now, self.bar.total
            say(f"step {step}/{total} return {mean_return:.1f} SPS {sps:.0f}")
        self.last_log = now

    def checkpoint(self) -> None:
        """Saves where it is due, and finds out whether any of the processes was asked to stop."""
        asked = torch.tensor(float(len(self.signals) > 0), device=self.device)
        self.stop_requested = all_reduce_mean(asked).item() > 0
        last = self.iteration == self.args.num_iterations
        due = last or self.iteration % self.args.checkpoint_interval == 0
        if RANK == 0 and (due or self.stop_requested):
            self.save()

    def save(self) -> None:
        """Writes latest.pt, and best.pt if 100 training episodes never had a better mean."""
        mean_return = float(np.mean(self.recent_returns or -math.inf))
        is_best = len(self.recent_returns) == 100 and mean_return > self.best_return
        self.best_return = mean_return if is_best else self.best_return
        return_rms = vars(self.envs.return_rms) if self.args.norm_reward else {}
        checkpoint = {
            "script": Path(__file__).stem,
            "args": self.settings,
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "return_rms": {name: float(value) for name, value in return_rms.items()},
            "rng_state": {self.device.type: self.rng.get_rng_state()},
            "iteration": self.iteration,
            "global_step": self.global_step,
            "recent_returns": list(self.recent_returns),
            "best_return": self.best_return,
        }
        for name in ("best.pt", "latest.pt") if is_best else ("latest.pt",):
            save_checkpoint(self.folder / name, checkpoint)
        self.writer.flush()

    def finish(self) -> tuple[np.ndarray, Path]:
        """Evaluates the final weights. Raises SystemExit, 130 or 143, after a signal."""
        if self.stop_requested:
            if RANK == 0:
                print(f"stopped: {self.advice()}", file=sys.stderr)
            raise SystemExit(128 + (self.signals or [signal.SIGTERM])[0])
        if RANK > 0:
            return np.empty(0), Path(self.args.log_dir)
        try:
            returns, _ = evaluate(self.agent, self.args, self.folder)
        except BaseException as error:
            error.add_note(self.advice())
            raise
        self.writer.add_scalar("eval/return_mean", returns.mean(), self.global_step)
        self.writer.close()
        say(f"checkpoint: {self.folder / 'latest.pt'}")
        folder = shlex.quote(str(self.folder))
        say(f"watch it:   python {Path(__file__).name} --evaluate {folder} --render")
        return returns, self.folder


# --- 8. Several processes -------------------------------------------------------------------------

RANK = int(os.environ.get("RANK", 0))  # torchrun's: which process this is,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # which on its machine,
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all processes; where there is one, ``tensor`` itself."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
        tensor = tensor / WORLD_SIZE
    return tensor


def set_up(args: Args) -> torch.device:
    """Checks ``args``, picks the device, joins the other processes, seeds. Raises InputError."""
    check_args(args)
    check_env(args)
    device = torch.device("cpu")
    if args.cuda and torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    elif args.cuda:
        print("warning: --cuda, but torch finds no GPU: going on with the CPU", file=sys.stderr)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed + RANK)
    torch.set_num_threads(args.num_threads)  # the first weights' last bits depend on it
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.compile:  # loss.backward() too, unless DistributedDataParallel hooks into it
        torch._dynamo.config.trace_autograd_ops = WORLD_SIZE == 1
    return device


class WorkerEnvs(AsyncVectorEnv):
    """AsyncVectorEnv that waits for no process that is gone and leaves none behind."""

    def __init__(self, env_fns, **kwargs):
        self.processes, self._state = [], None  # no state: nothing can be asked of the processes
        try:
            super().__init__(env_fns, worker=run_worker, **kwargs)
        except BaseException:
            self.close_extras()
            raise

    def close_extras(self, **kwargs) -> None:
        if self._state == AsyncState.DEFAULT and all(p.is_alive() for p in self.processes):
            return super().close_extras(**kwargs)
        for process in self.processes:  # one of them would never answer
            if process.pid is not None:  # else it was never started
                process.kill()
                process.join()

    def _raise_if_errors(self, successes) -> None:
        if not all(successes):  # Gymnasium would print a traceback for each environment
            self._state = None
            trace = self.error_queue.get()
            print(trace, file=sys.stderr, end="")
            raise RunError(f"an environment raised {trace.splitlines()[-1]}")


def run_worker(index, env_fn, pipe, parent_pipe, memory, errors, *modes) -> None:
    """A process of WorkerEnvs: Gymnasium's own, but signals are for the process that trains, and
    errors, those of a constructor too, are sent as text: not every exception can be pickled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    put = errors.put
    errors.put = lambda error: put(error[-1])
    try:
        _async_worker(index, env_fn, pipe, parent_pipe, memory, errors, *modes)
    except Exception:
        put(traceback.format_exc())
        with suppress(EOFError, ConnectionError):  # nobody may be there any more
            pipe.send((None, False))
            pipe.recv()  # a command may be on its way, and needs this process to be sent


@contextmanager
def open_envs(args: Args, num_envs: int, training: bool, video_folder: Path | None = None):
    """make_envs() under `with`. Raises RunError where an environment calls sys.exit(), which would
    end training as if all were well, or its process is gone."""
    try:
        with closing(make_envs(args, num_envs, training, video_folder)) as envs:
            yield envs
    except (SystemExit, EOFError, ConnectionError) as error:
        if not (args.async_envs or isinstance(error, SystemExit)):
            raise  # an environment's own
        notes = getattr(error, "__notes__", ())
        raise RunError("; ".join([f"an environment is gone: {error!r}", *notes])) from error


# --- 9. Command line ------------------------------------------------------------------------------


class InputError(ValueError):
    """A flag, environment or checkpoint that can't be used; the message says what to do."""


class RunError(RuntimeError):
    """A run that failed midway; the message says what happened and where."""


def check_args(args: Args) -> None:
    """Refuses what can't work, before anything is created. Raises InputError."""

    def require(holds: bool, name: str, condition: str) -> None:
        if not holds:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} must be {condition}, not {getattr(args, name)}")

    for name in (
        "num_threads", "eval_episodes", "num_envs", "total_timesteps", "num_steps",
        "num_minibatches", "update_epochs", "checkpoint_interval",
    ):  # fmt: skip
        require(getattr(args, name) >= 1, name, "at least 1")
    for name in ("seed", "eval_seed", "ent_coef", "vf_coef"):
        require(0 <= getattr(args, name) < math.inf, name, "0 or more")
    for name in ("learning_rate", "clip_coef", "max_grad_norm", "reward_scale"):
        require(0 < getattr(args, name) < math.inf, name, "above 0")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, "between 0 and 1")
    require(args.target_kl is None or args.target_kl > 0, "target_kl", "above 0")
    require(args.num_envs % WORLD_SIZE == 0, "num_envs", f"a multiple of {WORLD_SIZE} processes")
    share = args.batch_size // WORLD_SIZE
    divides = f"a divisor of num_envs * num_steps, {share} in a process"
    require(share % args.num_minibatches == 0, "num_minibatches", divides)
    rollout = f"at least one rollout, num_envs * num_steps = {args.batch_size}"
    require(args.total_timesteps >= args.batch_size, "total_timesteps", rollout)
    last_seed = args.seed + args.num_envs * args.num_iterations - 1
    before, after = args.eval_seed + args.eval_episodes <= args.seed, args.eval_seed > last_seed
    require(before or after, "eval_seed", f"clear of the training seeds {args.seed} to {last_seed}")
    require(args.resume is None or args.evaluate is None, "resume", "used without --evaluate")
    require(not args.render or args.evaluate is not None, "render", "used with --evaluate")


def check_env(args: Args) -> None:
    """Makes, resets and, where it is to be seen, draws one environment: what a flag or an install
    can mend is found before anything is written. Raises InputError."""
    try:
        with TemporaryDirectory() as folder, catch_warnings(action="ignore"):
            video_folder = Path(folder) if args.capture_video else None
            with open_envs(replace(args, async_envs=False), 1, False, video_folder) as envs:
                Agent(envs.single_observation_space, envs.single_action_space, args)
                envs.reset(seed=args.seed)
                endless = isinstance(envs.envs[0], gym.wrappers.TimeLimit)  # the one of make_env
    except Exception as error:
        text = f"{args.env_id}: {error}"
        expected = isinstance(error, InputError | gym.error.Error | ImportError)
        if "reset() got an unexpected keyword argument" in text:
            text += "; since Gym 0.26 it takes seed and options, and returns (obs, info)"
        elif (args.render or args.capture_video) and not expected:
            text += "; without a display, MuJoCo draws where MUJOCO_GL=egl is set"
        elif not expected and "unexpected keyword argument" not in text:  # --env-kwargs
            raise
        raise InputError(text) from error
    if endless and args.evaluate is None and RANK == 0:
        say(f"{args.env_id} has no time limit: evaluations end an episode after 10,000 steps")


def parse_args() -> Args:
    """Reads the flags, over a checkpoint's settings or the environment's preset."""
    given = tyro.cli(Args, description=__doc__)
    checkpoint = given.resume or given.evaluate
    default = saved_args(checkpoint) if checkpoint else preset(given.env_id)
    # tyro makes a flag of its own of each entry of a default; so its entries are added here.
    args = tyro.cli(Args, description=__doc__, default=replace(default, env_kwargs={}))
    return replace(args, env_kwargs=default.env_kwargs | args.env_kwargs)


def say(line: str) -> None:
    """Prints a line. Where nobody reads it any more, as after `| head -1`, the run goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = None


def main() -> None:
    """Trains or evaluates. Ends with status 2 where something is refused, 1 where a run fails."""
    sys.path.append(os.getcwd())  # where --env-id module:Id may have its module
    try:
        args = parse_args()
        if args.evaluate is None:
            train(args)
        else:
            folder = args.evaluate if args.evaluate.is_dir() else args.evaluate.parent
            evaluate(load_agent(args), args, folder)
    except (InputError, RunError, KeyboardInterrupt) as error:
        line = f"error: {error}" if str(error) else "interrupted"
        print(line, *getattr(error, "__notes__", ()), sep="; ", file=sys.stderr)
        sys.exit({InputError: 2, RunError: 1, KeyboardInterrupt: 130}[type(error)])
    except Exception as error:  # an environment's own; Python shows its traceback, then the note
        error.__notes__ = getattr(error, "__notes__", ["nothing was written"])
        raise


if __name__ == "__main__":
    main()
