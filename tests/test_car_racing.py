"""FastCarRacing is CarRacing-v3 in every pixel and reward, and the wrappers do what they say."""

import copy

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, ppo_carracing, tiny_args
from gymnasium.envs.box2d.car_racing import CarRacing

STEER = np.float32([0.1, 0.5, 0.1])
LEVER = np.float32([0.1, 0.5])  # the same, as the agent says it


def fast_env(**kwargs):
    spec = copy.deepcopy(gym.spec("CarRacing-v3"))
    spec.entry_point = ppo_carracing.FastCarRacing
    return gym.make(spec, **kwargs)


def follow_the_road(env, speed):
    """A driver that looks five tiles ahead."""
    car, road = env.unwrapped.car, np.array(env.unwrapped.track)[:, 2:]
    nearest = np.square(road - car.hull.position).sum(1).argmin()
    dx, dy = road[(nearest + 5) % len(road)] - car.hull.position
    error = (np.arctan2(-dx, dy) - car.hull.angle + np.pi) % (2 * np.pi) - np.pi
    gas = 0.5 if np.hypot(*car.hull.linearVelocity) < speed else 0.0
    return np.array([np.clip(-2 * error, -1, 1), gas, 0], np.float32)


DRIVERS = {
    "slow lap": lambda env, rng: follow_the_road(env, 40),
    "fast lap, off the road in the bends": lambda env, rng: follow_the_road(env, 90),
    "straight on, to the field's edge": lambda env, rng: np.float32([0, 0.5, 0]),
    "spin": lambda env, rng: np.float32([1, 0.6, 0]),
    "noise": lambda env, rng: rng.uniform([-1, 0, 0], [1, 1, 0.4]).astype(np.float32),
}


@pytest.fixture(scope="module")
def both():
    envs = gym.make("CarRacing-v3"), fast_env()
    yield envs
    for env in envs:
        env.close()


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_pixel_and_reward_equals_the_stock_env(both, driver):
    stock, fast = both
    colors, ends = set(), []
    for seed in (3, 14):
        rng = np.random.default_rng(seed)
        frames = stock.reset(seed=seed)[0], fast.reset(seed=seed)[0]
        assert np.array_equal(*frames)
        for step in range(300):
            action = DRIVERS[driver](stock, rng)
            expected, got = stock.step(action), fast.step(action)
            assert np.array_equal(expected[0], got[0]), f"seed {seed}, frame {step}"
            assert expected[1:] == got[1:]
            colors |= set(map(tuple, got[0][::8, ::8].reshape(-1, 3)))
            if expected[2] or expected[3]:
                ends.append(expected[1])
                break
    assert len(colors) > 5  # something was driven past
    if driver.startswith("straight"):
        assert ends == [-100, -100]


@pytest.mark.parametrize("mode", ["rgb_array", "human"])
def test_other_render_modes_equal_the_stock_env(monkeypatch, mode):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    stock, fast = gym.make("CarRacing-v3", render_mode=mode), fast_env(render_mode=mode)
    assert np.array_equal(stock.reset(seed=5)[0], fast.reset(seed=5)[0])
    for _ in range(20 if mode == "rgb_array" else 5):
        assert np.array_equal(stock.step(STEER)[0], fast.step(STEER)[0])
        if mode == "rgb_array":
            assert np.array_equal(stock.render(), fast.render())
    stock.close()
    fast.close()


def test_colors_may_be_random():
    stock, fast = gym.make("CarRacing-v3", domain_randomize=True), fast_env(domain_randomize=True)
    for seed in (1, 2):
        assert np.array_equal(stock.reset(seed=seed)[0], fast.reset(seed=seed)[0])
        for _ in range(20):
            assert np.array_equal(stock.step(STEER)[0], fast.step(STEER)[0])


def test_action_repeat_sums_rewards_and_shows_the_last_frame(both):
    stock, fast = both
    repeated = ppo_carracing.ActionRepeat(fast, 4)
    assert np.array_equal(stock.reset(seed=8)[0], repeated.reset(seed=8)[0])
    for _ in range(40):
        action = follow_the_road(stock, 60)
        total = 0.0
        for _ in range(4):
            frame, reward, *_ = stock.step(action)
            total += reward
        got_frame, got_total, *_ = repeated.step(action)
        assert np.array_equal(frame, got_frame) and got_total == total


