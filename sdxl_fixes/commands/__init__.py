"""The commands of ``sdxl-fixes``, one module each, registered by its ``add_command``. They import no torch:
what does is imported where a command runs."""
