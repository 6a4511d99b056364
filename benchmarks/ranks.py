"""Prints how a script's speed grows with processes, and what they say to each other: python benchmarks/ranks.py

For each script at its defaults: steps per second in one process and under torchrun with two on this machine, each with
one thread; the bytes of an update's message (its gradients), the milliseconds that two processes take to average it,
and those of the computing between two messages, one minibatch.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpu import milliseconds, minibatch, prepared, whole_run

import ppo_carracing
import ppo_cartpole
import ppo_continuous_mlp


@dataclass
class Args:
    iterations: int = 12
    """of each whole run; the first half doesn't count"""
    message: int | None = None
    """under torchrun: times the averaging of so many numbers and nothing else"""


def message(numbers: int) -> None:
    """Prints the milliseconds of one averaging, on rank 0."""
    dist.init_process_group("gloo")
    gradients = torch.ones(numbers)
    took = milliseconds(lambda: ppo_cartpole.averaged(gradients), 200)
    if dist.get_rank() == 0:
        print(took)
    dist.destroy_process_group()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.message is not None:
        return message(args.message)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    print("| script | steps/s, 1 process | 2 processes | growth | message | averaging it | a minibatch |")
    print("| --- " * 7 + "|", flush=True)
    for script in (ppo_cartpole, ppo_carracing, ppo_continuous_mlp):
        flags = ["--no-cuda", "--num-threads", "1"]
        one, two = (whole_run(script, flags, args.iterations, ranks)[0] for ranks in (1, 2))
        settings, agent, rollout, _ = prepared(script, torch.device("cpu"))
        numbers = sum(parameter.numel() for parameter in agent.parameters())
        computing = minibatch(script, settings, agent, rollout, script.minibatch_loss, 3)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
        averaging = float(subprocess.check_output([*command, "--message", str(numbers)], text=True))
        print(f"| {Path(script.__file__).name} | {one:.0f} | {two:.0f} | {two / one:.2f} x ", end="")
        print(f"| {numbers * 4 / 1000:.0f} kB | {averaging:.2f} ms | {computing:.2f} ms |", flush=True)


if __name__ == "__main__":
    main()
