"""What makes the engine fast on a CPU in bf16. Without it all is computed just the same, and no GPU uses it."""
