"""The simulated shell: the engine model and, on it, recorded runs, on a virtual clock."""
