"""Files that nobody meant to write, by hypothesis."""
