"""Environments as people have them: odd observations, odd actions, odd infos, no time limit."""

import fcntl
import os
import resource
import shlex
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, ppo_cartpole, ppo_continuous_mlp, tiny_args
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

FLAT = Box(-1, 1, (3,))
MATRIX = Box(np.float32([[-2, 0]]), np.float32([[2, 1]]))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))


class Odd(gym.Env):
    """Episodes of 8 steps in any spaces; ends never with ``limit=None``."""

    def __init__(self, observations, actions, info=None, limit=8):
        self.observation_space, self.action_space = observations, actions
        self.info, self.limit = info or {}, limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        return self.observation_space.sample(), 1.0, self.time == self.limit, False, dict(self.info)


def suitable_actions(script):
    return Discrete(2) if script is ppo_cartpole else FLAT


def trained(script, tmp_path, **kwargs):
    """Trains on Odd and returns the returns of the evaluation."""
    gym.register("Odd-v0", Odd, kwargs={"observations": FLAT, "actions": Discrete(2)} | kwargs)
    return script.train(tiny_args(script, tmp_path, env_id="Odd-v0"))[0]


@pytest.mark.parametrize(
    "space",
    [
        Discrete(5, start=-2),
        MultiDiscrete([3, 2]),
        MultiBinary(4),
        Tuple((Discrete(3), Box(-1, 1, (2,)))),
        Dict(joints=Box(-np.inf, np.inf, (3,)), camera=Box(0, 255, (2, 2), np.uint8)),
        Box(0, 255, (128,), np.uint8),
        Box(-1, 1, (3,), np.float64),
        Box(-1, 1, (3, 2, 2)),
        Box(0, 255, (6, 6), np.uint8),
    ],
    ids=str,
)
def test_observations_become_vectors_of_floats(mlp_script, tmp_path, space):
    actions = suitable_actions(mlp_script)
    assert trained(mlp_script, tmp_path, observations=space, actions=actions).tolist() == [8, 8]


def test_an_image_is_refused(mlp_script, tmp_path):
    image = Box(0, 255, (64, 64, 3), np.uint8)
    actions = suitable_actions(mlp_script)
    with pytest.raises(mlp_script.InputError, match=r"must be vectors \(images.*\(64, 64, 3\)"):
        trained(mlp_script, tmp_path, observations=image, actions=actions)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "space", [MATRIX, Box(-1, 1, ()), Box(0, 1, (2, 2, 1), np.float64)], ids=str
)
def test_box_actions_have_any_shape(tmp_path, space):
    assert trained(ppo_continuous_mlp, tmp_path, actions=space).tolist() == [8, 8]


@pytest.mark.parametrize("space", [Box(-9, 9, (3,), np.int64), MultiBinary(3)], ids=str)
def test_other_actions_are_refused_before_anything_is_created(mlp_script, tmp_path, space):
    with pytest.raises(mlp_script.InputError, match="actions must be") as refused:
        trained(mlp_script, tmp_path, actions=space)
    assert str(space) in str(refused.value) and not list(tmp_path.iterdir())


def test_an_info_may_have_a_key_episode(mlp_script, tmp_path):
    actions = suitable_actions(mlp_script)
    trained(mlp_script, tmp_path, actions=actions, info={"episode": 3})


def test_an_evaluation_ends_where_episodes_never_do(mlp_script, tmp_path):
    """Each is cut after 10,000 steps."""
    actions = suitable_actions(mlp_script)
    returns = trained(mlp_script, tmp_path, actions=actions, limit=None)
    assert returns.tolist() == [10_000, 10_000]


class Exits(Odd):
    """Calls sys.exit(), as a game does whose window is closed."""

    def step(self, action):
        raise SystemExit(0)


