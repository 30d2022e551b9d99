"""Training sets on disk, read without loading them."""
