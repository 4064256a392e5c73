# SPDX-License-Identifier: GPL-2.0
#
# bench-table.awk: results.csv of scripts/bench to a table that sets each figure
# against its aim. A figure that was not measured meets none. Variable arch tells which
# of them there have to be.

NR > 1 {
	key = $1 "," $2 "," $3 "," $4
	value[key] = $6
	if ($6)
		spread[key] = ($8 - $7) * 100 / $6
	if ($1 == "counts" && ($4 ~ /^lock:/ || $4 ~ /^contended:/))
		locks[$2 "," $3 "," $4] = $6
	if ($4 ~ /^lock:/)
		lockstat[$2 "," $3] = 1
	if ($4 ~ /^contended:/)
		contended[$2 "," $3] += $6
}

function has(key) { return key in value }

# The key of a cost on the series' kernel.
function cost(thing, variant) { return "series," thing "," variant ",cost" }

function line(what, left, right, figure, aim, good, range) {
	printf "%-50s %11s %11s %9s %8s  %-8s %s\n", what, left, right, figure, range, aim, good
}

function verdict(good) {
	if (!good)
		missed++
	return good ? "met" : "MISSED"
}

function figure(key) { return has(key) ? sprintf("%.0f", value[key]) : "absent" }

# Are two figures there? Otherwise there is a line that says which is not.
function both(what, a, b, aim) {
	if (has(a) && has(b) && value[b])
		return 1
	line(what, figure(a), figure(b), "", aim, "ABSENT")
	lacking++
	return 0
}

# The larger spread of two figures.
function range(a, b) {
	return sprintf("%.2f %%", spread[a] > spread[b] ? spread[a] : spread[b])
}

# Two figures, whose ratio must be limit at most.
function ratio(what, a, b, limit,    r) {
	if (!both(what, a, b, limit ? "<= " limit : ""))
		return
	r = value[a] / value[b]
	line(what, sprintf("%.0f", value[a]), sprintf("%.0f", value[b]), sprintf("%.3f", r),
	     limit ? "<= " limit : "", limit ? verdict(r <= limit) : "", range(a, b))
}

# What guest_memfd_perf_test did to pages of one memory, against another thing or memory.
function filling(what, memory, thing, memory2, thing2, limit) {
	ratio(what, "series," memory ",1," thing, "series," memory2 ",1," thing2, limit)
}

# Two figures that have to be the same.
function all(what, a, b) {
	if (both(what, a, b, "100 %"))
		line(what, figure(a), figure(b), sprintf("%.0f %%", value[a] * 100 / value[b]), "100 %",
		     verdict(value[a] == value[b]))
}

# Three digits, and no minus sign before nothing.
function digits(x) {
	x = sprintf("%.3f", x)
	sub(/^-0\.000$/, "0.000", x)
	return x
}

# Counts per fault, with 1, 8 and 64 vCPUs, which are nothing if rounded to one decimal.
# What was not counted since the last of these lines is not nothing.
function nothing(what, a,    i, good) {
	good = 1
	for (i = 1; i <= 3; i++)
		good = good && a[i] < 0.05 && a[i] > -0.05
	if (absent) {
		line(what, "", "", "absent", "0", "ABSENT")
		lacking++
	} else
		line(what, digits(a[1]), digits(a[2]), digits(a[3]), "0", verdict(good))
	absent = 0
}

function counted(thing, vcpus, metric,    key) {
	key = "counts," thing "," vcpus "," metric
	if (!has(key)) {
		absent++
		return 0
	}
	return value[key]
}

function shown(thing, metric,    key) {
	key = "counts," thing ",8," metric
	return has(key) ? sprintf("%.3f", value[key]) : "absent"
}

# Locks that nobody waited for have no line.
function waited(thing,    key) {
	key = thing ",8"
	return key in lockstat ? sprintf("%.3f", contended[key]) : "absent"
}

# Exclusive locks of anything that is on the way of a fault.
function taken(thing,    k, sum) {
	if (!((thing ",8") in lockstat))
		return "absent"
	for (k in locks) {
		if (index(k, thing ",8,lock:") == 1 && k !~ /-R$/)
			sum += locks[k]
	}
	return sprintf("%.3f", sum)
}

