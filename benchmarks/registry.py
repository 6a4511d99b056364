"""Tries every environment that Gymnasium registers: python benchmarks/registry.py

Each id is trained for 64 steps and evaluated by the first of the three scripts that takes it, or
refused by all with status 2 and a line that says why. Ends with status 1 if any ends otherwise, or
shows a traceback. Takes about four minutes on two cores, with MuJoCo installed.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym

ROOT = Path(__file__).parent.parent
SCRIPTS = ("ppo_cartpole.py", "ppo_continuous_mlp.py", "ppo_carracing.py")
FLAGS = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "1", "--update-epochs", "1"]
FLAGS += ["--total-timesteps", "64", "--eval-episodes", "1", "--no-cuda"]


def try_script(script: str, env_id: str, folder: str) -> tuple[bool, str]:
    """Whether ``script`` trains ``env_id``, and what it says where it doesn't."""
    command = [sys.executable, str(ROOT / script), "--env-id", env_id, *FLAGS]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return False, "FAULT: it never ends"
    lines = done.stderr.strip().splitlines() or [""]
    if done.returncode == 0 and "Traceback" not in done.stderr:
        return True, ""
    refused = done.returncode == 2 and lines[-1].startswith("error: ")
    if refused and "Traceback" not in done.stderr:
        return False, lines[-1].removeprefix("error: ")
    return False, f"FAULT: status {done.returncode}: {lines[-1]}"


def try_all(env_id: str) -> str:
    """A line of the table: the script that trains ``env_id``, or the reasons why none does."""
    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        for script in SCRIPTS:
            trains, reason = try_script(script, env_id, folder)
            if trains and not any("FAULT" in reason for reason in reasons):
                return f"{env_id:30s} trained by {script}"
            reasons.append(f"{script}: {reason}")
    faults = [reason for reason in reasons if "FAULT" in reason]
    return f"{env_id:30s} " + (faults or reasons)[0]


def main() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = list(pool.map(try_all, sorted(gym.registry)))
    print("\n".join(lines))
    trained = sum("trained by" in line for line in lines)
    faults = sum("FAULT" in line for line in lines)
    refused = len(lines) - trained - faults
    print(f"{len(lines)} ids: {trained} trained, {refused} refused, {faults} at fault")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
