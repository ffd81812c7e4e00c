"""Keys and values in rectangles, for CPUs and models over several GPUs: contiguous, left-padded to one width."""
