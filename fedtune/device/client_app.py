"""The Flower ClientApps: for simulations, for simulated devices whose memory is limited, and for stock SuperNodes.

In a simulation nothing leaves the machine, so errors keep their full text. A SuperNode would send the text of an
exception to the server, and the text may quote its data. Its app sends a code of :mod:`fedtune.wire.protocol_codes`
instead.
"""

import logging

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedtune import paths
from fedtune.device.limited_round import run_limited_round
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.device.problems import problem_of
from fedtune.errors import MemoryBudgetError, NoTaskError
from fedtune.flower import train_messages
from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.plan.runtime_surplus import measure_runtime_surplus
from fedtune.plan.runtimes import TRAINER_MODULES
from fedtune.recipe.refused_attacks import refuse_attacks
from fedtune.recipe.required_plug_ins import decode_plug_ins, require_plug_ins
from fedtune.recipe.schema import Recipe
from fedtune.training import get_run_context
from fedtune.training.attacked_data import change_training_data
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.error_codes import DECLINED_PREFIX, TRAINING_FAILED

__all__ = ["app", "deployed", "limited"]

app = ClientApp()
deployed = ClientApp()
limited = ClientApp()


@app.train()
def train_round(message: Message, _: Context) -> Message:
    """Train from the state in the message, and return a reply with the deltas and a report."""
    return _train(message, enforced=False)


@limited.train()
def train_round_within_memory(message: Message, _: Context) -> Message:
    """Do the same within the memory of the client's device class, as a real device does."""
    return _train(message, enforced=True)


def _train(message: Message, *, enforced: bool) -> Message:
    request = _read_request(message)
    require_plug_ins(decode_plug_ins(request.plug_ins))
    run_context = get_run_context(request.recipe)
    own = paths.get_runs_folder() / request.run_id / "own" / f"client-{request.client:06d}"
    payload = train_messages.state_file(message.content) or train_messages.read_shared_state(message.content)
    state = read_payload(payload, run_context, request.client)
    rows = run_context.client_rows[request.client]
    run_context = change_training_data(run_context, request.client)
    try:
        if enforced:
            fix_mmap_threshold()
            budget = _find_budget(run_context.recipe, request.client)
            deltas, report = run_limited_round(request, state, run_context, rows, own, budget)
        else:
            deltas, report = run_local_round(request, state, run_context, rows, own)
    except (NoTaskError, MemoryBudgetError) as error:
        return Message(Error(TRAINING_FAILED, f"{DECLINED_PREFIX}{error}"), reply_to=message)
    return Message(train_messages.make_update_record(deltas, report.to_fields()), reply_to=message)


def _find_budget(recipe: Recipe, client: int) -> int:
    """Return the memory of a client's class, and what this process imports that a device of a plan does not."""
    surplus = measure_runtime_surplus(recipe.get_client_recipe(client), TRAINER_MODULES)
    return int(recipe.get_device_class(client).memory) + surplus


def _read_request(message: Message) -> TrainRequest:
    return TrainRequest(**train_messages.read_train_request(message.content))  # type: ignore[arg-type]


def _without_attack(message: Message) -> Message:
    """Return the message; RecipeError if its recipe has attacks, which are for simulations."""
    refuse_attacks(get_run_context(_read_request(message).recipe).recipe)
    return message


@deployed.train()
def train_round_and_keep_errors(message: Message, context: Context) -> Message:
    """Do the same as ``train_round``, but write the text of an error only to the log of this machine."""
    try:
        return train_round(_without_attack(message), context)
    except Exception as error:
        logging.getLogger("fedtune").exception("a train request failed")
        return Message(Error(TRAINING_FAILED, problem_of(error).text), reply_to=message)
