/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Helpers for tests of KVM Userfault.
 *
 * First, wrappers of the interface.  Next, an agent: guest code that performs one
 * memory access after the other on behalf of the host, so that a test reads as a
 * list of accesses and of what each of them must do.  Last, threads for system
 * calls that wait for a page, and accesses by KVM itself for them to make.
 */
#ifndef SELFTEST_KVM_USERFAULT_UTIL_H
#define SELFTEST_KVM_USERFAULT_UTIL_H

#include <pthread.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/io_uring.h>
#include <linux/sizes.h>

#include "kvm_util.h"
#include "test_util.h"

/*
 * The kernels that run this with every debug option on are slow.  It is less than what
 * the settings grant the whole program, so that a test which hangs is named.
 */
#define TEST_TIMEOUT_SECS	60

#define userfault_test(fixture, name) \
	TEST_F_TIMEOUT(fixture, name, TEST_TIMEOUT_SECS)

#define USERFAULT_READ	(KVM_MEMORY_EXIT_FLAG_USERFAULT | KVM_MEMORY_EXIT_FLAG_READ)
#define USERFAULT_WRITE	(KVM_MEMORY_EXIT_FLAG_USERFAULT | KVM_MEMORY_EXIT_FLAG_WRITE)
#define USERFAULT_EXEC	(KVM_MEMORY_EXIT_FLAG_USERFAULT | KVM_MEMORY_EXIT_FLAG_EXEC)

static inline void vm_userfault_enable(struct kvm_vm *vm)
{
	vm_enable_cap(vm, KVM_CAP_USERFAULT, KVM_USERFAULT_ENABLE);
}

static inline void vm_userfault_disable(struct kvm_vm *vm)
{
	vm_enable_cap(vm, KVM_CAP_USERFAULT, KVM_USERFAULT_DISABLE);
}

static inline int __vm_change_attributes(struct kvm_vm *vm, gpa_t gpa, u64 size,
					 u64 attributes, u64 flags)
{
	struct kvm_memory_attributes attr = {
		.attributes = attributes,
		.address = gpa,
		.size = size,
		.flags = flags,
	};

	return __vm_ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &attr);
}

static inline void vm_change_attributes(struct kvm_vm *vm, gpa_t gpa, u64 size,
					u64 attributes, u64 flags)
{
	int ret = __vm_change_attributes(vm, gpa, size, attributes, flags);

	TEST_ASSERT_VM_VCPU_IOCTL(!ret, KVM_SET_MEMORY_ATTRIBUTES, ret, vm);
}

static inline void vm_userfault_arm(struct kvm_vm *vm, gpa_t gpa, u64 size)
{
	vm_change_attributes(vm, gpa, size, KVM_MEMORY_ATTRIBUTE_USERFAULT,
			     KVM_MEMORY_ATTRIBUTES_SET);
}

static inline void vm_userfault_clear(struct kvm_vm *vm, gpa_t gpa, u64 size)
{
	vm_change_attributes(vm, gpa, size, KVM_MEMORY_ATTRIBUTE_USERFAULT,
			     KVM_MEMORY_ATTRIBUTES_CLEAR);
}

/* Whether KVM_RUN, which returned @ret, reports a page to be filled. */
static inline bool vcpu_has_userfault(struct kvm_vcpu *vcpu, int ret)
{
	return ret == -1 && errno == EFAULT &&
	       vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
	       vcpu->run->memory_fault.flags & KVM_MEMORY_EXIT_FLAG_USERFAULT;
}

void vcpu_fail_run(struct kvm_vcpu *vcpu, int ret, const char *expected);
void vcpu_assert_userfault(struct kvm_vcpu *vcpu, gpa_t gpa, u64 flags);
void vcpu_run_expect_userfault(struct kvm_vcpu *vcpu, gpa_t gpa, u64 flags);

/* The agent serves at most this many vCPUs of a VM. */
#define AGENT_MAX_VCPUS		64

enum agent_op {
	AGENT_READ,	/* Return the word at @gva. */
	AGENT_WRITE,	/* Write @arg to the word at @gva. */
	AGENT_EXEC,	/* Call @gva with @arg, return what it returns. */
	AGENT_CHECK,	/* Return how many of @arg pages do not hold their content. */
	AGENT_SPIN,	/* Read the word at @gva until it is not @arg, return it. */
};

