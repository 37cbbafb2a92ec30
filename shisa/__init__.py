"""Turn an English base model into a bilingual Japanese-English chat model, and prove each step."""
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("shisa")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"
