"""Stored recipes keep their meaning: the split that dirichlet named, how pictures were read, that checkpoints stay."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_runs = sa.table("runs", sa.column("id", sa.String), sa.column("recipe", sa.Text))


def upgrade() -> None:
    connection = op.get_bind()
    for row in connection.execute(sa.select(_runs.c.id, _runs.c.recipe)).all():
        recipe = _read(row.recipe)
        changed = _as_now(recipe)
        if changed != recipe:
            text = json.dumps(changed, separators=(",", ":"), ensure_ascii=False)
            connection.execute(sa.update(_runs).where(_runs.c.id == row.id).values(recipe=text))


def downgrade() -> None:
    """Nothing: what was written out would be read as an unknown key by older code, as new recipes are."""


def _read(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _as_now(recipe: dict[str, Any]) -> dict[str, Any]:
    if not recipe.get("data"):
        return recipe
    changed = {**recipe, "checkpoints": recipe.get("checkpoints", {"keep": "all"})}
    data, model, train = (recipe.get(key) or {} for key in ("data", "model", "train"))
    split = data.get("split") or {}
    if split.get("kind") == "dirichlet":
        changed["data"] = {**data, "split": {**split, "kind": "equal-dirichlet"}}
    if recipe.get("task") == "image-classification" and "preprocessor" not in model:
        changed["model"] = {**model, "preprocessor": _pixels_of_then(train.get("image") or 96)}
    return changed


def _pixels_of_then(side: int) -> dict[str, Any]:
    return {
        "side": side,
        "edge": None,
        "resize": "both",
        "resample": "bilinear",
        "channels": "rgb",
        "scale": 1.0,
        "mean": [127.0, 127.0, 127.0],
        "std": [128.0, 128.0, 128.0],
    }
