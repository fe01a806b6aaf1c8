"""tmemd, the daemon: its socket, what it does to pools for those who ask, its metrics."""
