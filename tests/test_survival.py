"""A run survives what happens to runs: kills, failing environments, numbers that aren't finite,
full disks."""

import errno
import gc
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, Clock, register, suitable, tiny_args
from gymnasium.envs.box2d.car_racing import CarRacing
from hypothesis import given, settings
from hypothesis import strategies as st


class Faulty(Clock):
    """A clock that breaks at its 21st step, in the way that its id says."""

    def __init__(self, fault, **kwargs):
        super().__init__(**kwargs)
        self.fault = fault

    def step(self, action):
        obs, reward, *rest = super().step(np.nan_to_num(action))
        if self.time == 21:
            if self.fault == "Raising":
                raise ValueError("engine on fire")
            if self.fault == "Killed":
                os.kill(os.getpid(), signal.SIGKILL)
            obs[1] = math.nan if self.fault == "BlindObs" else obs[1]
            reward = math.inf if self.fault == "InfiniteReward" else reward
        return obs, reward, *rest


FAULTS = {
    "Raising": "engine on fire",
    "Killed": "an environment is gone",
    "BlindObs": "obs of environment 0 at step 42 are not finite",
    "InfiniteReward": "rewards of environment 0 at step 40 are not finite",
}
for fault in FAULTS:
    register(fault, Faulty, fault=fault)


def test_processes_that_nobody_listens_to_end_in_silence(mlp_script, tmp_path, capfd):
    """As after an interrupt that comes between a step and AsyncVectorEnv's note of it: closing then
    takes the step's answers for goodbyes, and goes before these are said."""
    args = tiny_args(mlp_script, tmp_path, async_envs=True)
    envs = mlp_script.make_envs(args, 2, training=True)
    envs.reset(seed=1)
    for pipe in envs.unwrapped.parent_pipes:
        pipe.close()
    for process in envs.unwrapped.processes:
        process.join(10)
        assert process.exitcode == 0
    envs.close()
    assert capfd.readouterr().err == ""


def workers(pid):
    """Processes that ``pid`` started and that still run."""
    found = []
    for status in os.listdir("/proc"):
        try:
            with open(f"/proc/{status}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
            found += [int(status)] if int(parent) == pid and state != "Z" else []
        except (OSError, ValueError):
            pass
    return found


@pytest.mark.parametrize(
    "fault, async_envs", [(f, a) for f in FAULTS for a in (False, True) if a or f != "Killed"]
)
def test_what_an_environment_does_wrong_ends_the_run(mlp_script, tmp_path, fault, async_envs):
    """Within seconds, with the last good checkpoint kept and named, and no process left. An
    exception of the environment's own stays what it is, or is printed where it was raised."""
    env = {"env_id": suitable(mlp_script, fault), "async_envs": async_envs}
    args = tiny_args(mlp_script, tmp_path, **env, total_timesteps=6400)
    start, before = time.monotonic(), set(workers(os.getpid()))
    kind = ValueError if fault == "Raising" and not async_envs else mlp_script.RunError
    with pytest.raises(kind, match=FAULTS[fault]) as raised:
        mlp_script.train(args)
    assert time.monotonic() - start < 30 and "\n" not in str(raised.value)
    (folder,) = (tmp_path / "runs").iterdir()
    line = "; ".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert f"python {mlp_script.__name__}.py --resume {folder}" in line
    checkpoint = mlp_script.load_checkpoint(folder)
    assert checkpoint["iteration"] == 2  # of 16 steps each
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())
    deadline = time.monotonic() + 10
    while set(workers(os.getpid())) - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not set(workers(os.getpid())) - before


def test_a_failure_is_one_line_and_status_1(mlp_script, tmp_path, monkeypatch, capsys):
    """What went wrong, where the last checkpoint is and the command that goes on."""
    monkeypatch.chdir(tmp_path)
    env_id = suitable(mlp_script, "InfiniteReward")
    flags = ["--env-id", env_id, "--num-envs", "2", "--num-steps", "8", "--num-minibatches", "1"]
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--checkpoint-interval", "1"])
    with pytest.raises(SystemExit) as exit:
        mlp_script.main()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line)
    assert exit.value.code == 1 and line.startswith("error: rewards of environment 0 at step 40")
    assert f"; go on from the last checkpoint with python {mlp_script.__name__}.py --resume" in line


def test_an_environment_that_fails_in_the_evaluation_keeps_its_traceback(mlp_script, tmp_path):
    """The weights are trained and saved by then: the note says where."""
    env_id = suitable(mlp_script, "LateFault")
    with pytest.raises(ValueError, match="only in evaluation") as raised:
        mlp_script.train(tiny_args(mlp_script, tmp_path, env_id=env_id))
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"--resume {folder}" in raised.value.__notes__[0]
    assert mlp_script.load_checkpoint(folder)["iteration"] == 4


