# Sourced by demo.sh and test.sh: a .venv in the repository with the versions of constraints.txt, made once and
# again when the requirements change. Needs Python 3.11 or newer; afterwards nothing needs a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "setting up .venv (a few minutes, once)"
  python3 -m venv --clear .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
  echo "$wanted" >.venv/installed
fi
PATH="$PWD/.venv/bin:$PATH"
