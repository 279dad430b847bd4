"""Golden vectors, and the runner that holds the library against them."""
