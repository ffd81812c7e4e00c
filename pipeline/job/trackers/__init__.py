"""Speak a tracker's language: a file for each, and the process that calls it."""
