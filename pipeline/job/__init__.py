"""Run a job, and keep its folder."""
