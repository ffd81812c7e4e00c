"""Find, load, convert and compare models."""
