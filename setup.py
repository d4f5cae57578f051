"""Packaging. The product is one file, so this is all of it."""

import re
from pathlib import Path

from setuptools import setup

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


setup(
    name="wsqueue",
    version=version(),
    description="Pushes events from any process to every connected browser; a directory is the queue",
    # Whoever repackages the source may leave the README out; that is no reason not to build.
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The wsqueue authors",
    license="MIT",
    license_files=["LICENSE"],
    py_modules=["wsqueue"],
    python_requires=">=3.8",
    # Only a server needs it, and imports it when it starts; producers run without.
    install_requires=["websocket-server>=0.6.4"],
    extras_require={
        **BROKERS,
        "test": [
            *(library for libraries in BROKERS.values() for library in libraries),
            "pytest>=8",
            "pytest-timeout",  # a hung test fails, and does not hang the run
            "pytest-xdist",  # two files of tests at a time
            "coverage[toml]>=7.6",  # what tests/coverage.py runs the suite under
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
        "Programming Language :: Python :: 3",
        "Topic :: Internet :: WWW/HTTP",
    ],
)
