"""Look at a model, its text and the machine, and change nothing."""
