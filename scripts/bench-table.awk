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
		lockstat[$2] = 1
	if ($4 ~ /^contended:/)
		contended[$2] += $6
}

function has(key) { return key in value }

# The key of a cost on the series' kernel.
function cost(thing, variant) { return "series," thing "," variant ",cost" }

function line(what, left, right, figure, aim, good) {
	printf "%-52s %12s %12s %10s  %-11s %s\n", what, left, right, figure, aim, good
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

# Two figures, whose ratio must be limit at most.
function ratio(what, a, b, limit,    r) {
	if (!both(what, a, b, limit ? "<= " limit : ""))
		return
	r = value[a] / value[b]
	line(what, sprintf("%.0f", value[a]), sprintf("%.0f", value[b]), sprintf("%.3f", r),
	     limit ? "<= " limit : "", limit ? verdict(r <= limit) : "")
	if (spread[a] > worst)
		worst = spread[a]
	if (spread[b] > worst)
		worst = spread[b]
}

# Two figures that have to be the same.
function all(what, a, b) {
	if (both(what, a, b, "100 %"))
		line(what, figure(a), figure(b), sprintf("%.0f %%", value[a] * 100 / value[b]), "100 %",
		     verdict(value[a] == value[b]))
}

# A count per fault, which is nothing if rounded to one decimal. What was not counted
# since the last of these lines is not nothing.
function nothing(what, a) {
	if (absent) {
		line(what, "", "", "absent", "0", "ABSENT")
		lacking++
	} else
		line(what, "", "", sprintf("%.3f", a), "0", verdict(a < 0.05 && a > -0.05))
	absent = 0
}

function counted(thing, metric,    key) {
	key = "counts," thing ",8," metric
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
function waited(thing) { return thing in lockstat ? sprintf("%.3f", contended[thing]) : "absent" }

function allocations(thing) {
	return counted(thing, "kmallocs") + counted(thing, "slab_allocs") + counted(thing, "page_allocs")
}

# Exclusive locks that are of the feature, or that it was not to take.
function own_locks(thing, kind,    k, sum) {
	if (!(thing in lockstat))
		absent++
	for (k in locks) {
		if (index(k, thing ",8," kind ":") == 1 &&
		    (k ~ /uf->|bucket/ || k ~ /slots_lock/ || k ~ /mmu_lock.*-W/ || k ~ /userfault/))
			sum += locks[k]
	}
	return sum
}

END {
	line("per fault or page, in instructions", "this", "other", "ratio", "aim", "")
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
	ratio("wake, 64 : 1 others wait, queue", cost("wake-queue", 64), cost("wake-queue", 1))
	ratio("wake, 64 : 1 others wait, uffd", cost("wake-uffd", 64), cost("wake-uffd", 1))
	ratio("wake, 64 others wait, queue : uffd", cost("wake-queue", 64), cost("wake-uffd", 64))
	ratio("guest_memfd MINOR : shmem MINOR", "series,guest_memfd,1,minor", "series,shmem,1,minor", 1.0)
	ratio("clear one page by ioctl : PRIVATE", "series,arm,64,clear_one", "series,private,64,clear_one", 0.2)

	a = "series,arm,64,cost"
	p = "series,private,64,cost"
	what = "PRIVATE : arming, 64 GiB"
	if (both(what, p, a, ">= 5000")) {
		r = value[p] / value[a]
		line(what, sprintf("%.3g", value[p]), sprintf("%.3g", value[a]),
		     sprintf("%.0f", r), ">= 5000", verdict(r >= 5000))
	}
	a = "series,arm,64,bitmap_bytes"
	p = "series,private,64,slab_bytes"
	what = "memory to arm 64 GiB, and slab for PRIVATE, KiB"
	if (both(what, a, p, "<= 2048"))
		line(what, sprintf("%.0f", value[a] / 1024), sprintf("%.0f", value[p] / 1024), "",
		     "<= 2048", verdict(value[a] <= 2097152))

	if (arch == "x86_64") {
		a = "series,huge,1,pages_2m_"
		all("pages_2m after disabling, and never used", a "disabled", a "never")
		all("pages_2m of clean blocks, and their number", a "clean_blocks", "series,huge,1,clean_blocks")
	}

	ratio("demand_paging_test, series : unpatched", "series,demand_paging_test,1,total",
	      "unpatched,demand_paging_test,1,total", 1.005)
	ratio("plain fault, series : unpatched", cost("plain", 1), "unpatched,plain,1,cost", 1.005)
	printf "Worst spread of these, largest less smallest value: %.2f %%\n", worst

	print ""
	line("counts per userfault exit, 8 vCPUs on 2 CPUs", "", "", "figure", "aim", "")
	nothing("context switches of its own accord", counted("exit", "own_switches"))
	nothing("system calls but KVM_RUN", counted("exit", "syscalls") - counted("exit", "kvm_run_calls"))
	nothing("exclusive locks of the feature", own_locks("exit", "lock"))
	nothing("contended locks of the feature", own_locks("exit", "contended"))
	nothing("allocations more than a plain fault", allocations("exit") - allocations("plain"))
	nothing("IPIs", counted("exit", "ipis") + counted("exit", "ipi_masks"))
	print ""
	printf "%-24s %10s %10s %10s %10s\n", "counts per fault", "plain", "exit", "queue", "uffd"
	n = split("vm_exits kvm_run_calls syscalls switches kmallocs slab_allocs page_allocs ipis", m, " ")
	for (i = 1; i <= n; i++)
		printf "%-24s %10s %10s %10s %10s\n", m[i], shown("plain", m[i]),
			shown("exit", m[i]), shown("queue", m[i]), shown("uffd", m[i])
	# The tracepoint has every mutex that lockstat makes go the slow way.
	printf "%-24s %10s %10s %10s %10s\n", "contended locks", waited("plain"), waited("exit"),
		waited("queue"), waited("uffd")

	print ""
	if (lacking)
		print missed + 0 " missed, " lacking " absent"
	else
		print missed ? missed " missed" : "all met"
}
