"""How far the predicted memory of earlier contributions was from what their devices held, according to the store."""

from collections import defaultdict

from sqlalchemy import Engine, select

from fedtune.tracking import tables
from fedtune.tracking.database import reader

__all__ = ["PredictionRows"]

_MOST_ROWS = 20_000
_MOST_OF_CLASS = 200


class PredictionRows:
    """The client records that have a predicted and a measured memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list_errors(self) -> dict[str, list[float]]:
        """Return by device class how much more anonymous memory was held than predicted, as shares, newest first.

        Only real devices count: a simulated client shares its process with the server or with other clients. The
        newest 200 contributions of a class count, so that devices that were replaced are forgotten.
        """
        found: dict[str, list[float]] = defaultdict(list)
        record, run = tables.client_records.c, tables.runs.c
        wanted = (
            select(record.device_class, record.predicted_anonymous, record.anonymous_memory)
            .join(tables.runs, run.id == record.run_id)
            .where(record.predicted_anonymous > 0, record.anonymous_memory > 0)
            .where(record.device_name.isnot(None), record.device_class.isnot(None))
            .order_by(run.created_at.desc(), run.id.desc(), record.round.desc(), record.client)
            .limit(_MOST_ROWS)
        )
        with reader(self._engine) as connection:
            for device_class, predicted, held in connection.execute(wanted):
                if len(found[device_class]) < _MOST_OF_CLASS:
                    found[device_class].append(held / predicted - 1)
        return dict(found)
