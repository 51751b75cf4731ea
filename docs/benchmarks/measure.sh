#!/usr/bin/env bash
# All figures of a machine, which must have nothing else to do meanwhile: docs/benchmarks/measure.sh NAME [THREADS]
# NAME names the files; THREADS is a list such as 1,2 (default). About an hour on 2 cores. Needs llama-cpp-python.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:?usage: docs/benchmarks/measure.sh NAME [THREADS]}
threads=${2:-1,2}
out=docs/benchmarks

bench() { .venv/bin/python -m runtime.bench "$@" -o csv; }
body() { tail -n +2; } # a table without its heading

{
    echo "commit      $(git describe --always --dirty)"
    echo "date        $(date -u +%F)"
    .venv/bin/python -m runtime.bench --info
} > "$out/machine-$name.txt"

bench --kernels > "$out/kernels-$name.csv"

{
    bench --synthetic smollm2-135m -p 128 -n 64 -t "$threads" -r 5
    bench --synthetic 1.1b -p 128 -n 64 -t "$threads" -r 5 | body
    bench --synthetic 7b -p 128 -n 64 -t "$threads" -r 5 | body
} > "$out/decode-$name.csv"

{
    bench --synthetic smollm2-135m --peer -p 128 -n 64 -t "$threads" -r 5
    bench --synthetic 1.1b --peer -p 128 -n 64 -t "$threads" -r 5 | body
    bench --synthetic 7b --peer -p 0 -n 16 -t "$threads" -r 5 | body
} > "$out/peer-$name.csv"
