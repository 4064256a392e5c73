// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault for vCPU faults: one function per rule.
 *
 * Guest memory holds a content that is derived from its address.  A page whose
 * content is missing holds something else, and the test puts the content there
 * only when KVM asks for it, so a page that KVM maps too early is seen by the
 * guest itself and not only by a counter.
 */
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/bitmap.h>
#include <linux/sizes.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "userfaultfd_util.h"

#define ONE_TIB			BIT_ULL(40)

/* One page of the bitmap: the pages that share it are a chunk. */
#define CHUNK_PAGES		(8ul * getpagesize())

/*
 * Touching memory that is mapped costs the guest a few exits at most, for
 * interrupts of the host.  Touching as many pages that are not mapped costs one
 * exit per page, or one per eight of them where KVM maps neighbours as well.
 */
#define MAX_NOISE_EXITS		32
#define NR_COUNTED_PAGES	512

static u64 page_size;

/* The number of exits that reading @nr_pages costs the guest. */
static u64 count_exits(struct kvm_vcpu *vcpu, gva_t gva, u64 nr_pages)
{
	u64 before;

	/* The agent itself must be mapped. */
	agent_do(vcpu, AGENT_CHECK, gva, 0);

	before = vcpu_get_stat(vcpu, exits);
	TEST_ASSERT_EQ(agent_do(vcpu, AGENT_CHECK, gva, nr_pages), 0);

	return vcpu_get_stat(vcpu, exits) - before;
}

static void assert_mapped(struct kvm_vcpu *vcpu, gva_t gva, u64 nr_pages)
{
	u64 exits = count_exits(vcpu, gva, nr_pages);

	TEST_ASSERT(exits <= MAX_NOISE_EXITS,
		    "%lu exits for %lu pages that must be mapped", exits, nr_pages);
}

static void assert_mapped_small(struct kvm_vcpu *vcpu, gva_t gva, u64 nr_pages)
{
	u64 exits = count_exits(vcpu, gva, nr_pages);

	TEST_ASSERT(exits > MAX_NOISE_EXITS,
		    "%lu exits for %lu pages that must be mapped one by one",
		    exits, nr_pages);
}

/*
 * The capability.
 */

FIXTURE(capability) {
	struct kvm_vm *vm;
};

FIXTURE_SETUP(capability)
{
	self->vm = vm_create_barebones();
}

FIXTURE_TEARDOWN(capability)
{
	kvm_vm_free(self->vm);
}

static int enable_cap(struct kvm_vm *vm, u32 flags, u64 arg0, u64 arg1, u64 arg2,
		      u64 arg3)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_USERFAULT,
		.flags = flags,
		.args = { arg0, arg1, arg2, arg3 },
	};

	return __vm_ioctl(vm, KVM_ENABLE_CAP, &cap);
}

static void assert_cap_invalid(struct kvm_vm *vm, u32 flags, u64 arg0, u64 arg1,
			       u64 arg2, u64 arg3)
{
	int ret = enable_cap(vm, flags, arg0, arg1, arg2, arg3);

	TEST_ASSERT(ret == -1 && errno == EINVAL,
		    "flags %#x, args %#lx %#lx %#lx %#lx: expected EINVAL, got %d (errno %d)",
		    flags, arg0, arg1, arg2, arg3, ret, errno);
}

static bool vm_has_userfault_attribute(struct kvm_vm *vm)
{
	return vm_check_cap(vm, KVM_CAP_MEMORY_ATTRIBUTES) &
	       KVM_MEMORY_ATTRIBUTE_USERFAULT;
}

userfault_test(capability, is_reported)
{
	u32 both = KVM_USERFAULT_ENABLE | KVM_USERFAULT_DISABLE;

	TEST_ASSERT_EQ(kvm_check_cap(KVM_CAP_USERFAULT) & both, both);
	TEST_ASSERT_EQ(vm_check_cap(self->vm, KVM_CAP_USERFAULT) & both, both);
	TEST_ASSERT(kvm_has_cap(KVM_CAP_MEMORY_FAULT_INFO),
		    "The exit of a userfault must be announced");
}

userfault_test(capability, refuses_bad_arguments)
{
	u64 known = vm_check_cap(self->vm, KVM_CAP_USERFAULT);
	u64 on = KVM_USERFAULT_ENABLE;
	u64 off = KVM_USERFAULT_DISABLE;
	int i;

	assert_cap_invalid(self->vm, 0, 0, 0, 0, 0);
	assert_cap_invalid(self->vm, 0, on | off, 0, 0, 0);

	for (i = 0; i < 64; i++) {
		if (known & BIT_ULL(i))
			continue;
		assert_cap_invalid(self->vm, 0, BIT_ULL(i), 0, 0, 0);
		assert_cap_invalid(self->vm, 0, on | BIT_ULL(i), 0, 0, 0);
		assert_cap_invalid(self->vm, 0, off | BIT_ULL(i), 0, 0, 0);
	}

	for (i = 0; i < 32; i++)
		assert_cap_invalid(self->vm, BIT(i), on, 0, 0, 0);

	assert_cap_invalid(self->vm, 0, on, 1, 0, 0);
	assert_cap_invalid(self->vm, 0, on, 0, 1, 0);
	assert_cap_invalid(self->vm, 0, on, 0, 0, 1);
	assert_cap_invalid(self->vm, 0, off, 1, 0, 0);
	assert_cap_invalid(self->vm, 0, off, 0, 1, 0);
	assert_cap_invalid(self->vm, 0, off, 0, 0, 1);

	TEST_ASSERT(!vm_has_userfault_attribute(self->vm),
		    "A refused KVM_ENABLE_CAP enabled userfault");
}

/* What is refused must not disable it either. */
userfault_test(capability, refuses_bad_arguments_while_enabled)
{
	vm_userfault_enable(self->vm);

	assert_cap_invalid(self->vm, 0, 0, 0, 0, 0);
	assert_cap_invalid(self->vm, 0, KVM_USERFAULT_ENABLE | KVM_USERFAULT_DISABLE,
			   0, 0, 0);
	assert_cap_invalid(self->vm, 1, KVM_USERFAULT_DISABLE, 0, 0, 0);
	assert_cap_invalid(self->vm, 0, KVM_USERFAULT_DISABLE, 0, 0, 1);

	TEST_ASSERT(vm_has_userfault_attribute(self->vm),
		    "A refused KVM_ENABLE_CAP disabled userfault");
}

userfault_test(capability, enables_once)
{
	int ret;

	vm_userfault_enable(self->vm);
	ret = enable_cap(self->vm, 0, KVM_USERFAULT_ENABLE, 0, 0, 0);
	TEST_ASSERT(ret == -1 && errno == EEXIST,
		    "Enabled already: expected EEXIST, got %d (errno %d)", ret, errno);
	TEST_ASSERT(vm_has_userfault_attribute(self->vm),
		    "Enabling twice disabled userfault");

	vm_userfault_disable(self->vm);
	vm_userfault_enable(self->vm);
}

userfault_test(capability, disables_any_time)
{
	vm_userfault_disable(self->vm);
	vm_userfault_enable(self->vm);
	vm_userfault_disable(self->vm);
	vm_userfault_disable(self->vm);
}

userfault_test(capability, shows_the_attribute_while_enabled)
{
	u64 before = vm_check_cap(self->vm, KVM_CAP_MEMORY_ATTRIBUTES);

	TEST_ASSERT(!(kvm_check_cap(KVM_CAP_MEMORY_ATTRIBUTES) &
		      KVM_MEMORY_ATTRIBUTE_USERFAULT),
		    "/dev/kvm must not report what has to be enabled");
	TEST_ASSERT_EQ(before & KVM_MEMORY_ATTRIBUTE_USERFAULT, 0);

	vm_userfault_enable(self->vm);
	TEST_ASSERT_EQ(vm_check_cap(self->vm, KVM_CAP_MEMORY_ATTRIBUTES),
		       before | KVM_MEMORY_ATTRIBUTE_USERFAULT);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(vm_check_cap(self->vm, KVM_CAP_MEMORY_ATTRIBUTES), before);
}

/* Run @fn in a process that has the VM's file, but not its memory. */
static int errno_in_other_process(struct kvm_vm *vm, int (*fn)(struct kvm_vm *vm))
{
	int status;
	pid_t pid;

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed, errno %d", errno);
	if (!pid)
		_exit(fn(vm) ? errno : 0);

	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(WIFEXITED(status), "The other process died, status %#x", status);

	return WEXITSTATUS(status);
}

static int try_enable(struct kvm_vm *vm)
{
	return enable_cap(vm, 0, KVM_USERFAULT_ENABLE, 0, 0, 0);
}

static int try_arm(struct kvm_vm *vm)
{
	return __vm_change_attributes(vm, AGENT_GPA, page_size,
				      KVM_MEMORY_ATTRIBUTE_USERFAULT,
				      KVM_MEMORY_ATTRIBUTES_SET);
}

