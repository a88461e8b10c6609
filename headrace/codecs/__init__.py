"""The codec seam: what a page of the cache holds. One file a method."""
