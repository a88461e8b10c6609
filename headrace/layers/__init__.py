"""Layers that models are built from: pure modules, without any engine state."""