userfault_test(capability, belongs_to_the_process_of_the_vm)
{
	TEST_ASSERT_EQ(errno_in_other_process(self->vm, try_enable), EIO);
	TEST_ASSERT(!vm_has_userfault_attribute(self->vm),
		    "Another process enabled userfault");

	vm_userfault_enable(self->vm);
	TEST_ASSERT_EQ(errno_in_other_process(self->vm, try_arm), EIO);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 0);
}

/*
 * The attribute.
 */

FIXTURE(userfault) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
};

FIXTURE_SETUP(userfault)
{
	self->vm = agent_create_vm_with_memory(VM_MEM_SRC_ANONYMOUS, NR_PAGES,
					       &self->vcpu);
	self->hva = memslot2region(self->vm, AGENT_SLOT)->host_mem;
}

FIXTURE_TEARDOWN(userfault)
{
	kvm_vm_free(self->vm);
}

static void assert_attributes_invalid(struct kvm_vm *vm, gpa_t gpa, u64 size,
				      u64 attributes, u64 flags)
{
	int ret = __vm_change_attributes(vm, gpa, size, attributes, flags);

	TEST_ASSERT(ret == -1 && errno == EINVAL,
		    "gpa %#lx, size %#lx, attributes %#lx, flags %#lx: expected EINVAL, got %d (errno %d)",
		    gpa, size, attributes, flags, ret, errno);
}

/* Ranges are checked whatever is done to them, also when that is nothing. */
static void assert_ranges_invalid(struct kvm_vm *vm, u64 attributes, u64 flags)
{
	assert_attributes_invalid(vm, AGENT_GPA, 0, attributes, flags);
	assert_attributes_invalid(vm, AGENT_GPA + 1, page_size, attributes, flags);
	assert_attributes_invalid(vm, AGENT_GPA, page_size + 1, attributes, flags);
	assert_attributes_invalid(vm, AGENT_GPA, page_size / 2, attributes, flags);
	assert_attributes_invalid(vm, -page_size, page_size, attributes, flags);
	assert_attributes_invalid(vm, -page_size, 2 * page_size, attributes, flags);
	assert_attributes_invalid(vm, AGENT_GPA, -page_size, attributes, flags);
}

static void assert_attribute_calls_invalid(struct kvm_vm *vm)
{
	u64 supported = vm_check_cap(vm, KVM_CAP_MEMORY_ATTRIBUTES);
	u64 flags[] = { 0, KVM_MEMORY_ATTRIBUTES_SET, KVM_MEMORY_ATTRIBUTES_CLEAR };
	u64 both = KVM_MEMORY_ATTRIBUTES_SET | KVM_MEMORY_ATTRIBUTES_CLEAR;
	u64 userfault = KVM_MEMORY_ATTRIBUTE_USERFAULT;
	int i, j;

	for (i = 0; i < ARRAY_SIZE(flags); i++) {
		assert_ranges_invalid(vm, userfault & supported, flags[i]);
		assert_ranges_invalid(vm, 0, flags[i]);

		for (j = 0; j < 64; j++) {
			if (supported & BIT_ULL(j))
				continue;
			assert_attributes_invalid(vm, AGENT_GPA, page_size,
						  BIT_ULL(j), flags[i]);
			assert_attributes_invalid(vm, AGENT_GPA, page_size,
						  supported | BIT_ULL(j), flags[i]);
		}
	}

	assert_attributes_invalid(vm, AGENT_GPA, page_size, userfault, both);
	assert_attributes_invalid(vm, AGENT_GPA, page_size, 0, both);
	for (i = 2; i < 64; i++) {
		assert_attributes_invalid(vm, AGENT_GPA, page_size, userfault,
					  BIT_ULL(i));
		assert_attributes_invalid(vm, AGENT_GPA, page_size, 0, BIT_ULL(i));
	}
}

userfault_test(userfault, bad_attribute_calls_are_refused)
{
	assert_attribute_calls_invalid(self->vm);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 0);
}

userfault_test(userfault, bad_attribute_calls_clear_nothing)
{
	vm_userfault_arm(self->vm, page_gpa(0), page_size);
	assert_attribute_calls_invalid(self->vm);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(0), page_gpa(0), USERFAULT_READ),
		    "A refused call cleared a page");
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

/* The attribute is one that is not supported while userfault is off. */
userfault_test(userfault, attribute_needs_the_capability)
{
	vm_userfault_disable(self->vm);
	assert_attribute_calls_invalid(self->vm);

	vm_userfault_enable(self->vm);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

userfault_test(userfault, deltas_of_nothing_change_nothing)
{
	vm_userfault_arm(self->vm, page_gpa(1), page_size);
	vm_change_attributes(self->vm, AGENT_GPA, NR_PAGES * page_size, 0,
			     KVM_MEMORY_ATTRIBUTES_SET);
	vm_change_attributes(self->vm, AGENT_GPA, NR_PAGES * page_size, 0,
			     KVM_MEMORY_ATTRIBUTES_CLEAR);

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, 1), 0);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(1), page_gpa(1), USERFAULT_READ),
		    "A delta of no attributes cleared a page");
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

userfault_test(userfault, replacing_arms_and_clears)
{
	vm_change_attributes(self->vm, page_gpa(0), 2 * page_size,
			     KVM_MEMORY_ATTRIBUTE_USERFAULT, 0);
	vm_change_attributes(self->vm, page_gpa(1), page_size, 0, 0);

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(1), NR_PAGES - 1), 0);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(0), page_gpa(0), USERFAULT_READ),
		    "Replacing the attributes of one page cleared another one");
}

userfault_test(userfault, arming_and_clearing_can_be_repeated)
{
	int i;

	for (i = 0; i < 3; i++) {
		vm_userfault_arm(self->vm, page_gpa(0), page_size);
		vm_userfault_arm(self->vm, page_gpa(0), 2 * page_size);
		vm_userfault_clear(self->vm, page_gpa(1), page_size);
		vm_userfault_clear(self->vm, page_gpa(1), page_size);

		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(1), 2), 0);
		TEST_ASSERT(agent_probe(self->vcpu, page_gpa(0), page_gpa(0),
					USERFAULT_READ),
			    "Armed twice, a page is not armed");
	}
}

/*
 * Pages share words of the bitmap, but not their fate: one thread changes every
 * other page while another one changes those in between.  Each goes to and fro
 * for a while, so that one is likely to be at it when the other one has its last
 * go, and there are several rounds.
 */
#define NR_ROUNDS	4
#define NR_PASSES	51

struct changer {
	struct kvm_vm *vm;
	pthread_barrier_t *barrier;
	u64 first_page;
	/* What happens first and last, the other one happens in between. */
	u64 flags;
};

static void *changer_thread(void *arg)
{
	u64 both = KVM_MEMORY_ATTRIBUTES_SET | KVM_MEMORY_ATTRIBUTES_CLEAR;
	struct changer *changer = arg;
	u64 flags, page;
	int i;

	pthread_barrier_wait(changer->barrier);
	for (i = 0; i < NR_PASSES; i++) {
		flags = i & 1 ? changer->flags ^ both : changer->flags;
		for (page = changer->first_page; page < NR_PAGES; page += 2)
			vm_change_attributes(changer->vm, page_gpa(page), page_size,
					     KVM_MEMORY_ATTRIBUTE_USERFAULT, flags);
	}

	return NULL;
}

static void change_concurrently(struct kvm_vm *vm, u64 even_flags, u64 odd_flags)
{
	pthread_barrier_t barrier;
	struct changer changers[] = {
		{ vm, &barrier, 0, even_flags },
		{ vm, &barrier, 1, odd_flags },
	};
	pthread_t threads[ARRAY_SIZE(changers)];
	int i;

	pthread_barrier_init(&barrier, NULL, ARRAY_SIZE(changers));
	for (i = 0; i < ARRAY_SIZE(changers); i++)
		kvm_pthread_create(&threads[i], NULL, changer_thread, &changers[i]);
	for (i = 0; i < ARRAY_SIZE(changers); i++)
		kvm_pthread_join(threads[i], NULL);
	pthread_barrier_destroy(&barrier);
}

userfault_test(userfault, concurrent_changes_are_not_lost)
{
	u64 set = KVM_MEMORY_ATTRIBUTES_SET;
	u64 clear = KVM_MEMORY_ATTRIBUTES_CLEAR;
	u64 page;
	int i;

	for (i = 0; i < NR_ROUNDS; i++) {
		vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
		change_concurrently(self->vm, clear, clear);
		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);

		for (page = 1; page < NR_PAGES; page += 2)
			vm_userfault_arm(self->vm, page_gpa(page), page_size);
		change_concurrently(self->vm, set, clear);
		for (page = 0; page < NR_PAGES; page++)
			TEST_ASSERT(agent_probe(self->vcpu, page_gpa(page),
						page_gpa(page), USERFAULT_READ) ==
				    !(page & 1),
				    "Page %lu did not get what was done to it", page);
	}
}

