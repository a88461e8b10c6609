"""The eviction seam: which slots of its cache a request keeps. One file a method."""