enum agent_exit {
	AGENT_DONE,		/* The access was performed. */
	AGENT_USERFAULT,	/* The access needs a page to be filled. */
	AGENT_OTHER,		/* Any other exit, in vcpu->run. */
};

void agent_guest_code(u32 vcpu_id);

/* Put a function at @hva, for AGENT_EXEC, that returns 3 * @arg + 1. */
void agent_put_code(void *hva);

struct kvm_vm *agent_create_vm(struct vm_shape shape, u32 nr_vcpus,
			       struct kvm_vcpu *vcpus[]);

void agent_request(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva, u64 arg);
enum agent_exit agent_run(struct kvm_vcpu *vcpu);
u64 agent_result(struct kvm_vcpu *vcpu);
u64 agent_finish(struct kvm_vcpu *vcpu);
bool agent_is_busy(struct kvm_vcpu *vcpu);
bool agent_is_spinning(struct kvm_vcpu *vcpu);

u64 agent_do(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva, u64 arg);
void agent_expect_userfault(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva,
			    u64 arg, gpa_t gpa, u64 flags);
void agent_expect_mmio(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva,
		       u64 arg, gpa_t gpa);
bool agent_probe(struct kvm_vcpu *vcpu, gva_t gva, gpa_t gpa, u64 flags);

u64 agent_page_content(gva_t gva);
void agent_fill(void *hva, gva_t gva, u64 nr_pages);
void agent_assert_content(void *hva, gva_t gva, u64 nr_pages);

#define MAX_SENT_FDS		128

void send_fds(int sock, int *fds, int nr);
void receive_fds(int sock, int *fds, int nr);

/* Where a test's own memory is: above all of what the library puts in a VM. */
#define AGENT_GPA		SZ_4G
#define AGENT_SLOT		10

/* As much of it as a test needs that has no need for more. */
#define NR_PAGES		64

static inline gpa_t page_gpa(u64 page)
{
	return AGENT_GPA + page * getpagesize();
}

/* Trace events: in a directory of tracefs, which is gone when it's removed. */
const char *trace_create(void);
void trace_remove(const char *dir);
FILE *trace_open(const char *dir, const char *name, const char *mode);
void trace_write(const char *dir, const char *name, int value);

void *agent_add_memory(struct kvm_vm *vm, enum vm_mem_backing_src_type src,
		       gpa_t gpa, u32 slot, u64 nr_pages, u32 flags);
struct kvm_vm *agent_create_vm_with_memory(enum vm_mem_backing_src_type src,
					   u64 nr_pages, struct kvm_vcpu **vcpu);
bool has_hugetlb(u64 size, u64 nr);
bool is_thp(void *hva, u64 size);
void agent_map(struct kvm_vm *vm, gva_t gva, gpa_t gpa, u64 size);

/*
 * The userfault file.
 */

int __vm_create_userfault_fd(struct kvm_vm *vm);
int vm_create_userfault_fd(struct kvm_vm *vm);

static inline int __userfault_resolve(int fd, gpa_t gpa, u64 size, u32 flags, int error)
{
	struct kvm_userfault_resolve resolve = {
		.gpa = gpa,
		.size = size,
		.flags = flags,
		.error = error,
	};

	return ioctl(fd, KVM_USERFAULT_RESOLVE, &resolve);
}

static inline void userfault_resolve(int fd, gpa_t gpa, u64 size, u32 flags, int error)
{
	int ret = __userfault_resolve(fd, gpa, size, flags, error);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_USERFAULT_RESOLVE, ret));
}

static inline void vm_userfault_enable_async(struct kvm_vm *vm, u64 flags)
{
	vm_enable_cap(vm, KVM_CAP_USERFAULT,
		      KVM_USERFAULT_ENABLE | KVM_USERFAULT_ASYNC | flags);
}

/* The bits of the pages from @gpa on, up to the end of the page that they are in. */
void *userfault_map_bitmap(int fd, gpa_t gpa);

static inline bool userfault_test_bit(u8 *bitmap, u64 page)
{
	return __atomic_load_n(&bitmap[page / 8], __ATOMIC_ACQUIRE) & BIT(page % 8);
}

