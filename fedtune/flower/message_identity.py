"""The two private parts of Flower that an in-process grid needs (flwr 1.41 and 1.42).

Flower creates messages only in a process with a run and a node, and the SuperLink sets the message id.
"""

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["set_message_id", "set_node_identity"]


def set_node_identity(node: int, run: int = 1) -> None:
    """Let this process create messages as ``node`` of ``run``."""
    TaskIdentity.run_id = run
    TaskIdentity.task_id = run
    TaskIdentity.node_id = node


def set_message_id(message: Message, message_id: str) -> str:
    """Set the id of a message, which replies refer to, and return it."""
    message.metadata.__dict__["_message_id"] = message_id
    return message_id
