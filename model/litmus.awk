# SPDX-License-Identifier: GPL-2.0
#
# model/litmus.awk: see model/litmus. FILE in the environment is the name of the test.
#
# This does what herd7 does with the kernel's tools/memory-model: the relations below
# are those of linux-kernel.cat and lock.cat there, and have their names. It tries all
# values that reads may return and all orders of the accesses to each variable, and
# whatever the model does not forbid may happen. So writes need not reach all CPUs at
# once, reads may run before a condition that they depend on, and an if orders what it
# tests only before the writes in its body.
#
# Left out: RCU, plain accesses, pointers, else, loops, operations that return a value;
# what is not known is an error. A thread gets each lock that it takes: there are no
# deadlocks. Each statement is a line of its own.

function die(text)
{
	print "error: " ENVIRON["FILE"] ":" NR ": " text > "/dev/stderr"
	dead = 1
	exit 2
}

# ---- Reading a test ----

# The line with N for its names and numbers, which are in w, but not for functions and types.
function form_of(s,   out, word)
{
	for (words = 0; match(s, /[A-Za-z_0-9]+/); s = substr(s, RSTART + RLENGTH)) {
		word = substr(s, RSTART, RLENGTH)
		out = out substr(s, 1, RSTART - 1)
		if (substr(s, RSTART + RLENGTH, 1) != "(" && word !~ /^(int|atomic_t|spinlock_t|if|exists)$/) {
			w[++words] = word
			word = "N"
		}
		out = out word
	}
	return out s
}

# A number, or a register of thread t.
function operand(x, t)
{
	if (x !~ /^[0-9]+$/ && !((t, x) in registers))
		die("no number and no register here: " x)
	if (x ~ /^[0-9]+$/ && x + 0 > most)
		most = x + 0
	return x
}

function instruction(what, variable, x, y,   i)
{
	if (variable != "" && !((t, variable) in parameters))
		die("not a parameter: " variable)
	op[++ins] = what
	thread_of[ins] = t
	var[ins] = variable
	left[ins] = x
	right[ins] = y
	for (i = 1; i <= depth; i++)
		within[ins] = within[ins] " " open[i]
}