@pytest.mark.parametrize("async_envs", [False, True])
def test_an_environment_that_exits_is_a_failure(mlp_script, tmp_path, async_envs):
    """Not a run that ended well: sys.exit() alone would end with status 0 and no word."""
    actions = suitable_actions(mlp_script)
    gym.register("Exits-v0", Exits, kwargs={"observations": FLAT, "actions": actions})
    args = tiny_args(mlp_script, tmp_path, env_id="Exits-v0", async_envs=async_envs)
    with pytest.raises(mlp_script.RunError, match="an environment is gone"):
        mlp_script.train(args)


class SameArray(Odd):
    """Shows one array, changed in place: 0.9 at an episode's end, -0.9 after a reset."""

    def __init__(self, observations, actions):
        super().__init__(observations, actions)
        self.state = np.zeros(3, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state[:] = -0.9
        return self.state, {}

    def step(self, action):
        self.time += 1
        self.state[:] = 0.9 if self.time == 8 else self.time / 10
        return self.state, 1.0, False, self.time == 8, {}


@pytest.mark.parametrize("async_envs", [False, True])
def test_a_last_observation_survives_the_reset_in_place(mlp_script, tmp_path, async_envs):
    actions = suitable_actions(mlp_script)
    kwargs = {"observations": FLAT, "actions": actions}
    gym.register("SameArray-v0", SameArray, kwargs=kwargs, disable_env_checker=True)
    args = tiny_args(mlp_script, tmp_path, env_id="SameArray-v0", async_envs=async_envs)
    envs = mlp_script.make_envs(args, 2, training=True)
    envs.reset(seed=1)
    for _ in range(8):
        obs, *_, infos = envs.step(np.stack([actions.sample()] * 2))
    assert np.stack(infos["final_obs"]) == pytest.approx(0.9) and obs == pytest.approx(-0.9)
    envs.close()


def test_no_time_limit_is_said_before_training(mlp_script, tmp_path, capsys):
    trained(mlp_script, tmp_path, actions=suitable_actions(mlp_script))
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("Odd-v0 has no time limit") and "10,000" in first
    assert not any("time limit" in line for line in others)


def test_nothing_is_said_where_there_is_a_time_limit(mlp_script, tmp_path, capsys):
    env_id = "CartPole-v1" if mlp_script is ppo_cartpole else "Pendulum-v1"
    mlp_script.train(tiny_args(mlp_script, tmp_path, env_id=env_id))
    assert "time limit" not in capsys.readouterr().out


def program(tmp_path, text):
    """A module of tmp_path with the imports that environments want."""
    imports = "import os, sys, time\nimport gymnasium as gym\nimport numpy as np\n"
    imports += "from gymnasium.spaces import Box, Dict, Discrete\n"
    (tmp_path / "robot.py").write_text(imports + text)


def command(script, *flags):
    """A short run of robot:Robot-v0."""
    sizes = ["--env-id", "robot:Robot-v0", "--num-envs", "2", "--num-steps", "8"]
    sizes += ["--num-minibatches", "1", "--total-timesteps", "32", "--eval-episodes", "1"]
    return [sys.executable, str(ROOT / f"{script.__name__}.py"), *sizes, *flags]


def run(script, tmp_path, *flags, **kwargs):
    kwargs = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60} | kwargs
    return subprocess.run(command(script, *flags), **kwargs)


ROBOT = """
from gymnasium.envs.classic_control import {base} as Base
gym.register("Robot-v0", entry_point=Base, max_episode_steps=10)
"""


def test_a_module_of_the_current_folder_is_found(mlp_script, tmp_path):
    """Without PYTHONPATH, though the script lies elsewhere."""
    base = "CartPoleEnv" if mlp_script is ppo_cartpole else "PendulumEnv"
    program(tmp_path, ROBOT.format(base=base))
    done = run(mlp_script, tmp_path)
    assert done.returncode == 0 and "evaluation: mean" in done.stdout, done.stderr


