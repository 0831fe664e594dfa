"""The cheapest federations there are, and ways to run them in this process: the tests of the round loop share them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedtune.device.client_app import train_round
from fedtune.flower import train_messages
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.events import Event, event_handler
from fedtune.server.server_app import run_to_completion
from fedtune.simulation import resolve_recipe
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import ClientWorkers, SequentialWorkers
from fedtune.tracking import RoundRecord, RunRecord, Store, claim_run

__all__ = [
    "TRIVIAL",
    "WORDS",
    "Ended",
    "Spoil",
    "begin",
    "execute",
    "order_of",
    "outcome",
    "sent_state",
    "silent",
    "spoilt",
    "tiny_bert",
    "trivial",
    "words",
]

TRIVIAL = """
version: 2
name: trivial
task: image-classification
model: {source: "sample:logistic"}
data: {source: "sample:digits"}
devices: [{name: toy, count: 4, memory: 64MB}]
train: {techniques: [full], optimiser: sgd, lr: 0.03, max_grad_norm: 1.0, batch_size: 10, image_size: 28,
  local_steps: 2}
federation: {rounds: 2}
"""
WORDS = """
version: 2
name: words
task: text-classification
model: {{source: "path:{folder}/bert"}}
data: {{source: "csv:{folder}/words.csv"}}
devices: [{{name: toy, count: 3}}]
train: {{techniques: lora+gradient-checkpointing, lr: 0.01, batch_size: 4, max_length: 16, local_steps: 2}}
federation: {{rounds: 2}}
"""
_GOOD = ("fine", "great", "lovely", "superb")
_BAD = ("awful", "dull", "poor", "weak")


@dataclass(frozen=True)
class Ended:
    """What a run left in the store."""

    run: RunRecord
    rounds: list[RoundRecord]

    @property
    def hashes(self) -> list[str]:
        """The digest of each round's checkpoint."""
        return [record.checkpoint.sha256 for record in self.rounds if record.checkpoint]


def trivial(*overrides: str) -> Recipe:
    """Logistic regression on 8x8 digits over four clients."""
    return resolve_recipe(parse_recipe(TRIVIAL, "trivial", overrides))


def words(folder: Path, *overrides: str) -> Recipe:
    """A tiny random BERT on made-up verdicts over three clients; both are written to ``folder``."""
    tiny_bert(folder / "bert")
    rows = [f"the film {row} was {one},{label}" for row in range(20) for one, label in _verdicts()]
    (folder / "words.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return resolve_recipe(parse_recipe(WORDS.format(folder=folder), "words", overrides))


def _verdicts() -> Iterator[tuple[str, str]]:
    yield from ((word, "good") for word in _GOOD)
    yield from ((word, "bad") for word in _BAD)


def tiny_bert(folder: Path, width: int = 16, layers: int = 2) -> None:
    """A BERT body of random weights, 9 thousand unless it is wider, without a head, and its tokenizer."""
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "was", *_GOOD, *_BAD, *map(str, range(20))]
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = BertConfig(
            vocab_size=len(known),
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=2,
            num_hidden_layers=layers,
        )
        BertModel(shape).save_pretrained(folder)


def begin(store: Store, recipe: Recipe, run: str = "run-1", engine: str = "in-process") -> str:
    """Record a run that has yet to do its first round."""
    rounds = recipe.federation.rounds
    text = recipe.model_dump_json()
    store.create_run(id=run, name=recipe.name, recipe=text, seed=recipe.seed, engine=engine, rounds_planned=rounds)
    return run


def execute(recipe: Recipe, workers: ClientWorkers | ClientApp | None = None, run: str = "run-1") -> Ended:
    """Carry a new run to its end in this process, with the real server and the given clients."""
    from fedtune.device.client_app import app

    crew = workers if isinstance(workers, ClientWorkers) else SequentialWorkers(workers or app)
    with Store.open() as store, claim_run(begin(store, recipe, run)), silent():
        try:
            run_to_completion(InProcessGrid(recipe.num_clients, crew), store, run)
        finally:
            crew.close()
    return outcome(run)


def outcome(run: str = "latest") -> Ended:
    """What the default store holds of a run."""
    with Store.open() as store:
        found = store.run(run)
        return Ended(found, store.rounds(found.id))


def order_of(message: Message) -> tuple[int, int]:
    """Round and client a message is for."""
    order = message.content.config_records[train_messages.TRAIN_REQUEST]
    number, client = order["round"], order["client"]
    assert isinstance(number, int)
    assert isinstance(client, int)
    return number, client


def sent_state(message: Message) -> bytes:
    """The shared state a client is sent, whether the message carries it or names its file."""
    file = train_messages.state_file(message.content)
    return train_messages.read_shared_state(message.content) if file is None else file.read_bytes()


Spoil = Callable[[Message, Message], Message]


def spoilt(spoil: Spoil, clients: Iterable[int], rounds: Iterable[int] | None = None) -> ClientApp:
    """The real ClientApp, but ``spoil(message, reply)`` answers in place of some clients in some rounds."""
    app, chosen, when = ClientApp(), set(clients), None if rounds is None else set(rounds)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number, client = order_of(message)
        reply = train_round(message, context)
        return spoil(message, reply) if client in chosen and (when is None or number in when) else reply

    return app


@contextmanager
def silent() -> Iterator[list[Event]]:
    """Nothing is printed; the events are collected."""
    events: list[Event] = []
    token = event_handler.set(events.append)
    try:
        yield events
    finally:
        event_handler.reset(token)
