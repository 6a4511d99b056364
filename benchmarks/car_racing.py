"""Prints how fast CarRacing-v3 is, stock and as ppo_carracing.py has it, on one core: python benchmarks/car_racing.py

The variants take turns over the same drive, round after round, so that a slow moment of the machine hits all of them;
the figures are medians over the rounds.
"""

import copy
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from ppo_carracing import ActionRepeat, FastCarRacing

FRAMES, ROUNDS, SEED = 240, 5, 4


def follow_the_road(env: gym.Env) -> np.ndarray:
    """Steers for the tile five ahead, at a moderate speed."""
    car, road = env.unwrapped.car, np.array(env.unwrapped.track)[:, 2:]
    nearest = np.square(road - car.hull.position).sum(1).argmin()
    dx, dy = road[(nearest + 5) % len(road)] - car.hull.position
    error = (np.arctan2(-dx, dy) - car.hull.angle + np.pi) % (2 * np.pi) - np.pi
    gas = 0.5 if np.hypot(*car.hull.linearVelocity) < 45 else 0.0
    return np.array([np.clip(-2 * error, -1, 1), gas, 0], np.float32)


def frames_per_second(env: gym.Env, actions: list[np.ndarray], repeat: int = 1) -> float:
    """Plays ``actions``, each one standing for ``repeat`` frames."""
    env.reset(seed=SEED)
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return len(actions) * repeat / (time.perf_counter() - start)


def main() -> None:
    spec = copy.deepcopy(gym.spec("CarRacing-v3"))
    stock = gym.make(spec, disable_env_checker=True)
    spec.entry_point = FastCarRacing
    fast = gym.make(spec, disable_env_checker=True)
    blind = gym.make(spec, disable_env_checker=True)
    repeated = ActionRepeat(gym.make(spec, disable_env_checker=True), 4, patience=None)
    fast.reset(seed=SEED)
    actions = []
    for _ in range(FRAMES):
        actions.append(follow_the_road(fast))
        fast.step(actions[-1])
    blind.reset(seed=SEED)
    blind.unwrapped.draw = False
    rates = {"stock": [], "fast": [], "fast, repeat 4": [], "physics alone": []}
    for _ in range(ROUNDS):
        rates["stock"].append(frames_per_second(stock, actions))
        rates["fast"].append(frames_per_second(fast, actions))
        rates["fast, repeat 4"].append(frames_per_second(repeated, actions[::4], repeat=4))
        rates["physics alone"].append(frames_per_second(blind, actions))
    for name, values in rates.items():
        ratio = np.median(np.array(values) / rates["stock"])
        print(f"{name:15s} {np.median(values):7.0f} frames/s  {ratio:6.1f} x stock")
    drawing = [1 / rate - 1 / bare for rate, bare in zip(rates["stock"], rates["physics alone"])]
    quicker = [1 / rate - 1 / bare for rate, bare in zip(rates["fast"], rates["physics alone"])]
    print(f"drawing alone   {np.median(np.array(drawing) / quicker):.1f} x as fast as stock")


if __name__ == "__main__":
    main()
