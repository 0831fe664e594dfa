"""Attacks of hostile clients, for simulations that test a merge. Each attack is one file; real devices never attack."""

from fedtune.attacks._attack import Attack, AttackedTensor
from fedtune.attacks._build import build_attack, check_attacks, write_out_attack

__all__ = ["Attack", "AttackedTensor", "build_attack", "check_attacks", "write_out_attack"]