# A line of thread t.
function statement(   f)
{
	f = $0
	gsub(/^.* = |\(.*/, "", f)
	if (form == "int N;")
		registers[t, w[1]] = 1
	else if (form ~ /^if \(N( [=!]= N)?\)( [{])?$/) {
		instruction("if", "", operand(w[1], t), operand(words > 1 ? w[2] : 0, t))
		equal[ins] = form ~ /==/
		braces[open[++depth] = ins] = form ~ /[{]/
		return
	} else if (form ~ /^(WRITE_ONCE\(\*|smp_store_release\()N, N\);$/)
		instruction(f, w[1], "", operand(w[2], t))
	else if (form ~ /^N = (READ_ONCE\(\*|(smp_load_acquire|atomic_read)\()N\);$/ && (t, w[1]) in registers)
		instruction(f, w[2], w[1])
	else if (form ~ /^smp_(mb|wmb|rmb|mb__after_atomic)\(\);$/)
		instruction(f)
	else if (form ~ /^(atomic_inc|spin_(un)?lock)\(N\);$/) {
		instruction(f, w[1], "", 0)
		most += f == "atomic_inc"
	} else if (form != "}" || depth && !braces[open[depth]])
		die("not known here: " $0)
	else if (depth)
		target[open[depth--]] = ins + 1
	else
		state = "top"
	for (; depth && !braces[open[depth]]; depth--)
		target[open[depth]] = ins + 1
}

# exists (...): the values that registers and variables have in the end.
function condition(   i, terms, p)
{
	for (i = split(substr($0, 9, length($0) - 9), terms, / \/\\ /); i; i--)
		if (split(terms[i], p, /[:=]/) == 3 && (p[1], p[2]) in registers)
			wanted_register[p[1], p[2]] = operand(p[3]) + 0
		else if (terms[i] !~ /:/ && p[1] in known)
			wanted[p[1]] = operand(p[2]) + 0
		else
			die("no such variable or register: " terms[i])
}

# A line of no thread. The state is what it is in, or after.
function top_level(   i)
{
	if (state == "title" && form == "{}" || state == "init" && form == "}")
		state = "top"
	else if (state == "title" && form == "{")
		state = "init"
	else if (state == "init" && form == "N=N;")
		initial[w[1]] = operand(w[2]) + 0
	else if (state == "top" && form ~ "^P" threads + 0 "\\(((int|atomic_t|spinlock_t) \\*N(, |\\)$))+$") {
		state = "head"
		t = threads++
		for (i = 1; i <= words; i++)
			parameters[t, w[i]] = known[w[i]] = 1
	} else if (state == "head" && form == "{")
		state = "body"
	else if (state == "top" && form ~ /^exists \(((N:)?N=N( \/\\ |\)$))+$/) {
		state = "end"
		condition()
	} else
		die("not known here: " $0)
}

# ---- What may happen: events of the threads, orders of the accesses to a variable ----

function event(k, i, v,   j, ifs)
{
	kind[++n] = k
	by[n] = op[i]
	thread[n] = thread_of[i]
	loc[n] = var[i]
	val[n] = v
	rmw[n] = k == "W" && op[i] ~ /^(atomic_inc|spin_lock)$/
	data[n] = " " depends[thread[n], right[i]] " "
	ctrl[n] = " "
	for (j = split(within[i], ifs, " "); j; j--)
		ctrl[n] = ctrl[n] condition_on[ifs[j]]
}

function value(t, x)
{
	return x ~ /^[0-9]/ ? x + 0 : register[t, x] + 0
}

# Instruction i and those after it; all of a thread come before those of the next one.
function run(i,   reads, both, reg, v, before, old, old_depends)
{
	if (i > ins) {
		ended()
		return
	}
	if (op[i] == "if") {
		condition_on[i] = " " depends[thread_of[i], left[i]] " " depends[thread_of[i], right[i]] " "
		v = value(thread_of[i], left[i]) == value(thread_of[i], right[i])
		run(v == equal[i] ? i + 1 : target[i])
		return
	}
	before = n
	reg = thread_of[i] SUBSEP left[i]
	old = register[reg]
	old_depends = depends[reg]
	both = op[i] ~ /^(atomic_inc|spin_lock)$/
	reads = both || left[i] != ""
	for (v = 0; v <= (reads && op[i] != "spin_lock" ? most : 0) && !found; v++) {
		if (reads)
			event("R", i, v)
		if (left[i] != "") {
			register[reg] = v
			depends[reg] = n
		}
		if (both || !reads)
			event(var[i] == "" ? "F" : "W", i, both ? v + 1 : value(thread_of[i], right[i]))
		run(i + 1)
		n = before
	}
	register[reg] = old
	depends[reg] = old_depends
}

function ended(   r, v, locs)
{
	for (r in wanted_register)
		if (register[r] + 0 != wanted_register[r])
			return
	for (v in known)
		locations[++locs] = v
	locations[locs + 1] = ""
	order(1, 0, 1)
}

# The k-th access to variable l, and those after it; last was the last write, 0 is the
# initial one. This is also the axioms "coherence" and "atomic".
function order(l, last, k,   v, e, now, more, tried)
{
	v = locations[l]
	if (v == "") {
		found = allowed()
		return
	}
	now = last ? val[last] : initial[v] + 0
	for (e = 1; e <= n && !found; e++) {
		if (loc[e] != v || place[e] || thread[e] in tried)
			continue
		more = tried[thread[e]] = 1
		if (kind[e] == "R" ? val[e] != now : rmw[e] && rf[e - 1] != last)
			continue
		place[e] = k
		rf[e] = last
		order(l, kind[e] == "W" ? e : last, k + 1)
		place[e] = 0
	}
	if (!more && (!(v in wanted) || wanted[v] == now))
		order(l + 1, 0, 1)
}

# ---- Whether it may: linux-kernel.cat ----

function put(relations, i, j,   k, names)
{
	for (k = split(relations, names, " "); k; k--)
		rel[names[k], i, j] = 1
}

# to |= a ; b
function seq(to, a, b,   i, j, k)
{
	for (i = 1; i <= n; i++)
		for (k = 1; k <= n; k++)
			for (j = 1; (a, i, k) in rel && j <= n; j++)
				if ((b, k, j) in rel)
					rel[to, i, j] = 1
}

# relations |= id
function optional(relations,   i)
{
	for (i = 1; i <= n; i++)
		put(relations, i, i)
}

# a = a+. Is it free of cycles?
function closure(a,   i, j, k, cycle)
{
	for (k = 1; k <= n; k++)
		for (i = 1; i <= n; i++)
			for (j = 1; (a, i, k) in rel && j <= n; j++)
				if ((a, k, j) in rel)
					rel[a, i, j] = 1
	for (i = 1; i <= n; i++)
		cycle += (a, i, i) in rel
	return !cycle
}

# From an access to a later one of its thread.
function po_edges(i, j,   k, inc, fences)
{
	for (k = i; k < j; k++) {
		inc = inc || by[k] == "atomic_inc"
		if (k > i && kind[k] == "F")
			fences = fences (inc && by[k] == "smp_mb__after_atomic" ? "smp_mb" : by[k]) ";"
	}
	if (fences ~ /smp_mb;/)
		put("mb a-cumul cumul-fence hb", i, j)
	if (by[j] ~ /^(smp_store_release|spin_unlock)$/)
		put("a-cumul cumul-fence hb", i, j)
	if (fences ~ /smp_wmb;/ && kind[i] kind[j] == "WW")
		put("cumul-fence hb", i, j)
	if (fences ~ /smp_rmb;/ && kind[i] kind[j] == "RR" && by[i] by[j] !~ /atomic_inc/)
		put("hb", i, j)
	if (kind[i] == "R" && by[i] ~ /^(smp_load_acquire|spin_lock)$/)
		put("hb", i, j)
	if (kind[j] == "W" && (loc[i] == loc[j] || index(data[j] ctrl[j], " " i " ")))
		put("hb", i, j)
	if (index(data[j], " " i " "))
		put("data", i, j)
	if (kind[j] == "R" && rf[j] == i)
		put("rfi", i, j)
}

function edges(i, j)
{
	if (kind[i] == "F" || kind[j] == "F")
		return
	if (thread[i] == thread[j]) {
		if (i < j)
			po_edges(i, j)
	} else if (loc[i] == loc[j]) {
		if (kind[j] == "R" && rf[j] == i)
			put("rfe hb", i, j)
		if (kind[j] == "W" && place[i] < place[j])
			put("overwrite", i, j)
	}
	if (rmw[j] && rf[j - 1] == i)
		put("rf;rmw", i, j)
}

# po ; [UL] ; (po|rf) ; [LKR] ; po: from before unlock u to after lock k.
function po_unlock_lock_po(u, k,   i, j)
{
	if (by[u] != "spin_unlock" || by[k] != "spin_lock" || rmw[k])
		return
	if (rf[k] == u || thread[u] == thread[k] && u < k)
		for (i = 1; i < u; i++)
			for (j = k + 1; thread[i] == thread[u] && j <= n; j++)
				if (thread[j] == thread[k])
					put(thread[i] == thread[j] ? "cumul-fence hb" : "cumul-fence", i, j)
}

function allowed(   i, j)
{
	split("", rel)
	for (i = 1; i <= n; i++)
		for (j = 1; j <= n; j++) {
			edges(i, j)
			po_unlock_lock_po(i, j)
		}
	seq("hb", "data", "rfi")
	seq("cumul-fence", "rfe", "a-cumul")
	closure("rf;rmw")
	optional("rf;rmw")
	seq("cumul-fence*", "cumul-fence", "rf;rmw")
	closure("cumul-fence*")
	optional("overwrite cumul-fence* rfe")
	seq("overwrite;cumul-fence*", "overwrite", "cumul-fence*")
	seq("prop", "overwrite;cumul-fence*", "rfe")
	for (i = 1; i <= n; i++)
		for (j = 1; j <= n; j++)
			if (i != j && thread[i] == thread[j] && ("prop", i, j) in rel)
				put("hb", i, j)
	if (!closure("hb"))
		return 0
	optional("hb")
	seq("prop;mb", "prop", "mb")
	seq("pb", "prop;mb", "hb")
	return closure("pb")
}

# ---- What is checked ----

function expect(want, text)
{
	found = n = 0
	run(1)
	print (found == (want == "Sometimes") ? "    ok  " : "    FAIL") " litmus: " name ": " want text
	failed = failed || found != (want == "Sometimes")
}

function weaken(i, weaker,   was)
{
	was = op[i]
	op[i] = weaker
	expect("Sometimes", (weaker == "nothing" ? " without " : " with " weaker "() for ") was "() of P" thread_of[i])
	op[i] = was
}

function weaken_each(   i, j, weaker, names)
{
	weaker["smp_wmb"] = weaker["smp_rmb"] = "nothing"
	weaker["smp_mb"] = weaker["smp_mb__after_atomic"] = "nothing smp_wmb smp_rmb"
	weaker["smp_store_release"] = "WRITE_ONCE"
	weaker["smp_load_acquire"] = "READ_ONCE"
	for (i = 1; i <= ins; i++)
		for (j = 1; j <= split(weaker[op[i]], names, " "); j++)
			weaken(i, names[j])
}

NR == 1 {
	name = $2
	state = $1 == "C" && NF == 2 ? "title" : "not C"
	next
}

/^\(\*/, /\*\)$/ {
	if ($2 == "Result:")
		result = $3
	next
}

{
	sub(/[ \t]*(\/\/.*|\(\* .*\*\))$/, "")
	gsub(/^[ \t]+|[ \t]+$/, "")
	form = form_of($0)
}

form != "" && state == "body" { statement(); next }
form != ""                    { top_level() }

END {
	if (dead)
		exit 2
	if (state != "end" || result !~ /^(Never|Sometimes)$/)
		die("no exists (...), or no Result: Never or Sometimes")
	expect(result)
	if (result == "Never")
		weaken_each()
	exit failed + 0
}
