"""Say what a job's config may hold, and compose it. The only folder that knows Hydra and OmegaConf."""