/*
 * What is armed: bits, words and chunks of the bitmap have edges.
 */

FIXTURE(edges) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	gpa_t edge;
	gpa_t gpa;
	u64 chunk;
};

FIXTURE_VARIANT(edges) {
	gpa_t gpa;
};

FIXTURE_VARIANT_ADD(edges, low) {
	.gpa = AGENT_GPA,
};

/* KVM finds the bits of lower pages in another way than those of higher ones. */
FIXTURE_VARIANT_ADD(edges, high) {
	.gpa = 16 * AGENT_GPA,
};

/* 128 pages on each side of the edge between two chunks, 64 bits to a word. */
#define EDGE_PAGES	256
#define EDGE_MARGIN	3

FIXTURE_SETUP(edges)
{
	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);

	self->chunk = CHUNK_PAGES * page_size;
	self->edge = round_up(AGENT_GPA + self->chunk, self->chunk);
	if (self->edge < variant->gpa)
		self->edge = variant->gpa;
	self->gpa = self->edge - EDGE_PAGES / 2 * page_size;
	if (self->edge + 2 * self->chunk > self->vm->max_gfn << self->vm->page_shift)
		SKIP(return, "A guest can't have memory at %#lx", self->edge);

	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, self->gpa, AGENT_SLOT,
			 EDGE_PAGES, 0);
	vm_userfault_enable(self->vm);
}

FIXTURE_TEARDOWN(edges)
{
	kvm_vm_free(self->vm);
}

static const struct {
	int first;
	int nr;
} edges[] = {
	{ 64, 1 }, { 63, 1 }, { 63, 2 }, { 64, 64 }, { 63, 66 }, { 65, 62 }, { 60, 8 },
	{ 127, 1 }, { 128, 1 }, { 127, 2 }, { 64, 128 }, { 63, 130 }, { 65, 126 },
	{ 100, 29 }, { 128, 64 }, { 128, 65 }, { 40, 170 },
};

/* Read the pages around one end of a range: inside it armed, outside not. */
static void assert_edge(struct kvm_vcpu *vcpu, gpa_t base, int page, int first,
			int last, bool armed_inside)
{
	int i;

	for (i = page - EDGE_MARGIN; i <= page + EDGE_MARGIN; i++) {
		gpa_t gpa = base + i * page_size;
		bool inside = i >= first && i <= last;
		bool armed = agent_probe(vcpu, gpa, gpa, USERFAULT_READ);

		TEST_ASSERT(armed == (inside == armed_inside),
			    "Range %d-%d: page %d is%s armed", first, last, i,
			    armed ? "" : " not");
	}
}

userfault_test(edges, arming_is_exact)
{
	int first, last, i;

	for (i = 0; i < ARRAY_SIZE(edges); i++) {
		first = edges[i].first;
		last = first + edges[i].nr - 1;

		vm_userfault_clear(self->vm, self->gpa, EDGE_PAGES * page_size);
		vm_userfault_arm(self->vm, self->gpa + first * page_size,
				 edges[i].nr * page_size);
		assert_edge(self->vcpu, self->gpa, first, first, last, true);

		/* Probing clears, and the ends may be near to each other. */
		vm_userfault_clear(self->vm, self->gpa, EDGE_PAGES * page_size);
		vm_userfault_arm(self->vm, self->gpa + first * page_size,
				 edges[i].nr * page_size);
		assert_edge(self->vcpu, self->gpa, last, first, last, true);
	}
}

userfault_test(edges, clearing_is_exact)
{
	int first, last, i;

	for (i = 0; i < ARRAY_SIZE(edges); i++) {
		first = edges[i].first;
		last = first + edges[i].nr - 1;

		vm_userfault_arm(self->vm, self->gpa, EDGE_PAGES * page_size);
		vm_userfault_clear(self->vm, self->gpa + first * page_size,
				   edges[i].nr * page_size);
		assert_edge(self->vcpu, self->gpa, first, first, last, false);

		vm_userfault_arm(self->vm, self->gpa, EDGE_PAGES * page_size);
		vm_userfault_clear(self->vm, self->gpa + first * page_size,
				   edges[i].nr * page_size);
		assert_edge(self->vcpu, self->gpa, last, first, last, false);
	}
}

/* A whole chunk with a page on each side, as a range that has memory at its ends only. */
userfault_test(edges, whole_chunks_are_armed_and_cleared)
{
	gpa_t second = self->gpa + self->chunk;
	int first = EDGE_PAGES / 2 - 1;
	int last = first + CHUNK_PAGES + 1;

	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, second, AGENT_SLOT + 1,
			 EDGE_PAGES, 0);

	vm_userfault_arm(self->vm, self->edge - page_size, self->chunk + 2 * page_size);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 3);
	assert_edge(self->vcpu, self->gpa, first, first, last, true);
	assert_edge(self->vcpu, self->gpa, last, first, last, true);

	vm_userfault_arm(self->vm, self->edge - self->chunk, 3 * self->chunk);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 3);
	vm_userfault_clear(self->vm, self->edge - page_size, self->chunk + 2 * page_size);
	assert_edge(self->vcpu, self->gpa, first, first, last, false);
	assert_edge(self->vcpu, self->gpa, last, first, last, false);
}

/* What was never armed costs nothing, and clearing it does not either. */
userfault_test(edges, memory_is_used_by_what_is_armed)
{
	vm_userfault_clear(self->vm, self->edge - self->chunk, 64 * self->chunk);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 0);

	vm_userfault_arm(self->vm, self->edge - page_size, page_size);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 1);
	vm_userfault_arm(self->vm, self->edge, page_size);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 2);
	vm_userfault_arm(self->vm, self->edge - self->chunk, 2 * self->chunk);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 2);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 0);
}

/*
 * Arming 1 TiB takes a second at most, which kernels with debug options may well
 * exceed: for them, it is compared with what it takes to populate as much memory as
 * the bitmap has.  The machine may be busy with something else, so it is the time of
 * this thread that counts, and one good try of several.
 */
#define NR_TRIES	5

static u64 cpu_time_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return timespec_to_ns(now);
}

static u64 time_populating(u64 nr)
{
	void *mem = kvm_mmap(nr * page_size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1);
	u64 start;

	/* Which fails if there are none. */
	madvise(mem, nr * page_size, MADV_NOHUGEPAGE);

	start = cpu_time_ns();
	TEST_ASSERT(!madvise(mem, nr * page_size, MADV_POPULATE_WRITE),
		    "madvise() failed, errno %d", errno);
	start = cpu_time_ns() - start;

	kvm_munmap(mem, nr * page_size);
	return start;
}

static u64 cpu_time_limit_ns(u64 nr_bitmap_pages)
{
	u64 reference = time_populating(nr_bitmap_pages);

	ksft_print_msg("As many pages as the bitmap has: populated in %lu ms of CPU time\n",
		       reference / 1000000);
	return max((u64)NSEC_PER_SEC, 5 * reference);
}

/* Change the userfault attribute of 1 TiB, and return how long that took. */
static u64 time_one_tib(struct kvm_vm *vm, u64 attributes, u64 flags)
{
	u64 start = cpu_time_ns();

	vm_change_attributes(vm, AGENT_GPA, ONE_TIB, attributes, flags);
	return cpu_time_ns() - start;
}

/* Far above all memory, as a VMM does that arms the whole of a big guest. */
static void assert_one_tib_is_cheap(struct kvm_vcpu *vcpu, u64 set_flags, u64 clear_flags,
				    u64 clear_attributes)
{
	u64 nr_bitmap_pages = ONE_TIB / page_size / CHUNK_PAGES;
	gpa_t last = page_gpa(NR_PAGES - 1);
	u64 best_armed = -1, best_cleared = -1;
	u64 limit = cpu_time_limit_ns(nr_bitmap_pages);
	struct kvm_vm *vm = vcpu->vm;
	int i;

	for (i = 0; i < NR_TRIES && max(best_armed, best_cleared) >= limit; i++) {
		best_armed = min(best_armed,
				 time_one_tib(vm, KVM_MEMORY_ATTRIBUTE_USERFAULT, set_flags));
		TEST_ASSERT_EQ(vm_get_stat(vm, userfault_bitmap_pages), nr_bitmap_pages);
		TEST_ASSERT(agent_probe(vcpu, last, last, USERFAULT_READ),
			    "Memory inside what was armed is not armed");

		best_cleared = min(best_cleared,
				   time_one_tib(vm, clear_attributes, clear_flags));
		TEST_ASSERT_EQ(agent_do(vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);

		vm_userfault_disable(vm);
		TEST_ASSERT_EQ(vm_get_stat(vm, userfault_bitmap_pages), 0);
		vm_userfault_enable(vm);
	}

	ksft_print_msg("1 TiB: armed in %lu ms, cleared in %lu ms of CPU time, %lu KiB\n",
		       best_armed / 1000000, best_cleared / 1000000,
		       nr_bitmap_pages * page_size / SZ_1K);

	TEST_ASSERT(best_armed < limit, "Arming took %lu ns", best_armed);
	TEST_ASSERT(best_cleared < limit, "Clearing took %lu ns", best_cleared);
}

userfault_test(userfault, one_tib_is_cheap)
{
	assert_one_tib_is_cheap(self->vcpu, KVM_MEMORY_ATTRIBUTES_SET,
				KVM_MEMORY_ATTRIBUTES_CLEAR,
				KVM_MEMORY_ATTRIBUTE_USERFAULT);
}

/* Nor is it dearer to replace attributes of which no other is in use. */
userfault_test(userfault, one_tib_is_cheap_to_replace)
{
	assert_one_tib_is_cheap(self->vcpu, 0, 0, 0);
}

/*
 * The exit, for each kind of memory.
 */

FIXTURE(memory) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
	u64 nr_pages;
};

