"""Packaging. The product is one file, so this is all of it."""

import os
import re
from pathlib import Path

from setuptools import __version__ as setuptools_version
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


# A queue other than the directory and SQLite needs its broker's library.
BROKERS = {
    "redis": ["redis>=5"],
    "postgres": ["psycopg[binary]>=3.2.1"],
    "rabbitmq": ["pika>=1.3"],
}


def version() -> str:
    """Read the version as text: importing the module would run it, and this only has to know one line."""
    match = re.search(r'^__version__.*?"([^"]+)"', (HERE / "wsqueue.py").read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit('setup.py: wsqueue.py has no line __version__ = "..."')
    return match.group(1)


def description() -> str:
    """The README as an index can show it: that has none of the files that it links to, so their names stay as text.

    Whoever repackages the source may leave the README out; that is no reason not to build.
    """
    text = README.read_text("utf-8") if README.exists() else ""
    return re.sub(r"!?\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


class BuildWithTypes(build_py):
    """Type checkers believe an installed package's annotations, but no module's that is a file (PEP 561).

    They believe a package NAME-stubs beside it, and the file is its own best stub.
    """

    def run(self) -> None:
        super().run()
        for stub in self.stubs():
            self.mkpath(os.path.dirname(stub))
            self.copy_file("wsqueue.py", stub)

    def stubs(self) -> "list[str]":
        """None for an editable installation: it would go stale."""
        return [] if getattr(self, "editable_mode", False) else [
            os.path.join(self.build_lib, "wsqueue-stubs", "__init__.pyi")]

    def get_outputs(self, include_bytecode: bool = True) -> "list[str]":
        return [*super().get_outputs(include_bytecode), *self.stubs()]


class WholeSource(sdist):
    """With what the README describes, the tests and the examples: packagers run them.

    setuptools by itself takes tests/test*.py, and nothing that these import.
    """

    def make_release_tree(self, base_dir: str, files: "list[str]") -> None:
        below = [path.relative_to(HERE) for name in ("tests", "examples") for path in (HERE / name).rglob("*")]
        kept = [path for path in below  # and not what the tests have left behind
                if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)]
        more = {str(path) for path in [Path(".ruff.toml"), *kept] if (HERE / path).is_file()}
        super().make_release_tree(base_dir, sorted({*files, *more}))


setup(
    name="wsqueue",
    version=version(),
    description="Pushes events from any process to every connected browser; a directory is the queue",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The wsqueue authors",
    # An SPDX expression; before setuptools 77 the field is free text, and any other name a warning.
    **{"license_expression" if int(setuptools_version.split(".")[0]) >= 77 else "license": "MIT"},
    license_files=["LICENSE"],
    py_modules=["wsqueue"],
    cmdclass={"build_py": BuildWithTypes, "sdist": WholeSource},
    python_requires=">=3.8",
    # Only a server needs it, and imports it when it starts; producers run without.
    install_requires=["websocket-server>=0.6.4"],
    extras_require={
        **BROKERS,
        "test": [
            *(library for libraries in BROKERS.values() for library in libraries),
            "pytest>=8",
            "pytest-timeout",  # a hung test fails, and does not hang the run
            "pytest-xdist",  # some files of tests at a time
            "coverage>=7.10.4; python_version >= '3.9'",  # what tests/measure_coverage.py runs the suite under
            "hypothesis",
            "websockets",  # two clients that know nothing of us, nor of each other
            "websocket-client",
            "selenium",  # drives a real browser
            "gunicorn",  # a preforking server, whose workers each start ours
            "prometheus-client",  # parses what /metrics says
            "trustme",  # certificates for an hour
            "pyyaml",  # reads examples/two_nodes/compose.yaml
            "pyjwt",  # makes and reads tickets, and knows nothing of us
            "flask",  # the frameworks of examples/
            "django",
            "bottle",
            "flask-socketio",  # what README.md tells how to leave
            "matplotlib",  # draws what tests/bench.py plot has measured
            "ruff",
            "mypy",
            "twine",  # says whether an index would take the packages
            "setuptools>=70.1",  # tests/test_packaging.py builds with it; 70.1 makes wheels by itself
        ],
    },
    entry_points={"console_scripts": ["wsqueue = wsqueue:main"]},
    keywords="websocket server-push event-queue broadcast wsgi php cron",
    classifiers=[
        "Intended Audience :: Developers",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(8, 14)),
        "Topic :: Internet :: WWW/HTTP",
        "Typing :: Typed",
    ],
)
