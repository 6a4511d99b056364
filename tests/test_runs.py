"""Whole runs of a second or two: checkpoints, evaluation, resuming, TensorBoard, flags."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_agent, ppo_carracing, suitable, tiny_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

EVALUATION = re.compile(
    r"evaluation: mean (\S+) std (\S+) median (\S+) min (\S+) max (\S+) "
    r"episodes (\d+) first-seed (\d+)"
)
SMALL = ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--update-epochs", "1"]


def trained(script, *args, **kwargs):
    """Trains with tiny_args and returns the run's folder."""
    return script.train(tiny_args(script, *args, **kwargs))[1]


def resume(script, folder, **changes):
    """Goes on with a run as the command line does, and returns its folder."""
    changes = {"cuda": False, "eval_episodes": 2, **changes}
    return script.train(script.saved_args(folder, resume=folder, **changes))[1]


def weights(folder, name="latest.pt"):
    return torch.load(folder / name, weights_only=True)["agent"]


def equal(first, second):
    same = all(torch.equal(first[name], second[name]) for name in first)
    return first.keys() == second.keys() and same


def evaluation_line(text):
    found = EVALUATION.findall(text)
    assert found, text
    return found[-1]


def call(script, *flags, cwd, path=None):
    command = [sys.executable, str(path or ROOT / f"{script.__name__}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def parsed(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, flags)])
    return script.parse_args()


def rewind(script, folder, iteration):
    """Makes a run's checkpoint say that it was written by an earlier iteration."""
    checkpoint = torch.load(folder / "latest.pt", weights_only=True)
    checkpoint["iteration"], checkpoint["global_step"] = iteration, iteration * 16
    script.save_checkpoint(folder / "latest.pt", checkpoint)
    (folder / "best.pt").unlink(missing_ok=True)
    time.sleep(1)  # TensorBoard reads a folder's files by name, and names count seconds


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """One small run from the command line: (the finished process, its folder)."""
    place = tmp_path_factory.mktemp(script.__name__)
    flags = ["--total-timesteps", 64, "--eval-episodes", 3, "--checkpoint-interval", 2, "--cuda"]
    done = call(script, *SMALL, *flags, cwd=place)
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


def test_a_copy_under_another_name_reads_the_same_checkpoints(script, run, tmp_path):
    done, folder = run
    copy = shutil.copy(ROOT / f"{script.__name__}.py", tmp_path / "my_ppo.py")
    again = call(script, "--evaluate", folder, "--eval-episodes", 3, cwd=tmp_path, path=copy)
    assert evaluation_line(again.stdout) == evaluation_line(done.stdout), again.stderr


def test_each_episode_has_its_own_seed(script, run):
    """Episodes 2 and 3 of one evaluation are episodes 1 and 2 of one that starts a seed later."""
    _, folder = run
    returns = []
    for first_seed in (1_000_000, 1_000_001):
        call = {"evaluate": folder, "eval_seed": first_seed, "eval_episodes": 3, "cuda": False}
        args = script.saved_args(folder, num_envs=2, async_envs=False, **call)
        returns.append(script.evaluate(script.load_agent(args), args)[0])
    assert np.allclose(returns[0][1:], returns[1][:2])


def test_evaluation_counts_each_episode_once_whatever_their_lengths(mlp_script, tmp_path):
    """Five episodes in two environments: returns and lengths in the order of the seeds."""
    args = tiny_args(mlp_script, tmp_path, env_id=suitable(mlp_script, "Limited"), eval_episodes=5)
    envs = mlp_script.make_envs(args, 1, training=False)
    returns, lengths = mlp_script.evaluate(make_agent(mlp_script, args, envs), args)
    assert returns.tolist() == lengths.tolist() == [5] * 5


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rate_and_clip_range_fall_linearly(script, tmp_path, monkeypatch, anneal):
    """Or stay. The last of 4 iterations is trained with a quarter of each, not with none."""
    honest, seen = script.update, []

    def update(agent, optimizer, rollout, clip_coef, *rest):
        seen.append((optimizer.param_groups[0]["lr"], clip_coef))
        return honest(agent, optimizer, rollout, clip_coef, *rest)

    monkeypatch.setattr(script, "update", update)
    schedules = {"anneal_lr": anneal, "anneal_clip": anneal}
    first = {"learning_rate": 1e-3, "clip_coef": 0.2}
    script.train(tiny_args(script, tmp_path, async_envs=False, **schedules, **first))
    shares = np.array([[1.0], [0.75], [0.5], [0.25]]) if anneal else np.ones((4, 1))
    assert np.allclose(seen, shares * [1e-3, 0.2])


POLICY_TAGS = {
    "ppo_cartpole": {"policy/share_0", "policy/share_1"},
    "ppo_carracing": {"policy/steering", "policy/gas"},
    "ppo_continuous_mlp": {"policy/mean_0", "policy/std_0", "policy/mean_1", "policy/std_1"},
}


def test_tensorboard_shows_the_tags_of_the_readme(script, run):
    _, folder = run
    events = EventAccumulator(str(folder)).Reload()
    names = "value_loss policy_loss entropy old_approx_kl approx_kl clipfrac explained_variance"
    expected = {f"losses/{name}" for name in (*names.split(), "grad_norm")}
    expected |= {"charts/learning_rate", "losses/clip_coef", "charts/SPS"}
    expected |= {"time/collect_fraction", "eval/return_mean"} | POLICY_TAGS[script.__name__]
    scalars = set(events.Tags()["scalars"])
    assert expected <= scalars <= expected | {"charts/episodic_return", "charts/episodic_length"}
    assert min(scalars | {"charts/episodic_return"}).startswith("charts/")  # what opens first
    assert [event.step for event in events.Scalars("losses/value_loss")] == [16, 32, 48, 64]
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    assert np.allclose(np.array(rates) / rates[0], [1, 0.75, 0.5, 0.25])
    assert "hyperparameters/text_summary" in events.Tags()["tensors"]
    pictures = ["policy/frames"] if script.__name__ == "ppo_carracing" else []
    assert events.Tags()["images"] == pictures
    names = {data.plugin_data.plugin_name for data in events.summary_metadata.values()}
    assert {"hparams", "text"} <= names


def test_hparams_opens_on_the_learning_rate(script, run):
    """The tab shows five columns, those first that are said to differ, then by name."""
    _, folder = run
    events = EventAccumulator(str(folder)).Reload()
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    infos = HParamsPluginData.FromString(content).experiment.hparam_infos
    columns = sorted(infos, key=lambda info: (not info.differs, info.name))
    assert "learning_rate" in [info.name for info in columns[:5]]
    assert not {info.name for info in infos} & script.NOT_SAVED
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["anneal_lr"].string_value == "True" and values["seed"].number_value == 1


@pytest.mark.parametrize("async_envs", [False, True])
def test_the_same_seed_gives_the_same_weights(script, tmp_path, async_envs):
    folders = [
        trained(script, tmp_path / place, seed=seed, async_envs=async_envs)
        for place, seed in (("first", 7), ("second", 7), ("third", 8))
    ]
    assert equal(weights(folders[0]), weights(folders[1]))
    assert not equal(weights(folders[0]), weights(folders[2]))


def test_a_compiled_loss_gives_the_same_weights(script, tmp_path):
    """Up to rounding, over a whole run: 4e-7."""
    eager = weights(trained(script, tmp_path / "eager"))
    compiled = weights(trained(script, tmp_path / "compiled", compile=True))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    assert not equal(compiled, eager)  # else nothing was compiled


def test_resume_finishes_the_schedule(script, tmp_path):
    """A run that is cut short and resumed goes on in its folder, at its step, to the same end."""
    folder = trained(script, tmp_path)
    before = script.load_checkpoint(folder)
    assert before["global_step"] == 64 and before["iteration"] == 4
    rewind(script, folder, 2)
    assert resume(script, folder, log_dir=tmp_path / "elsewhere") == folder
    after = script.load_checkpoint(folder)
    assert after["iteration"] == 4 and after["global_step"] == 64
    adam = next(iter(after["optimizer"]["state"].values()))["step"].item()
    assert adam == (4 + 2) * 2 * 2  # iterations, epochs, minibatches
    assert not (tmp_path / "elsewhere").exists()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("charts/SPS")] == [16, 32, 48, 64]


def test_a_finished_run_can_be_made_longer(script, run, tmp_path):
    """--resume RUN --total-timesteps N: its schedules then run over the new total."""
    _, finished = run
    folder = shutil.copytree(finished, tmp_path / "longer")
    time.sleep(1)
    flags = ["--resume", folder, "--total-timesteps", 128, "--eval-episodes", 1, "--no-cuda"]
    done = call(script, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = script.load_checkpoint(folder)
    assert checkpoint["iteration"] == 8 and checkpoint["args"]["total_timesteps"] == 128
    events = EventAccumulator(str(folder)).Reload().Scalars("charts/learning_rate")
    rates = {event.step: event.value / script.Args().learning_rate for event in events}
    assert [rates[step] for step in (80, 128)] == pytest.approx([1 / 2, 1 / 8])


def test_a_finished_run_that_is_resumed_is_evaluated_again(script, tmp_path):
    """It may have been killed between its last checkpoint and its evaluation."""
    folder = trained(script, tmp_path)
    before = script.load_checkpoint(folder)
    assert resume(script, folder) == folder
    after = script.load_checkpoint(folder)
    assert after["iteration"] == before["iteration"] == 4
    assert equal(before["agent"], after["agent"])
    assert len(EventAccumulator(str(folder)).Reload().Scalars("eval/return_mean")) == 2


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint(script, tmp_path, signum, status):
    """Ctrl-C reaches the environments' processes too; SIGTERM only the one that trains."""
    flags = ["--total-timesteps", "1000000", "--checkpoint-interval", "1", "--async-envs"]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *SMALL, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    while not list(tmp_path.glob("runs/*/latest.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors
    assert "--resume runs/" in errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert script.load_checkpoint(folder)["iteration"] >= 1


def test_a_second_signal_ends_a_run_at_once_in_one_line(script, tmp_path):
    """Within an iteration of minutes; nothing half-written is left."""
    flags = ["--num-steps", "1000000", "--total-timesteps", "2000000", "--async-envs"]
    flags += ["--eval-seed", "9000000"]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *SMALL, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    while not list(tmp_path.glob("runs/*/events*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "interrupted; no checkpoint was written\n"
    assert not list(tmp_path.glob("runs/*/*.tmp"))


def test_training_works_outside_the_main_thread(script, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(trained(script, tmp_path)))
    thread.start()
    thread.join()
    assert script.load_checkpoint(results[0])["iteration"] == 4


def test_a_sweep_may_pass_numpy_numbers_and_plain_paths(script, tmp_path):
    numbers = {"learning_rate": np.float64(1e-3), "seed": np.int64(3), "norm_adv": np.bool_(True)}
    args = tiny_args(script, tmp_path, log_dir=str(tmp_path), **numbers)
    returns, folder = script.train(args)
    assert returns.shape == (2,)
    assert script.load_checkpoint(str(folder))["args"]["seed"] == 3
    assert script.saved_args(folder).learning_rate == 1e-3


def test_checkpoint_round_trip(script, tmp_path):
    state = {"script": "x", "args": {"env_id": "y"}, "agent": {"w": torch.randn(3)}}
    script.save_checkpoint(tmp_path / "latest.pt", state)
    loaded = script.load_checkpoint(tmp_path)
    assert torch.equal(loaded["agent"]["w"], state["agent"]["w"])
    assert loaded["args"] == {"env_id": "y"}
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]


def test_normalisation_is_part_of_the_checkpoint(mlp_script, tmp_path):
    folder = trained(mlp_script, tmp_path, norm_obs=True, norm_reward=True)
    saved = weights(folder)
    assert saved["obs_norm.count"] == 64 and (saved["obs_norm.var"] != 1).any()
    checkpoint = mlp_script.load_checkpoint(folder)
    assert checkpoint["return_rms"]["count"] == pytest.approx(100 + 64)
    rewind(mlp_script, folder, 2)  # two iterations more, which go on counting
    resume(mlp_script, folder)
    assert weights(folder)["obs_norm.count"] == 64 + 32
    checkpoint = mlp_script.load_checkpoint(folder)
    assert checkpoint["return_rms"]["count"] == pytest.approx(100 + 64 + 32)


def test_without_norm_obs_the_networks_see_what_the_environments_show(mlp_script, tmp_path):
    folder = trained(mlp_script, tmp_path, norm_obs=False)
    assert not any(name.startswith("obs_norm") for name in weights(folder))
    agent = mlp_script.load_agent(mlp_script.saved_args(folder, evaluate=folder, cuda=False))
    large = torch.full((2, 8), 1e3)
    assert torch.equal(agent.obs_norm(large), large)


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_a_bad_checkpoint_is_refused(script, tmp_path, capsys):
    good = {"script": script.__name__, "args": {"env_id": "x"}, "agent": {}}
    script.save_checkpoint(tmp_path / "good.pt", good)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:200])
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save(good | {"bomb": Bomb()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"script": "other_script"}, tmp_path / "other.pt")
    names = "cut.pt", "text.pt", "empty.pt", "code.pt", "list.pt", "missing.pt", "other.pt"
    for name in names:
        with pytest.raises(script.InputError, match=name):
            script.load_checkpoint(tmp_path / name)
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
def test_bad_input_ends_in_one_line_and_status_2(
    script, tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    with pytest.raises(SystemExit) as exit:
        script.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_new_flag_may_be_zero(script):
    """Only the counts that must be positive are checked to be."""
    my_args = dataclasses.make_dataclass("MyArgs", [("obstacles", int, 0)], bases=(script.Args,))
    script.check_args(my_args())


def test_car_racing_refuses_other_environments(tmp_path):
    with pytest.raises(ppo_carracing.InputError, match="no CarRacing"):
        ppo_carracing.train(tiny_args(ppo_carracing, tmp_path, env_id="CartPole-v1"))
    assert not list(tmp_path.iterdir())


def test_the_wrong_environment_is_refused_with_the_right_script(mlp_script, tmp_path):
    other = {"ppo_cartpole": "Pendulum-v1", "ppo_continuous_mlp": "CartPole-v1"}
    env_id = other[mlp_script.__name__]
    with pytest.raises(mlp_script.InputError, match="ppo_c"):
        mlp_script.train(tiny_args(mlp_script, tmp_path, env_id=env_id))
    assert not list(tmp_path.iterdir())


def test_env_id_picks_its_preset_and_flags_win(mlp_script, monkeypatch):
    """Also a flag that says what the default says."""
    presets = mlp_script.PRESETS
    env_id = next(name for name in presets if "total_timesteps" in presets[name])
    default = mlp_script.Args().total_timesteps
    plain = parsed(mlp_script, monkeypatch, "--env-id", env_id)
    assert plain == mlp_script.preset(env_id) != mlp_script.Args()
    changed = parsed(mlp_script, monkeypatch, "--env-id", env_id, "--total-timesteps", default)
    assert changed == mlp_script.preset(env_id, total_timesteps=default) != plain


def test_flags_go_over_the_checkpoint_also_where_they_equal_the_default(script, run, monkeypatch):
    _, folder = run
    saved = parsed(script, monkeypatch, "--evaluate", folder)
    assert (saved.num_steps, saved.num_envs, saved.update_epochs) == (8, 2, 1)
    assert saved.checkpoint_interval == 2 and saved.eval_episodes == 100
    default = script.Args().num_envs
    changed = parsed(script, monkeypatch, "--resume", folder, "--num-envs", default)
    assert changed.num_envs == default != 2 and changed.num_steps == 8


def test_another_environment_than_the_checkpoints_is_refused(mlp_script, tmp_path, monkeypatch):
    """Also the script's default, if it was typed."""
    folder = trained(mlp_script, tmp_path, env_id=suitable(mlp_script, "Limited"))
    env_id = mlp_script.Args().env_id
    args = parsed(mlp_script, monkeypatch, "--env-id", env_id, "--evaluate", folder)
    assert args.env_id == env_id
    with pytest.raises(mlp_script.InputError, match=r"weights of ppo_\w+\.py for Limited\S+ don't"):
        mlp_script.load_agent(args)


def test_no_episode_in_the_first_iterations_is_said(mlp_script, tmp_path, capsys):
    endless = {"env_id": suitable(mlp_script, "Long"), "total_timesteps": 16 * 12}
    trained(mlp_script, tmp_path, **endless)
    assert capsys.readouterr().out.count("no episode ended in 160 steps") == 1


def test_video(mlp_script, tmp_path):
    pytest.importorskip("moviepy")
    env_id = {"ppo_cartpole": "CartPole-v1", "ppo_continuous_mlp": "Pendulum-v1"}
    folder = trained(mlp_script, tmp_path, env_id=env_id[mlp_script.__name__], capture_video=True)
    (mp4,) = (folder / "videos").iterdir()
    assert mp4.suffix == ".mp4" and mp4.stat().st_size > 1000
