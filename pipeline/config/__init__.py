"""The schema of the configs and their composition; the only folder that knows Hydra and OmegaConf."""
