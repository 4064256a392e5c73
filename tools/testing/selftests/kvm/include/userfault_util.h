/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Helpers for tests of KVM Userfault.
 *
 * The first half wraps the interface.  The second half is an agent: guest code
 * that performs one memory access after the other on behalf of the host, so
 * that a test reads as a list of accesses and of what each of them must do.
 */
#ifndef SELFTEST_KVM_USERFAULT_UTIL_H
#define SELFTEST_KVM_USERFAULT_UTIL_H

#include <linux/sizes.h>

#include "kvm_util.h"
#include "test_util.h"

/* The kernels that run this with every debug option on are slow. */
#define TEST_TIMEOUT_SECS	120

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
#define AGENT_MAX_VCPUS		4

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
struct kvm_vm *agent_create_vm(struct vm_shape shape, u32 nr_vcpus,
			       struct kvm_vcpu *vcpus[]);

void agent_request(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva, u64 arg);
enum agent_exit agent_run(struct kvm_vcpu *vcpu);
u64 agent_result(struct kvm_vcpu *vcpu);
u64 agent_finish(struct kvm_vcpu *vcpu);
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

/* Where a test's own memory is: above all of what the library puts in a VM. */
#define AGENT_GPA		SZ_4G
#define AGENT_SLOT		10

/* As much of it as a test needs that has no need for more. */
#define NR_PAGES		64

static inline gpa_t page_gpa(u64 page)
{
	return AGENT_GPA + page * getpagesize();
}

void *agent_add_memory(struct kvm_vm *vm, enum vm_mem_backing_src_type src,
		       gpa_t gpa, u32 slot, u64 nr_pages, u32 flags);
struct kvm_vm *agent_create_vm_with_memory(enum vm_mem_backing_src_type src,
					   u64 nr_pages, struct kvm_vcpu **vcpu);
bool has_hugetlb(u64 size, u64 nr);
bool is_thp(void *hva, u64 size);
void agent_map(struct kvm_vm *vm, gva_t gva, gpa_t gpa, u64 size);

#endif /* SELFTEST_KVM_USERFAULT_UTIL_H */
