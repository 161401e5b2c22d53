"""The pages; `tools/` writes the tables in them."""
