"""Predict memory and measure it."""
