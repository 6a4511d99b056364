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
"""PPO for continuous actions and vector observations: LunarLander, BipedalWalker, Pendulum, MuJoCo and their like.

    python ppo_continuous_mlp.py                               # train, then evaluate on unseen seeds
    tensorboard --logdir runs                                  # watch it learn
    python ppo_continuous_mlp.py --evaluate runs/NAME --render  # watch what it learned

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (PPO); Schulman et al. 2015,
"High-Dimensional Continuous Control Using Generalized Advantage Estimation" (GAE); Huang et al. 2022, "The 37
Implementation Details of Proximal Policy Optimization" (details).
"""

import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeReward, TransformReward
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # Run
    seed: int = 1
    """seed of the weights, the sampled actions and the training environments (seed, seed + 1, ...)"""
    cuda: bool = field(default_factory=torch.cuda.is_available)
    """train on the GPU; the default where there is one"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic kernels only"""
    num_threads: int = 1
    """torch's threads in an update (collection always takes one)"""
    compile: bool = False
    """compile the update's loss, on a GPU into CUDA graphs; pays in long runs, on a CPU it needs a C++ compiler"""
    resume: Path | None = None
    """go on with this run: its folder, or one of its checkpoints"""
    evaluate: Path | None = None
    """play this run's folder or checkpoint instead of training"""
    eval_episodes: int = 100
    """episodes of an evaluation, with --evaluate and after training"""
    eval_seed: int = 1_000_000
    """seed of an evaluation's first episode; the others count up from it"""
    render: bool = False
    """show the evaluation in a window"""
    capture_video: bool = False
    """record the first episode of the evaluation as mp4 under the run's videos/"""

    # Environment
    env_id: str = "LunarLanderContinuous-v3"
    """any Gymnasium environment with Box actions and a flat Box of observations"""
    num_envs: int = 16
    """environments that are stepped side by side"""
    async_envs: bool = False
    """one process per environment; pays when a step takes longer than about 0.1 ms"""

    # PPO
    total_timesteps: int = 1_000_000
    """environment steps in all"""
    learning_rate: float = 1e-3
    """Adam's step size at the start"""
    num_steps: int = 512
    """steps per environment and rollout"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    anneal_clip: bool = True
    """lower the clip range linearly to 0"""
    gamma: float = 0.999
    """discount factor"""
    gae_lambda: float = 0.98
    """lambda of the advantage estimator: 0 trusts the critic, 1 the sampled return"""
    num_minibatches: int = 32
    """minibatches per epoch"""
    update_epochs: int = 10
    """passes over each rollout"""
    norm_adv: bool = True
    """normalise advantages within each minibatch"""
    clip_coef: float = 0.2
    """clip range of the probability ratio at the start"""
    clip_vloss: bool = False
    """also clip how far a value may move in one update"""
    ent_coef: float = 0.005
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients are scaled down to this norm"""
    target_kl: float | None = None
    """end an update after the epoch whose approx_kl exceeds this"""
    norm_obs: bool = False
    """shift and scale observations by their running mean and standard deviation"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    reward_scale: float = 1.0
    """multiply rewards by this, before --norm-reward"""
    hidden_size: int = 64
    """units in each of the two hidden layers"""
    log_std_init: float = 0.0
    """logarithm of the first noise, in units of half the action box"""

    # Output
    exp_name: str = Path(__file__).stem
    """the run's name in its folder"""
    log_dir: Path = Path("runs")
    """where the folders of runs go"""
    checkpoint_interval: int = 10
    """iterations (a rollout and its update) between two checkpoints"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


# What other environments want, in the order of Args; a flag on the command line wins.
PRESETS = {
    "MountainCarContinuous-v0": {
        "total_timesteps": 100_000, "num_steps": 128, "gamma": 0.9999, "num_minibatches": 8, "update_epochs": 20,
        "ent_coef": 0.0, "norm_obs": True,
    },
    "BipedalWalker-v3": {  # under a falling clip range its noise grows again, and what is played isn't what was trained
        "total_timesteps": 3_000_000, "learning_rate": 7e-4, "anneal_clip": False, "gamma": 0.99, "gae_lambda": 0.95,
        "num_minibatches": 16, "ent_coef": 0.0,
    },
    "Pendulum-v1": {
        "total_timesteps": 200_000, "num_steps": 64, "gamma": 0.98, "gae_lambda": 0.9, "num_minibatches": 8,
        "ent_coef": 0.02, "norm_obs": True, "hidden_size": 128, "log_std_init": 0.5,
    },
    "HalfCheetah-v5": {  # --anneal-clip costs it 400 of its return, and Walker2d 660: means of three seeds
        "num_envs": 8, "learning_rate": 2e-4, "num_steps": 128, "anneal_clip": False, "gamma": 0.98, "gae_lambda": 0.92,
        "num_minibatches": 8, "ent_coef": 0.0, "norm_obs": True, "log_std_init": -2.0,
    },
    "Hopper-v5": {
        "num_envs": 8, "learning_rate": 3e-4, "num_steps": 256, "gamma": 0.99, "gae_lambda": 0.95, "ent_coef": 0.0,
        "norm_obs": True,
    },
    "Walker2d-v5": {
        "num_envs": 8, "learning_rate": 3e-4, "num_steps": 128, "anneal_clip": False, "gamma": 0.99, "gae_lambda": 0.95,
        "num_minibatches": 8, "ent_coef": 0.0, "norm_obs": True, "log_std_init": -1.0,
    },
}  # fmt: skip


def preset(env_id: str) -> Args:
    """The settings for ``env_id``: the defaults, but for what PRESETS says."""
    return Args(env_id=env_id, **PRESETS.get(env_id, {}))


class InputError(ValueError):
    """A flag, environment or checkpoint that can't be used; the message says why and what to do."""


