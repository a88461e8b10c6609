"""The decoder seam: which rows a step evaluates, and what is committed. One file a method."""
