"""What setup.cfg cannot say: a .pth file goes to the root of site-packages, and the sdist holds what its
tests need. All else is there."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "integrations/autostart/sdxl_fixes_kohya.pth"
TESTED = ("tests", "benchmarks", "constraints", "docs", "examples")
TESTED += ("CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml")


class BuildWithPth(build_py):
    def run(self):
        super().run()
        folders = [self.build_lib]
        if self.editable_mode:  # such a wheel holds what lies in install_lib, and links to the rest
            folders.append(self.get_finalized_command("install").install_lib)
        for folder in folders:
            self.mkpath(folder)
            self.copy_file(PTH, folder)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, Path(PTH).name))]

    def get_source_files(self):
        """For the sdist."""
        files = (file for name in TESTED for file in (Path(name), *Path(name).rglob("*")))
        return [
            *super().get_source_files(),
            PTH,
            *(str(file) for file in files if file.is_file() and "__pycache__" not in file.parts),
        ]


setup(cmdclass={"build_py": BuildWithPth})
