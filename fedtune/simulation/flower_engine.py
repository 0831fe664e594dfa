"""Runs a simulation on Flower's own engine: the same apps on a private SuperLink and Ray actors, which end with the
run.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.proto.federation_config_pb2 import SimulationConfig

from fedtune import paths
from fedtune.accelerator import choose_device
from fedtune.errors import RunError, ServerError
from fedtune.flower.superlink import SuperLink
from fedtune.recipe.schema import Recipe
from fedtune.server.events import RoundEnded, RunStarted, emit_event
from fedtune.tracking import Store

__all__ = ["run_on_flower_engine"]

_POLL_SECONDS = 0.5


def run_on_flower_engine(recipe: Recipe, run: str, store: str) -> None:
    """Execute a stored run on Flower's engine; RunError when Flower reports a failure.

    The SuperLink listens on a socket that only the owner can open. Ray listens on ports, and accepts only calls with a
    secret token of this run.
    """
    settings = {"run": run, "store": store, "home": str(paths.get_home_folder())}
    needed = SimulationConfig(
        num_supernodes=recipe.num_clients,
        client_resources_num_cpus=recipe.train.threads,
        client_resources_num_gpus=_count_gpus(recipe),
    )
    with tempfile.TemporaryDirectory(prefix="fedtune-flower-") as folder, _ray_with_a_secret():
        superlink = SuperLink(Path(folder), simulation=True)
        try:
            superlink.start()
            flower_run_id = superlink.get_control_client().start_run(settings, needed)
            _follow(superlink, flower_run_id, recipe, run, store)
        except ServerError as error:
            raise RunError(f"{error}; try again or use --engine in-process") from error
        finally:
            superlink.close()


def _count_gpus(recipe: Recipe) -> float:
    """Return the GPUs of one client. Ray hides them from clients that ask for none, and lets clients take turns."""
    settings = {recipe.train.device, *(one.device for one in recipe.devices if one.device is not None)}
    return float(any(choose_device(setting).type == "cuda" for setting in settings))


@contextmanager
def _ray_with_a_secret() -> Iterator[None]:
    """Make Ray's processes require a token from each other. They read it from the environment."""
    added = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _follow(superlink: SuperLink, flower_run_id: int, recipe: Recipe, run: str, store: str) -> None:
    """Emit an event for each committed round until Flower reports the end of the run."""
    with Store.open(store) as opened:
        last = max((record.number for record in opened.rounds(run)), default=-1)
        emit_event(RunStarted(run, max(1, last + 1), recipe.federation.rounds))
        ended = False
        while not ended:
            found = superlink.get_control_client().get_run_status(
                flower_run_id
            )  # read before the rounds, so that no round committed before the end is missed
            ended = found.status == "finished"
            for record in opened.rounds(run, last):
                emit_event(RoundEnded(record, recipe.evaluation.main_metric))
                last = record.number
            time.sleep(0 if ended else _POLL_SECONDS)
        if found.outcome != "completed":
            reason = opened.run(run).reason or found.details or found.outcome
            raise RunError(f"Flower's engine ended without completing the run: {reason}")
