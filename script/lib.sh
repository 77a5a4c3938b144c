# Shared by the scripts beside it: where things are, what must be installed, how to say what is going on.
# Sourced, not run. Quiet when all is well.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# Everything that is downloaded or built for keeps lies here, outside the tree.
export VMSIGHT_CACHE="${VMSIGHT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmsight}"
tools="$VMSIGHT_CACHE/tools"
mkdir -p "$tools" "$VMSIGHT_CACHE/log"
export PATH="$tools/bin:$PATH"
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-never}"

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# log_of NAME: where the output of a step goes.
log_of() { printf '%s/log/%s.log' "$VMSIGHT_CACHE" "${1//[^a-zA-Z0-9.-]/-}"; }

# step NAME COMMAND…: runs it quietly; on failure shows what it printed and stops.
step() {
    local name=$1 log start
    shift
    log=$(log_of "$name")
    start=$SECONDS
    if "$@" >"$log" 2>&1 </dev/null; then
        printf 'ok    %-34s %4d s\n' "$name" $((SECONDS - start))
    else
        local code=$?
        printf 'FAIL  %-34s %4d s\n' "$name" $((SECONDS - start))
        tail -n 200 "$log" >&2
        die "$name failed (exit $code); the whole output is in $log"
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@" || die "needs root for: $*"; fi
}

# Installs those Debian packages of script/packages.txt that are missing.
install_packages() {
    local missing=() name
    [ -r /etc/debian_version ] || die "these scripts know Debian's packages only; see script/packages.txt for what is needed"
    while read -r name; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null | grep -q '^ii' || missing+=("$name")
    done < <(sed -n 's/^\([a-z0-9][^ #]*\).*/\1/p' script/packages.txt)
    [ ${#missing[@]} -eq 0 ] && return 0
    printf 'installing Debian packages: %s\n' "${missing[*]}"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# cargo_tool CRATE VERSION: a tool that cargo builds, kept in the cache.
cargo_tool() {
    local crate=$1 version=$2
    [ -x "$tools/bin/$crate" ] && "$tools/bin/$crate" --version 2>/dev/null | grep -qF "$version" && return 0
    printf 'building %s %s (once, some minutes)\n' "$crate" "$version"
    cargo install --quiet --locked --root "$tools" "$crate@$version"
}

# Always the whole workspace with all its features, so that nothing is built twice: for each choice of packages that leaves a library
# with other features, cargo builds that, and all that uses it, anew. Which tests run is chosen by their names.
# shellcheck disable=SC2034
whole=(cargo test --workspace --features vmsight-lab/volatility --locked)

# Everything of this workspace that is compiled after this is linted as it is compiled, as `cargo clippy` would, which would compile
# all once more.
lint_what_is_built() { export RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-Dwarnings__CLIPPY_HACKERY__; }

command -v cargo >/dev/null || die "needs Rust: cargo is not on the PATH"
