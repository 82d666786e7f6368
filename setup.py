"""Builds the wheel with what a user needs beside the package: recipes, measured results, the two shipped checkpoints.

Everything else about the project stands in pyproject.toml. In a clone, and in an editable install, these files are
read where they lie; a wheel has them in `distill/shipped/` (distill/storage.py finds them there).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = ("recipes", "checkpoints/teacher", "checkpoints/base")


class BuildWithData(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "distill" / "shipped"
        shutil.rmtree(target, ignore_errors=True)
        for folder in SHIPPED:
            shutil.copytree(
                ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", ".*")
            )


setup(cmdclass={"build_py": BuildWithData})
