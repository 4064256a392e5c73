/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kernel does while something is measured: trace events on all CPUs, by
 * perf, and lock acquisitions, by lockstat.  What the kernel was not configured
 * for is left out.
 */
#ifndef SELFTEST_KVM_KERNEL_COUNTS_H
#define SELFTEST_KVM_KERNEL_COUNTS_H

#include "kvm_util.h"

typedef void (*kernel_count_fn_t)(const char *name, u64 count);

void kernel_counts_init(void);
void kernel_counts_start(void);
void kernel_counts_stop(void);

/* Since they were started. */
void kernel_counts_for_each(kernel_count_fn_t fn);

#endif /* SELFTEST_KVM_KERNEL_COUNTS_H */
