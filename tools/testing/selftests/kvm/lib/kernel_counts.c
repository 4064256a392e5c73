// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counts of what the kernel does.
 */
#include <errno.h>
#include <linux/perf_event.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel_counts.h"
#include "test_util.h"

static struct counter {
	const char *name;
	const char *event;
	/* One for each CPU, or -1. */
	int *fds;
	bool exists;
} counters[] = {
	{ "syscalls",		"raw_syscalls/sys_enter" },
	{ "switches",		"sched/sched_switch" },
	{ "kmallocs",		"kmem/kmalloc" },
	{ "slab_allocs",	"kmem/kmem_cache_alloc" },
	{ "page_allocs",	"kmem/mm_page_alloc" },
	{ "ipis",		"ipi/ipi_send_cpu" },
	{ "ipi_masks",		"ipi/ipi_send_cpumask" },
	{ "contentions",	"lock/contention_begin" },
	{ "vm_exits",		"kvm/kvm_exit" },
	{ "userfault_exits",	"kvm/kvm_userfault_exit" },
	{ "userspace_exits",	"kvm/kvm_userspace_exit" },
	{ "host_faults",	"exceptions/page_fault_user" },
};

static int nr_cpus;

/* The number of an event, wherever tracefs is, or -1. */
static int event_id(const char *event)
{
	static const char * const roots[] = {
		"/sys/kernel/tracing",
		"/sys/kernel/debug/tracing",
	};
	FILE *file = NULL;
	char path[128];
	int i, id = -1;

	for (i = 0; i < ARRAY_SIZE(roots) && !file; i++) {
		snprintf(path, sizeof(path), "%s/events/%s/id", roots[i], event);
		file = fopen(path, "r");
	}
	if (!file)
		return -1;

	if (fscanf(file, "%d", &id) != 1)
		id = -1;
	fclose(file);
	return id;
}

/* Returns -1 if the CPU is not online. */
static int counter_open(int id, int cpu)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_TRACEPOINT,
		.size = sizeof(attr),
		.config = id,
		.disabled = 1,
	};
	int fd = syscall(__NR_perf_event_open, &attr, -1, cpu, -1, 0);

	TEST_ASSERT(fd >= 0 || errno == ENODEV,
		    "perf_event_open() of event %d failed, errno %d", id, errno);
	return fd;
}

static void counter_init(struct counter *counter)
{
	int id = event_id(counter->event);
	int i;

	counter->exists = id >= 0;
	if (!counter->exists)
		return;

	counter->fds = calloc(nr_cpus, sizeof(*counter->fds));
	TEST_ASSERT(counter->fds, "Out of memory");
	for (i = 0; i < nr_cpus; i++)
		counter->fds[i] = counter_open(id, i);
}

static void write_file(const char *path, const char *value)
{
	FILE *file = fopen(path, "w");

	if (!file)
		return;

	fputs(value, file);
	fclose(file);
}

void kernel_counts_init(void)
{
	int i;

	nr_cpus = sysconf(_SC_NPROCESSORS_CONF);
	for (i = 0; i < ARRAY_SIZE(counters); i++)
		counter_init(&counters[i]);
	write_file("/proc/sys/kernel/lock_stat", "0");
}

static void counter_ioctl(struct counter *counter, unsigned long cmd)
{
	int i;

	for (i = 0; counter->exists && i < nr_cpus; i++) {
		if (counter->fds[i] >= 0)
			TEST_ASSERT_EQ(ioctl(counter->fds[i], cmd, 0), 0);
	}
}

static void counters_ioctl(unsigned long cmd)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(counters); i++)
		counter_ioctl(&counters[i], cmd);
}

void kernel_counts_start(void)
{
	write_file("/proc/lock_stat", "0");
	write_file("/proc/sys/kernel/lock_stat", "1");
	counters_ioctl(PERF_EVENT_IOC_RESET);
	counters_ioctl(PERF_EVENT_IOC_ENABLE);
}

void kernel_counts_stop(void)
{
	counters_ioctl(PERF_EVENT_IOC_DISABLE);
	write_file("/proc/sys/kernel/lock_stat", "0");
}

/* Returns false if the kernel does not have it. */
static bool counter_read(struct counter *counter, u64 *sum)
{
	u64 count;
	int i;

	*sum = 0;
	for (i = 0; counter->exists && i < nr_cpus; i++) {
		if (counter->fds[i] < 0)
			continue;

		TEST_ASSERT_EQ(read(counter->fds[i], &count, sizeof(count)), sizeof(count));
		*sum += count;
	}

	return counter->exists;
}

/*
 * 'class: con-bounces contentions min max total avg acq-bounces acquisitions ...'.
 * Readers and writers of the same class have a line each.
 */
static void lock_line(char *line, kernel_count_fn_t fn)
{
	u64 contentions, acquisitions;
	char name[160], *end;

	end = strrchr(line, ':');
	if (!end || sscanf(end + 1, "%*u %lu %*f %*f %*f %*f %*u %lu",
			   &contentions, &acquisitions) != 2)
		return;

	*end = '\0';
	line += strspn(line, " ");
	/* For whoever splits the output at blanks. */
	for (end = line; *end; end++) {
		if (*end == ' ')
			*end = '_';
	}

	snprintf(name, sizeof(name), "lock:%s", line);
	fn(name, acquisitions);
	if (contentions) {
		snprintf(name, sizeof(name), "contended:%s", line);
		fn(name, contentions);
	}
}

static void locks_for_each(kernel_count_fn_t fn)
{
	char line[512];
	FILE *file;

	file = fopen("/proc/lock_stat", "r");
	if (!file)
		return;

	while (fgets(line, sizeof(line), file))
		lock_line(line, fn);
	fclose(file);
}

void kernel_counts_for_each(kernel_count_fn_t fn)
{
	u64 count;
	int i;

	for (i = 0; i < ARRAY_SIZE(counters); i++) {
		if (counter_read(&counters[i], &count))
			fn(counters[i].name, count);
	}
	locks_for_each(fn);
}
