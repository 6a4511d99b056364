"""Prints what a GPU and --compile gain, for CarRacing and for continuous control.

    python benchmarks/gpu.py

First the milliseconds of GAE. Then for each script those of a minibatch, eager and compiled, and of
the policy's answer to one step of the environments, the copies to the device and back included;
and the speed of whole runs on the GPU and on the CPU, with the share of the time that they spend
collecting, in which the policy waits for the environments. Without a GPU, or with --device cpu,
everything is measured on the CPU alone.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
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
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the parts are timed
    repetitions: int = 20  # of each timed part; the median counts
    iterations: int = 12  # of each whole run; the first half, in which it compiles, doesn't count


def milliseconds(part: Callable[[], object], repetitions: int) -> float:
    """The median time of ``part``, the device's work included, after three calls to warm up."""
    times = []
    for _ in range(3 + repetitions):
        start = time.perf_counter()
        part()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[3:]))


def prepared(script, device: torch.device) -> tuple:
    """The script's default settings, an agent on ``device``, a rollout, and the observations that
    follow it."""
    settings = script.Args(async_envs=False)
    with closing(script.make_envs(settings, settings.num_envs, training=True)) as envs:
        spaces = envs.single_observation_space, envs.single_action_space
        agent = script.Agent(*spaces, settings).to(device)
        obs, _ = envs.reset(seed=1)
        rollout, obs, _ = script.collect(agent, envs, obs, settings.num_steps)
    return settings, agent, rollout, obs


def minibatch(script, settings, agent, rollout, backward_fn: Callable, repetitions: int) -> float:
    """Milliseconds of one minibatch of an update, its share of GAE and of shuffling included."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-6, eps=1e-5, fused=True)
    inputs = [agent, optimizer, rollout, settings.clip_coef, settings, backward_fn]
    took = milliseconds(lambda: script.update(*inputs), repetitions)
    return took / settings.update_epochs / settings.num_minibatches


def parts(script, args: Args) -> None:
    """Prints the times of a minibatch and of the policy's answer to one step."""
    device = torch.device(args.device)
    settings, agent, rollout, obs = prepared(script, device)

    def answer() -> None:
        agent.env_actions(agent.sample_actions(torch.tensor(obs, device=device)))

    torch._dynamo.config.trace_autograd_ops = True
    compiled_backward = torch.compile(script.backward, mode="reduce-overhead")
    inputs = [script, settings, agent, rollout]
    eager = minibatch(*inputs, script.backward, args.repetitions)
    compiled = minibatch(*inputs, compiled_backward, args.repetitions)
    size = settings.batch_size // settings.num_minibatches
    print(f"  minibatch of {size}    {eager:8.3f} ms eager {compiled:8.3f} ms compiled", end="")
    print(f"   {eager / compiled:.1f} x as fast")
    with torch.inference_mode():
        took = milliseconds(answer, args.repetitions)
    print(f"  one step's policy  {took:8.3f} ms for {settings.num_envs} environments")


def whole_run(script, flags: list[str], iterations: int, processes: int = 1) -> tuple[float, float]:
    """Trains for a while. Returns the second half's steps per second and the share of its time that
    went into collecting."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        command += [script.__file__, "--log-dir", folder, "--eval-episodes", "1", *flags]
        command += ["--total-timesteps", str(iterations * script.Args().batch_size)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (run,) = Path(folder).iterdir()
        log = EventAccumulator(str(run)).Reload()
    points = log.Scalars("time/collect_fraction")[iterations // 2 :]
    speed = (points[-1].step - points[0].step) / (points[-1].wall_time - points[0].wall_time)
    return speed, float(np.mean([point.value for point in points]))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    print(f"{device}, torch {torch.__version__}")
    rewards, values, next_values = torch.rand(3, 2048, 64, device=args.device)
    terminations, dones = torch.zeros(2, 2048, 64, device=args.device)
    inputs = [rewards, values, next_values, terminations, dones, 0.99, 0.95]
    took = milliseconds(lambda: ppo_continuous_mlp.compute_gae(*inputs), args.repetitions)
    print(f"GAE of 2048 x 64 {took:10.3f} ms", flush=True)
    runs = [["--no-cuda"], ["--no-cuda", "--compile"]]
    if args.device == "cuda":
        runs = [["--cuda"], ["--cuda", "--compile"], *runs]
    for script in (ppo_carracing, ppo_continuous_mlp):
        print(Path(script.__file__).name, flush=True)
        parts(script, args)
        for flags in runs:
            speed, share = whole_run(script, flags, args.iterations)
            speed = f"{' '.join(flags):22s} {speed:8.0f} steps/s"
            print(f"  {speed}, {share:4.0%} of the time collecting", flush=True)


if __name__ == "__main__":
    main()
