"""What a GPU and a compiled update gain, for CarRacing and for continuous control: python benchmarks/gpu.py

Prints the milliseconds of a minibatch, eager and with --compile, of a policy's answer to one step of the environments
(copies there and back included) and of GAE, by the scan and by a loop; then whole runs on the GPU and on the CPU, with
the share of the time in which the policy waits for the environments. Without a GPU, or with --device cpu, the CPU
stands in for it: the same lines, nothing to compare.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_carracing
import ppo_continuous_mlp


@dataclass
class Args:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the parts are timed"""
    repetitions: int = 20
    """of each timed part; the median counts"""
    iterations: int = 12
    """of each whole run; the first half, which compiles and warms up, doesn't count"""


def milliseconds(part: Callable[[], object], repetitions: int) -> float:
    """The median time of ``part``, the device's work included, after three calls that don't count."""
    times = []
    for _ in range(3 + repetitions):
        start = time.perf_counter()
        part()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[3:]))


def gae_loop(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """compute_gae as it is mostly written."""
    advantages, trace = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (1 - terminations[t]) * next_values[t] - values[t]
        advantages[t] = trace = delta + gamma * gae_lambda * (1 - dones[t]) * trace
    return advantages, advantages + values


def prepared(script, device: torch.device) -> tuple:
    """The script's defaults, an agent and a rollout of their sizes on ``device``, and what is seen at the start."""
    settings = script.Args(async_envs=False)
    envs = script.make_envs(settings, settings.num_envs, training=True)
    agent, rollout = script.make_agent(settings, envs, device), script.make_rollout(settings, envs, device)
    obs, _ = envs.reset(seed=1)
    envs.close()
    rollout["obs"].copy_(script.to_device(obs, device))
    rollout["actions"].copy_(agent.sample(rollout["obs"].flatten(0, 1)).detach().view_as(rollout["actions"]))
    rollout["rewards"].normal_()
    return settings, agent, rollout, obs


def minibatch(script, settings, agent, rollout, loss_of: Callable, repetitions: int) -> float:
    """Milliseconds of one minibatch of an update, its share of GAE and of shuffling included."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-6, eps=1e-5, fused=True)
    update = [agent, optimizer, rollout, settings, settings.clip_coef, loss_of]
    took = milliseconds(lambda: script.update(*update), repetitions)
    return took / settings.update_epochs / settings.num_minibatches


def parts(script, args: Args) -> None:
    """Prints what the device needs for updates and for answers."""
    device = torch.device(args.device)
    settings, agent, rollout, obs = prepared(script, device)
    compiled = torch.compile(script.minibatch_loss, mode="reduce-overhead")
    losses = (script.minibatch_loss, compiled)
    times = [minibatch(script, settings, agent, rollout, loss_of, args.repetitions) for loss_of in losses]
    print(f"  minibatch of {settings.minibatch_size}    {times[0]:8.3f} ms eager {times[1]:8.3f} ms compiled", end="")
    print(f"   {times[0] / times[1]:.1f} x as fast")
    with torch.inference_mode():
        answer = milliseconds(lambda: agent.env_action(agent.sample(script.to_device(obs, device))), args.repetitions)
    print(f"  one step's policy  {answer:8.3f} ms for {settings.num_envs} environments")


def whole_run(script, flags: list[str], iterations: int, ranks: int = 1) -> tuple[float, float]:
    """Trains for a while. Returns the second half's steps per second and the share of its time spent collecting."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    steps = iterations * script.Args().batch_size
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, script.__file__, "--log-dir", folder, "--eval-episodes", "1", *flags]
        subprocess.run([*command, "--total-timesteps", str(steps)], check=True, stdout=subprocess.DEVNULL)
        (place,) = Path(folder).iterdir()
        log = EventAccumulator(str(place)).Reload()
    points = log.Scalars("time/collect_fraction")[iterations // 2 :]
    speed = (points[-1].step - points[0].step) / (points[-1].wall_time - points[0].wall_time)
    return speed, float(np.mean([point.value for point in points]))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'the CPU'}, torch {torch.__version__}")
    rollout = [torch.rand(2048, 64, device=args.device) for _ in range(3)] + [torch.zeros(2048, 64).to(args.device)] * 2
    for name, gae in (("scan", ppo_continuous_mlp.compute_gae), ("loop", gae_loop)):
        took = milliseconds(lambda gae=gae: gae(*rollout, 0.99, 0.95), args.repetitions)
        print(f"GAE of 2048 x 64 by a {name} {took:10.3f} ms", flush=True)
    for script in (ppo_carracing, ppo_continuous_mlp):
        print(Path(script.__file__).name, flush=True)
        parts(script, args)
        cuda = [["--cuda"], ["--cuda", "--compile"]] if args.device == "cuda" else []
        for flags in (*cuda, ["--no-cuda"], ["--no-cuda", "--compile"]):
            speed, collecting = whole_run(script, flags, args.iterations)
            print(f"  {' '.join(flags):22s} {speed:8.0f} steps/s, {collecting:4.0%} of the time collecting", flush=True)


if __name__ == "__main__":
    main()
