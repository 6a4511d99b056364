"""Several processes under torchrun, on gloo: one policy, and one process that writes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_agent, ppo_cartpole, tiny_args

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# Each process runs the script's main() and writes down its own agent's weights at the end.
WITNESS = """
import os, pathlib, sys, torch
pathlib.Path(os.environ["RANK"] + ".pid").write_text(str(os.getpid()))
sys.path.insert(0, {root!r})
import {script} as script
update, seen = script.update, []
def spy(agent, *args):
    seen.append(agent.module)
    return update(agent, *args)
script.update = spy
script.main()
torch.save(seen[-1].state_dict(), f"weights{{os.environ['RANK']}}.pt")
"""


def start(place, program, *flags, ranks=2, torchrun=()):
    (place / "program.py").write_text(program)
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), *torchrun, "program.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)


def finished(process, seconds=240):
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output


def test_two_processes_learn_cartpole_with_the_same_weights_and_one_writes(tmp_path):
    program = WITNESS.format(root=str(ROOT), script="ppo_cartpole")
    flags = ["--total-timesteps", "30720", "--eval-episodes", "20", "--norm-obs"]
    process = start(tmp_path, program, *flags)
    output = finished(process)
    assert process.returncode == 0, output
    first, second = (torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list(folder.glob("events*"))) == 1
    (line,) = (line for line in output.splitlines() if line.startswith("evaluation:"))
    assert float(line.split()[2]) >= 450
    checkpoint = ppo_cartpole.load_checkpoint(folder)
    seen = checkpoint["agent"]["obs_norm.count"]  # by all processes
    assert seen == checkpoint["global_step"] == 30720


@pytest.mark.parametrize("name", ["ppo_continuous_mlp", "ppo_carracing"])
def test_the_other_scripts_run_on_two_processes_and_nodes(tmp_path, name):
    """As two nodes of one process each, which meet on the loopback; one script compiled."""
    program = WITNESS.format(root=str(ROOT), script=name)
    flags = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "2"]
    flags += ["--update-epochs", "2", "--total-timesteps", "128", "--eval-episodes", "1"]
    flags += ["--compile"] if name == "ppo_continuous_mlp" else []
    rendezvous = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29517"]
    options = {"ranks": 1, "torchrun": rendezvous}
    nodes = [start(tmp_path, program, *flags, "--norm-reward", **options) for _ in range(2)]
    outputs = [finished(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    first, second = (torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


SHARE = """
import sys, time, torch, torch.distributed as dist, weakref
sys.path.insert(0, {root!r})
import ppo_cartpole as script
dist.init_process_group("gloo")
group = weakref.ref(dist.group.WORLD)
given = torch.load("given.pt", weights_only=False)
half = slice(None, 4) if dist.get_rank() == 0 else slice(4, None)
rollout = {{name: tensor[:, half].contiguous() for name, tensor in given["rollout"].items()}}
agent, args = given["agent"], given["args"]
learner = script.DistributedDataParallel(agent)
optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
stats = script.update(learner, optimizer, rollout, 0.2, args)
agent.obs_norm.update(rollout["obs"])
torch.save((agent.state_dict(), stats), f"result{{dist.get_rank()}}.pt")
time.sleep(0.1)  # as in Run.__exit__
dist.destroy_process_group()
del learner
assert group() is None  # else its threads may outlive the interpreter, which then aborts
"""


def test_an_update_equals_that_of_one_process_with_all_the_data(tmp_path):
    """Gradients and observation statistics; one minibatch, so that order doesn't matter. Advantages
    are normalised by each process alone, and so by none here."""
    sizes = {"num_envs": 8, "num_minibatches": 1, "update_epochs": 3}
    args = tiny_args(ppo_cartpole, tmp_path, norm_obs=True, norm_adv=False, **sizes)
    envs = ppo_cartpole.make_envs(args, 8, training=True)
    torch.manual_seed(0)
    agent = make_agent(ppo_cartpole, args, envs)
    rollout, _, _ = ppo_cartpole.collect(agent, envs, envs.reset(seed=1)[0], 16)
    torch.save({"agent": agent, "rollout": rollout, "args": args}, tmp_path / "given.pt")
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    stats = ppo_cartpole.update(agent, optimizer, rollout, 0.2, args)
    agent.obs_norm.update(rollout["obs"])
    process = start(tmp_path, SHARE.format(root=str(ROOT)))
    output = finished(process)
    assert process.returncode == 0, output
    results = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in range(2)]
    for weights, _ in results:
        expected = dict(agent.state_dict())
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl"):  # of each half of the data
        mean = (results[0][1][name] + results[1][1][name]) / 2
        assert mean == pytest.approx(stats[name], rel=1e-3, abs=1e-5), name


def test_a_process_that_dies_ends_the_run_with_a_line(tmp_path):
    program = WITNESS.format(root=str(ROOT), script="ppo_cartpole")
    process = start(tmp_path, program, "--total-timesteps", "10000000")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/latest.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    killed = time.monotonic()
    output = finished(process, 60)
    assert time.monotonic() - killed < 30 and process.returncode != 0
    assert "error: process 0 lost another; go on from the last checkpoint with python" in output
    first = int((tmp_path / "0.pid").read_text())
    assert not os.path.exists(f"/proc/{first}")
    (folder,) = (tmp_path / "runs").iterdir()
    assert ppo_cartpole.load_checkpoint(folder)["iteration"] >= 10


def test_environments_that_cannot_be_shared_out_are_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(script.InputError, match="--num-envs must be a multiple of 3 processes"):
        script.check_args(tiny_args(script, tmp_path))