def test_an_episode_that_ends_within_a_repeat_shows_its_last_frame(both):
    stock, fast = both
    stock.reset(seed=14)
    repeated = ppo_carracing.ActionRepeat(fast, 8)
    repeated.reset(seed=14)
    action, total, got_total, frames, terminated = np.float32([0, 0.5, 0]), 0.0, 0.0, 0, False
    while not terminated and frames < 1000:
        frame, reward, terminated, _, _ = stock.step(action)
        total, frames = total + reward, frames + 1
    assert terminated and frames % 8  # over the edge of the field, in the midst of a repeat
    for _ in range(frames // 8 + 1):
        got_frame, reward, terminated, _, _ = repeated.step(action)
        got_total += reward
    assert terminated
    assert np.array_equal(frame, got_frame) and got_total == pytest.approx(total)


@pytest.mark.parametrize("training", [True, False])
def test_what_shapes_training_is_off_in_evaluation(tmp_path, training):
    """A car that stands still: terminated after 150 frames in training, truncated after 1000."""
    env = ppo_carracing.make_env(tiny_args(ppo_carracing, tmp_path), training)
    env.reset(seed=1)
    steps, total, terminated, truncated = 0, 0.0, False, False
    while not (terminated or truncated):
        _, reward, terminated, truncated, _ = env.step(np.float32([0, 0]))
        steps, total = steps + 1, total + reward
    assert (terminated, truncated) == (training, not training)
    assert 38 <= steps <= 40 if training else steps == 250
    if not training:
        assert total < -80  # the environment's own reward, unscaled


@pytest.mark.parametrize("end", ["lap finished", "last tile", "field left"])
@pytest.mark.parametrize("training", [True, False])
def test_the_end_of_a_lap_is_a_truncation_in_training_only(tmp_path, training, end):
    """Also of a lap with tiles missed, with which the environment goes on. Leaving the field
    terminates."""
    env = ppo_carracing.make_env(tiny_args(ppo_carracing, tmp_path), training)
    env.reset(seed=1)
    for _ in range(20):
        env.step(np.float32([0, 1]))
    racing = env.unwrapped
    assert racing.tile_visited_count > 5 and not racing.road[-1].road_visited
    if end == "lap finished":
        racing.new_lap = True
    elif end == "last tile":
        for tile in racing.road[:100] + racing.road[101:]:
            tile.road_visited = True
    else:
        racing.car.hull.position = (340, 0)
    _, reward, terminated, truncated, info = env.step(LEVER)
    assert info.get("lap_finished") == {"lap finished": True, "field left": False}.get(end)
    assert (reward < -50) == (end == "field left")
    assert truncated == (training and end != "field left")
    assert terminated == (end == "field left" or (end == "lap finished" and not training))


def test_observations_are_stacked_grey_uint8(tmp_path):
    env = ppo_carracing.make_env(tiny_args(ppo_carracing, tmp_path), training=True)
    stock = gym.make("CarRacing-v3")
    obs, _ = env.reset(seed=2)
    frames = [stock.reset(seed=2)[0]]
    assert (
        obs.dtype == np.uint8 and obs.shape == (4, 48, 48) and env.observation_space.contains(obs)
    )
    for _ in range(3):
        obs = env.step(LEVER)[0]
        for _ in range(4):
            frame = stock.step(STEER)[0]
        frames.append(frame)
    greens = np.stack(frames)[..., 1].astype(float).reshape(4, 48, 2, 48, 2).mean((2, 4))
    assert np.array_equal(obs[:, :42], np.floor(greens)[:, :42])


def test_the_dashboard_shows_the_speed(tmp_path):
    """As one brightness, about 2.1 levels for each unit/s; the stock frame gives the same."""
    env = ppo_carracing.make_env(tiny_args(ppo_carracing, tmp_path), training=False)
    env.reset(seed=2)
    stock, speeds = gym.make("CarRacing-v3"), []
    stock.reset(seed=2)
    for _ in range(60):
        obs = env.step(np.float32([0, 1]))[0]
        for _ in range(4):
            frame = stock.step(np.float32([0, 1, 0]))[0]
        (level,) = set(obs[-1, 42:].flatten().tolist())
        assert (ppo_carracing.shrink(frame)[42:] == level).all()
        speeds.append((np.hypot(*env.unwrapped.car.hull.linearVelocity), level))
    fast = [(speed, level) for speed, level in speeds if 30 < speed < 110]
    assert len(fast) > 20 and max(speed for speed, _ in fast) > 60
    assert all(level / speed == pytest.approx(2.15, abs=0.15) for speed, level in fast)
    assert ppo_carracing.shrink(np.full((96, 96, 3), 255, np.uint8)).max() == 255


def test_training_reports_raw_returns_and_trains_on_scaled_rewards(tmp_path):
    """A tile counts alike on each track; that is not reported."""
    args = tiny_args(ppo_carracing, tmp_path, async_envs=False, reward_scale=0.5)
    envs = ppo_carracing.make_envs(args, 1, training=True)
    plain = ppo_carracing.make_env(args, training=False)
    envs.reset(seed=1)
    plain.reset(seed=1)
    total, terminated, steps = 0.0, [False], 0
    while not terminated[0]:
        action = np.float32([0.3, 0.5])
        raw = plain.step(action)[1]
        total += raw
        steps += 1
        _, rewards, terminated, _, infos = envs.step(action[None])
        length = len(plain.unwrapped.track) / 300
        assert length != 1 and rewards[0] == pytest.approx(0.5 * raw * length)
    assert infos["final_info"]["statistics"]["r"][0] == pytest.approx(total)
    assert infos["final_info"]["statistics"]["l"][0] == steps
    envs.close()


def test_the_stock_env_plays_the_same(tmp_path):
    fast, stock = (
        ppo_carracing.make_env(tiny_args(ppo_carracing, tmp_path, stock_env=stock), training=False)
        for stock in (False, True)
    )
    assert type(stock.unwrapped) is CarRacing
    assert isinstance(fast.unwrapped, ppo_carracing.FastCarRacing)
    assert np.array_equal(fast.reset(seed=6)[0], stock.reset(seed=6)[0])
    for _ in range(50):
        (obs, *rest), (stock_obs, *stock_rest) = fast.step(LEVER), stock.step(LEVER)
        assert np.array_equal(obs, stock_obs) and rest == stock_rest


class WideCarRacing(CarRacing):
    """Somebody's own, with a longer first second."""

    def reset(self, **kwargs):
        first = super().reset(**kwargs)
        self.t = -1.0
        return first


class GreyCarRacing(CarRacing):
    """Draws itself."""

    def _render(self, mode):
        return 0 * super()._render(mode)


def test_a_subclass_of_car_racing_trains(tmp_path):
    """At full speed, unless it draws itself: then as it draws."""
    gym.register("Wide-v0", f"{__name__}:WideCarRacing", max_episode_steps=500)
    gym.register("Grey-v0", GreyCarRacing, max_episode_steps=500)
    settings = {"num_steps": 4, "num_minibatches": 1, "total_timesteps": 8, "eval_episodes": 1}
    for env_id, is_fast in ((f"{__name__}:Wide-v0", True), ("Grey-v0", False)):
        args = tiny_args(ppo_carracing, tmp_path, env_id=env_id, **settings)
        args.env_kwargs = {"lap_complete_percent": 0.5, "domain_randomize": True}
        env = ppo_carracing.make_env(args, training=False)
        assert isinstance(env.unwrapped, ppo_carracing.FastCarRacing) == is_fast
        assert env.unwrapped.lap_complete_percent == 0.5 and env.unwrapped.domain_randomize
        obs, _ = env.reset(seed=1)
        assert (obs[:, :42].max() > 0) == is_fast
        env.close()
        args.env_kwargs = {}
        ppo_carracing.train(args)


def test_discrete_actions_are_refused(tmp_path):
    args = tiny_args(ppo_carracing, tmp_path, env_kwargs={"continuous": False})
    with pytest.raises(ppo_carracing.InputError, match="continuous=True"):
        ppo_carracing.train(args)
    assert not list(tmp_path.iterdir())


def test_a_tile_passed_over_costs_twenty_points_in_training(tmp_path):
    """Not more than 500, however many; a visit after all takes the price back."""
    env, twin = (
        ppo_carracing.make_env(tiny_args(ppo_carracing, tmp_path), training=True) for _ in range(2)
    )
    for farthest in (9, 90):
        env.reset(seed=3), twin.reset(seed=3)
        env.step(LEVER), twin.step(LEVER)
        road = env.unwrapped.road
        road[farthest].road_visited = True
        missed = sum(not tile.road_visited for tile in road[:farthest])
        assert missed >= 5
        assert env.step(LEVER)[1] == pytest.approx(twin.step(LEVER)[1] - min(20 * missed, 500))
        for tile in road[:farthest]:
            tile.road_visited = True
        assert env.step(LEVER)[1] > 10 * missed


@pytest.mark.parametrize("training", [True, False])
def test_one_lever_works_both_pedals(tmp_path, training):
    env = ppo_carracing.make_env(tiny_args(ppo_carracing, tmp_path), training)
    assert np.array_equal(env.action_space.low, [-1, 0]) and np.array_equal(
        env.action_space.high, [1, 1]
    )
    env.reset(seed=1)
    wheel = env.unwrapped.car.wheels[2]
    for lever, gas, brake in [
        (0, 0, 0.2),
        (0.25, 0.25, 0.15),
        (1, 1, 0),
    ]:  # gas rises by up to 0.1 a frame
        for _ in range(3):
            env.step(np.float32([0, lever]))
        assert (wheel.gas, wheel.brake) == pytest.approx((gas, brake))


def test_the_pretrained_driver_drives(tmp_path):
    """On the first four of the tracks that the README reports."""
    path = ROOT / "pretrained" / "ppo_carracing.pt"
    args = ppo_carracing.saved_args(path, evaluate=path, cuda=False, eval_episodes=4)
    returns, _ = ppo_carracing.evaluate(ppo_carracing.load_agent(args), args)
    assert returns.min() >= 850
