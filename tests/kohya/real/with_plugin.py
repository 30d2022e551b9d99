"""pytest -p with_plugin: sd-scripts' own tests with the fixes installed and none switched on. In a checkout:

PYTHONPATH=path/to/tests/kohya/real python -m pytest -p with_plugin
"""

import sdxl_fixes.kohya


def pytest_configure(config):
    sdxl_fixes.kohya.install()


def pytest_unconfigure(config):
    sdxl_fixes.kohya.uninstall()