class RunError(RuntimeError):
    """A run that failed midway; the message says what happened and where. Its last checkpoint is good."""


def check_args(args: Args) -> None:
    """Refuses what contradicts itself, before anything is created. Raises InputError."""

    def require(holds: bool, name: str, condition: str) -> None:
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} must be {condition}, not {getattr(args, name)}")

    for name, value in asdict(args).items():
        require(type(value) is not int or value >= 1 or name in ("seed", "eval_seed"), name, "at least 1")
    for name in ("seed", "eval_seed", "ent_coef", "vf_coef"):
        require(0 <= getattr(args, name) < math.inf, name, "0 or more")
    for name in ("learning_rate", "clip_coef", "max_grad_norm", "reward_scale"):
        require(0 < getattr(args, name) < math.inf, name, "above 0")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, "between 0 and 1")
    require(args.target_kl is None or args.target_kl > 0, "target_kl", "above 0")
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    require(args.num_envs % ranks == 0, "num_envs", f"a multiple of the {ranks} processes")
    batch = f"num_envs * num_steps = {args.batch_size // ranks}{' of a process' if ranks > 1 else ''}"
    require(args.batch_size // ranks % args.num_minibatches == 0, "num_minibatches", f"a divisor of {batch}")
    rollout = f"at least one rollout, num_envs * num_steps = {args.batch_size}"
    require(args.total_timesteps >= args.batch_size, "total_timesteps", rollout)
    training_seeds = range(args.seed, args.seed + args.num_envs * args.num_iterations)  # resumed, it takes new ones
    unseen = args.eval_seed + args.eval_episodes <= args.seed or args.eval_seed not in training_seeds
    require(unseen, "eval_seed", f"clear of the training seeds {args.seed} to {training_seeds[-1]}")
    require(args.resume is None or args.evaluate is None, "resume", "used without --evaluate")
    require(not args.render or args.evaluate is not None, "render", "used with --evaluate")
    filmed = not args.capture_video or find_spec("moviepy") is not None
    require(filmed, "capture_video", "used with moviepy (pip install moviepy)")
    compiler = which(os.environ.get("CXX", "g++")) or which("cl")
    require(not args.compile or compiler, "compile", "used with a C++ compiler (install g++ or set CXX)")


def make_env(args: Args, training: bool, video_folder: Path | None = None) -> gym.Env:
    """Builds one environment, which in training records returns. Raises gymnasium.error.Error if there is none."""
    if multiprocessing.parent_process() is not None:  # a worker: signals are for the process that trains
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    render_mode = "rgb_array" if video_folder is not None else "human" if args.render else None
    env = gym.make(args.env_id, render_mode=render_mode)
    if video_folder is not None:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda episode: episode == 0)
    return gym.wrappers.RecordEpisodeStatistics(env) if training else env


def make_envs(args: Args, num_envs: int, training: bool, video_folder: Path | None = None) -> gym.vector.VectorEnv:
    """Builds ``num_envs`` environments behind one interface.

    For training, an episode's end and the next one's start share a step (SAME_STEP: its true last observation is in
    ``infos["final_obs"]``) and rewards come out scaled. For evaluation nothing resets by itself, so that each episode
    can get its own seed. Raises InputError.
    """
    vectorize = AsyncVectorEnv if args.async_envs else SyncVectorEnv
    videos = [video_folder] + [None] * (num_envs - 1)  # only the first environment is filmed
    try:
        envs = vectorize(
            [partial(make_env, args, training, video) for video in videos],
            copy=False,  # collect() copies each observation into the rollout before the next step
            autoreset_mode=AutoresetMode.SAME_STEP if training else AutoresetMode.DISABLED,
        )
    except gym.error.Error as error:
        raise InputError(f"--env-id {args.env_id}: {error}") from error
    if training:
        envs = TransformReward(envs, partial(np.multiply, args.reward_scale))
        if args.norm_reward:
            envs = NormalizeReward(envs, gamma=args.gamma)
            envs.return_rms.count = 100.0  # a prior of variance 1, worth 100 steps: the first returns hardly vary
    return envs


@contextmanager
def opened(envs: gym.vector.VectorEnv):
    """Yields ``envs`` and closes them; after an error by force, for a worker may be gone and the others waiting."""
    try:
        yield envs
    except BaseException:
        for process in getattr(envs.unwrapped, "processes", ()):
            process.kill()
            envs.unwrapped.closed = True
        raise
    finally:
        envs.close()


