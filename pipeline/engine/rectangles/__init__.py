"""Hold keys and values in rectangles, for CPUs and models over several GPUs: rows padded to one width."""
