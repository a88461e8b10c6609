"""Model families, their configurations, and the loading of checkpoints."""
