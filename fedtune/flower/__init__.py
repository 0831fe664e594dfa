"""Every use of Flower: its processes, its protocols and what it keeps private."""
