"""Programs around the method: each is one file whose docstring is its manual."""
