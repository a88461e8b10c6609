"""The scheduler seam: pure functions of a snapshot decide what each step evaluates. One file a policy."""
