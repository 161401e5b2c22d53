"""Plans: counted arrays and operations against hand-computed and published numbers."""
