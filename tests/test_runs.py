"""Whole runs of a second or two: checkpoints, evaluation, resuming, TensorBoard, flags, randomness."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, ppo_carracing, tiny_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVALUATION = re.compile(
    r"evaluation: mean (\S+) std (\S+) median (\S+) min (\S+) max (\S+) episodes (\d+) first-seed (\d+)"
)


def weights(folder, name="latest.pt"):
    return torch.load(folder / name, weights_only=True)["agent"]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def evaluation_line(text):
    found = EVALUATION.findall(text)
    assert found, text
    return found[-1]


def call(script, *flags, cwd):
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


SMALL = ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--update-epochs", "1"]


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """One small run from the command line: (the finished process, its folder)."""
    place = tmp_path_factory.mktemp(script.__name__)
    flags = [*SMALL, "--total-timesteps", "64", "--eval-episodes", "3", "--checkpoint-interval", "2", "--cuda"]
    done = call(script, *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    (folder,) = (place / "runs").iterdir()
    return done, folder


def test_a_run_leaves_what_it_says(script, run):
    done, folder = run
    env_id = script.Args().env_id
    assert re.fullmatch(rf"{env_id}__{script.__name__}__1__\d+", folder.name)
    assert (folder / "latest.pt").is_file() and str(folder.name) in done.stdout
    assert len(list(folder.glob("events.*"))) == 1 and not list(folder.glob("*.tmp"))
    assert evaluation_line(done.stdout)[5:] == ("3", "1000000")
    if not torch.cuda.is_available():  # one line, and on with the CPU
        assert done.stderr.count("warning: --cuda") == 1
    assert "\r" not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_evaluation_of_a_saved_run_prints_what_the_run_printed(script, run):
    done, folder = run
    for path in (folder, folder / "latest.pt"):
        again = call(script, "--evaluate", path, "--eval-episodes", 3, cwd=folder)
        assert again.returncode == 0, again.stderr
        assert evaluation_line(again.stdout) == evaluation_line(done.stdout)


def test_each_episode_has_its_own_seed(script, run):
    """Episodes 2 and 3 of one evaluation are episodes 1 and 2 of one that starts a seed later."""
    _, folder = run
    checkpoint = script.load_checkpoint(folder)
    returns = []
    for first_seed in (1_000_000, 1_000_001):
        flags = script.Args(eval_seed=first_seed, eval_episodes=3, num_envs=2, async_envs=False, cuda=False)
        args = script.adopt_args(flags, checkpoint, free=("num_envs", "async_envs"))
        returns.append(script.evaluate(args, checkpoint["agent"], folder, torch.device("cpu"))[0])
    assert np.allclose(returns[0][1:], returns[1][:2])


ACTION_TAGS = {
    "ppo_cartpole": {"actions/share_0", "actions/share_1"},
    "ppo_carracing": {"actions/steering", "actions/gas"},
    "ppo_continuous_mlp": {"actions/mean_0", "actions/std_0", "actions/mean_1", "actions/std_1"},
}


def test_tensorboard_shows_the_tags_of_the_design(script, run):
    _, folder = run
    events = EventAccumulator(str(folder)).Reload()
    names = "value_loss policy_loss entropy old_approx_kl approx_kl clipfrac explained_variance grad_norm"
    expected = {f"losses/{name}" for name in names.split()}
    expected |= {"charts/learning_rate", "charts/clip_coef", "charts/SPS"}
    expected |= {"time/collect_fraction", "eval/return_mean"} | ACTION_TAGS[script.__name__]
    scalars = set(events.Tags()["scalars"])
    assert expected <= scalars <= expected | {"charts/episodic_return", "charts/episodic_length"}
    assert [event.step for event in events.Scalars("losses/value_loss")] == [16, 32, 48, 64]
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    assert np.allclose(np.array(rates) / rates[0], [1, 0.75, 0.5, 0.25])
    assert "hyperparameters/text_summary" in events.Tags()["tensors"]
    assert events.Tags()["images"] == (["agent/frames"] if script.__name__ == "ppo_carracing" else [])
    plugins = {events.summary_metadata[tag].plugin_data.plugin_name for tag in events.summary_metadata}
    assert {"hparams", "custom_scalars", "text"} <= plugins


@pytest.mark.parametrize("async_envs", [False, True])
def test_the_same_seed_gives_the_same_weights(script, tmp_path, async_envs):
    folders = [
        script.train(tiny_args(script, tmp_path / place, seed=seed, async_envs=async_envs))
        for place, seed in (("first", 7), ("second", 7), ("third", 8))
    ]
    assert equal(weights(folders[0]), weights(folders[1]))
    assert not equal(weights(folders[0]), weights(folders[2]))


def test_a_compiled_update_gives_the_same_weights(script, tmp_path):
    """Up to rounding, over a whole run."""
    eager = weights(script.train(tiny_args(script, tmp_path / "eager")))
    compiled = weights(script.train(tiny_args(script, tmp_path / "compiled", compile=True)))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(compiled[name], eager[name]) for name in eager)  # else nothing was compiled


def test_resume_finishes_the_schedule(script, tmp_path):
    """A run that is cut short and resumed goes on in its folder, at its step, to the same end."""
    args = tiny_args(script, tmp_path)
    whole = script.train(args)
    checkpoint = torch.load(whole / "latest.pt", weights_only=True)
    assert checkpoint["global_step"] == 64 and checkpoint["iteration"] == 4
    # A checkpoint of the same settings, as the second iteration would have left it
    checkpoint["iteration"], checkpoint["global_step"] = 2, 32
    script.save_checkpoint(whole / "latest.pt", checkpoint)
    (whole / "best.pt").unlink(missing_ok=True)
    time.sleep(1)  # TensorBoard reads a folder's files in the order of their names, which count seconds
    flags = script.Args(resume=whole, cuda=False, eval_episodes=2, log_dir=tmp_path / "elsewhere")
    assert script.train(flags) == whole
    resumed = torch.load(whole / "latest.pt", weights_only=True)
    assert resumed["iteration"] == 4 and resumed["global_step"] == 64
    adam = next(iter(resumed["optimizer"]["state"].values()))["step"].item()
    assert adam == (4 + 2) * 2 * 2  # iterations, epochs, minibatches
    assert not (tmp_path / "elsewhere").exists()
    events = EventAccumulator(str(whole)).Reload()
    assert [event.step for event in events.Scalars("charts/SPS")] == [16, 32, 48, 64]


def test_a_finished_run_that_is_resumed_is_evaluated_again(script, tmp_path):
    """It may have been killed between its last checkpoint and its evaluation."""
    folder = script.train(tiny_args(script, tmp_path))
    before = script.load_checkpoint(folder)
    assert script.train(script.Args(resume=folder, cuda=False, eval_episodes=2)) == folder
    after = script.load_checkpoint(folder)
    assert after["iteration"] == before["iteration"] == 4
    assert all(torch.equal(before["agent"][name], tensor) for name, tensor in after["agent"].items())
    assert len(EventAccumulator(str(folder)).Reload().Scalars("eval/return_mean")) == 2


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint(script, tmp_path, signum, status):
    """Ctrl-C reaches the workers of the environments too; SIGTERM comes for the process that trains."""
    flags = [*SMALL, "--total-timesteps", "1000000", "--checkpoint-interval", "1", "--async-envs"]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    while not list(tmp_path.glob("runs/*/latest.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors and "--resume runs/" in errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert script.load_checkpoint(folder)["iteration"] >= 1


def test_checkpoint_round_trip(script, tmp_path):
    state = {"script": script.__name__, "args": {"seed": 3}, "agent": {"w": torch.randn(3)}, "iteration": 2}
    script.save_checkpoint(tmp_path / "latest.pt", state)
    loaded = script.load_checkpoint(tmp_path)
    assert torch.equal(loaded["agent"]["w"], state["agent"]["w"]) and loaded["args"] == {"seed": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]


def test_normalisation_is_part_of_the_checkpoint(mlp_script, tmp_path):
    folder = mlp_script.train(tiny_args(mlp_script, tmp_path, norm_obs=True, norm_reward=True))
    saved = weights(folder)
    assert saved["obs_norm.count"] == 64 and (saved["obs_norm.var"] != 1).any()
    checkpoint = torch.load(folder / "latest.pt", weights_only=True)
    assert checkpoint["return_rms"]["count"] == pytest.approx(100 + 64)
    checkpoint["iteration"], checkpoint["global_step"] = 2, 32  # two iterations more, which go on counting
    mlp_script.save_checkpoint(folder / "latest.pt", checkpoint)
    mlp_script.train(mlp_script.Args(resume=folder, cuda=False, eval_episodes=2))
    assert weights(folder)["obs_norm.count"] == 64 + 32
    checkpoint = torch.load(folder / "latest.pt", weights_only=True)
    assert checkpoint["return_rms"]["count"] == pytest.approx(100 + 64 + 32)


def test_without_norm_obs_the_networks_see_what_the_environments_show(mlp_script, tmp_path):
    args = tiny_args(mlp_script, tmp_path, norm_obs=False)
    assert not any(name.startswith("obs_norm") for name in weights(mlp_script.train(args)))
    envs = mlp_script.make_envs(args, 2, training=True)
    agent = mlp_script.make_agent(args, envs, torch.device("cpu"))
    large = np.full((2, *envs.single_observation_space.shape), 1e3, np.float64)
    shown = mlp_script.to_device(large, torch.device("cpu"))
    assert shown.dtype == torch.float32 and torch.equal(agent.obs_norm(shown), shown)
    assert agent.get_value(shown).isfinite().all()
    envs.close()


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_a_bad_checkpoint_is_refused(script, tmp_path, capsys):
    good = {"script": script.__name__, "args": {}}
    script.save_checkpoint(tmp_path / "good.pt", good)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:200])
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save(good | {"bomb": Bomb()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"script": "other_script"}, tmp_path / "other.pt")
    for name in ("cut.pt", "text.pt", "empty.pt", "code.pt", "list.pt", "missing.pt", "other.pt"):
        with pytest.raises(script.InputError, match=name):
            script.load_checkpoint(tmp_path / name)
    with pytest.raises(script.InputError, match=r"other_script\.py"):
        script.load_checkpoint(tmp_path / "other.pt")
    assert "boom" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-envs", "0"], "--num-envs must be at least 1"),
        (["--num-minibatches", "7"], "a divisor of num_envs * num_steps"),
        (["--gamma", "1.5"], "--gamma must be between 0 and 1"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0"),
        (["--total-timesteps", "10"], "at least one rollout"),
        (["--seed", "1000000"], "clear of the training seeds"),
        (["--env-id", "CartPoll-v1"], "CartPoll"),
        (["--evaluate", "nowhere.pt"], "nowhere.pt"),
        (["--render"], "with --evaluate"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(script, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    with pytest.raises(SystemExit) as exit:
        script.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not list(tmp_path.iterdir())


def test_car_racing_has_flags_of_its_own_to_refuse(tmp_path):
    for changes, words in [({"env_id": "CartPole-v1"}, "no CarRacing"), ({"action_repeat": 0}, "at least 1")]:
        with pytest.raises(ppo_carracing.InputError, match=words):
            ppo_carracing.train(tiny_args(ppo_carracing, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_the_wrong_environment_is_refused_with_the_right_script(mlp_script, tmp_path):
    other = {"ppo_cartpole": "Pendulum-v1", "ppo_continuous_mlp": "CartPole-v1"}[mlp_script.__name__]
    with pytest.raises(mlp_script.InputError, match="ppo_c"):
        mlp_script.train(tiny_args(mlp_script, tmp_path, env_id=other))
    assert not list(tmp_path.iterdir())


def test_env_id_picks_its_preset_and_flags_win(mlp_script, monkeypatch):
    """Also a flag that says what the default says."""
    env_id = next(iter(mlp_script.PRESETS))
    steps = mlp_script.Args().total_timesteps
    seen = []
    monkeypatch.setattr(mlp_script, "train", seen.append)
    for flags in ([], ["--total-timesteps", str(steps)]):
        monkeypatch.setattr(sys, "argv", ["x", "--env-id", env_id, *flags])
        mlp_script.main()
    settings = dataclasses.asdict(mlp_script.Args()) | mlp_script.PRESETS[env_id] | {"env_id": env_id}
    assert dataclasses.asdict(seen[0]) == settings != dataclasses.asdict(mlp_script.Args())
    assert dataclasses.asdict(seen[1]) == settings | {"total_timesteps": steps}
    assert settings["total_timesteps"] != steps


def test_a_preset_is_no_contradiction_but_its_environment_is(mlp_script, tmp_path):
    checkpoint = mlp_script.load_checkpoint(mlp_script.train(tiny_args(mlp_script, tmp_path)))
    other = mlp_script.preset(next(iter(mlp_script.PRESETS)))
    with pytest.raises(mlp_script.InputError, match="--env-id"):
        mlp_script.adopt_args(other, checkpoint)
    saved = {"args": {**checkpoint["args"], "env_id": other.env_id}}
    assert mlp_script.adopt_args(other, saved).total_timesteps == checkpoint["args"]["total_timesteps"]


def test_a_flag_that_contradicts_the_checkpoint_is_refused(script, run, capsys):
    _, folder = run
    checkpoint = script.load_checkpoint(folder)
    with pytest.raises(script.InputError, match=r"--gamma 0\.5 contradicts"):
        script.adopt_args(script.Args(gamma=0.5), checkpoint)
    args = script.adopt_args(script.Args(cuda=False, eval_episodes=7), checkpoint)
    assert (args.num_steps, args.num_envs, args.eval_episodes) == (8, 2, 7)


def test_video(mlp_script, tmp_path):
    pytest.importorskip("moviepy")
    env_id = {"ppo_cartpole": "CartPole-v1", "ppo_continuous_mlp": "Pendulum-v1"}[mlp_script.__name__]
    folder = mlp_script.train(tiny_args(mlp_script, tmp_path, env_id=env_id, capture_video=True))
    gif, mp4 = sorted((folder / "videos").iterdir(), key=lambda path: path.suffix)
    assert (gif.suffix, mp4.suffix) == (".gif", ".mp4") and mp4.stat().st_size > 1000
    assert EventAccumulator(str(folder)).Reload().Tags()["images"] == ["eval/video"]
