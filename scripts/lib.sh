# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Sourced by every script: where things are, messages, the architectures.
#
# Environment: ARCH, KERNEL, JOBS (see 'make help'); PATCHES and BUILD, other
# folders than patches/ and build/.

set -eEuo pipefail
# Nothing fails in silence; status 2 has been explained by die().
trap '[ $? = 2 ] || echo "error: $0:$LINENO: failed: $BASH_COMMAND" >&2; exit 2' ERR
export LC_ALL=C

# shellcheck disable=SC2034
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BUILD=${BUILD:-$TOP/build}
LOGS=$BUILD/logs
DL=$BUILD/dl
PATCHES=${PATCHES:-$TOP/patches}
JOBS=${JOBS:-$(nproc)}
ARCHES="x86_64 arm64"

# Trees and commits must not depend on the person's git configuration.
mkdir -p "$BUILD"
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=$BUILD/gitconfig
cat > "$GIT_CONFIG_GLOBAL" <<EOF
[user]
	name = KVM Userfault series
	email = series@localhost
[safe]
	directory = *
[advice]
	detachedHead = false
[gc]
	auto = 0
EOF

say()   { printf '%s\n' "$*"; }
stage() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }
# One line and exit 2: something the person at the keyboard can put right.
die()   { printf 'error: %s\n' "$*" >&2; exit 2; }

is_root() { [ "$(id -u)" = 0 ]; }

# Patch files in order, without the cover letter.
series()
{
	[ ! -d "$PATCHES" ] ||
		find "$PATCHES" -maxdepth 1 -name '[0-9]*.patch' ! -name '0000-*' | sort
}

# need_space GIB: die unless build/ has that much room.
need_space()
{
	local free

	mkdir -p "$BUILD"
	free=$(($(df -Pk "$BUILD" | awk 'NR == 2 { print $4 }') >> 20))
	[ "$free" -ge "$1" ] ||
		die "$BUILD needs $1 GiB of free disk space and has $free GiB"
}

check_arch()
{
	case " $ARCHES " in
	*" $1 "*) ;;
	*) die "unknown ARCH '$1': use one of: $ARCHES" ;;
	esac
}

# set_arch ARCH: what make, the compiler and QEMU call this architecture.
set_arch()
{
	check_arch "$1"
	case $1 in
	x86_64)	KARCH=x86 IMAGE=arch/x86/boot/bzImage DEBARCH=amd64
		TRIPLET=x86_64-linux-gnu CPU=x86_64 QEMU=qemu-system-x86_64 ;;
	arm64)	KARCH=arm64 IMAGE=arch/arm64/boot/Image DEBARCH=arm64
		TRIPLET=aarch64-linux-gnu CPU=aarch64 QEMU=qemu-system-aarch64 ;;
	esac
	CROSS=
	[ "$(uname -m)" = "$CPU" ] || CROSS=$TRIPLET-
	export KARCH IMAGE DEBARCH TRIPLET CPU QEMU CROSS
}

# compiler: the one for the architecture set, with ccache if there is one. A miss shall
# cost no preprocessing of its own; what was built in another BUILD will do.
compiler()
{
	! command -v ccache >/dev/null || printf 'ccache '
	echo "${CROSS}gcc"
}
export CCACHE_DEPEND=1 CCACHE_BASEDIR=$BUILD CCACHE_NOHASHDIR=1

# kmake TREE OUT ARGS...: make in a kernel tree for the architecture set.
kmake()
{
	local tree=$1 out=$2

	shift 2
	timeout --foreground 90m make -C "$tree" O="$out" ARCH="$KARCH" \
		CROSS_COMPILE="$CROSS" CC="$(compiler)" -j"$JOBS" "$@"
}

# logged NAME COMMAND...: run with all output in build/logs/NAME.log, showing
# the count of objects built on the way; returns the command's status.
logged()
{
	local log=$LOGS/$1.log

	shift
	mkdir -p "$LOGS"
	"$@" 2>&1 </dev/null | tee "$log" | awk '
		$1 ~ /^(CC|CC\[M\]|AS|HOSTCC)$/ && ++n % 250 == 0 {
			print "    " n " objects"; fflush()
		}'
}

# failed NAME WHAT: show the end of a log and give up.
failed()
{
	tail -n 25 "$LOGS/$1.log" >&2
	die "$2 (the log's end is above, all of it in $LOGS/$1.log)"
}

# lock: one harness at a time works in build/; scripts it calls may.
lock()
{
	[ -z "${HARNESS_LOCKED:-}" ] || return 0
	exec 9> "$BUILD/.lock"
	flock -n 9 || die "another run is at work in $BUILD"
	export HARNESS_LOCKED=1
}

# trees: set SRC, where kernels get built; DEV, where a person works on the
# series; and SUFFIX, which tells what comes from KERNEL=DIR from the rest.
trees()
{
	SUFFIX=
	[ -z "${KERNEL:-}" ] ||
		SUFFIX=-$(realpath -m "$KERNEL" | sha256sum | cut -c1-8)
	SRC=$BUILD/src$SUFFIX
	DEV=$BUILD/linux$SUFFIX
}

# What scripts/tree applied last, in SRC. patches/ may change while a run lasts.
TIP=refs/series/tip

# tracks ARCH...: run function track ARCH for all at once, each in a process
# group of its own, which ends with this script however that ends.
tracks()
{
	local arch pids=

	set -m
	for arch in "$@"; do
		track "$arch" </dev/null &
		pids="$pids $!"
	done
	set +m
	# shellcheck disable=SC2064 # the groups of now
	trap "kill -TERM $(printf -- ' -%s' $pids) 2>/dev/null || true" EXIT
	trap 'exit 130' INT TERM HUP
	for arch in $pids; do
		wait "$arch" || result fail "the harness" "broke off while it ran tests"
	done
	trap - EXIT INT TERM HUP
}

# Results of checks and tests, one line each in $RESULTS: the outermost script
# begins and ends them, those that it calls add to them.
results_begin()
{
	RESULTS_OWNER=
	if [ -z "${RESULTS:-}" ]; then
		RESULTS_OWNER=y
		export RESULTS=$BUILD/results
		: > "$RESULTS"
	fi
}

# result pass|fail|skip WHAT [WHY]; also flaky, besides the pass that it is about.
result()
{
	printf '%s %s\n' "$1" "$2${3:+: $3}" >> "$RESULTS"
}

# results_end: show failures and the count, exit accordingly.
results_end()
{
	[ -n "$RESULTS_OWNER" ] || exit 0
	sed -n 's/^flaky /FLAKY: /p; s/^fail /FAILED: /p' "$RESULTS"
	say "$(grep -c '^pass ' "$RESULTS" || :) passed," \
	    "$(grep -c '^fail ' "$RESULTS" || :) failed," \
	    "$(grep -c '^skip ' "$RESULTS" || :) skipped"
	! grep -q '^fail ' "$RESULTS" || exit 1
	exit 0
}