FAULTY = """
class Robot(gym.Env):
    observation_space = Box(-1, 1, (3,))
    action_space = {actions}

    def __init__(self):
        {init}

    def reset(self, {reset_takes}):
        {reset}
        return np.zeros(3, np.float32), {{}}

    def step(self, action):
        {step}
        return np.zeros(3, np.float32), 1.0, True, False, {{}}

class OwnError(Exception):
    def __init__(self, code, text):  # can't be unpickled
        super().__init__(text)

gym.register("Robot-v0", entry_point=Robot, max_episode_steps=10)
"""
RAISES = "raise OwnError(3, 'no robot.xml')"


def faulty(script, tmp_path, **places):
    actions = "Discrete(2)" if script is ppo_cartpole else "Box(-1, 1, (2,))"
    parts = {"init": "pass", "reset": "pass", "step": "pass", "actions": actions}
    takes = {"reset_takes": "*, seed=None, options=None"}
    program(tmp_path, FAULTY.format(**(parts | takes | places)))


@pytest.mark.parametrize("place", ["init", "reset", "step"])
@pytest.mark.parametrize("flag", ["--no-async-envs", "--async-envs"])
def test_what_an_environment_raises_is_shown_once_and_ends_in_one_line(tmp_path, place, flag):
    faulty(ppo_cartpole, tmp_path, **{place: RAISES})
    done = run(ppo_cartpole, tmp_path, flag)
    assert done.returncode == 1
    assert done.stderr.count("OwnError(3") == 1 and done.stderr.count("Traceback") == 1
    last = done.stderr.splitlines()[-1]
    assert "nothing was written" in last or "no checkpoint was written" in last
    assert not left_of(tmp_path)


@pytest.mark.parametrize("place", ["init", "reset", "step"])
@pytest.mark.parametrize("flag", ["--no-async-envs", "--async-envs"])
def test_an_exit_is_status_1_and_one_line(tmp_path, place, flag):
    faulty(ppo_cartpole, tmp_path, **{place: "sys.exit()"})
    done = run(ppo_cartpole, tmp_path, flag)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")


def test_an_exit_in_an_evaluation_is_status_1_and_one_line(tmp_path):
    faulty(ppo_cartpole, tmp_path)
    (folder,) = [word for word in run(ppo_cartpole, tmp_path).stdout.split() if "latest" in word]
    faulty(ppo_cartpole, tmp_path, step="sys.exit()")
    done = run(ppo_cartpole, tmp_path, "--evaluate", folder)
    assert done.returncode == 1 and done.stderr == "error: an environment is gone: SystemExit()\n"