def test_a_worker_that_is_killed_ends_the_run_in_one_line(script, tmp_path, monkeypatch):
    """As the kernel does when memory runs out; with the last checkpoint kept, within seconds."""
    honest, calls = script.collect, []

    def collect(agent, envs, *rest):
        calls.append(None)
        if len(calls) == 3:
            os.kill(envs.unwrapped.processes[0].pid, signal.SIGKILL)
        return honest(agent, envs, *rest)

    monkeypatch.setattr(script, "collect", collect)
    start = time.monotonic()
    with pytest.raises(script.RunError, match="an environment is gone"):
        script.train(tiny_args(script, tmp_path, async_envs=True))
    assert time.monotonic() - start < 30
    (folder,) = (tmp_path / "runs").iterdir()
    assert script.load_checkpoint(folder)["iteration"] == 2


def test_a_gradient_that_is_not_finite_is_never_saved(script, tmp_path, monkeypatch):
    honest, calls = script.ppo_loss, []

    def poisoned(*args):
        calls.append(None)
        loss, stats = honest(*args)
        return (loss * math.nan if len(calls) > 8 else loss), stats

    monkeypatch.setattr(script, "ppo_loss", poisoned)
    with pytest.raises(script.RunError, match=r"\w+ is nan in the update after step 48"):
        script.train(tiny_args(script, tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    checkpoint = script.load_checkpoint(folder)
    assert checkpoint["iteration"] == 2
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


def test_a_full_disk_leaves_the_previous_checkpoint(script, tmp_path, monkeypatch, capsys):
    state = {"script": "x", "args": {"env_id": "y"}, "agent": {}, "iteration": 1}
    script.save_checkpoint(tmp_path / "latest.pt", state)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(script.RunError, match=r"latest\.pt can't be written: .*No space left"):
        script.save_checkpoint(tmp_path / "latest.pt", state | {"iteration": 2})
    assert script.load_checkpoint(tmp_path)["iteration"] == 1 and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(
        script, "train", lambda args: script.save_checkpoint(tmp_path / "latest.pt", state)
    )
    with pytest.raises(SystemExit) as exit:
        script.main()
    assert exit.value.code == 1 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_missing_package_is_named_with_its_pip_line(mlp_script, tmp_path, monkeypatch):
    """What an environment needs, and what a video needs: before the training, not after it."""
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("Box2D", "moviepy"):
        monkeypatch.setitem(sys.modules, name, None)
    landers = {"ppo_cartpole": "LunarLander-v3", "ppo_continuous_mlp": "LunarLanderContinuous-v3"}
    lander, clock = landers[mlp_script.__name__], suitable(mlp_script, "Rounds")
    with pytest.raises(mlp_script.InputError, match=r"pip install .*box2d"):
        mlp_script.train(tiny_args(mlp_script, tmp_path, env_id=lander))
    with pytest.raises(mlp_script.InputError, match=r"MoviePy is not installed, .*pip install"):
        mlp_script.train(tiny_args(mlp_script, tmp_path, env_id=clock, capture_video=True))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(script, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(script.InputError, match=r"--log-dir .*runs: Not a directory"):
        script.train(tiny_args(script, tmp_path))


def test_weights_of_another_shape_are_refused(script, tmp_path):
    _, folder = script.train(tiny_args(script, tmp_path))
    checkpoint = script.load_checkpoint(folder)
    name = next(name for name, tensor in checkpoint["agent"].items() if tensor.ndim == 2)
    checkpoint["agent"][name] = checkpoint["agent"][name][:, 1:]
    script.save_checkpoint(folder / "latest.pt", checkpoint)
    with pytest.raises(script.InputError, match=f"weights of {script.__name__}.py .* don't fit"):
        script.train(script.saved_args(folder, resume=folder, cuda=False))


def test_a_resumed_run_equals_the_uninterrupted_one(script, tmp_path):
    """Bit for bit, where episodes end with the checkpoint's iteration and are all the same."""
    pixels = {"stock_env": True} if script.__name__ == "ppo_carracing" else {}
    env_id = "RoundsPixels-v0" if pixels else suitable(script, "Rounds")
    settings = {"total_timesteps": 96, "async_envs": False, "norm_reward": False, **pixels}
    args = tiny_args(script, tmp_path, env_id=env_id, **settings)
    whole = script.load_checkpoint(script.train(args)[1])
    stopped = stop_after(script, replace(args, log_dir=tmp_path / "stopped"), iterations=3)
    assert script.load_checkpoint(stopped)["iteration"] == 3
    call = {"resume": stopped, "cuda": False, "eval_episodes": 1, **pixels}
    script.train(script.saved_args(stopped, **call))
    resumed = script.load_checkpoint(stopped)
    for part in ("agent", "optimizer", "return_rms", "rng_state"):
        assert flat(whole[part]) == flat(resumed[part]), part
    assert [whole[key] for key in ("iteration", "global_step")] == [6, 96]
    assert whole["best_return"] == -math.inf
    assert whole["recent_returns"] == resumed["recent_returns"]


class Rounds(Clock):
    """A clock that is cut off after 4 steps and doesn't count its episodes."""

    def step(self, action):
        obs, *rest = super().step(action)
        return obs * np.float32([1, 0, 1]), *rest

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0] * np.float32([1, 0, 1]), {}


class PixelRounds(Rounds, CarRacing):
    """The same with CarRacing's pixels and pedals; a step is 4 frames."""

    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    car, track, road = SimpleNamespace(wheels=[]), range(300), [SimpleNamespace(road_visited=False)]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(np.float32([-1, 0, 0]), np.float32([1, 1, 1]))

    def step(self, action):
        _, *rest = super().step(action)
        return self._render("state_pixels"), *rest

    def reset(self, **kwargs):
        gym.Env.reset(self, seed=0)  # neither the clock's nor the car's
        self.time, self.episode = 0, 0
        return self._render("state_pixels"), {}

    def close(self):
        pass

    def _render(self, mode):
        return np.full((96, 96, 3), 10 * self.time, np.uint8)


gym.register("RoundsPixels-v0", entry_point=PixelRounds, kwargs={"limit": 16})
register("Rounds", Rounds, limit=4)


class LateFault(Rounds):
    """Fails on the seeds of an evaluation, which no training reaches."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and seed >= 1_000_000:
            raise ValueError("only in evaluation")
        return super().reset(seed=seed)


register("LateFault", LateFault, limit=4)


def flat(value):
    """Nested values as something that == compares."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


def stop_after(script, args, iterations):
    """Trains until a signal in the midst of iteration ``iterations``; returns the folder."""
    honest, calls = script.update, []

    def update(*rest):
        calls.append(None)
        if len(calls) == iterations:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*rest)

    script.update = update
    try:
        with pytest.raises(SystemExit) as exit:
            script.train(args)
    finally:
        script.update = honest
    assert exit.value.code == 143
    (folder,) = args.log_dir.iterdir()
    return folder


def start(script, place, *flags):
    """Starts a run that saves all the time and returns it once it has written a checkpoint."""
    flags = ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "1", *flags]
    flags += ["--update-epochs", "1", "--checkpoint-interval", "1", "--seed", "2000000"]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags]
    command += ["--total-timesteps", "100000000"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    before = [path.stat().st_mtime_ns for path in place.glob("runs/*/latest.pt")]
    process = subprocess.Popen(command, cwd=place, start_new_session=True, **pipes)
    while [path.stat().st_mtime_ns for path in place.glob("runs/*/latest.pt")] == before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def test_a_signal_to_all_processes_ends_a_run_with_a_checkpoint(script, tmp_path):
    """As job schedulers and `timeout` send it: to the workers too."""
    process = start(script, tmp_path, "--async-envs")
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume runs/" in errors and "Traceback" not in errors


def test_no_worker_outlives_a_killed_run(script, tmp_path):
    process = start(script, tmp_path, "--async-envs")
    children = workers(process.pid)
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


def kill_and_resume(script, place, kills):
    rng, iteration = random.Random(1), 0
    for kill in range(kills):
        resume = ["--resume", str(next(place.glob("runs/*")))] if kill else []
        process = start(script, place, *resume)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        (folder,) = place.glob("runs/*")
        checkpoint = script.load_checkpoint(folder)
        assert checkpoint["iteration"] > iteration
        iteration = checkpoint["iteration"]


@pytest.mark.slow
def test_twenty_kills_lose_nothing(script, tmp_path):
    """At random instants, a third of them while a checkpoint is written."""
    kill_and_resume(script, tmp_path, 20)


def test_a_kill_loses_nothing(script, tmp_path):
    kill_and_resume(script, tmp_path, 2)


def test_memory_and_files_stay_flat(mlp_script, tmp_path, monkeypatch):
    """From the hundredth iteration to the four hundredth."""
    seen, honest = [], mlp_script.update

    def update(*rest):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        return honest(*rest)

    gc.collect()  # closes what earlier tests have left open
    monkeypatch.setattr(mlp_script, "update", update)
    sizes = {"total_timesteps": 16 * 400, "update_epochs": 1, "num_minibatches": 1}
    env_id = suitable(mlp_script, "Rounds")
    args = tiny_args(mlp_script, tmp_path, env_id=env_id, checkpoint_interval=100, **sizes)
    mlp_script.train(args)
    memory, files = np.array(seen).T
    growth = memory[199::100] - memory[99:-100:100]  # a leak shows in each of the hundreds
    assert len(growth) == 3 and min(growth) < 5e5 and files[-1] == files[100]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_arguments_are_both_accepted_and_unusable(script, data):
    """Whatever numbers the flags get: one line that names a flag, or sizes that fit each other."""
    anything = {int: st.integers(-3, 300), float: st.floats(), bool: st.booleans()}
    kinds = {field.name: field.type for field in fields(script.Args) if field.type in anything}
    names = data.draw(st.sets(st.sampled_from(sorted(kinds))))
    args = script.Args(**{name: data.draw(anything[kinds[name]]) for name in sorted(names)})
    try:
        script.check_args(args)
    except script.InputError as error:
        assert str(error).startswith("--") and "\n" not in str(error)
        return
    assert args.num_iterations >= 1 and args.batch_size % args.num_minibatches == 0
    assert math.isfinite(args.learning_rate) and 0 <= args.gamma <= 1
