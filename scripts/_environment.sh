# Sourced by the scripts beside it, from the root of the repository: sets `python`, and lets it import the clone.
if [ -n "${VENV:-}" ]; then
    python=$VENV/bin/python
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi
if ! "$python" -c "" 2>/dev/null; then
    echo "$python does not run; 'make install' makes an environment, or name one: VENV=path $0" >&2
    exit 2
fi
# The clone comes first, so that an environment that several clones share tests this one.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
