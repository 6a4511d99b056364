"""Another environment of pixels: what is to be changed in ppo_cartpole.py, and that it learns."""

import difflib
import importlib.util

import gymnasium as gym
import numpy as np
from conftest import ROOT


class Catch(gym.Env):
    """A ball falls through a field of 8 x 8 squares; a paddle at the bottom goes left, stays or
    goes right. 64 x 64 RGB pixels; 1 for a ball that was caught, -1 for one that was not."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, *self.np_random.integers(0, 8, 2)
        return self.draw(), {}

    def draw(self):
        squares = np.zeros((8, 8, 3), np.uint8)
        squares[self.row, self.column] = (255, 80, 80)
        squares[7, self.paddle] = (80, 255, 80)
        return squares.repeat(8, 0).repeat(8, 1)

    def step(self, action):
        self.row += 1
        self.paddle = np.clip(self.paddle + action - 1, 0, 7)
        reward = (1.0 if self.column == self.paddle else -1.0) if self.row == 7 else 0.0
        return self.draw(), reward, self.row == 7, False, {}


# (a text of the script, what takes its place)
EDITS = [
    (  # make_env: colours first, nothing is flattened
        """    space = env.observation_space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        env = gym.wrappers.TransformObservation(env, np.copy, space)  # some show one array, changed
    elif space.dtype != np.uint8 or math.prod(space.shape) <= 2048:  # else an image: Agent refuses
        env = gym.wrappers.FlattenObservation(env)
""",
        """    space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
    env = gym.wrappers.TransformObservation(env, lambda obs: obs.transpose(2, 0, 1), space)
""",
    ),
    (  # Agent takes images
        "len(observation_space.shape) != 1:",
        "len(observation_space.shape) != 3:",
    ),
    (  # its network
        """            first, second = nn.Linear(num_inputs, 64), nn.Linear(64, 64)
            return nn.Sequential(layer_init(first), nn.Tanh(), layer_init(second), nn.Tanh())
""",
        """            return nn.Sequential(
                layer_init(nn.Conv2d(num_inputs, 16, 8, stride=8)), nn.ReLU(),
                nn.Flatten(), layer_init(nn.Linear(16 * 8 * 8, 64)), nn.ReLU(),
            )  # fmt: skip
""",
    ),
    (  # bytes from 0 to 1
        "self.actor_trunk(self.obs_norm(obs.float())[:, : self.num_inputs])",
        "self.actor_trunk(obs.float() / 255)",
    ),
    (
        """        inputs = self.obs_norm(obs.float())[:, : self.num_inputs]
        return self.critic(self.critic_trunk(inputs)).squeeze(-1)
""",
        """        return self.critic(self.critic_trunk(obs.float() / 255)).squeeze(-1)
""",
    ),
]


def test_forty_lines_make_it_play_from_pixels(tmp_path):
    before = after = (ROOT / "ppo_cartpole.py").read_text()
    for old, new in EDITS:
        assert after.count(old) == 1, old
        after = after.replace(old, new)
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
    changed = [line for line in diff if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 40
    path = tmp_path / "ppo_catch.py"
    path.write_text(after)
    spec = importlib.util.spec_from_file_location("ppo_catch", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    gym.register("Catch-v0", Catch)
    args = script.Args(
        env_id="Catch-v0", log_dir=tmp_path, cuda=False, total_timesteps=60_000, num_threads=1
    )
    returns, folder = script.train(args)
    assert returns.mean() >= 0.9
    again = script.load_agent(script.saved_args(folder, evaluate=folder, cuda=False))
    assert script.evaluate(again, args)[0].tolist() == returns.tolist()
