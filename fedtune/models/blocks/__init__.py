"""Decoders and encoders as plain torch modules, with the names and the bits of transformers' classes.

A trainer that builds them imports neither transformers nor what that imports.
"""
