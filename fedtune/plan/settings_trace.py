"""What the trace of one set of settings found, in a form that is stored as JSON. Nothing here imports torch."""

from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["BatchTrace", "SettingsTrace"]


class BatchTrace(BaseModel):
    """The largest figures of a step's rounds on ``examples`` examples.

    ``step_bytes`` is the peak with the gradients of parameters, ``peak_bytes`` the one without them.
    """

    model_config = ConfigDict(frozen=True)

    examples: int
    kept_bytes: int
    peak_bytes: int
    step_bytes: int
    flops: int


class SettingsTrace(BaseModel):
    """A list of techniques and a precision, with what the model holds and sends.

    ``batches`` go from one example to the whole batch; a batch that cannot be split has one entry. ``runtime`` names
    the libraries that its process needs. Frozen weights of a file are ``mapped_bytes`` if they are read in place; all
    other weights are ``weight_bytes``. ``master_values`` are fp32 copies of trained values, those of
    ``federation.algorithm`` included. Without ``needs_gradients`` it holds no gradients and no state of an optimiser.
    ``blocks_problem`` says why a trainer builds the model with transformers and not of plain blocks. ``error`` says why
    it cannot be used.
    """

    model_config = ConfigDict(frozen=True)

    techniques: list[Any]
    dtype: str
    error: str | None = None
    exact_gradients: bool = True
    needs_gradients: bool = True
    runtime: str = ""
    blocks_problem: str | None = None
    batches: list[BatchTrace] = []
    trained_values: int = 0
    master_values: int = 0
    weight_bytes: int = 0
    mapped_bytes: int = 0
    shared_bytes: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    traced_blocks: int | None = None
    shapes: dict[str, list[int]] = {}

    @property
    def name(self) -> str:
        """The techniques as one word."""
        return "+".join(_format_unit(unit) for unit in self.techniques)


def _format_unit(unit: Any) -> str:
    [(name, settings)] = unit.items() if isinstance(unit, dict) else [(unit, {})]
    told = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"{name}({told})" if told else str(name)