def num_ranks() -> int:
    """How many processes train together: what torchrun started, or 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def lost_ranks_named():
    """Raises RunError where another rank is gone in the midst of a message."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"rank {dist.get_rank()} has lost another one, whose own message says why") from error


def averaged(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over the ranks; alone, ``tensor`` itself. Raises RunError."""
    if num_ranks() > 1:
        tensor = tensor / num_ranks()
        with lost_ranks_named():
            dist.all_reduce(tensor)
    return tensor


def gathered(item) -> list:
    """What each rank has for ``item``, any object that can be pickled; alone, ``item`` itself. Raises RunError."""
    items = [item] * num_ranks()
    if num_ranks() > 1:
        with lost_ranks_named():
            dist.all_gather_object(items, item)
    return items


class RunningNorm(nn.Module):
    """Shifts and scales observations to mean 0 and variance 1, by the statistics of all that training has seen.

    They are buffers: a checkpoint holds them, and every observation, a truncated episode's last one too, is
    normalised alike. They change between iterations only, so the ratio of an update starts at exactly 1.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(shape))  # 1 / std, ready for every step

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale).clamp(-10, 10)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merges the statistics of ``x [..., *shape]`` into the running ones (Chan et al. 1979)."""
        x = x.reshape(-1, *self.mean.shape)
        mean = averaged(x.mean(0))
        var = averaged(((x - mean) ** 2).mean(0))
        count = len(x) * num_ranks()
        total, delta = self.count + count, mean - self.mean
        self.var.copy_((self.count * self.var + count * var + delta**2 * self.count * count / total) / total)
        self.mean += delta * count / total
        self.count.copy_(total)
        self.scale.copy_(torch.rsqrt(self.var + 1e-8))


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights of gain ``std``, no bias (Huang et al. 2022, detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Actor and critic on a vector of observations; the policy is a normal distribution per action dimension.

    Its standard deviation does not depend on the state. What is sampled is unbounded, in units of half the action box
    from its middle: env_action() clips it for the environment only, and log-probabilities are those of the unclipped
    action.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
            raise InputError(f"{args.env_id} has no flat Box of observations; ppo_carracing.py learns from pixels")
        if not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1:
            raise InputError(f"{args.env_id} has no flat Box of actions; ppo_cartpole.py takes Discrete ones")
        width, (num_actions,) = args.hidden_size, action_space.shape

        def trunk() -> nn.Module:
            first, second = nn.Linear(observation_space.shape[0], width), nn.Linear(width, width)
            return nn.Sequential(layer_init(first), nn.Tanh(), layer_init(second), nn.Tanh())

        self.obs_norm = RunningNorm(observation_space.shape) if args.norm_obs else nn.Identity()
        self.actor_mean = nn.Sequential(trunk(), layer_init(nn.Linear(width, num_actions), std=0.01))
        self.actor_logstd = nn.Parameter(torch.full((num_actions,), args.log_std_init))
        self.critic = nn.Sequential(trunk(), layer_init(nn.Linear(width, 1), std=1.0))
        self.low, self.high = action_space.low, action_space.high
        bounded = np.isfinite(self.low) & np.isfinite(self.high)  # elsewhere an action is taken as it is
        low, high = np.where(bounded, self.low, -1), np.where(bounded, self.high, 1)
        self.middle, self.half = (low + high) / 2, (high - low) / 2

    def get_value(self, obs: Tensor) -> Tensor:
        """V(obs) ``[batch]`` of ``obs [batch, *obs_shape]``."""
        return self.critic(self.obs_norm(obs)).squeeze(-1)

    def sample(self, obs: Tensor) -> Tensor:
        """Draws an action for each of ``obs``."""
        mean = self.actor_mean(self.obs_norm(obs))
        return mean + self.actor_logstd.exp() * torch.randn_like(mean)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What training asks about ``actions`` at ``obs``: (log-probability, entropy, value), each ``[batch]``."""
        obs = self.obs_norm(obs)
        nats = self.actor_logstd + 0.5 * math.log(2 * math.pi)  # -log of the density's peak
        logprob = -(0.5 * ((actions - self.actor_mean(obs)) / self.actor_logstd.exp()) ** 2 + nats).sum(-1)
        return logprob, (nats + 0.5).sum().expand(len(obs)), self.critic(obs).squeeze(-1)

    def act(self, obs: Tensor) -> Tensor:
        """The action that evaluation plays: the mean."""
        return self.actor_mean(self.obs_norm(obs))

    def env_action(self, action: Tensor) -> np.ndarray:
        """What the environment takes for ``action``: -1 to 1 spans its box, beyond it the nearest point counts."""
        return np.clip(self.middle + self.half * action.cpu().numpy(), self.low, self.high)

    def observe(self, obs: Tensor) -> None:
        """Takes a rollout's observations into the statistics that normalise the next ones."""
        if isinstance(self.obs_norm, RunningNorm):
            self.obs_norm.update(obs)

    def calibrate(self, args: Args, device: torch.device) -> None:
        """Nothing to set after training: the policy that was trained is the one that is played."""

    def log(self, writer, rollout: dict[str, Tensor], global_step: int) -> None:
        """Shows in TensorBoard the mean of each action over a rollout, and the noise that explores around it."""
        means, stds = rollout["actions"].mean((0, 1)).tolist(), self.actor_logstd.exp().tolist()
        for i, (mean, std) in enumerate(zip(means, stds)):
            writer.add_scalar(f"actions/mean_{i}", mean, global_step)
            writer.add_scalar(f"actions/std_{i}", std, global_step)


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    dones: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16), without a loop over time.

    All tensors are floating point ``[num_steps, num_envs]``. ``next_values[t]`` is the value of the observation that
    step t led to, before any reset; ``terminations`` is 1 where an episode really ended, ``dones`` where it ended or
    was cut off by a time limit. Termination stops bootstrapping, truncation only the trace:

        delta_t = r_t + gamma (1 - termination_t) V(s_t+1) - V(s_t)
        A_t = delta_t + gamma lambda (1 - done_t) A_t+1

    This recurrence is a linear scan. Each round below lets A_t reach twice as far ahead, so that ceil(log2 num_steps)
    rounds of whole-tensor operations solve it (Hillis & Steele 1986; Blelloch 1990). Returns (advantages, returns),
    where returns = advantages + values are the critic's targets.
    """
    advantages = rewards + gamma * (1 - terminations) * next_values - values
    trace = gamma * gae_lambda * (1 - dones)  # the weight of A_t+reach in A_t; its tail, past the end, is cut off
    reach = 1
    while reach < len(rewards):
        ahead = trace[: len(rewards) - reach] * advantages[reach:]
        advantages = torch.cat([advantages[:-reach] + ahead, advantages[-reach:]])
        trace = trace[:-reach] * trace[reach:]
        reach *= 2
    return advantages, advantages + values


def ppo_loss(
    new_logprob: Tensor,
    logprob: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    new_value: Tensor,
    value: Tensor,
    returns: Tensor,
    clip_coef: float,
    vf_coef: float,
    ent_coef: float,
    clip_vloss: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's objective (Schulman et al. 2017, eq. 9), as a loss. All tensors are ``[batch]``.

    Returns the loss and, detached, what is logged, by CleanRL's names. approx_kl is the estimator (r - 1) - log r of
    http://joschu.net/blog/kl-approx.html: never negative, and less noisy than old_approx_kl's -log r.
    """
    logratio = new_logprob - logprob
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped).mean()  # eq. 7
    value_loss = (new_value - returns) ** 2
    if clip_vloss:
        moved = value + (new_value - value).clamp(-clip_coef, clip_coef)
        value_loss = torch.max(value_loss, (moved - returns) ** 2)
    value_loss = 0.5 * value_loss.mean()
    entropy = entropy.mean()
    loss = policy_loss + vf_coef * value_loss
    if ent_coef:  # at 0 it would be differentiated for nothing
        loss = loss - ent_coef * entropy
    with torch.no_grad():
        stats = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "old_approx_kl": -logratio.mean(),
            "approx_kl": ((ratio - 1) - logratio).mean(),
            "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        }
    return loss, {name: value.detach() for name, value in stats.items()}


