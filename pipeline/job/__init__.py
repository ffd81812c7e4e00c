"""One run of a job, and its folder."""
