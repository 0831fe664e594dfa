"""fedtune as a library. ``import fedtune`` gives these functions; each module is imported when its name is first used.

This room is for people who write Python: a training loop of their own, a notebook, a script. Commands use it too.
"""
