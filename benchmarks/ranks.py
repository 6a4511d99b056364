"""Prints how a script's speed grows with processes, and what their messages cost.

    python benchmarks/ranks.py

For each script at its defaults: steps per second in one process and under torchrun with two on this
machine, each with one thread; the size of a message, which is the gradients of a minibatch; the
milliseconds that two processes take to average it; and those of computing a minibatch, after each
of which there is a message. Here it is sent alone and in one piece, while DistributedDataParallel
sends the first gradients when it still computes the last ones.
"""

import os
import subprocess
import sys
import time
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
    iterations: int = 12  # of each whole run; the first half doesn't count
    message: int | None = None  # under torchrun: only times the averaging of so many numbers


def message(numbers: int) -> None:
    """Prints the milliseconds of averaging ``numbers`` numbers, in the first process."""
    dist.init_process_group("gloo")
    gradients = torch.zeros(numbers)
    took = milliseconds(lambda: ppo_cartpole.all_reduce_mean(gradients), 200)
    if dist.get_rank() == 0:
        print(took)
    time.sleep(0.1)  # as in the scripts: the last all_reduce's thread ends under the GIL
    dist.destroy_process_group()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.message is not None:
        return message(args.message)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    columns = ["script", "steps/s, 1 process", "2 processes", "growth", "message", "averaging it"]
    columns += ["a minibatch"]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|", flush=True)
    for script in (ppo_cartpole, ppo_carracing, ppo_continuous_mlp):
        flags = ["--no-cuda", "--num-threads", "1"]
        one, _ = whole_run(script, flags, args.iterations, processes=1)
        two, _ = whole_run(script, flags, args.iterations, processes=2)
        settings, agent, rollout, _ = prepared(script, torch.device("cpu"))
        computing = minibatch(script, settings, agent, rollout, script.backward, 3)
        numbers = sum(parameter.numel() for parameter in agent.parameters())
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
        averaging = float(subprocess.check_output([*command, "--message", str(numbers)], text=True))
        cells = [Path(script.__file__).name, f"{one:.0f}", f"{two:.0f}", f"{two / one:.2f} x"]
        cells += [f"{numbers * 4 / 1000:.0f} kB", f"{averaging:.2f} ms", f"{computing:.2f} ms"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
