"""What the repository needs around the product: generated pages and the inputs that are tried for them."""
