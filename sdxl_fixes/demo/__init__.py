"""A tiny SDXL, trained with and without the fixes, and the report on it."""
