#!/bin/sh
# Publish an event from a shell script or a crontab, with nothing but printf and mv:
#
#     examples/publish.sh EVENT [JSON | -]        - reads the JSON from stdin, where no other user can see it
#     examples/publish.sh backup_done '{"bytes": 123456}'
#
# EVENT is made of letters, digits and _ . : -, so it needs no escaping. JSON is passed on as it is: put numbers into
# it, and words that you know, but no text that somebody else wrote, which may contain a quotation mark. What turns
# out to be no JSON, the server puts into failed/, with the reason.
#
# Environment: WS_QUEUE_PATH, a directory that is there. Status 0: it is queued. 1: it is not. 2: a wrong command line.

set -eu
export LC_ALL=C # a-z are then the 26 letters, and nothing else

die() {
    status=$1
    shift
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "$status"
}

case $# in 1 | 2) ;; *) die 2 'usage: publish.sh EVENT [JSON | -]' ;; esac
event=$1 payload=${2:-null}
case $event in '' | *[!A-Za-z0-9_.:-]*) die 2 "EVENT must be letters, digits and _ . : - only" ;; esac
[ "$payload" != - ] || payload=$(cat)
[ -n "$payload" ] || die 1 "there was no JSON on stdin"
queue=${WS_QUEUE_PATH:-$(dirname -- "$0")/logs/ws_queue}
[ -d "$queue" ] || die 1 "there is no directory $queue: set WS_QUEUE_PATH, or start wsqueue serve, which makes it"
[ -w "$queue" ] || die 1 "$(id -un) may not write to $queue: give it the permission"

# Events go out in the order of the number that the name begins with. Where date knows no %N the name begins with none,
# and they go out in the order in which the files were written.
stamp=$(date +%s.%N)
case $stamp in *[!0-9.]*) stamp=publish-$(date +%s) ;; esac
name=$stamp-$$.json
temporary=$queue/.$name.tmp # the dot hides it from the server, until all of it is there

trap 'rm -f -- "$temporary"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
set -C # > then never writes to a file, or through a link, that is there already
printf '{"event": "%s", "payload": %s}\n' "$event" "$payload" >"$temporary" ||
    die 1 "could not write to $queue: see whether its disk is full (df -P $queue)"
mv -- "$temporary" "$queue/$name" || die 1 "could not rename a file in $queue; the reason stands above"
