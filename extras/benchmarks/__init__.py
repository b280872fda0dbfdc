"""What measures: each is one file whose docstring is its manual."""
