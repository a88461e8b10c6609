"""The loop: plan, run, commit, collect. It knows the seams and no technique by name."""