FIXTURE_VARIANT(memory) {
	enum vm_mem_backing_src_type src;
};

FIXTURE_VARIANT_ADD(memory, anonymous) {
	.src = VM_MEM_SRC_ANONYMOUS,
};

FIXTURE_VARIANT_ADD(memory, thp) {
	.src = VM_MEM_SRC_ANONYMOUS_THP,
};

FIXTURE_VARIANT_ADD(memory, hugetlb) {
	.src = VM_MEM_SRC_ANONYMOUS_HUGETLB_2MB,
};

FIXTURE_VARIANT_ADD(memory, shmem) {
	.src = VM_MEM_SRC_SHMEM,
};

FIXTURE_VARIANT_ADD(memory, guest_memfd) {
	.src = VM_MEM_SRC_GUEST_MEMFD,
};

FIXTURE_SETUP(memory)
{
	self->nr_pages = 2 * SZ_2M / page_size;

	if (variant->src == VM_MEM_SRC_ANONYMOUS_HUGETLB_2MB && !has_hugetlb(SZ_2M, 2))
		SKIP(return, "4 MiB of reserved 2 MiB pages are needed");
	if (variant->src == VM_MEM_SRC_ANONYMOUS_THP && !thp_configured())
		SKIP(return, "There are no transparent huge pages");
	if (variant->src == VM_MEM_SRC_GUEST_MEMFD && !kvm_has_mappable_guest_memfd())
		SKIP(return, "There is no guest_memfd that can be mapped");

	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);
	self->hva = agent_add_memory(self->vm, variant->src, AGENT_GPA, AGENT_SLOT,
				     self->nr_pages, 0);
	if (variant->src == VM_MEM_SRC_ANONYMOUS_THP &&
	    !is_thp(self->hva, self->nr_pages * page_size))
		SKIP(return, "The host gave no transparent huge pages");

	vm_userfault_enable(self->vm);
}

FIXTURE_TEARDOWN(memory)
{
	kvm_vm_free(self->vm);
}

/* Each kind of access, each of them to a page of its own, is reported as such. */
static void assert_every_access_is_reported(struct kvm_vcpu *vcpu, void *hva)
{
	u64 val = 0x1122334455667788;
	u64 *word = hva + page_size;

	vm_userfault_arm(vcpu->vm, page_gpa(0), 3 * page_size);

	agent_expect_userfault(vcpu, AGENT_READ, page_gpa(0), 0, page_gpa(0),
			       USERFAULT_READ);
	vm_userfault_clear(vcpu->vm, page_gpa(0), page_size);
	TEST_ASSERT_EQ(agent_finish(vcpu), agent_page_content(page_gpa(0)));

	agent_expect_userfault(vcpu, AGENT_WRITE, page_gpa(1), val, page_gpa(1),
			       USERFAULT_WRITE);
	TEST_ASSERT_EQ(READ_ONCE(*word), agent_page_content(page_gpa(1)));
	vm_userfault_clear(vcpu->vm, page_gpa(1), page_size);
	agent_finish(vcpu);
	TEST_ASSERT_EQ(READ_ONCE(*word), val);

	agent_expect_userfault(vcpu, AGENT_EXEC, page_gpa(2), 11, page_gpa(2),
			       USERFAULT_EXEC);
	agent_put_code(hva + 2 * page_size);
	vm_userfault_clear(vcpu->vm, page_gpa(2), page_size);
	TEST_ASSERT_EQ(agent_finish(vcpu), 34);
}

userfault_test(memory, every_access_is_reported)
{
	assert_every_access_is_reported(self->vcpu, self->hva);
}

/* The same once it is mapped: arming must take it away again. */
userfault_test(memory, every_access_is_reported_once_mapped)
{
	agent_put_code(self->hva + 2 * page_size);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(0), 2), 0);
	agent_do(self->vcpu, AGENT_WRITE, page_gpa(1), agent_page_content(page_gpa(1)));
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_EXEC, page_gpa(2), 1), 4);

	assert_every_access_is_reported(self->vcpu, self->hva);
}

/* The content that arrives after the exit is what the guest gets to see. */
userfault_test(memory, guest_sees_what_was_filled)
{
	u64 i;

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, self->nr_pages), 0);
	vm_userfault_arm(self->vm, AGENT_GPA, self->nr_pages * page_size);
	memset(self->hva, 0xdb, self->nr_pages * page_size);

	agent_request(self->vcpu, AGENT_CHECK, AGENT_GPA, self->nr_pages);
	for (i = 0; i < self->nr_pages; i++) {
		vcpu_run_expect_userfault(self->vcpu, page_gpa(i), USERFAULT_READ);
		agent_fill(self->hva + i * page_size, page_gpa(i), 1);
		vm_userfault_clear(self->vm, page_gpa(i), page_size);
	}
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
}

userfault_test(memory, first_and_last_page_of_a_slot)
{
	u64 last = self->nr_pages - 1;

	vm_userfault_arm(self->vm, page_gpa(0), page_size);
	vm_userfault_arm(self->vm, page_gpa(last), page_size);

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(1), last - 1), 0);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(0), page_gpa(0), USERFAULT_READ),
		    "The first page of the slot is not armed");
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(last), page_gpa(last),
				USERFAULT_READ),
		    "The last page of the slot is not armed");
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, self->nr_pages), 0);
}

/*
 * One page in the middle of what is mapped.  The page that is armed sits in the
 * second half, so the first half has no reason to fault again, nor has anything
 * else where there are no blocks.
 */
userfault_test(memory, neighbours_stay_mapped_and_intact)
{
	u64 half = self->nr_pages / 2;
	u64 page = half + 7;

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, self->nr_pages), 0);
	vm_userfault_arm(self->vm, page_gpa(page), page_size);
	memset(self->hva + page * page_size, 0xdb, page_size);

	assert_mapped(self->vcpu, AGENT_GPA, half);
	if (!backing_src_can_be_huge(variant->src))
		assert_mapped(self->vcpu, page_gpa(page + 1), self->nr_pages - page - 1);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(half), 7), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(page + 1),
				self->nr_pages - page - 1), 0);

	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(page), 0,
			       page_gpa(page), USERFAULT_READ);
	agent_fill(self->hva + page * page_size, page_gpa(page), 1);
	vm_userfault_clear(self->vm, page_gpa(page), page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(page)));

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, self->nr_pages), 0);
	agent_assert_content(self->hva, AGENT_GPA, self->nr_pages);
}

/* For memory of each kind: not all of it can have huge mappings to recover. */
userfault_test(memory, disabling_gives_back_all_of_it)
{
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, self->nr_pages), 0);
	vm_userfault_arm(self->vm, page_gpa(3), page_size);
	vm_userfault_disable(self->vm);

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, self->nr_pages), 0);
}

/*
 * Every other page, where KVM may map the neighbours of a page that faults,
 * alone or as a block.  The first sweep makes the guest mark the pages accessed,
 * without which neighbours are not mapped.
 */
userfault_test(memory, neighbours_are_not_mapped_along)
{
	u64 nr = NR_PAGES;
	u64 i;

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, nr), 0);
	vm_userfault_arm(self->vm, AGENT_GPA, nr * page_size);
	for (i = 0; i < nr; i += 2)
		vm_userfault_clear(self->vm, page_gpa(i), page_size);

	for (i = 0; i < nr; i += 2)
		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(i), 1), 0);
	for (i = 1; i < nr; i += 2)
		TEST_ASSERT(agent_probe(self->vcpu, page_gpa(i), page_gpa(i),
					USERFAULT_READ),
			    "Page %lu was mapped along with a neighbour", i);
}

/* A vCPU that is in the guest when a page is armed must not go on using it. */
struct spinner {
	struct kvm_vcpu *vcpu;
	enum agent_exit exit;
	atomic_bool done;
};

static void *spinner_thread(void *arg)
{
	struct spinner *spinner = arg;

	spinner->exit = agent_run(spinner->vcpu);
	atomic_store(&spinner->done, true);

	return NULL;
}

