# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Sourced: boot the debug kernel with tests of tests/table, judge what it said.

# Kernel messages that fail a boot, whatever the tests themselves said. Broken memory,
# i.e. "hardware memory corruption", is what some tests ask for.
BAD='WARNING:|BUG:|Oops|KASAN:|INFO: (possible|rcu|task|trying)|suspicious RCU|possible (circular|recursive)|'
BAD+='inconsistent lock|self-detected stall|detected stalls|soft lockup|blocked for more than|Kernel panic|'
BAD+='general protection fault|Unable to handle kernel|[^y] corruption|refcount_t:|DEBUG_LOCKS_WARN|kernel BUG|Call [Tt]race'

# table ARCH SET...: 'SECONDS TEST [ARGUMENT...]' lines of tests/table.
table()
{
	local arch=$1

	shift
	awk -v arch="$arch" -v sets=" $* " '
		/^[^#]/ && index(sets, " " $1 " ") && ($2 == "*" || $2 == arch) {
			sub(/^[^ \t]+[ \t]+[^ \t]+[ \t]+/, ""); gsub(/[ \t]+/, " "); print
		}' "$TOP/tests/table"
}

# skipped BOOT TEST SUBTEST WHY: a skip is good if it is on the list. SUBTEST may
# be empty.
skipped()
{
	local what="$1 $2${3:+ $3}" pattern

	while read -r pattern; do
		# shellcheck disable=SC2053 # a pattern it is
		if [[ $what == $pattern ]]; then
			result skip "$1: $2${3:+: $3}" "$4"
			return
		fi
	done < <(sed 's/[ \t]*#.*//; s/[ \t]\+/ /g; /^$/d' "$TOP/tests/skips")
	result fail "$1: $2${3:+: $3}" "skipped: $4"
}

