"""The two private details of Flower that an in-process grid needs, and nothing else (flwr 1.41 and 1.42).

A message can be made only in a process that knows its run and node, and gets its number from the SuperLink.
"""

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["set_message_id", "set_node_identity"]


def set_node_identity(node: int, run: int = 1) -> None:
    """Let this process make messages as ``node`` of ``run``."""
    TaskIdentity.run_id = run
    TaskIdentity.task_id = run
    TaskIdentity.node_id = node


def set_message_id(message: Message, message_id: str) -> str:
    """Give a message the number that replies will refer to."""
    message.metadata.__dict__["_message_id"] = message_id
    return message_id