userfault_test(memory, arming_stops_a_running_vcpu)
{
	struct spinner spinner = { .vcpu = self->vcpu };
	u64 initial = agent_page_content(AGENT_GPA);
	u64 *word = self->hva;
	pthread_t thread;

	agent_request(self->vcpu, AGENT_SPIN, AGENT_GPA, initial);
	kvm_pthread_create(&thread, NULL, spinner_thread, &spinner);
	while (!agent_is_spinning(self->vcpu) && !atomic_load(&spinner.done))
		sched_yield();
	TEST_ASSERT(!atomic_load(&spinner.done), "KVM_RUN returned before the page was armed");

	/* What is written once the ioctl has returned is seen by nobody. */
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	WRITE_ONCE(*word, 0xdbdbdbdb);

	kvm_pthread_join(thread, NULL);
	TEST_ASSERT_EQ(spinner.exit, AGENT_USERFAULT);
	vcpu_assert_userfault(self->vcpu, AGENT_GPA, USERFAULT_READ);

	WRITE_ONCE(*word, 0x600d);
	vm_userfault_clear(self->vm, AGENT_GPA, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0x600d);
}

/*
 * More about the exit.
 */

/* The address is that of the page, wherever in it the access was. */
userfault_test(userfault, address_is_that_of_the_page)
{
	gpa_t gpa = page_gpa(5);

	vm_userfault_arm(self->vm, gpa, page_size);
	agent_expect_userfault(self->vcpu, AGENT_READ, gpa + page_size - 8, 0, gpa,
			       USERFAULT_READ);
	vm_userfault_clear(self->vm, gpa, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(gpa));
}

/* An access to two pages needs the one that is armed, here the second. */
userfault_test(userfault, access_to_two_pages)
{
	gpa_t gpa = page_gpa(6);
	u64 first = agent_page_content(page_gpa(5)) >> 32;
	u64 second = agent_page_content(gpa) << 32;

	vm_userfault_arm(self->vm, gpa, page_size);
	agent_expect_userfault(self->vcpu, AGENT_READ, gpa - 4, 0, gpa, USERFAULT_READ);
	vm_userfault_clear(self->vm, gpa, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), first | second);
}

/* Until the page is cleared, running again does nothing but exit again. */
userfault_test(userfault, exit_repeats_until_cleared)
{
	u64 before = vcpu_get_stat(self->vcpu, userfault_exits);
	u64 *word = self->hva;
	int i;

	vm_userfault_arm(self->vm, page_gpa(0), page_size);
	agent_request(self->vcpu, AGENT_WRITE, page_gpa(0), 1);
	for (i = 0; i < 5; i++)
		vcpu_run_expect_userfault(self->vcpu, page_gpa(0), USERFAULT_WRITE);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits) - before, 5);
	TEST_ASSERT_EQ(READ_ONCE(*word), agent_page_content(page_gpa(0)));

	vm_userfault_clear(self->vm, page_gpa(0), page_size);
	agent_finish(self->vcpu);
	TEST_ASSERT_EQ(READ_ONCE(*word), 1);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits) - before, 5);
}

/* There is no memory at @gpa that KVM could get. */
static void run_expect_no_memory(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	int ret = _vcpu_run(vcpu);

	TEST_ASSERT(ret == -1 && errno == EFAULT, KVM_IOCTL_ERROR(KVM_RUN, ret));
#ifdef __x86_64__
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_UNKNOWN);
#else
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.flags, 0);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.gpa, gpa);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.size, page_size);
#endif
}

/*
 * Memory that KVM cannot get is another matter, which on arm64 has an exit that
 * names the page, and which has none of the bits that go with a userfault.
 * Armed, it is a userfault first.
 */
userfault_test(userfault, other_exits_are_unchanged)
{
	struct kvm_vcpu *vcpu = self->vcpu;
	gpa_t gpa = page_gpa(4);

	TEST_ASSERT_EQ(mprotect(self->hva + 4 * page_size, page_size, PROT_NONE), 0);
	vm_userfault_arm(self->vm, gpa, page_size);

	agent_expect_userfault(vcpu, AGENT_READ, gpa, 0, gpa, USERFAULT_READ);
	vm_userfault_clear(self->vm, gpa, page_size);
	run_expect_no_memory(vcpu, gpa);

	TEST_ASSERT_EQ(mprotect(self->hva + 4 * page_size, page_size,
				PROT_READ | PROT_WRITE), 0);
	TEST_ASSERT_EQ(agent_finish(vcpu), agent_page_content(gpa));
}

/* Nor is a hole in the address space of the VMM a userfault, unless it is armed. */
userfault_test(userfault, other_exits_without_a_mapping)
{
	void *hva = self->hva + 4 * page_size;
	struct kvm_vcpu *vcpu = self->vcpu;
	gpa_t gpa = page_gpa(4);

	kvm_munmap(hva, page_size);
	vm_userfault_arm(self->vm, gpa, page_size);
	agent_expect_userfault(vcpu, AGENT_READ, gpa, 0, gpa, USERFAULT_READ);
	vm_userfault_clear(self->vm, gpa, page_size);
	run_expect_no_memory(vcpu, gpa);

	TEST_ASSERT_EQ(mmap(hva, page_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), hva);
	agent_fill(hva, gpa, 1);
	TEST_ASSERT_EQ(agent_finish(vcpu), agent_page_content(gpa));
}

userfault_test(userfault, clean_pages_cost_no_exit)
{
	u64 before = vcpu_get_stat(self->vcpu, userfault_exits);

	vm_userfault_arm(self->vm, page_gpa(NR_PAGES), page_size);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits), before);
}

/*
 * Several vCPUs.
 */

#define NR_VCPUS	2

FIXTURE(vcpus) {
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct kvm_vm *vm;
};

FIXTURE_SETUP(vcpus)
{
	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, NR_VCPUS, self->vcpus);
	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA, AGENT_SLOT,
			 NR_COUNTED_PAGES, 0);
}

FIXTURE_TEARDOWN(vcpus)
{
	kvm_vm_free(self->vm);
}

/* A page that several vCPUs need is reported to each of them. */
userfault_test(vcpus, each_gets_an_exit)
{
	int i;

	vm_userfault_enable(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);

	for (i = 0; i < NR_VCPUS; i++)
		agent_expect_userfault(self->vcpus[i], AGENT_READ, AGENT_GPA, 0,
				       AGENT_GPA, USERFAULT_READ);
	vm_userfault_clear(self->vm, AGENT_GPA, page_size);
	for (i = 0; i < NR_VCPUS; i++)
		TEST_ASSERT_EQ(agent_finish(self->vcpus[i]),
			       agent_page_content(AGENT_GPA));
}

/*
 * A guest whose memory is all armed from its first instruction on: its code, its
 * page tables and its stack have to arrive like any other page.
 */
userfault_test(userfault, all_of_a_guest_is_armed)
{
	struct userspace_mem_region *region = memslot2region(self->vm, 0);
	u64 size = region->region.memory_size;
	struct kvm_vcpu *vcpu = self->vcpu;
	u64 offset, flags, nr_filled = 0, seen = 0;
	enum agent_exit exit;
	void *content;

	agent_request(vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES);
	content = malloc(size);
	TEST_ASSERT(content, "Out of memory");
	memcpy(content, region->host_mem, size);
	vm_userfault_arm(self->vm, region->region.guest_phys_addr, size);

	/*
	 * With shadow paging it is KVM that walks the guest's page tables, and
	 * KVM's own accesses are not intercepted.
	 */
#ifdef __x86_64__
	if (kvm_is_tdp_enabled())
#endif
		memset(region->host_mem, 0xff, size);

	for (;;) {
		exit = agent_run(vcpu);
		if (exit != AGENT_USERFAULT)
			break;

		offset = vcpu->run->memory_fault.gpa - region->region.guest_phys_addr;
		TEST_ASSERT(offset < size, "Exit for %#llx, which is not armed",
			    vcpu->run->memory_fault.gpa);
		TEST_ASSERT_EQ(vcpu->run->memory_fault.size, page_size);

		/* Walks of the guest's page tables are reads or writes, too. */
		flags = vcpu->run->memory_fault.flags;
		TEST_ASSERT(flags == USERFAULT_READ || flags == USERFAULT_WRITE ||
			    flags == USERFAULT_EXEC,
			    "Exit for %#llx with flags %#lx",
			    vcpu->run->memory_fault.gpa, flags);
		seen |= flags;

		memcpy(region->host_mem + offset, content + offset, page_size);
		vm_userfault_clear(self->vm, vcpu->run->memory_fault.gpa, page_size);
		nr_filled++;
		TEST_ASSERT(nr_filled <= size / page_size,
			    "More pages were asked for than there are");
	}

	TEST_ASSERT_EQ(exit, AGENT_DONE);
	/* Code, stack and mailbox at the least. */
	TEST_ASSERT(nr_filled >= 3, "Only %lu pages were asked for", nr_filled);
	TEST_ASSERT(seen & KVM_MEMORY_EXIT_FLAG_EXEC, "The guest runs, but no code was asked for");
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, userfault_exits), nr_filled);

	free(content);
}

