"""The cache: pages, prefix index, and the manager that alone moves them."""
