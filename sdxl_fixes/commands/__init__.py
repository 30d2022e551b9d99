"""The commands of ``sdxl-fixes``, one module each."""