/*
 * Memslots come and go, the attribute belongs to the address.
 */

/* An address with no memory is MMIO, armed or not, and stays armed. */
userfault_test(userfault, unbacked_memory_is_mmio_until_it_is_backed)
{
	gpa_t gpa = page_gpa(NR_PAGES + 1);
	u64 *word;

	virt_map(self->vm, gpa, gpa, page_size / self->vm->page_size);
	vm_userfault_arm(self->vm, gpa, page_size);

	agent_expect_mmio(self->vcpu, AGENT_READ, gpa, 0, gpa);
	agent_expect_mmio(self->vcpu, AGENT_WRITE, gpa, 1, gpa);

	vm_userspace_mem_region_add(self->vm, VM_MEM_SRC_ANONYMOUS, gpa, AGENT_SLOT + 1,
				    page_size / self->vm->page_size, 0);
	word = memslot2region(self->vm, AGENT_SLOT + 1)->host_mem;

	agent_expect_userfault(self->vcpu, AGENT_READ, gpa, 0, gpa, USERFAULT_READ);
	*word = 0x600d;
	vm_userfault_clear(self->vm, gpa, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0x600d);
}

userfault_test(userfault, survives_deleting_a_slot)
{
	vm_userfault_arm(self->vm, page_gpa(3), page_size);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, 3), 0);

	vm_mem_region_reload(self->vm, AGENT_SLOT);

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, 3), 0);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(3), page_gpa(3), USERFAULT_READ),
		    "Deleting the slot cleared the page");
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

userfault_test(userfault, does_not_move_with_a_slot)
{
	gpa_t there = AGENT_GPA + SZ_1G;
	gpa_t moved = there + 3 * page_size;

	virt_map(self->vm, there, there, NR_PAGES * page_size / self->vm->page_size);
	vm_userfault_arm(self->vm, page_gpa(2), page_size);
	vm_userfault_arm(self->vm, moved, page_size);

	vm_mem_region_move(self->vm, AGENT_SLOT, there);
	agent_expect_mmio(self->vcpu, AGENT_READ, page_gpa(2), 0, page_gpa(2));
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, there + 2 * page_size, 0),
		       agent_page_content(page_gpa(2)));
	agent_expect_userfault(self->vcpu, AGENT_READ, moved, 0, moved, USERFAULT_READ);
	vm_userfault_clear(self->vm, moved, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(3)));

	vm_mem_region_move(self->vm, AGENT_SLOT, AGENT_GPA);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(2), page_gpa(2), USERFAULT_READ),
		    "Moving the slot cleared the page");
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

/*
 * A write to read-only memory is MMIO.  On x86 the page is looked at before the
 * access is, so the page has to be filled first.
 */
userfault_test(userfault, read_only_memory)
{
	gpa_t gpa = page_gpa(NR_PAGES);
	gpa_t second = gpa + page_size;
	void *hva;

	if (!kvm_has_cap(KVM_CAP_READONLY_MEM))
		SKIP(return, "There are no read-only slots");

	hva = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, gpa, AGENT_SLOT + 1, 2,
			       KVM_MEM_READONLY);
	vm_userfault_arm(self->vm, gpa, 2 * page_size);

	agent_expect_userfault(self->vcpu, AGENT_READ, gpa, 0, gpa, USERFAULT_READ);
	vm_userfault_clear(self->vm, gpa, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(gpa));
	agent_expect_mmio(self->vcpu, AGENT_WRITE, gpa, 1, gpa);

#ifdef __x86_64__
	agent_expect_userfault(self->vcpu, AGENT_WRITE, second, 1, second,
			       USERFAULT_WRITE);
	vm_userfault_clear(self->vm, second, page_size);
	TEST_ASSERT_EQ(agent_run(self->vcpu), AGENT_OTHER);
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_MMIO);
	agent_finish(self->vcpu);
#else
	agent_expect_mmio(self->vcpu, AGENT_WRITE, second, 1, second);
	TEST_ASSERT(agent_probe(self->vcpu, second, second, USERFAULT_READ),
		    "MMIO cleared the page");
#endif
	agent_assert_content(hva, gpa, 2);
}

/*
 * Dirty logging.
 */

static void assert_dirty(struct kvm_vm *vm, u64 nr_pages, int dirty_page)
{
	unsigned long *bitmap = bitmap_zalloc(nr_pages);
	u64 i;

	kvm_vm_get_dirty_log(vm, AGENT_SLOT, bitmap);
	for (i = 0; i < nr_pages; i++)
		TEST_ASSERT(test_bit(i, bitmap) == (i == dirty_page),
			    "Page %lu is%s dirty", i, test_bit(i, bitmap) ? "" : " not");
	free(bitmap);
}

userfault_test(userfault, survives_toggling_dirty_logging)
{
	vm_userfault_arm(self->vm, page_gpa(1), 2 * page_size);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(0), 1), 0);

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(0), 1), 0);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(1), page_gpa(1), USERFAULT_READ),
		    "Dirty logging, switched on, cleared the page");

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(0), 2), 0);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(2), page_gpa(2), USERFAULT_READ),
		    "Dirty logging, switched off, cleared the page");
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

/* Page 1 was armed before, page 2 while it is write protected for the log. */
userfault_test(userfault, dirty_logging_sees_the_write_and_not_the_exit)
{
	int page;

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	vm_userfault_arm(self->vm, page_gpa(1), page_size);
	agent_do(self->vcpu, AGENT_WRITE, page_gpa(2), 0);
	assert_dirty(self->vm, NR_PAGES, 2);
	vm_userfault_arm(self->vm, page_gpa(2), page_size);

	for (page = 1; page <= 2; page++) {
		agent_expect_userfault(self->vcpu, AGENT_WRITE, page_gpa(page), 1,
				       page_gpa(page), USERFAULT_WRITE);
		assert_dirty(self->vm, NR_PAGES, -1);

		vm_userfault_clear(self->vm, page_gpa(page), page_size);
		assert_dirty(self->vm, NR_PAGES, -1);

		agent_finish(self->vcpu);
		assert_dirty(self->vm, NR_PAGES, page);
	}
}

/*
 * Huge mappings.
 */

FIXTURE(huge) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	u64 nr_pages;
};

#define NR_BLOCKS	3

FIXTURE_SETUP(huge)
{
	if (page_size != SZ_4K)
		SKIP(return, "The pages of the host are not 4 KiB");
	if (!has_hugetlb(SZ_2M, NR_BLOCKS))
		SKIP(return, "6 MiB of reserved 2 MiB pages are needed");

	self->nr_pages = SZ_2M / page_size;
	self->vm = agent_create_vm_with_memory(VM_MEM_SRC_ANONYMOUS_HUGETLB_2MB,
					       NR_BLOCKS * self->nr_pages, &self->vcpu);
}

FIXTURE_TEARDOWN(huge)
{
	kvm_vm_free(self->vm);
}

/* A block that holds no armed page is mapped as one, its neighbour is not. */
userfault_test(huge, clean_blocks_are_mapped_huge)
{
	gpa_t block = page_gpa(self->nr_pages);
	gpa_t armed = block + 100 * page_size;

	vm_userfault_arm(self->vm, armed, page_size);

	assert_mapped(self->vcpu, AGENT_GPA, self->nr_pages);
	assert_mapped(self->vcpu, block + SZ_2M, self->nr_pages);
	assert_mapped_small(self->vcpu, armed + page_size, self->nr_pages - 101);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, block, 100), 0);
	TEST_ASSERT(agent_probe(self->vcpu, armed, armed, USERFAULT_READ),
		    "A page was mapped as part of a block");
}

/* Each end of a block counts. */
userfault_test(huge, first_and_last_page_of_a_block)
{
	gpa_t first = page_gpa(0);
	gpa_t last = page_gpa(2 * self->nr_pages - 1);

	vm_userfault_arm(self->vm, first, page_size);
	vm_userfault_arm(self->vm, last, page_size);

	assert_mapped_small(self->vcpu, first + page_size, self->nr_pages - 1);
	assert_mapped_small(self->vcpu, last - SZ_2M + page_size, self->nr_pages - 1);
	assert_mapped(self->vcpu, last + page_size, self->nr_pages);

	TEST_ASSERT(agent_probe(self->vcpu, first, first, USERFAULT_READ),
		    "The first page was mapped as part of a block");
	TEST_ASSERT(agent_probe(self->vcpu, last, last, USERFAULT_READ),
		    "The last page was mapped as part of a block");
}

/* Arming takes away the block that holds the page, and no other one. */
userfault_test(huge, arming_unmaps_one_block)
{
	gpa_t block = page_gpa(self->nr_pages);
	gpa_t armed = block + 100 * page_size;

	assert_mapped(self->vcpu, AGENT_GPA, NR_BLOCKS * self->nr_pages);
	vm_userfault_arm(self->vm, armed, page_size);

	assert_mapped(self->vcpu, AGENT_GPA, self->nr_pages);
	assert_mapped(self->vcpu, block + SZ_2M, self->nr_pages);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, block, 100), 0);
	TEST_ASSERT(agent_probe(self->vcpu, armed, armed, USERFAULT_READ),
		    "A page stayed mapped as part of a block");
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, block, self->nr_pages), 0);
}

