"""Steps that combine the deltas of several models into one."""
