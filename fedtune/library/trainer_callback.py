"""A prepared model in the Trainer of transformers."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fedtune.errors import ModelError

if TYPE_CHECKING:
    from fedtune.library.prepared_model import PreparedModel

__all__ = ["PreparedModelCallback"]


class PreparedModelCallback(TrainerCallback):
    """Attach the Trainer's optimiser while it trains. Refuse settings under which the Trainer would fail later."""

    def __init__(self, prepared: "PreparedModel", steps_per_round: int | None) -> None:
        self._prepared, self._steps_per_round = prepared, steps_per_round

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the optimiser at the step where the training begins, which may be one on the same model again."""
        if args.n_gpu > 1:
            raise ModelError(
                f"the Trainer would train copies of the prepared model on {args.n_gpu} cards in one process; make one "
                "card visible with CUDA_VISIBLE_DEVICES, or start a process for each card with accelerate launch"
            )
        if "save_pretrained" in vars(self._prepared.model) and str(getattr(args.save_strategy, "value", "no")) != "no":
            raise ModelError(
                "the Trainer cannot save a model that its configuration does not describe; set save_strategy='no' and "
                "call save(folder) after the training"
            )
        self._prepared.attach(kwargs["optimizer"], steps_per_round=self._steps_per_round, total_steps=state.max_steps)
        self._prepared.skip_to_step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the optimiser."""
        self._prepared.detach()