function allocations(thing, vcpus,    slab) {
	slab = counted(thing, vcpus, "kmallocs") + counted(thing, vcpus, "slab_allocs")
	return slab + counted(thing, vcpus, "page_allocs")
}

# Those by which the threads of vCPUs start and end are among these.
function other_calls(thing, vcpus) {
	return counted(thing, vcpus, "syscalls") - counted(thing, vcpus, "kvm_run_calls")
}

# Exclusive locks that are of the feature, or that it was not to take.
function own_locks(thing, vcpus, kind,    k, sum) {
	k = thing "," vcpus
	if (!(k in lockstat))
		absent++
	for (k in locks) {
		if (index(k, thing "," vcpus "," kind ":") == 1 &&
		    (k ~ /uf->|bucket/ || k ~ /slots_lock/ || k ~ /mmu_lock.*-W/ || k ~ /userfault/))
			sum += locks[k]
	}
	return sum
}

# Lines of counts that have to be nothing.
function nothings(    i, own, syscalls, exclusive, waits, allocs, ipis) {
	line("counts per userfault exit, vCPUs on 2 CPUs", "1", "8", "64", "aim", "")
	for (i = 1; i <= 3; i++)
		own[i] = counted("exit", vcpus[i], "own_switches")
	nothing("context switches of its own accord", own)
	for (i = 1; i <= 3; i++)
		syscalls[i] = other_calls("exit", vcpus[i]) - other_calls("plain", vcpus[i])
	nothing("system calls but KVM_RUN, more than a plain fault", syscalls)
	for (i = 1; i <= 3; i++)
		exclusive[i] = own_locks("exit", vcpus[i], "lock")
	nothing("exclusive locks of the feature", exclusive)
	for (i = 1; i <= 3; i++)
		waits[i] = own_locks("exit", vcpus[i], "contended")
	nothing("contended locks of the feature", waits)
	for (i = 1; i <= 3; i++)
		allocs[i] = allocations("exit", vcpus[i]) - allocations("plain", vcpus[i])
	nothing("allocations more than a plain fault", allocs)
	for (i = 1; i <= 3; i++)
		ipis[i] = counted("exit", vcpus[i], "ipis") + counted("exit", vcpus[i], "ipi_masks")
	nothing("IPIs", ipis)
}

# What PRIVATE takes for the same.
function against_private(    a, p, r, what) {
	ratio("clear one page by ioctl : PRIVATE", "series,arm,64,clear_one", "series,private,64,clear_one", 0.2)
	a = "series,arm,64,cost"
	p = "series,private,64,cost"
	what = "PRIVATE : arming, 64 GiB"
	if (both(what, p, a, ">= 5000")) {
		r = value[p] / value[a]
		line(what, sprintf("%.3g", value[p]), sprintf("%.3g", value[a]),
		     sprintf("%.0f", r), ">= 5000", verdict(r >= 5000), range(p, a))
	}
	p = "series,private,64,slab_bytes"
	line("bytes of slab for PRIVATE, 64 GiB", "", figure(p), "", "", has(p) ? "" : "ABSENT")
}

