"""Submit jobs to a Slurm cluster, and ask what became of them."""
