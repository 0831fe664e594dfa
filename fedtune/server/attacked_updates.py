"""The attacks of simulated clients: their updates are changed on disk before the server checks sizes and merges.

Attackers of one device class know each other's updates, as the published attacks assume. All numbers they draw are
derived from the seed of the run, the round, the client and the tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fedtune.attacks import Attack, AttackedTensor, build_attack
from fedtune.errors import ClientUpdateError
from fedtune.files import write_bytes_atomically
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.server.class_payloads import RoundPayloads
from fedtune.server.private_aggregation import get_norm_limit
from fedtune.tracking import ClientRecord
from fedtune.wire.client_update import ClientUpdate, TensorSpec, pack
from fedtune.wire.update_checks import check_client_update

__all__ = ["attack_updates", "note_attackers"]

Records = dict[int, ClientRecord]


class _Band(NamedTuple):
    """The attackers of one device class in a round. ``num_updates`` counts all updates of the round."""

    recipe: Recipe
    round_number: int
    attack: Attack
    updates: Sequence[ClientUpdate]
    num_updates: int


def attack_updates(
    recipe: Recipe, records: Records, updates: Sequence[ClientUpdate], payloads: RoundPayloads
) -> tuple[Records, list[ClientUpdate]]:
    """Return the records and the updates of a simulated round, with those of attackers changed.

    An update that the recipe's limits do not allow is refused, as one of a real device would be.
    """
    records, refused = dict(records), set[int]()
    for band in _list_bands(recipe, payloads.round_number, updates):
        for update, written in list(zip(band.updates, _write_attacked(band, payloads), strict=True)):
            written.replace(update.path)
            try:
                norm = _check(recipe, update, payloads)
                records[update.client] = replace(records[update.client], update_norm=norm)
            except ClientUpdateError as error:
                refused.add(update.client)
                record = records[update.client]
                records[update.client] = replace(record, status="rejected", reason=str(error), num_examples=0)
    return records, [update for update in updates if update.client not in refused]


def note_attackers(recipe: Recipe, records: Iterable[ClientRecord]) -> list[ClientRecord]:
    """Return the records with the attack of each hostile client that sent an update."""
    return [_note(one, recipe) if one.status in ("merged", "rejected") else one for one in records]


def _note(record: ClientRecord, recipe: Recipe) -> ClientRecord:
    attack = recipe.get_device_class(record.client).attack
    if attack is None:
        return record
    return replace(record, reason="; ".join(filter(None, (f"attack: {attack.name}", record.reason))))


def _list_bands(recipe: Recipe, round_number: int, updates: Sequence[ClientUpdate]) -> list[_Band]:
    found: dict[str, list[ClientUpdate]] = {}
    for update in sorted(updates, key=lambda one: one.client):
        found.setdefault(recipe.get_device_class(update.client).name, []).append(update)
    attacks = {device.name: build_attack(device) for device in recipe.devices}
    return [
        _Band(recipe, round_number, attack, own, len(updates))
        for name, own in found.items()
        if (attack := attacks[name]) is not None
    ]


def _write_attacked(band: _Band, payloads: RoundPayloads) -> list[Path]:
    """Write what each attacker sends beside its honest update, which the others still read; return the files."""
    files = []
    for update in band.updates:
        names = payloads.get_for_client(update.client).expected_shapes
        extras = update.read_tensors(update.list_tensor_names() - names.keys())
        sent = {name: _attack(band, update.client, name) for name in names}
        path = update.path.with_suffix(".attacked")
        write_bytes_atomically(path, pack({**sent, **extras}))
        files.append(path)
    return files


def _attack(band: _Band, client: int, name: str) -> Tensor:
    deltas = {one.client: one.read_tensors([name])[name] for one in band.updates}
    seed = derive_seed(band.recipe.seed, band.round_number, client, "attack", name)
    tensor = AttackedTensor(deltas[client], list(deltas.values()), band.num_updates, seed)
    return band.attack.change_delta(tensor).contiguous()


def _check(recipe: Recipe, update: ClientUpdate, payloads: RoundPayloads) -> float:
    """Return the norm of an attacked update; ClientUpdateError if it is not finite or too large."""
    payload = payloads.get_for_client(update.client)
    extras: Mapping[str, TensorSpec] = payload.extra_payload_specs
    shapes = {name: tuple(one.shape) for name, one in update.read_tensors(payload.expected_shapes).items()}
    return check_client_update(update.path, shapes, extras, get_norm_limit(recipe, shapes.values()))
