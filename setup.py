"""Packaging: everything is read from settings.ini, the one home of metadata."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]


def lines(key: str) -> list[str]:
    """The non-empty lines of a multi-line setting."""
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"],
    author=settings["author"],
    license=settings["license"],
    url=settings["git_url"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["shisa", "shisa.*"]),
    include_package_data=True,
    python_requires=f">={settings['min_python']}",
    install_requires=lines("requirements"),
    extras_require={
        key.removesuffix("_requirements"): lines(key) for key in settings if key.endswith("_requirements")
    },
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
)
