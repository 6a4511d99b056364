"""Prints how fast CarRacing-v3 is, Gymnasium's own and the one of ppo_carracing.py.

    python benchmarks/car_racing.py

First the environment alone, on one core. All variants drive the same drive, one after the other in
each round, so that a slow moment of the machine hits all of them; figures are medians over the
rounds. Then whole training runs on all cores, cut short: the script, the script on the stock
environment, and Stable-Baselines3's PPO with the settings of its zoo.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_carracing
from ppo_carracing import ACTION_REPEAT, ActionRepeat, FastCarRacing

FRAMES = 240  # of the drive
ROUNDS = 5
SEED = 4  # of the track


def follow_the_road(env: gym.Env) -> np.ndarray:
    """Steers for the tile five ahead, at a moderate speed."""
    car, road = env.unwrapped.car, np.array(env.unwrapped.track)[:, 2:]
    nearest = np.square(road - car.hull.position).sum(1).argmin()
    dx, dy = road[(nearest + 5) % len(road)] - car.hull.position
    error = (np.arctan2(-dx, dy) - car.hull.angle + np.pi) % (2 * np.pi) - np.pi
    gas = 0.5 if np.hypot(*car.hull.linearVelocity) < 45 else 0.0
    return np.array([np.clip(-2 * error, -1, 1), gas, 0], np.float32)


def frames_per_second(env: gym.Env, actions: list[np.ndarray], repeat: int = 1) -> float:
    """Plays ``actions``, each of which the environment holds for ``repeat`` frames."""
    env.reset(seed=SEED)
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return len(actions) * repeat / (time.perf_counter() - start)


def script_speed(*flags: str) -> float:
    """Steps per second of a run of ppo_carracing.py, without its start and its evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ppo_carracing.__file__, "--log-dir", folder, *flags]
        command += ["--total-timesteps", "8192", "--eval-episodes", "1"]
        subprocess.run(command, check=True, capture_output=True)
        (run,) = Path(folder).iterdir()
        return EventAccumulator(str(run)).Reload().Scalars("charts/SPS")[-1].value


def zoo_env() -> gym.Env:
    """Two frames per action, grey; the zoo shrinks to 64 x 64, which costs more than this cut."""
    env = ActionRepeat(gym.make("CarRacing-v3"), 2)
    grey = gym.spaces.Box(0, 255, (64, 64, 1), np.uint8)
    return gym.wrappers.TransformObservation(env, lambda frame: frame[16:80, 16:80, 1:2], grey)


def sb3_speed() -> float:
    """Steps per second of Stable-Baselines3's PPO, by its zoo's settings for CarRacing, over one
    rollout and update."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize
    from torch import nn

    envs = VecNormalize(VecFrameStack(SubprocVecEnv([zoo_env] * 8), 2), norm_obs=False)
    model = PPO(
        "CnnPolicy", envs, n_steps=512, batch_size=128, n_epochs=10, learning_rate=1e-4,
        use_sde=True, sde_sample_freq=4,
        policy_kwargs={
            "log_std_init": -2, "ortho_init": False, "activation_fn": nn.GELU, "net_arch": [256],
        },
    )  # fmt: skip
    start = time.perf_counter()
    model.learn(8 * 512)
    seconds = time.perf_counter() - start
    envs.close()
    return 8 * 512 / seconds


def measure_environments() -> None:
    """Prints frames per second of the variants, and how much faster the drawing alone became."""
    stock_spec = gym.spec("CarRacing-v3")
    fast_spec = replace(stock_spec, entry_point=FastCarRacing)
    stock = gym.make(stock_spec, disable_env_checker=True)
    fast = gym.make(fast_spec, disable_env_checker=True)
    repeated = ActionRepeat(gym.make(fast_spec, disable_env_checker=True), 4)
    blind = gym.make(fast_spec, disable_env_checker=True)
    blind.reset(seed=SEED)
    blind.unwrapped.draw = False

    fast.reset(seed=SEED)
    actions = []
    for _ in range(FRAMES):
        actions.append(follow_the_road(fast))
        fast.step(actions[-1])

    rates = {"stock": [], "fast": [], "fast, repeat 4": [], "physics alone": []}
    for _ in range(ROUNDS):
        rates["stock"].append(frames_per_second(stock, actions))
        rates["fast"].append(frames_per_second(fast, actions))
        rates["fast, repeat 4"].append(frames_per_second(repeated, actions[::4], repeat=4))
        rates["physics alone"].append(frames_per_second(blind, actions))
    rates = {name: np.array(values) for name, values in rates.items()}
    for name, values in rates.items():
        ratio = np.median(values / rates["stock"])
        print(f"{name:15s} {np.median(values):7.0f} frames/s  {ratio:6.1f} x stock")
    stock_drawing = 1 / rates["stock"] - 1 / rates["physics alone"]  # seconds per frame
    fast_drawing = 1 / rates["fast"] - 1 / rates["physics alone"]
    print(f"drawing alone   {np.median(stock_drawing / fast_drawing):.1f} x as fast as stock")


def measure_training() -> None:
    """Prints steps and frames per second of whole training runs."""
    runs = {  # what measures steps per second, and the frames in a step
        "training": (script_speed, ACTION_REPEAT),
        "training on stock": (partial(script_speed, "--stock-env"), ACTION_REPEAT),
        "training with SB3": (sb3_speed, 2),
    }
    first = None
    for name, (measure, repeat) in runs.items():
        steps = measure()
        frames = steps * repeat
        first = first or frames
        speed = f"{steps:4.0f} steps/s {frames:5.0f} frames/s"
        print(f"{name:18s} {speed}; the first is {first / frames:.1f} x as fast", flush=True)


if __name__ == "__main__":
    measure_environments()
    measure_training()