static inline void userfault_set_bit(u8 *bitmap, u64 page)
{
	__atomic_fetch_or(&bitmap[page / 8], BIT(page % 8), __ATOMIC_SEQ_CST);
}

static inline void userfault_clear_bit(u8 *bitmap, u64 page)
{
	__atomic_fetch_and(&bitmap[page / 8], ~BIT(page % 8), __ATOMIC_RELEASE);
}

struct userfault_counts {
	unsigned int pending;
	unsigned int delivered;
	unsigned int waiting;
};

struct userfault_counts userfault_get_counts(int fd);
void userfault_wait_for_waiters(int fd, unsigned int nr);

/* All of these give up, i.e. fail the test, when it takes too long. */
struct kvm_userfault_event userfault_read(int fd);
struct kvm_userfault_event vm_userfault_read(struct kvm_vm *vm);
bool userfault_is_readable(int fd, int timeout_ms);

/*
 * Threads for what waits.
 */

/* Enough for anything that ends at all, on a slow machine with a slow kernel. */
#define USERFAULT_TIMEOUT_SECS	30

u64 userfault_now_ms(void);

/* Fail unless @cond becomes true soon. */
#define userfault_wait_until(cond)						\
do {										\
	u64 __end = userfault_now_ms() + USERFAULT_TIMEOUT_SECS * 1000;		\
										\
	while (!(cond)) {							\
		TEST_ASSERT(userfault_now_ms() < __end, "Never became true: " #cond);	\
		usleep(500);							\
	}									\
} while (0)

struct waiter {
	pthread_t thread;
	void (*fn)(void *arg);
	void *arg;
	pid_t tid;
	bool done;
};

void waiter_start(struct waiter *waiter, void (*fn)(void *arg), void *arg);
bool waiter_is_done(struct waiter *waiter);
void waiter_wait_asleep(struct waiter *waiter);
void waiter_assert_asleep(struct waiter *waiter);
void waiter_join(struct waiter *waiter);

/* KVM_RUN in a thread of its own, and how that ended. */
struct vcpu_call {
	struct kvm_vcpu *vcpu;
	int error;
	int ret;
};

void vcpu_call_run_fn(void *call);
char task_state(pid_t pid, pid_t tid);
bool task_is_asleep(pid_t pid, pid_t tid);

/* Wait for another process to get to where it tells. */
void tell(int sock);
void hear(int sock);

/* The least of io_uring that it takes to have one request at a time. */
struct ring {
	struct io_uring_params params;
	struct io_uring_sqe *sqes;
	void *mem;
	int fd;
};

/* Returns false if there is no io_uring. */
bool ring_create(struct ring *ring);
void ring_submit(struct ring *ring, u8 opcode, int fd, void *buf, u32 len, u32 events);
void ring_assert_waits(struct ring *ring);
s32 ring_result(struct ring *ring);

/*
 * A page that is armed, and without its content until it is filled.  That shows whether
 * anything reads the page, or writes to it, before.
 */
struct armed_page {
	gpa_t gpa;
	u8 *hva;
	u8 content[SZ_64K];
};

void armed_page_init(struct armed_page *page, struct kvm_vm *vm, gpa_t gpa);
void armed_page_assert_untouched(const struct armed_page *page);
void armed_page_fill(const struct armed_page *page, int fd);
void armed_page_expect_access(const struct armed_page *page, int fd,
			      struct waiter *waiter, u64 flags, u32 vcpu_id, u32 as_id);

/*
 * An access to guest memory that KVM does by itself: a read of the page of @gpa
 * that writes follow.  On arm64, a vCPU can do it for one gpa only.
 */
struct kvm_access {
	struct kvm_vcpu *vcpu;
	gpa_t gpa;
	struct waiter waiter;
	/* With which it failed, or 0.  For whoever has joined the waiter. */
	int error;
};

struct kvm_vm *kvm_access_create_vm(u32 nr_vcpus, struct kvm_vcpu *vcpus[]);
/* Returns the error with which it failed, or 0. */
int kvm_access_perform(struct kvm_vcpu *vcpu, gpa_t gpa);
void kvm_access_start(struct kvm_access *access, struct kvm_vcpu *vcpu, gpa_t gpa);
bool kvm_access_has_failed(void *hva);

#endif /* SELFTEST_KVM_USERFAULT_UTIL_H */
