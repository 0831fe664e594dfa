"""Codecs for tensors that autograd keeps for backward: what is kept instead of a tensor, and how it is made again."""
