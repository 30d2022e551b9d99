"""Files on disk: the header, writing, what a file says, the stamp."""
