"""Claims, one a file: each module holds `CLAIM`."""
