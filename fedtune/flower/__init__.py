"""Every use of Flower: its processes, its protocols, and private parts of it that fedtune needs."""
