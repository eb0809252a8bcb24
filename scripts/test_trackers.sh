#!/usr/bin/env bash
# Starts each tracker of accelerate once, locally or offline, and reads it back; needs the network for pip alone.
#
#     scripts/test_trackers.sh [folder of the environments] [file for the table]
#
# Each tracker gets an environment of its own, which sees the packages of the present one and adds the tracker's, so
# that what they ask for cannot break each other or what is there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-$(mktemp -d)} output=${2:-/dev/stdout}
here=$(python -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$folder"
table=$folder/table.md
{
    echo "# accelerate's trackers, started and read back"
    echo
    echo "\`scripts/test_trackers.sh\`, $(date -u +%Y-%m-%d), $(python -V), accelerate $(python -c 'from importlib.metadata import version; print(version("accelerate"))')."
    echo
    echo "| tracker | version | result |"
    echo "|---|---|---|"
} > "$table"
for name in aim clearml dvclive swanlab trackio; do
    place=$folder/$name
    [ -d "$place" ] || python -m venv "$place"
    echo "$here" > "$("$place/bin/python" -c 'import site; print(site.getsitepackages()[0])')/present.pth"
    if ! "$place/bin/python" -m pip install --quiet "$name" > "$place/pip.log" 2>&1; then
        echo "| $name | - | not installed: $(tail -n 1 "$place/pip.log" | cut -c1-200) |" >> "$table"
        continue
    fi
    version=$("$place/bin/python" -c "from importlib.metadata import version; print(version('$name'))")
    result=$("$place/bin/python" -m pytest -q -p no:cacheprovider tests/loggers/test_tracker.py -k "${name}_holds" > "$place/test.log" 2>&1; grep -E "(passed|failed|skipped|error).* in " "$place/test.log" | tail -n 1)
    echo "| $name | $version | $result |" >> "$table"
done
[ "$output" = /dev/stdout ] && cat "$table" || cp "$table" "$output"
! grep -qE "failed|error|not installed" "$table"