END {
	line("per fault or page, in instructions", "this", "other", "ratio", "aim", "", "spread")
	split("1 8 64", vcpus, " ")
	for (i = 1; i <= 3; i++) {
		v = vcpus[i]
		ratio("userfault exit : plain fault, " v " vCPUs", cost("exit", v), cost("plain", v), 1.5)
	}
	for (i = 1; i <= 3; i++)
		ratio("userfault exit : uffd MINOR, " vcpus[i] " vCPUs", cost("exit", vcpus[i]),
		      cost("uffd", vcpus[i]), 0.37)
	ratio("userfault exit, 64 : 1 vCPUs", cost("exit", 64), cost("exit", 1), 1.15)
	ratio("uffd MINOR, 64 : 1 vCPUs", cost("uffd", 64), cost("uffd", 1))
	ratio("plain fault, 64 : 1 vCPUs", cost("plain", 64), cost("plain", 1))
	ratio("userfault exit : plain, host mapping populated", cost("exit", "1-populated"),
	      cost("plain", "1-populated"))
	for (i = 1; i <= 3; i++)
		ratio("queue : uffd MINOR, " vcpus[i] " vCPUs", cost("queue", vcpus[i]), cost("uffd", vcpus[i]), 1.0)
	for (i = 1; i <= 3; i++)
		ratio("queue : uffd MINOR, both in other process, " vcpus[i], cost("queue", vcpus[i]),
		      cost("uffd-process", vcpus[i]), 1.0)
	ratio("access by KVM, queue : uffd", cost("access-queue", 64), cost("access-uffd", 64), 1.0)
	ratio("wake, 64 : 1 others wait, queue", cost("wake-queue", 64), cost("wake-queue", 1), 1.05)
	ratio("wake, 64 : 1 others wait, uffd", cost("wake-uffd", 64), cost("wake-uffd", 1))
	ratio("wake, 64 others wait, queue : uffd", cost("wake-queue", 64), cost("wake-uffd", 64))
	g = "guest_memfd"
	filling("guest_memfd MINOR : shmem MINOR", g, "MINOR_fault_CONTINUE", "shmem", "MINOR_fault_CONTINUE", 1.0)
	filling("guest_memfd MISSING : shmem MISSING", g, "MISSING_fault_COPY", "shmem", "MISSING_fault_COPY")
	filling("guest_memfd write() : COPY", g, "write()", g, "COPY")
	filling("same, many pages in a call", g, "write()_all_at_once", g, "COPY_all_at_once")
	filling("guest_memfd write() : memcpy()", g, "write()", g, "memcpy()")
	filling("guest_memfd write() : memcpy() and CONTINUE", g, "write()", g, "memcpy()_and_CONTINUE")
	filling("same, and both CONTINUE", g, "write()_and_CONTINUE", g, "memcpy()_and_CONTINUE")
	filling("guest_memfd write() : shmem write()", g, "write()", "shmem", "write()")
	a = "series,arm,64,bitmap_bytes"
	what = "memory to arm 64 GiB, KiB"
	if (both(what, a, a, "<= 2048"))
		line(what, sprintf("%.0f", value[a] / 1024), "", "", "<= 2048", verdict(value[a] <= 2097152))
	# arm64 has no PRIVATE, nor this statistic.
	if (arch == "x86_64") {
		against_private()
		a = "series,huge,1,pages_2m_"
		all("pages_2m after disabling, and never used", a "disabled", a "never")
		all("pages_2m of clean blocks, and their number", a "clean_blocks", "series,huge,1,clean_blocks")
	}

	ratio("demand_paging_test, series : unpatched", "series,demand_paging_test,1,total",
	      "unpatched,demand_paging_test,1,total", 1.005)
	ratio("plain fault, series : unpatched", cost("plain", 1), "unpatched,plain,1,cost", 1.005)

	print ""
	nothings()
	print ""
	printf "%-24s %10s %10s %10s %10s\n", "counts, 8 vCPUs", "plain", "exit", "queue", "uffd"
	n = split("vm_exits kvm_run_calls syscalls switches kmallocs slab_allocs page_allocs ipis", m, " ")
	for (i = 1; i <= n; i++)
		printf "%-24s %10s %10s %10s %10s\n", m[i], shown("plain", m[i]),
			shown("exit", m[i]), shown("queue", m[i]), shown("uffd", m[i])
	printf "%-24s %10s %10s %10s %10s\n", "exclusive locks", taken("plain"), taken("exit"),
		taken("queue"), taken("uffd")
	# The tracepoint has every mutex that lockstat makes go the slow way.
	printf "%-24s %10s %10s %10s %10s\n", "contended locks", waited("plain"), waited("exit"),
		waited("queue"), waited("uffd")

	print ""
	if (lacking)
		print missed + 0 " missed, " lacking " absent"
	else
		print missed ? missed " missed" : "all met"
}