def check_numbers(rollout: dict[str, Tensor], stats: dict[str, float], first_step: int) -> None:
    """Raises RunError where a rollout that began at ``first_step``, or the update that it led to, isn't finite."""
    for name in ("obs", "rewards"):
        for step, env, *_ in (~rollout[name].isfinite()).nonzero().tolist():
            step = first_step + step * rollout["rewards"].shape[1]
            raise RunError(f"{name} of environment {env} at step {step} are not finite")
    for name, value in stats.items():
        if not math.isfinite(value) and name != "explained_variance":  # which is nan where all returns are equal
            raise RunError(f"{name} is {value} in the update after step {first_step + rollout['rewards'].numel()}")


def anneal(initial: float, progress: float, enabled: bool = True) -> float:
    """Falls linearly from ``initial`` at progress 0 to 0 at progress 1; constant where not ``enabled``."""
    return initial * (1 - progress) if enabled else initial


def make_rollout(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> dict[str, Tensor]:
    """Allocates what collect() fills: tensors ``[num_steps, num_envs, ...]`` on ``device``, pixels as uint8."""
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    pixels, discrete = obs_space.dtype == np.uint8, np.issubdtype(action_space.dtype, np.integer)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(args.num_steps, envs.num_envs, *shape, dtype=dtype, device=device)

    return {
        "obs": zeros(*obs_space.shape, dtype=torch.uint8 if pixels else torch.float32),
        "actions": zeros(*action_space.shape, dtype=torch.int64 if discrete else torch.float32),
        **{name: zeros() for name in ("logprobs", "values", "next_values", "rewards", "terminations", "dones")},
    }


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` as a tensor of a rollout's type; to a GPU through pinned memory, so that nobody waits for the copy."""
    tensor = torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32, copy=False))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@torch.inference_mode()
def collect(
    agent: nn.Module, envs: gym.vector.VectorEnv, rollout: dict[str, Tensor], obs: np.ndarray
) -> tuple[np.ndarray, list[tuple[float, int]]]:
    """Plays ``num_steps`` steps in every environment and fills ``rollout`` with them.

    ``obs [num_envs, *obs_shape]`` is what the environments showed last. Returns what they show now, and the
    (return, length) of each episode that ended on the way.
    """
    num_steps, num_envs = rollout["rewards"].shape
    device = rollout["rewards"].device
    rewards, terminations, truncations = (np.zeros((num_steps, num_envs), np.float32) for _ in range(3))
    episodes, last_obs, last_steps, last_envs = [], [], [], []
    for step in range(num_steps):
        action = agent.sample(rollout["obs"][step].copy_(to_device(obs, device)))
        rollout["actions"][step] = action
        obs, rewards[step], terminated, truncated, infos = envs.step(agent.env_action(action))
        terminations[step], truncations[step] = terminated, truncated & ~terminated
        if "final_info" in infos:
            ended, episode = infos["_final_info"], infos["final_info"]["episode"]
            episodes += zip(episode["r"][ended].tolist(), episode["l"][ended].tolist())
            for env in np.flatnonzero(truncations[step]):
                last_obs.append(infos["final_obs"][env])
                last_steps.append(step)
                last_envs.append(env)
    # Nobody needs log-probabilities and values before now: one pass over the whole rollout costs less than many small.
    logprobs, _, values = agent.evaluate_actions(rollout["obs"].flatten(0, 1), rollout["actions"].flatten(0, 1))
    rollout["logprobs"].copy_(logprobs.view(num_steps, num_envs))
    rollout["values"].copy_(values.view(num_steps, num_envs))
    rollout["rewards"].copy_(torch.from_numpy(rewards))
    rollout["terminations"].copy_(torch.from_numpy(terminations))
    rollout["dones"].copy_(torch.from_numpy(terminations + truncations))
    # A step leads to the next step's observation, but the last step to the one in hand, and a truncated one to the
    # observation that the reset hid (Pardo et al. 2018, "Time Limits in Reinforcement Learning").
    rollout["next_values"][:-1] = rollout["values"][1:]
    rollout["next_values"][-1] = agent.get_value(to_device(obs, device))
    if last_obs:
        rollout["next_values"][last_steps, last_envs] = agent.get_value(to_device(np.stack(last_obs), device))
    return obs, episodes


def minibatch_loss(
    agent: nn.Module, mb: dict[str, Tensor], clip_coef: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """ppo_loss of a minibatch, rows of a rollout. With --compile, this and its gradient are a few kernels."""
    new_logprob, entropy, new_value = agent.evaluate_actions(mb["obs"], mb["actions"])
    return ppo_loss(
        new_logprob, mb["logprobs"], mb["advantages"], entropy, new_value, mb["values"], mb["returns"],
        clip_coef, args.vf_coef, args.ent_coef, args.clip_vloss,
    )  # fmt: skip


def update(
    agent: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollout: dict[str, Tensor],
    args: Args,
    clip_coef: float,
    loss_of: Callable = minibatch_loss,
) -> dict[str, float]:
    """Improves the agent on one rollout: epochs of shuffled minibatches. Returns what is logged, as means."""
    names = ("rewards", "values", "next_values", "terminations", "dones")
    advantages, returns = compute_gae(*(rollout[name] for name in names), args.gamma, args.gae_lambda)
    columns = {name: rollout[name] for name in ("obs", "actions", "logprobs", "values")}
    columns |= {"advantages": advantages, "returns": returns}
    batch = {name: column.flatten(0, 1) for name, column in columns.items()}
    parameters, stats = list(agent.parameters()), []
    clip_coef = torch.full((), clip_coef, device=returns.device)  # as a number, each new one would be compiled anew
    minibatch_size = returns.numel() // args.num_minibatches  # of this rank; all ranks' together make a minibatch
    for _ in range(args.update_epochs):
        shuffle = torch.randperm(returns.numel(), device=returns.device)
        shuffled = {name: column[shuffle] for name, column in batch.items()}  # one gather; minibatches are views
        if args.norm_adv and args.minibatch_size > 1:  # within each minibatch, all of them in one go
            rows = shuffled["advantages"].view(-1, minibatch_size)
            rows -= averaged(rows.mean(1, keepdim=True))
            variance = averaged((rows**2).mean(1, keepdim=True)) * args.minibatch_size / (args.minibatch_size - 1)
            rows /= variance.sqrt() + 1e-8
        for views in zip(*(column.split(minibatch_size) for column in shuffled.values())):
            loss, loss_stats = loss_of(agent, dict(zip(shuffled, views)), clip_coef, args)
            optimizer.zero_grad()
            loss.backward()
            if num_ranks() > 1:  # one message for all gradients
                grads = averaged(torch.cat([parameter.grad.flatten() for parameter in parameters]))
                for parameter, grad in zip(parameters, grads.split([parameter.numel() for parameter in parameters])):
                    parameter.grad = grad.view_as(parameter)
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            stats.append(torch.stack([*loss_stats.values(), grad_norm]))  # copied: a CUDA graph reuses its outputs
        if args.target_kl is not None and averaged(loss_stats["approx_kl"]) > args.target_kl:
            break
    explained_variance = 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()
    means = averaged(torch.cat([torch.stack(stats).mean(0), explained_variance[None]]))
    return dict(zip([*loss_stats, "grad_norm", "explained_variance"], means.tolist()))


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes ``checkpoint`` to ``path``, whole or not at all: a crash leaves the previous file. Raises RunError."""
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch's own, where its last bytes can't be written
        unfinished.unlink(missing_ok=True)
        raise RunError(f"{path} can't be written: {error}") from error


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint, or the ``latest.pt`` of a run's folder, as data only. Raises InputError."""
    path = path / "latest.pt" if path.is_dir() else path
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is no checkpoint that can be read ({type(error).__name__})") from error
    if script != Path(__file__).stem:
        raise InputError(f"{path} was written by {script}.py: use that script")
    return checkpoint


# What describes this call and not the agent: never saved, always from the command line.
CALL = (
    "cuda", "num_threads", "compile", "resume", "evaluate", "eval_episodes", "eval_seed", "render", "capture_video",
    "log_dir",
)  # fmt: skip


def adopt_args(args: Args, checkpoint: dict, free: tuple[str, ...] = ()) -> Args:
    """Takes a checkpoint's settings over. Raises InputError where a flag, but for those in ``free``, contradicts."""
    defaults, saved = asdict(preset(args.env_id)) | {"env_id": Args().env_id}, checkpoint["args"]
    given = {name for name, value in asdict(args).items() if value != defaults[name]}
    for name in sorted(given & saved.keys() - set(free)):
        if getattr(args, name) != saved[name]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise InputError(f"{flag} contradicts the checkpoint's {saved[name]}: leave the flag out")
    return replace(args, **{name: value for name, value in saved.items() if name not in given})


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device, weights: dict | None = None) -> nn.Module:
    """Builds the agent for ``envs``, with ``weights`` if given. Raises InputError where they don't fit."""
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    try:
        if weights is not None:
            agent.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the checkpoint's weights don't fit {args.env_id} as this script sees it") from error
    return agent


def pick_device(args: Args) -> torch.device:
    """The GPU if ``args.cuda`` and there is one, else the CPU, with a warning where a GPU was asked for."""
    if args.cuda and not torch.cuda.is_available():
        print("warning: --cuda, but torch finds no GPU: going on with the CPU", file=sys.stderr)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device(f"cuda:{local_rank}" if args.cuda and torch.cuda.is_available() else "cpu")


def join_ranks(device: torch.device) -> int:
    """Joins the other processes where torchrun started several. Returns this one's rank, 0 to num_ranks() - 1."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Adam would load this module later, whose default arguments then keep the group and its threads past their end.
        import torch.distributed.nn

        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank() if dist.is_initialized() else 0


def open_writer(args: Args, folder: Path, global_step: int):
    """Opens a run's TensorBoard log: hyperparameters as text and in the HPARAMS tab, one page of first-look charts."""
    from torch.utils.tensorboard import SummaryWriter  # here, because evaluation and import need not wait for it
    from torch.utils.tensorboard.summary import hparams

    writer = SummaryWriter(str(folder), purge_step=global_step + 1 if global_step else None)
    settings = {name: value if isinstance(value, int | float) else str(value) for name, value in asdict(args).items()}
    table = "\n".join(f"|{name}|{value}|" for name, value in settings.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    for summary in hparams(settings, {"eval/return_mean": 0.0, "charts/episodic_return": 0.0})[:2]:
        writer.file_writer.add_summary(summary)
    pages = {
        "return": ["charts/episodic_return", "eval/return_mean"],
        "explained variance": ["losses/explained_variance"],
        "policy": ["losses/approx_kl", "losses/clipfrac"],
        "entropy": ["losses/entropy"],
        "speed": ["charts/SPS"],
    }
    writer.add_custom_scalars({"PPO": {name: ["Multiline", tags] for name, tags in pages.items()}})
    return writer


def add_video(writer, folder: Path, global_step: int) -> None:
    """Shows an evaluation's mp4 in TensorBoard, as a GIF. (Torch's add_video doesn't work with moviepy 2.)"""
    from moviepy import VideoFileClip
    from tensorboard.compat.proto.summary_pb2 import Summary

    for mp4 in (folder / "videos").glob("*.mp4"):
        gif = mp4.with_suffix(".gif")
        with VideoFileClip(str(mp4)) as clip:
            clip.resized(width=240).write_gif(str(gif), fps=10, logger=None)
        image = Summary.Image(encoded_image_string=gif.read_bytes(), width=240, colorspace=3)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="eval/video", image=image)]), global_step)


@contextmanager
def caught_signals():
    """Yields a list that collects SIGINT and SIGTERM, for a run to end between iterations; the second one kills."""
    caught = []

    def catch(signum, frame):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    previous = {signum: signal.signal(signum, catch) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def train(args: Args) -> Path:
    """Trains to ``args.total_timesteps``, evaluates the final weights and returns the run's folder.

    Under torchrun each process steps its share of the environments, and rank 0 alone logs, saves and evaluates. Raises
    InputError where ``args`` can't be used, SystemExit (130 or 143) after SIGINT or SIGTERM.
    """
    checkpoint = None if args.resume is None else load_checkpoint(args.resume)
    args = args if checkpoint is None else adopt_args(args, checkpoint)
    check_args(args)
    device = pick_device(args)
    rank = join_ranks(device)
    torch.manual_seed(args.seed)
    rng = torch.cuda if device.type == "cuda" else torch
    torch.set_num_threads(args.num_threads)  # the weights' first bits depend on it, through the QR decomposition
    torch.backends.cudnn.deterministic = args.torch_deterministic
    with opened(make_envs(args, args.num_envs // num_ranks(), training=True)) as envs, caught_signals() as caught:
        agent = make_agent(args, envs, device, checkpoint and checkpoint["agent"])
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        rollout = make_rollout(args, envs, device)
        loss_of = torch.compile(minibatch_loss, mode="reduce-overhead") if args.compile else minibatch_loss
        first_iteration, best_return, recent_returns = 0, -math.inf, deque(maxlen=100)
        if checkpoint is None:
            name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
            folder = args.log_dir / name.replace("/", "_")
            try:
                if rank == 0:
                    folder.mkdir(parents=True)
            except OSError as error:
                raise InputError(f"--log-dir {args.log_dir} can't be written: {error.strerror}") from error
        else:
            folder = args.resume if args.resume.is_dir() else args.resume.parent
            optimizer.load_state_dict(checkpoint["optimizer"])
            if args.norm_reward:
                vars(envs.return_rms).update(checkpoint["return_rms"])
            first_iteration, best_return = checkpoint["iteration"], checkpoint["best_return"]
            recent_returns.extend(checkpoint["recent_returns"])
            if device.type in checkpoint["rng_state"]:
                rng.set_rng_state(checkpoint["rng_state"][device.type])
        if num_ranks() > 1:  # the same weights everywhere, noise and environments of one's own
            for tensor in agent.state_dict().values():
                dist.broadcast(tensor, 0)
            if rank > 0:
                torch.manual_seed(args.seed + first_iteration * num_ranks() + rank)
        global_step = first_step = first_iteration * args.batch_size
        writer = open_writer(args, folder, global_step) if rank == 0 else None
        total_steps = args.num_iterations * args.batch_size
        silent = True if rank > 0 else None  # None: a bar on a terminal only
        bar = tqdm(total=total_steps, initial=global_step, unit=" steps", disable=silent)
        # Episodes in flight are no part of a checkpoint: a resumed run starts new ones, from seeds of their own.
        obs, _ = envs.reset(seed=args.seed + first_iteration * args.num_envs + rank * envs.num_envs)
        start = last_line = time.perf_counter()
        stop = []  # signals; a run that is resumed after its last iteration goes straight to the evaluation
        for iteration in range(first_iteration + 1, args.num_iterations + 1):
            progress = (iteration - 1) / args.num_iterations
            learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
            optimizer.param_groups[0]["lr"] = learning_rate
            clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)

            iteration_start = time.perf_counter()
            torch.set_num_threads(1)  # torch's idle threads spin, which starves the environments' workers
            try:
                obs, episodes = collect(agent, envs, rollout, obs)
            except Exception as error:
                check_numbers(rollout, {}, global_step)  # an action that isn't finite may be what they failed at
                gone = isinstance(error, EOFError | ConnectionError)  # killed, perhaps for want of memory
                what = "one of their processes is gone" if gone else f"{type(error).__name__}: {error}"
                raise RunError(f"the environments failed after step {global_step}: {what}") from error
            collected = time.perf_counter()
            torch.set_num_threads(args.num_threads)
            stats = update(agent, optimizer, rollout, args, clip_coef, loss_of)
            check_numbers(rollout, stats, global_step)
            agent.observe(rollout["obs"])
            # What the ranks have to agree on, besides gradients: what is reported, when to stop, the scale of rewards.
            reports = gathered((episodes, caught, vars(envs.return_rms) if args.norm_reward else {}))
            episodes = [episode for report in reports for episode in report[0]]
            stop = [signum for report in reports for signum in report[1]]
            for name in reports[0][2]:
                setattr(envs.return_rms, name, np.mean([report[2][name] for report in reports], axis=0))
            now = time.perf_counter()

            global_step += args.batch_size
            scalars = {f"losses/{name}": value for name, value in stats.items()}
            scalars["charts/learning_rate"] = learning_rate
            scalars["charts/clip_coef"] = clip_coef
            scalars["charts/SPS"] = (global_step - first_step) / (now - start)
            scalars["time/collect_fraction"] = (collected - iteration_start) / (now - iteration_start)
            if episodes:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(episodes, axis=0)
            for tag, value in scalars.items() if rank == 0 else ():
                writer.add_scalar(tag, value, global_step)
            recent_returns.extend(episode_return for episode_return, _ in episodes)
            mean_return = float(np.mean(recent_returns)) if recent_returns else math.nan
            bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
            bar.update(args.batch_size)
            if bar.disable and rank == 0 and now - last_line > 10:  # a log file gets a plain line now and then
                last_line, speed = now, scalars["charts/SPS"]
                print(f"step {global_step}/{total_steps} return {mean_return:.1f} SPS {speed:.0f}", flush=True)

            due = stop or iteration % args.checkpoint_interval == 0 or iteration == args.num_iterations
            if due and rank == 0:
                best = len(recent_returns) == recent_returns.maxlen and mean_return > best_return
                best_return = mean_return if best else best_return
                checkpoint = {
                    "script": Path(__file__).stem,
                    "args": {name: value for name, value in asdict(args).items() if name not in CALL},
                    "agent": agent.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "return_rms": {k: float(v) for k, v in vars(envs.return_rms).items()} if args.norm_reward else None,
                    "rng_state": {device.type: rng.get_rng_state()},
                    "iteration": iteration,
                    "global_step": global_step,
                    "recent_returns": list(recent_returns),
                    "best_return": best_return,
                }
                for name in ("best.pt", "latest.pt") if best else ("latest.pt",):
                    save_checkpoint(folder / name, checkpoint)
                agent.log(writer, rollout, global_step)
            if stop:
                break
        bar.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if stop:
        print(f"stopped: go on with python {Path(__file__).name} --resume {folder}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    if rank > 0:
        return folder
    agent.calibrate(args, device)  # what it sets belongs to the weights
    save_checkpoint(folder / "latest.pt", checkpoint | {"agent": agent.state_dict()})
    returns, _ = evaluate(args, agent.state_dict(), folder, device)
    writer.add_scalar("eval/return_mean", returns.mean(), global_step)
    if args.capture_video:
        add_video(writer, folder, global_step)
    writer.close()
    print(f"checkpoint: {folder / 'latest.pt'}")
    print(f"watch it:   python {Path(__file__).name} --evaluate {folder} --render")
    return folder


@torch.inference_mode()
def play(args: Args, weights: dict[str, Tensor], folder: Path, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Plays ``args.eval_episodes`` episodes without noise, each from its own seed.

    Returns the returns, in the environment's own reward, and the lengths, in steps, both ``[eval_episodes]``. A video
    goes to ``folder``/videos.
    """
    num_envs = 1 if args.render else min(args.num_envs, args.eval_episodes)
    torch.set_num_threads(1)
    video_folder = folder / "videos" if args.capture_video else None
    with opened(make_envs(args, num_envs, training=False, video_folder=video_folder)) as envs:
        agent = make_agent(args, envs, device, weights)
        returns, lengths = np.zeros((2, args.eval_episodes))
        totals, steps = np.zeros((2, num_envs))
        episodes = np.arange(num_envs)  # the one that each environment plays; those past the last don't count
        obs, _ = envs.reset(seed=(args.eval_seed + episodes).tolist())
        while (episodes < args.eval_episodes).any():
            action = agent.act(to_device(obs, device))
            obs, rewards, terminated, truncated, _ = envs.step(agent.env_action(action))
            totals += rewards
            steps += 1
            done = terminated | truncated
            if done.any():
                counted = done & (episodes < args.eval_episodes)
                returns[episodes[counted]], lengths[episodes[counted]] = totals[counted], steps[counted]
                totals[done] = steps[done] = 0
                episodes[done] = episodes.max() + 1 + np.arange(done.sum())
                obs, _ = envs.reset(seed=(args.eval_seed + episodes).tolist(), options={"reset_mask": done})
    return returns, lengths


def evaluate(
    args: Args, weights: dict[str, Tensor], folder: Path, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Plays, prints one line of statistics and returns what play() does."""
    returns, lengths = play(args, weights, folder, device)
    print(
        f"evaluation: mean {returns.mean():.1f} std {returns.std():.1f} median {np.median(returns):.1f} "
        f"min {returns.min():.1f} max {returns.max():.1f} episodes {len(returns)} first-seed {args.eval_seed}",
        flush=True,
    )
    return returns, lengths


def main() -> None:
    """Reads the flags, then trains or evaluates. What is refused ends in a line and status 2, failures in status 1."""
    env_id = tyro.cli(Args, description=__doc__).env_id
    args = tyro.cli(Args, description=__doc__, default=preset(env_id))
    try:
        if args.evaluate is None:
            train(args)
        else:
            check_args(args)
            checkpoint = load_checkpoint(args.evaluate)
            args = adopt_args(args, checkpoint, free=("num_envs", "async_envs"))
            folder = args.evaluate if args.evaluate.is_dir() else args.evaluate.parent
            evaluate(args, checkpoint["agent"], folder, pick_device(args))
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
