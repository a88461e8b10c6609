"""Sampling: logit processors as per-request data, log-probabilities, and the keyed draw's front end."""