# subtests BOOT N: what the N-th test reported of its parts, one a line, as
# pass|fail|skip SUBTEST [WHY].
subtests()
{
	awk -v n="$2" '
		/^(not )?ok / { if (++done == n) exit; next }
		done == n - 1 && match($0, /^# (not )?ok [0-9]+ (- )?/) {
			verdict = $2 == "not" ? "fail" : "pass"
			line = substr($0, RLENGTH + 1)
			why = ""
			if (match(line, / *# *SKIP */)) {
				verdict = "skip"
				why = substr(line, RSTART + RLENGTH)
				line = substr(line, 1, RSTART - 1)
				# What comes after SKIP may be the name, and then the reason.
				if (line == "" && match(why, / \(/))
					line = substr(why, 1, RSTART - 1)
			}
			gsub(/ /, "_", line)
			print verdict, line, why
		}' "$LOGS/$1.tap"
}

# why BOOT N: the reason that test gave for its skip or failure.
why()
{
	awk -v n="$2" '
		/^(not )?ok / && $($1 == "not" ? 3 : 2) == n {
			print $1 == "not" && match($0, / # .*/) ? substr($0, RSTART + 3) "; " last : last
			exit
		}
		/^(not )?ok / { last = "" }
		/SKIP - / || /Test Assertion Failure/ || /^#  *[A-Za-z].* (failed|!=|==)/ {
			if (last == "" || /Test Assertion/) last = substr($0, 3)
		}' "$LOGS/$1.tap" | sed 's/1\.\.0 # SKIP - //'
}

# outcome BOOT N: the line of TAP on the N-th test, nothing if it did not finish.
outcome() { grep "^\(not \)\?ok $2 " "$LOGS/$1.tap" || true; }

# output BOOT N: all that the N-th test said.
output() { awk -v n="$2" '/^(not )?ok / { done++; next } done == n - 1' "$LOGS/$1.tap"; }

# emulated BOOT N: may the emulation be to blame that the N-th test did not pass? It is
# known to shut down a guest, or to end or hang the machine, when there is no result.
# A guest must have shut down in each part of the test that failed. Its being wanted
# and not seen is another failure.
emulated()
{
	local line

	line=$(outcome "$1" "$2")
	[ -z "$line" ] || output "$1" "$2" | awk -v parts="$([[ $line != *"# exit=1" ]] || echo y)" '
		{ sub(/Wanted KVM exit reason: [0-9]* \(SHUTDOWN\)/, "") }
		/SHUTDOWN/ { shut = 1 }
		/^# (not )?ok [0-9]/ {
			if ($2 == "not") {
				failed++
				other += !shut
			}
			shut = 0
		}
		# The status tells that parts failed, or how all of it ended after them.
		END { exit other || (!shut && !(parts && failed)) }'
}

# number BOOT TEST: which of the tests of that boot it is.
number() { test=$2 awk '{ sub(/^[0-9]+ /, "") } $0 == ENVIRON["test"] { print NR; exit }' "$LOGS/$1.list"; }

# again BOOT LIST [KERNEL-PARAMETER...]: QEMU's emulation of what KVM needs is not
# perfect: once in some hundred runs of a test a guest shuts down, or the machine ends
# or hangs. Under it, run what ended like that once more, if that is not much, in a
# boot of its own; to pass then is told apart from passing at once. Any other failure
# is final, and so is a time limit, for an access that nobody wakes runs into it, too.
again()
{
	local boot=$1 arch=${1%%-*} n=0 secs test failed=0 list=$LOGS/$1-again.list

	rm -f "$LOGS/$1-again".*
	[ "$(cat "$BUILD/images/$arch-accel" 2>/dev/null)" = tcg ] || return 0
	while read -r secs test; do
		n=$((n + 1))
		[[ $test != mm/* ]] || continue
		case $(outcome "$boot" $n) in
		ok*)	continue ;;
		not*)	failed=$((failed + 1)) ;;
		esac
		emulated "$boot" $n || continue
		echo "$secs $test" >> "$list"
	done < "$2"
	if [ ! -s "$list" ] || [ $failed -gt 2 ] || complaint "$boot" >/dev/null; then
		rm -f "$list"
		return 0
	fi
	shift 2
	stage "$boot: $(wc -l < "$list") tests once more"
	"$TOP/scripts/boot" "$arch" debug series "$boot-again" "$@" < "$list" ||
		result fail "$boot-again: boot" "the kernel did not come up, or not to the end"
}

# complaint BOOT: the first message of its kernel that fails a boot.
complaint() { grep -aE -m1 "$BAD" "$LOGS/$1.console"; }

# judge BOOT LIST: one result for each test, one for the kernel's messages. On an
# unpatched kernel the tests skip, for that reason; those of set 'control' pass.
judge()
{
	local first=$1 boot nr=0 n test line bad verdict sub why control

	control=$(table "${1%%-*}" control)
	while read -r _ test; do
		boot=$first nr=$((nr + 1)) n=$nr
		# compare_mm() judges these.
		[[ $test != mm/* ]] || continue
		line=$(outcome "$boot" $n)
		if [[ $line != ok* ]] && [ -e "$LOGS/$boot-again.list" ] && emulated "$boot" $n; then
			why=${line:+a guest had shut down}
			boot=$first-again
			n=$(number "$boot" "$test")
			line=$(outcome "$boot" "$n")
			[[ $line != ok* ]] ||
				result flaky "$first: $test" "passed when run again, after ${why:-it had no result}"
		fi
		! grep -q " $test\$" <<< "$control" || line="$line (control)"
		case $first:$line in
		*:)
			result fail "$first: $test" "did not finish" ;;
		*:"not ok"*)
			result fail "$first: $test" "$(why "$boot" $n)" ;;
		*"# X"*)
			result fail "$first: $test" "neither passed nor failed: ${line#*# }" ;;
		*-unpatched:*"# SKIP"*)
			why=$(why "$boot" $n)
			case $why in
			*USERFAULT*|*GUEST_MEMFD*)
				result pass "$first: $test skips" ;;
			*)	result fail "$first: $test" "skips, but not for lack of the series: $why" ;;
			esac ;;
		*-unpatched:*"(control)")
			result pass "$first: $test" ;;
		*-unpatched:*)
			result fail "$first: $test" "passes without the series" ;;
		*"# SKIP"*)
			skipped "$first" "$test" "" "$(why "$boot" $n)" ;;
		*)
			result pass "$first: $test" ;;
		esac
		while read -r verdict sub why; do
			case $verdict in
			skip)	skipped "$first" "$test" "$sub" "${why:-no reason given}" ;;
			*)	result "$verdict" "$first: $test: $sub" ;;
			esac
		done < <(subtests "$boot" $n)
	done < "$2"

	for boot in "$first" "$first-again"; do
		[ -e "$LOGS/$boot.console" ] || continue
		if bad=$(complaint "$boot"); then
			result fail "$boot: kernel log" "$bad (build/logs/$boot.console)"
		else
			result pass "$boot: kernel log is clean"
		fi
	done
}

# digest BOOT N: how that test ended, and what it said of each of its parts.
digest()
{
	outcome "$1" "$2" | sed 's/^ok .*# SKIP.*/ended: skip/; s/^ok .*/ended: pass/; s/^not ok .*/ended: fail/'
	subtests "$1" "$2"
}

# compare_mm ARCH [SUFFIX]: the tests of set mm[SUFFIX] must do with the series, in boot
# ARCH[SUFFIX], what they do without, in ARCH-unpatched[SUFFIX]. What both kernels skip is
# tested nowhere, and what fails on both is no pass.
compare_mm()
{
	local test n before after what verdict sub why base=$1-unpatched${2:-} boot=$1${2:-}

	while read -r _ test; do
		before=$(digest "$base" "$(number "$base" "$test")")
		n=$(number "$boot" "$test")
		after=$(digest "$boot" "$n")
		if [[ $before != "ended: "* || $before != "$after" ]]; then
			what=$({ diff <(echo "$before") <(echo "$after") || true; } | grep -m1 '^[<>]' ||
				echo "did not finish")
			result fail "$1: $test" "$what (< without the series)"
			continue
		fi
		case ${after%%$'\n'*} in
		*pass)	result pass "$1: $test: as without the series" ;;
		*skip)	skipped "$1" "$test" "" "on the unpatched kernel, too" ;;
		*)	result fail "$1: $test" "fails, also without the series" ;;
		esac
		while read -r verdict sub why; do
			case $verdict in
			skip)	skipped "$1" "$test" "$sub" "on the unpatched kernel, too${why:+: $why}" ;;
			fail)	result fail "$1: $test: $sub" "fails, also without the series" ;;
			*)	result pass "$1: $test: $sub" ;;
			esac
		done < <(subtests "$boot" "$n")
	done < <(table "$1" "mm${2:-}")
}

# boot_and_judge ARCH REV BOOT SET... [-- KERNEL-PARAMETER...]
boot_and_judge()
{
	local arch=$1 rev=$2 boot=$3 sets='' list=$LOGS/$3.list lost=

	shift 3
	while [ $# -gt 0 ] && [ "$1" != -- ]; do
		sets="$sets $1"
		shift
	done
	[ $# = 0 ] || shift
	table "$arch" $sets > "$list"
	if [ ! -e "$BUILD/images/$arch-debug-$rev$SUFFIX.stamp" ] ||
	   [ ! -e "$BUILD/images/$arch-initrd$SUFFIX.stamp" ]; then
		result fail "$boot" "not booted, for it was not built"
		return 0
	fi
	"$TOP/scripts/boot" "$arch" debug "$rev" "$boot" "$@" < "$list" || lost=y
	if [ "$rev" = series ]; then
		again "$boot" "$list" "$@"
	fi
	[ -z "$lost" ] || [ -e "$LOGS/$boot-again.list" ] ||
		result fail "$boot: boot" "the kernel did not come up, or not to the end"
	judge "$boot" "$list"
}
