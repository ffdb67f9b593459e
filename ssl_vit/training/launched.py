"""Process ranks: read from the environment set by torchrun or Slurm."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ssl_vit.common.errors import UserError, check

# Below the ports that Linux gives to outgoing connections (from 32768), above most services.
_FIRST_PORT, _PORTS = 12_000, 18_000


@dataclass(frozen=True)
class Launched:
    """Rank of this process among all (``rank`` of ``world``) and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def launched() -> Launched:
    """Ranks as ``torchrun`` or Slurm's ``srun`` set them; a single process without them.

    Under Slurm, the variables of torch.distributed are set from Slurm's: the address is the step's
    first machine, the port is derived from job and step. An address or port that is already set is
    kept.

    Raises:
        UserError: variables that are incomplete or contradict each other.
    """
    env = os.environ
    if "RANK" not in env and _in_step(env):
        env.update(_from_slurm(env))
    if "RANK" not in env:
        world = _number(env, "WORLD_SIZE", 1)
        check(world == 1, f"WORLD_SIZE is {world}, but RANK is not set; start it by torchrun")
        return Launched()
    return _from_torch(env)


def _from_torch(env: Mapping[str, str]) -> Launched:
    """Ranks from the variables that ``torchrun`` sets."""
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    # Without local ranks, all processes are assumed to be on one machine.
    local_rank = _number(env, "LOCAL_RANK", rank)
    local_world = _number(env, "LOCAL_WORLD_SIZE", world)
    check(rank < world, f"RANK is {rank}; WORLD_SIZE is {world}, it must be below that")
    check(
        local_rank < local_world <= world,
        f"LOCAL_RANK is {local_rank}, LOCAL_WORLD_SIZE {local_world}, WORLD_SIZE {world}; "
        "each must be below or at most the next",
    )
    for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 else ():
        check(bool(env.get(name)), f"WORLD_SIZE is {world}, but {name} is not set")
    return Launched(rank, world, local_rank, local_world)


def _in_step(env: Mapping[str, str]) -> bool:
    """True if this process is one of several tasks of an ``srun``.

    ``SLURM_NTASKS`` does not show it: it is also set in a batch script, which is one process.
    """
    return "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1


def _from_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """Variables of torch.distributed for this task of a Slurm step."""
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID", 0)
    # Two steps of a job, and jobs that start together, must not share a port.
    port = _FIRST_PORT + (job * 31 + step) % _PORTS
    nodes = env.get("SLURM_STEP_NODELIST") or _text(env, "SLURM_JOB_NODELIST")
    counts = _tasks_per_node(_text(env, "SLURM_STEP_TASKS_PER_NODE"))
    node = _number(env, "SLURM_NODEID")
    check(node < len(counts), f"SLURM_NODEID is {node}, of {len(counts)} machines")
    return {
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
        "RANK": _text(env, "SLURM_PROCID"),
        "WORLD_SIZE": _text(env, "SLURM_STEP_NUM_TASKS"),
        "LOCAL_RANK": _text(env, "SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": str(counts[node]),
    }


def first_host(nodes: str) -> str:
    """First host name of a Slurm node list: ``gpu[007-009,12]-ib,login`` -> ``gpu007-ib``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _tasks_per_node(text: str) -> list[int]:
    """Tasks per machine from Slurm's compressed list: ``8(x2),4`` -> ``[8, 8, 4]``."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    if not all(parts):
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; counts are expected, as 8(x2),4")
    return [n for part in parts if part for n in [int(part[1])] * int(part[2] or 1)]


def _text(env: Mapping[str, str], name: str) -> str:
    check(bool(env.get(name)), f"the environment is incomplete: {name} is not set")
    return env[name]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Integer value (0 or more) of an environment variable."""
    if default is not None and name not in env:
        return default
    text = _text(env, name)
    check(text.isascii() and text.isdigit(), f"{name} is {text!r}; it must be a whole number")
    return int(text)
