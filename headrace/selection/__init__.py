"""The selection seam: which pages of its cache a row reads. One file a method."""
