#!/usr/bin/env bash
# Builds the book of docs/ into target/book, or serves it while it is being written. Broken links are errors.
#
#     scripts/book.sh [build]
#     scripts/book.sh serve      # on http://127.0.0.1:8000
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
scripts/environment.sh "$target/book-tools" mkdocs==1.6.1
case ${1:-build} in
    build) "$target/book-tools/bin/mkdocs" build --strict --quiet --site-dir "$target/book" ;;
    serve) "$target/book-tools/bin/mkdocs" serve ;;
    *)
        echo "book.sh: command is $1, expected build or serve" >&2
        exit 2
        ;;
esac
