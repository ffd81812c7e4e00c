"""What makes the engine fast on a CPU in bf16. Without it everything runs, slower; no GPU uses it."""
