"""Run requests through vLLM, in a process and a Python of its own."""
