"""What the agent asks of an environment: side by side with others, and that it reports costs."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from rlprune.errors import InputError


def vectorised(env: gymnasium.Env | VectorEnv) -> VectorEnv:
    """The environment as a vector, of one if need be.

    Raises:
        InputError: autoreset mode or spaces that the agent can't work with.
    """
    if not isinstance(env, VectorEnv):
        # copied: an environment that reuses its array would overwrite the last observation as it is reset
        copied = gymnasium.wrappers.TransformObservation(env, np.array, env.observation_space)
        env = SyncVectorEnv([lambda: copied], autoreset_mode=AutoresetMode.SAME_STEP)
    if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise InputError("A vector environment must be made with autoreset_mode=AutoresetMode.SAME_STEP.")
    box, view = env.single_action_space, env.single_observation_space
    if not isinstance(box, gymnasium.spaces.Box) or not np.issubdtype(box.dtype, np.floating):
        raise InputError(f"The action space must be a Box of floats, not {box}.")
    if not isinstance(view, gymnasium.spaces.Box) or len(view.shape) != 1:
        raise InputError(f"The observation space must be a one-dimensional Box, not {view}: flatten it.")
    return env


def reported_costs(infos: dict[str, Any], over: np.ndarray, count: int) -> np.ndarray:
    """The costs of one step of a vector environment: (environments, count).

    Args:
        infos: as returned; of an episode that ended just now gymnasium keeps them in ``final_info``, since the
            rest already tells of the next episode's beginning.
        over: (environments,), where an episode ended.
        count: entries expected.

    Raises:
        InputError: no cost, not ``count`` entries, NaN or infinity, or integers where gymnasium may have cut them.
    """
    rows = []
    for i, ended in enumerate(over):
        source = infos.get("final_info", {}) if ended else infos
        if "cost" not in source or not source["_cost"][i]:
            raise InputError('The environment must report info["cost"] at every step, also at the last.')
        array = np.asarray(source["cost"])
        if len(over) > 1 and array.dtype.kind in "biu":
            raise InputError('info["cost"] must be of type float in a vector environment: write float(cost).')
        cost = np.asarray(array[i], dtype=np.float64).reshape(-1)
        if len(cost) != count:
            raise InputError(f'info["cost"] has {len(cost)} entries for {count} limits: give one limit per entry.')
        if not np.isfinite(cost).all():
            raise InputError(f'info["cost"] must be finite, not {cost.tolist()}.')
        rows.append(cost)
    return np.stack(rows)


def check_finite(observation: np.ndarray, reward: np.ndarray | None = None) -> None:
    """Raise `InputError` for NaN or infinity in what an environment returned."""
    if not (np.isfinite(observation).all() and (reward is None or np.isfinite(reward).all())):
        more = f", reward {reward}" if reward is not None else ""
        raise InputError(f"The environment returned NaN or infinity: observation {observation}{more}.")
