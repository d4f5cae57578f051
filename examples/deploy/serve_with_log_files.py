#!/usr/bin/env python3
"""`wsqueue serve` that turns its log files over by itself, for where neither systemd nor logrotate does.

    WS_LOG=/var/log/wsqueue.log python serve_with_log_files.py --queue /var/lib/wsqueue --port 8081

The options are those of `wsqueue serve`. Six files of 10 MB at most are kept: wsqueue.log, wsqueue.log.1 (older) and so
on. Two servers need two names. Where something else moves the file away, WatchedFileHandler(path) opens it anew.
"""

import logging
import logging.handlers
import os
import sys
from pathlib import Path

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is two directories up.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import wsqueue

path = os.environ.get("WS_LOG", "wsqueue.log")
handler = logging.handlers.RotatingFileHandler(path, maxBytes=10_000_000, backupCount=5, encoding="utf-8")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[handler])

if __name__ == "__main__":
    sys.exit(wsqueue.main(["serve", *sys.argv[1:]]))
