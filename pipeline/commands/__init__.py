"""Offer what can be typed: a file a command, one table, one door. And what a notebook imports."""