def test_the_interface_of_gym_before_0_26_is_refused_in_one_line(mlp_script, tmp_path):
    faulty(mlp_script, tmp_path, reset_takes="")
    done = run(mlp_script, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "it takes seed and options" in done.stderr and not (tmp_path / "runs").exists()


def left_of(tmp_path, seconds=5):
    """Processes that a run in tmp_path has left, looked for until there are none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        left = []
        for process in os.listdir("/proc"):
            try:
                if process.isdigit() and os.readlink(f"/proc/{process}/cwd") == str(tmp_path):
                    left.append(process)
            except OSError:  # it has ended meanwhile, or is somebody else's
                continue
        if not left:
            break
        time.sleep(0.1)
    return left


def test_a_simulator_that_exists_once_leaves_no_process(tmp_path):
    """Its constructor raises in the second worker only."""
    once = "self.file = open('lock', 'w'); import fcntl; "
    once += "fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    faulty(ppo_cartpole, tmp_path, init=once)
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # the lock works here at all
    done = run(ppo_cartpole, tmp_path, "--async-envs")
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("error: an environment raised BlockingIOError")
    assert not left_of(tmp_path)


def test_too_few_files_for_the_workers_leave_no_process(tmp_path):
    faulty(ppo_cartpole, tmp_path)
    many = ["--num-envs", "64", "--total-timesteps", "512"]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))}
    done = run(ppo_cartpole, tmp_path, "--async-envs", *many, **limit)
    assert done.returncode != 0 and "Too many open files" in done.stderr
    assert done.stderr.splitlines()[-1] == "nothing was written" and not left_of(tmp_path)


class Breezy(Odd):
    """Pays its options."""

    def __init__(self, observations, actions, wind=0.0, calm=True, name="none"):
        super().__init__(observations, actions)
        self.pay = wind + (0 if calm else 10) + len(name)

    def step(self, action):
        obs, _, *others = super().step(action)
        return obs, self.pay, *others


@pytest.mark.parametrize("async_envs", [False, True])
def test_options_reach_the_environment_and_the_checkpoint(
    mlp_script, tmp_path, monkeypatch, async_envs
):
    kwargs = {"observations": FLAT, "actions": suitable_actions(mlp_script)}
    gym.register("Breezy-v0", Breezy, kwargs=kwargs)
    options = ["--env-kwargs", "wind", "0.5", "calm", "False", "name", "4x4"]
    monkeypatch.setattr(sys, "argv", ["script", "--env-id", "Breezy-v0", *options])
    args = mlp_script.parse_args()
    assert args.env_kwargs == {"wind": 0.5, "calm": False, "name": "4x4"}
    tiny = tiny_args(mlp_script, tmp_path, env_id="Breezy-v0", async_envs=async_envs)
    tiny.env_kwargs = args.env_kwargs
    returns, folder = mlp_script.train(tiny)
    assert returns.tolist() == [8 * 13.5] * 2
    for flags, expected in (([], 13.5), (["--env-kwargs", "wind", "2.0"], 15.0)):
        monkeypatch.setattr(sys, "argv", ["script", "--evaluate", str(folder), *flags])
        args = mlp_script.parse_args()
        args.eval_episodes = 1
        assert mlp_script.evaluate(mlp_script.load_agent(args), args)[0] == [8 * expected]


def test_an_option_that_an_environment_does_not_have_is_refused(script, tmp_path):
    with pytest.raises(script.InputError, match="unexpected keyword argument 'wnd'"):
        script.train(tiny_args(script, tmp_path, env_kwargs={"wnd": 1}))
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_second_have_two_folders(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "time", lambda: 1e9)
    folders = {script.train(tiny_args(script, tmp_path))[1] for _ in range(2)}
    assert len(folders) == 2


def test_a_printed_command_quotes_its_path(mlp_script, tmp_path, capsys):
    log_dir = tmp_path / "my runs"
    _, folder = mlp_script.train(tiny_args(mlp_script, tmp_path, log_dir=log_dir))
    last = capsys.readouterr().out.splitlines()[-1]
    flags = shlex.split(last.removeprefix("watch it:"))
    assert flags == ["python", f"{mlp_script.__name__}.py", "--evaluate", str(folder), "--render"]


def test_nobody_reads_the_output(tmp_path):
    """As after | head -1."""
    program(tmp_path, ROBOT.format(base="CartPoleEnv"))
    line = f"{shlex.join(command(ppo_cartpole))} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert list(tmp_path.glob("runs/*/latest.pt"))


class Undrawable(Odd):
    """Can't be drawn, as MuJoCo without a display."""

    metadata = gym.Env.metadata | {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, observations, actions, render_mode=None):
        super().__init__(observations, actions)
        self.render_mode = render_mode

    def render(self):
        raise OSError("no OpenGL")


def test_a_film_is_tried_before_training(mlp_script, tmp_path):
    kwargs = {"observations": FLAT, "actions": suitable_actions(mlp_script)}
    gym.register("Undrawable-v0", Undrawable, kwargs=kwargs, disable_env_checker=True)
    args = tiny_args(mlp_script, tmp_path, env_id="Undrawable-v0", capture_video=True)
    with pytest.raises(mlp_script.InputError, match=r"no OpenGL; .* MUJOCO_GL=egl"):
        mlp_script.train(args)
    assert not list(tmp_path.iterdir())
