#!/bin/sh
# Runs a compiler command and keeps the report of `ptxas -v` on each kernel in <object>.ptxas, where the compile gate reads
# it: so the kernels that it judges are those that are shipped, and nothing is compiled twice. All other output of the
# compiler is passed on.
object=
before=
for argument in "$@"; do
  [ "$before" = -o ] && object=$argument
  before=$argument
done
[ -n "$object" ] || exec "$@"
"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame, .*bytes spill' "$object.ptxas" >&2
exit $status
