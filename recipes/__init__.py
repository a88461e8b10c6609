"""Recipes: programs that make the artefacts shipped with Headrace. Nothing in the engine imports them."""
