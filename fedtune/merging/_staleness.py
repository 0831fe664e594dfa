"""The weight of a client update that was trained on the state of an earlier round.

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff, arXiv 2106.06581), whose
server adds up deltas scaled by s(tau); the polynomial s(tau) = (1 + tau)^-a is that of Xie et al., "Asynchronous
Federated Optimization" (arXiv 1903.03934), and FedBuff takes a = 1/2.
"""

__all__ = ["compute_staleness_weight"]


def compute_staleness_weight(tau: int, exponent: float) -> float:
    """s(tau) for a delta from ``tau`` rounds ago: 1 for a fresh one, and 1 for exponent 0."""
    return float((1 + tau) ** -exponent)