/*
 * Nothing shows whether memory that is mapped is mapped as a block or page by
 * page, except what arming its first page takes away: the block with all of its
 * pages, or that page alone, which may not even be mapped.
 */
static void assert_block(struct kvm_vcpu *vcpu, gpa_t block)
{
	vm_userfault_arm(vcpu->vm, block, page_size);
	assert_mapped_small(vcpu, block + page_size, SZ_2M / page_size - 1);
	vm_userfault_clear(vcpu->vm, block, page_size);
}

/* The opposite: all of it is mapped, the first page included, but one by one. */
static void assert_no_block(struct kvm_vcpu *vcpu, gpa_t block)
{
	vm_userfault_arm(vcpu->vm, block, page_size);
	assert_mapped(vcpu, block + page_size, SZ_2M / page_size - 1);
	vm_userfault_clear(vcpu->vm, block, page_size);
}

/* The fault that follows the last piece of a block maps all of it. */
userfault_test(huge, complete_blocks_are_mapped_huge)
{
	u64 i;

	vm_userfault_arm(self->vm, AGENT_GPA, NR_BLOCKS * SZ_2M);

	agent_request(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_BLOCKS * self->nr_pages);
	for (i = 0; i < NR_BLOCKS * self->nr_pages; i++) {
		vcpu_run_expect_userfault(self->vcpu, page_gpa(i), USERFAULT_READ);
		vm_userfault_clear(self->vm, page_gpa(i), page_size);
	}
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

#ifdef __x86_64__
	/* Shadow pages with the small mappings may be at hand for the next fault. */
	if (!kvm_is_tdp_enabled() || !get_kvm_param_bool("tdp_mmu"))
		return;
#endif
	for (i = 0; i < NR_BLOCKS; i++)
		assert_block(self->vcpu, AGENT_GPA + i * SZ_2M);
}

/*
 * Map each block in small pieces, which stay small until one of them faults.  The
 * first page is armed, and left out.
 */
static void __map_blocks_small(struct kvm_vcpu *vcpu, gpa_t gpa, u64 nr)
{
	u64 i;

	for (i = 0; i < nr; i++) {
		vm_userfault_arm(vcpu->vm, gpa + i * SZ_2M, page_size);
		assert_mapped_small(vcpu, gpa + i * SZ_2M + page_size,
				    SZ_2M / page_size - 1);
	}
}

static void map_blocks_small(struct kvm_vcpu *vcpu)
{
	__map_blocks_small(vcpu, AGENT_GPA, NR_BLOCKS);
}

/*
 * Whatever is mapped small, no page of which needs to fault any more, has to
 * become huge by itself: the first page of each block stays untouched here.
 */
static void __assert_blocks_recovered(struct kvm_vcpu *vcpu, gpa_t gpa, u64 nr)
{
	u64 i;

	for (i = 0; i < nr; i++)
		assert_mapped(vcpu, gpa + i * SZ_2M + page_size, SZ_2M / page_size - 1);

	vm_userfault_enable(vcpu->vm);
	for (i = 0; i < nr; i++)
		assert_block(vcpu, gpa + i * SZ_2M);
}

static void assert_blocks_recovered(struct kvm_vcpu *vcpu)
{
	__assert_blocks_recovered(vcpu, AGENT_GPA, NR_BLOCKS);
}

userfault_test(huge, disabling_brings_blocks_back)
{
	map_blocks_small(self->vcpu);
	vm_userfault_clear(self->vm, AGENT_GPA, NR_BLOCKS * SZ_2M);
	vm_userfault_disable(self->vm);
	assert_blocks_recovered(self->vcpu);
}

/* Pages that are still armed are no reason to keep the mappings small. */
userfault_test(huge, disabling_with_armed_pages_brings_blocks_back)
{
	map_blocks_small(self->vcpu);
	vm_userfault_disable(self->vm);
	assert_blocks_recovered(self->vcpu);
}

/* Blocks next to each other may have their bits in different pages of the bitmap. */
userfault_test(huge, disabling_brings_blocks_of_all_chunks_back)
{
	gpa_t gpa = AGENT_GPA + CHUNK_PAGES * page_size - SZ_2M;

	if (!has_hugetlb(SZ_2M, 2))
		SKIP(return, "4 MiB more of reserved 2 MiB pages are needed");

	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS_HUGETLB_2MB, gpa, AGENT_SLOT + 1,
			 2 * self->nr_pages, 0);
	__map_blocks_small(self->vcpu, gpa, 2);
	vm_userfault_disable(self->vm);
	__assert_blocks_recovered(self->vcpu, gpa, 2);
}

/*
 * Dirty logging keeps them small, until it ends.  x86 recovers them then, whatever
 * made them small.  arm64 takes them away when userfault is disabled, so the guest
 * must not map them again, page by page, until logging has ended.
 */
userfault_test(huge, dirty_logging_defers_blocks)
{
	u64 i;

	map_blocks_small(self->vcpu);
	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA,
				NR_BLOCKS * self->nr_pages), 0);
	vm_userfault_enable(self->vm);
	for (i = 0; i < NR_BLOCKS; i++)
		assert_no_block(self->vcpu, AGENT_GPA + i * SZ_2M);

	vm_userfault_disable(self->vm);
	vm_mem_region_set_flags(self->vm, AGENT_SLOT, 0);
	assert_blocks_recovered(self->vcpu);
}

/*
 * A block of 1 GiB has its bits in several pages of the bitmap.
 */
FIXTURE(gigantic) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
};

FIXTURE_SETUP(gigantic)
{
	if (page_size != SZ_4K)
		SKIP(return, "The pages of the host are not 4 KiB");
	if (!has_hugetlb(SZ_1G, 1))
		SKIP(return, "A reserved page of 1 GiB is needed");

	/* With memory for page tables that map all of it page by page. */
	self->vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, 1, SZ_1G / page_size,
					  agent_guest_code, &self->vcpu);
	vcpu_args_set(self->vcpu, 1, 0);
	vm_userspace_mem_region_add(self->vm, VM_MEM_SRC_ANONYMOUS_HUGETLB_1GB,
				    AGENT_GPA, AGENT_SLOT, SZ_1G / page_size, 0);
	agent_map(self->vm, AGENT_GPA, AGENT_GPA, SZ_1G);
	self->hva = memslot2region(self->vm, AGENT_SLOT)->host_mem;
	vm_userfault_enable(self->vm);
}

FIXTURE_TEARDOWN(gigantic)
{
	kvm_vm_free(self->vm);
}

userfault_test(gigantic, every_page_counts)
{
	gpa_t first = AGENT_GPA;
	gpa_t pages[] = {
		first + page_size,
		first + SZ_128M - page_size,
		first + SZ_128M,
		first + SZ_512M + SZ_4M,
		first + SZ_1G - page_size,
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(pages); i++) {
		agent_fill(self->hva + pages[i] - first, pages[i], 1);
		vm_userfault_arm(self->vm, pages[i], page_size);

		agent_do(self->vcpu, AGENT_READ, first, 0);
		TEST_ASSERT(agent_probe(self->vcpu, pages[i], pages[i], USERFAULT_READ),
			    "Page %d was mapped as part of a block", i);
		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, pages[i], 1), 0);
	}
}

/* Read a word of every other 2 MiB, return how many faults that took. */
static u64 count_gigantic_faults(struct kvm_vcpu *vcpu)
{
	u64 before = vcpu_get_stat(vcpu, exits);
	u64 nr = SZ_1G / SZ_4M;
	u64 i;

	for (i = 0; i < nr; i++)
		agent_do(vcpu, AGENT_READ, AGENT_GPA + i * SZ_4M, 0);

	/* Reporting to the host is an exit as well. */
	return vcpu_get_stat(vcpu, exits) - before - nr;
}

/* What is armed right beside the block does not split it. */
userfault_test(gigantic, clean_block_is_mapped_whole)
{
	u64 faults;

#ifdef __x86_64__
	if (!kvm_cpu_has(X86_FEATURE_GBPAGES))
		SKIP(return, "There are no mappings of 1 GiB");
#endif
	vm_userfault_arm(self->vm, AGENT_GPA - page_size, page_size);
	vm_userfault_arm(self->vm, AGENT_GPA + SZ_1G, page_size);

	/* For the guest's page tables, which take faults of their own. */
	count_gigantic_faults(self->vcpu);
	vm_mem_region_reload(self->vm, AGENT_SLOT);

	faults = count_gigantic_faults(self->vcpu);
	TEST_ASSERT(faults <= MAX_NOISE_EXITS, "%lu faults in a block of 1 GiB", faults);
}

