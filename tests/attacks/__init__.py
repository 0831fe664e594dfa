"""Attacks on a server on this machine, each of which must be refused, recorded and harmless: ``make test-attacks``.

An honest device is served all the while, within a second. Loopback only, bounded in time and in count.
"""