/* The same after a page in the middle of the block was armed, by what is lost. */
userfault_test(gigantic, disabling_brings_the_block_back)
{
	u64 faults;

#ifdef __x86_64__
	if (!kvm_cpu_has(X86_FEATURE_GBPAGES))
		SKIP(return, "There are no mappings of 1 GiB");
#endif
	vm_userfault_arm(self->vm, AGENT_GPA + SZ_512M + SZ_2M, page_size);
	count_gigantic_faults(self->vcpu);
	vm_userfault_disable(self->vm);
	count_gigantic_faults(self->vcpu);

	vm_userfault_enable(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA + SZ_1G - page_size, page_size);
	faults = count_gigantic_faults(self->vcpu);
	TEST_ASSERT(faults > MAX_NOISE_EXITS,
		    "Only %lu faults, so the block was not mapped whole", faults);
}

/*
 * Locks.  A VMM may have to fill a page for a VM ioctl to go on, in which case
 * clearing the page must not wait for that ioctl.  KVM_GET_DIRTY_LOG is one that
 * writes to the memory of the VMM with slots_lock held: have it write to a page
 * that userfaultfd does not fill until the test says so.
 */
#define WAIT_SECS	20

static sem_t lock_taken, lock_release;

static int hold_page(int uffd_mode, int uffd, struct uffd_msg *msg)
{
	struct uffdio_zeropage zero = {
		.range.start = msg->arg.pagefault.address & ~(page_size - 1),
		.range.len = page_size,
	};

	sem_post(&lock_taken);
	sem_wait(&lock_release);

	return ioctl(uffd, UFFDIO_ZEROPAGE, &zero);
}

struct lock_holder {
	struct kvm_vm *vm;
	void *bitmap;
};

static void *lock_holder_thread(void *arg)
{
	struct lock_holder *holder = arg;

	kvm_vm_get_dirty_log(holder->vm, AGENT_SLOT, holder->bitmap);

	return NULL;
}

static void *arming_thread(void *arg)
{
	vm_userfault_arm(arg, page_gpa(1), page_size);

	return NULL;
}

/* Fill the page that the vCPU has stopped at, and run it on. */
static void *resolving_thread(void *arg)
{
	struct kvm_vcpu *vcpu = arg;

	vm_userfault_clear(vcpu->vm, page_gpa(0), page_size);
	TEST_ASSERT_EQ(agent_finish(vcpu), agent_page_content(page_gpa(0)));

	return NULL;
}

static struct timespec deadline_in(int secs)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += secs;

	return ts;
}

userfault_test(userfault, clearing_waits_for_no_other_ioctl)
{
	pthread_t holder_thread, resolver, armer;
	struct lock_holder holder = { .vm = self->vm };
	struct uffd_desc *uffd_desc;
	bool resolved, armed;
	struct timespec ts;
	int uffd;

	uffd = syscall(__NR_userfaultfd, O_CLOEXEC);
	if (uffd < 0)
		SKIP(return, "There is no userfaultfd for faults of the kernel");
	close(uffd);

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	vm_userfault_arm(self->vm, page_gpa(0), page_size);
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(0), 0, page_gpa(0),
			       USERFAULT_READ);

	sem_init(&lock_taken, 0, 0);
	sem_init(&lock_release, 0, 0);
	holder.bitmap = kvm_mmap(page_size, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uffd_desc = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 0,
					     holder.bitmap, page_size, 1, hold_page);
	kvm_pthread_create(&holder_thread, NULL, lock_holder_thread, &holder);
	ts = deadline_in(WAIT_SECS);
	TEST_ASSERT(!sem_timedwait(&lock_taken, &ts), "KVM_GET_DIRTY_LOG does not fault");

	/* Arming does wait: unlike clearing, it is an update of the VM's memory. */
	kvm_pthread_create(&armer, NULL, arming_thread, self->vm);
	kvm_pthread_create(&resolver, NULL, resolving_thread, self->vcpu);
	ts = deadline_in(WAIT_SECS);
	resolved = !pthread_timedjoin_np(resolver, NULL, &ts);
	usleep(100000);
	armed = !pthread_tryjoin_np(armer, NULL);

	/* Whatever came of it, let all threads go on. */
	sem_post(&lock_release);
	kvm_pthread_join(holder_thread, NULL);
	TEST_ASSERT(resolved, "Clearing a page waited for another ioctl");
	TEST_ASSERT(!armed, "The other ioctl held no lock, so that this tests nothing");
	kvm_pthread_join(armer, NULL);

	uffd_stop_demand_paging(uffd_desc);
	kvm_munmap(holder.bitmap, page_size);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(1), page_gpa(1), USERFAULT_READ),
		    "Having waited, arming did not arm the page");
}

/*
 * Disabling.
 */

userfault_test(userfault, disabling_lets_the_guest_go_on)
{
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
	agent_expect_userfault(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES, AGENT_GPA,
			       USERFAULT_READ);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
}

userfault_test(userfault, enabling_again_starts_clean)
{
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
	vm_userfault_disable(self->vm);
	vm_userfault_enable(self->vm);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);

	vm_userfault_arm(self->vm, page_gpa(9), page_size);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, 9), 0);
	TEST_ASSERT(agent_probe(self->vcpu, page_gpa(9), page_gpa(9), USERFAULT_READ),
		    "Enabled again, a page cannot be armed");
}

#define NR_TOGGLES	20

struct runner {
	struct kvm_vcpu *vcpu;
	atomic_bool *stop;
	atomic_ulong nr_exits;
};

/* Clearing a page may meet userfault being off, which is as good. */
static void runner_resolve(struct kvm_vcpu *vcpu)
{
	int ret;

	ret = __vm_change_attributes(vcpu->vm, vcpu->run->memory_fault.gpa, page_size,
				     KVM_MEMORY_ATTRIBUTE_USERFAULT,
				     KVM_MEMORY_ATTRIBUTES_CLEAR);
	TEST_ASSERT(!ret || errno == EINVAL,
		    KVM_IOCTL_ERROR(KVM_SET_MEMORY_ATTRIBUTES, ret));
}

/* Sweep all pages, and leave a fault unresolved now and then. */
static void *runner_thread(void *arg)
{
	struct runner *runner = arg;
	struct kvm_vcpu *vcpu = runner->vcpu;
	enum agent_exit exit;

	do {
		agent_request(vcpu, AGENT_CHECK, AGENT_GPA, NR_COUNTED_PAGES);
		for (;;) {
			exit = agent_run(vcpu);
			if (exit != AGENT_USERFAULT)
				break;
			if (atomic_fetch_add(&runner->nr_exits, 1) % 16)
				runner_resolve(vcpu);
			else
				sched_yield();
		}
		TEST_ASSERT_EQ(exit, AGENT_DONE);
	} while (!atomic_load(runner->stop));

	return NULL;
}

/* Arm all pages, and wait until each of the runners has run into one of them. */
static void arm_and_wait_for_runners(struct kvm_vm *vm, struct runner *runners)
{
	u64 before[NR_VCPUS];
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		before[i] = atomic_load(&runners[i].nr_exits);

	vm_userfault_arm(vm, AGENT_GPA, NR_COUNTED_PAGES * page_size);
	for (i = 0; i < NR_VCPUS; i++) {
		while (atomic_load(&runners[i].nr_exits) == before[i])
			sched_yield();
	}
}

/* vCPUs run, some of them into armed pages, while userfault comes and goes. */
userfault_test(vcpus, disabling_lets_running_vcpus_go_on)
{
	struct runner runners[NR_VCPUS] = {};
	pthread_t threads[NR_VCPUS];
	atomic_bool stop = false;
	int i;

	for (i = 0; i < NR_VCPUS; i++) {
		runners[i].vcpu = self->vcpus[i];
		runners[i].stop = &stop;
		kvm_pthread_create(&threads[i], NULL, runner_thread, &runners[i]);
	}

	for (i = 0; i < NR_TOGGLES; i++) {
		vm_userfault_enable(self->vm);
		arm_and_wait_for_runners(self->vm, runners);
		usleep(10000);
		vm_userfault_disable(self->vm);
		usleep(1000);
	}

	atomic_store(&stop, true);
	for (i = 0; i < NR_VCPUS; i++)
		kvm_pthread_join(threads[i], NULL);
	for (i = 0; i < NR_VCPUS; i++)
		TEST_ASSERT_EQ(agent_do(self->vcpus[i], AGENT_CHECK, AGENT_GPA,
					NR_COUNTED_PAGES), 0);
}

/* The VM goes while pages are armed and while a vCPU has not resolved its exit. */
userfault_test(userfault, vm_is_destroyed_with_armed_pages)
{
	vm_userfault_arm(self->vm, AGENT_GPA, SZ_1G);
	agent_expect_userfault(self->vcpu, AGENT_READ, AGENT_GPA, 0, AGENT_GPA,
			       USERFAULT_READ);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	page_size = getpagesize();

	return test_harness_run(argc, argv);
}
