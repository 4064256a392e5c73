// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault for what exists on x86 alone: private memory, the
 * second address space, KVM_PRE_FAULT_MEMORY, nested guests, internal memslots,
 * and the counters that tell how memory is mapped.
 */
#include <fcntl.h>
#include <sys/mman.h>

#include <linux/bitmap.h>
#include <linux/falloc.h>
#include <linux/sizes.h>

#include "apic.h"
#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "smm.h"
#include "svm_util.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "vmx.h"

#define PRIVATE			KVM_MEMORY_ATTRIBUTE_PRIVATE
#define USERFAULT		KVM_MEMORY_ATTRIBUTE_USERFAULT

/*
 * Whether huge mappings replace small ones in place, or small ones are zapped
 * for the next access to find none.
 */
static bool recovers_in_place(void)
{
	return kvm_is_tdp_enabled() && get_kvm_param_bool("tdp_mmu");
}

/*
 * VM types.
 */

TEST(only_types_whose_memory_kvm_can_fill)
{
	unsigned long types = kvm_check_cap(KVM_CAP_VM_TYPES);
	unsigned long supported = BIT(KVM_X86_DEFAULT_VM) | BIT(KVM_X86_SW_PROTECTED_VM);
	struct kvm_vm *vm;
	unsigned long type;
	int ret;

	for_each_set_bit(type, &types, BITS_PER_TYPE(types)) {
		vm = vm_create_barebones_type(type);

		if (supported & BIT(type)) {
			TEST_ASSERT_EQ(vm_check_cap(vm, KVM_CAP_USERFAULT),
				       kvm_check_cap(KVM_CAP_USERFAULT));
			vm_userfault_enable(vm);
		} else {
			TEST_ASSERT_EQ(vm_check_cap(vm, KVM_CAP_USERFAULT), 0);
			ret = __vm_enable_cap(vm, KVM_CAP_USERFAULT,
					      KVM_USERFAULT_ENABLE);
			TEST_ASSERT(ret == -1 && errno == EINVAL,
				    "VM type %lu: expected EINVAL, got %d (errno %d)",
				    type, ret, errno);
		}
		kvm_vm_free(vm);
	}
}

/*
 * Private memory.
 */

FIXTURE(private) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
};

/* The content of a page that is private, unlike the one that is shared. */
static u64 private_content(u64 page)
{
	return ~agent_page_content(page_gpa(page));
}

static u64 page_content(u64 page, bool is_private)
{
	return is_private ? private_content(page) : agent_page_content(page_gpa(page));
}

static bool has_sw_protected_vms(void)
{
	return kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM);
}

/* Every page has a content of each kind, and conversions keep both. */
FIXTURE_SETUP(private)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};
	u64 i;

	if (!has_sw_protected_vms())
		SKIP(return, "There are no VMs of type KVM_X86_SW_PROTECTED_VM");

	self->vm = agent_create_vm(shape, 1, &self->vcpu);
	self->hva = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA,
				     AGENT_SLOT, NR_PAGES, KVM_MEM_GUEST_MEMFD);

	vm_mem_set_private(self->vm, AGENT_GPA, NR_PAGES * PAGE_SIZE);
	for (i = 0; i < NR_PAGES; i++)
		agent_do(self->vcpu, AGENT_WRITE, page_gpa(i), private_content(i));
	vm_mem_set_shared(self->vm, AGENT_GPA, NR_PAGES * PAGE_SIZE);

	vm_userfault_enable(self->vm);
}

FIXTURE_TEARDOWN(private)
{
	kvm_vm_free(self->vm);
}

userfault_test(private, attribute_is_one_of_two)
{
	TEST_ASSERT_EQ(vm_check_cap(self->vm, KVM_CAP_MEMORY_ATTRIBUTES),
		       PRIVATE | USERFAULT);
}

/* Private memory that is mapped faults once it is armed, and says what it is. */
userfault_test(private, arming_mapped_private_memory)
{
	u64 i;

	vm_change_attributes(self->vm, AGENT_GPA, NR_PAGES * PAGE_SIZE, PRIVATE,
			     KVM_MEMORY_ATTRIBUTES_SET);
	for (i = 0; i < NR_PAGES; i++)
		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(i), 0),
			       private_content(i));

	vm_userfault_arm(self->vm, page_gpa(3), PAGE_SIZE);
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(3), 0, page_gpa(3),
			       USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE);
	vm_userfault_clear(self->vm, page_gpa(3), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), private_content(3));

	for (i = 0; i < NR_PAGES; i++)
		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(i), 0),
			       private_content(i));
}

userfault_test(private, every_access_is_reported)
{
	u64 flag = KVM_MEMORY_EXIT_FLAG_PRIVATE;

	vm_change_attributes(self->vm, AGENT_GPA, NR_PAGES * PAGE_SIZE,
			     PRIVATE | USERFAULT, KVM_MEMORY_ATTRIBUTES_SET);

	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(0), 0, page_gpa(0),
			       USERFAULT_READ | flag);
	vm_userfault_clear(self->vm, page_gpa(0), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), private_content(0));

	agent_expect_userfault(self->vcpu, AGENT_WRITE, page_gpa(1), 5, page_gpa(1),
			       USERFAULT_WRITE | flag);
	vm_userfault_clear(self->vm, page_gpa(1), PAGE_SIZE);
	agent_finish(self->vcpu);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(1), 0), 5);

	/* Private memory can be filled by the guest alone: with RET. */
	vm_userfault_clear(self->vm, page_gpa(2), PAGE_SIZE);
	agent_do(self->vcpu, AGENT_WRITE, page_gpa(2), 0xc3);
	vm_userfault_arm(self->vm, page_gpa(2), PAGE_SIZE);
	agent_expect_userfault(self->vcpu, AGENT_EXEC, page_gpa(2), 0, page_gpa(2),
			       USERFAULT_EXEC | flag);
	vm_userfault_clear(self->vm, page_gpa(2), PAGE_SIZE);
	agent_finish(self->vcpu);
}

/*
 * Assert both attributes of a page by what a read does and gets.  The page is
 * left mapped if it is not armed, so that the next change has to unmap it.
 */
static void assert_page_state(struct kvm_vcpu *vcpu, u64 page, bool is_private,
			      bool is_armed)
{
	u64 flags = USERFAULT_READ | (is_private ? KVM_MEMORY_EXIT_FLAG_PRIVATE : 0);
	u64 content = page_content(page, is_private);

	if (!is_armed) {
		TEST_ASSERT_EQ(agent_do(vcpu, AGENT_READ, page_gpa(page), 0), content);
		return;
	}

	agent_expect_userfault(vcpu, AGENT_READ, page_gpa(page), 0, page_gpa(page),
			       flags);
	vm_userfault_clear(vcpu->vm, page_gpa(page), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(vcpu), content);
	vm_userfault_arm(vcpu->vm, page_gpa(page), PAGE_SIZE);
}

static const struct {
	u64 flags;
	u64 attributes;
	/* What the page has then. */
	u64 result;
} changes[] = {
	{ KVM_MEMORY_ATTRIBUTES_SET,	USERFAULT,		USERFAULT },
	{ KVM_MEMORY_ATTRIBUTES_SET,	PRIVATE,		PRIVATE | USERFAULT },
	{ KVM_MEMORY_ATTRIBUTES_CLEAR,	PRIVATE,		USERFAULT },
	{ KVM_MEMORY_ATTRIBUTES_SET,	PRIVATE,		PRIVATE | USERFAULT },
	{ KVM_MEMORY_ATTRIBUTES_CLEAR,	USERFAULT,		PRIVATE },
	{ KVM_MEMORY_ATTRIBUTES_SET,	USERFAULT,		PRIVATE | USERFAULT },
	{ 0,				PRIVATE,		PRIVATE },
	{ 0,				USERFAULT,		USERFAULT },
	{ 0,				PRIVATE,		PRIVATE },
	{ 0,				PRIVATE | USERFAULT,	PRIVATE | USERFAULT },
	{ 0,				0,			0 },
	{ KVM_MEMORY_ATTRIBUTES_SET,	PRIVATE | USERFAULT,	PRIVATE | USERFAULT },
	{ KVM_MEMORY_ATTRIBUTES_SET,	0,			PRIVATE | USERFAULT },
	{ KVM_MEMORY_ATTRIBUTES_CLEAR,	0,			PRIVATE | USERFAULT },
	{ KVM_MEMORY_ATTRIBUTES_CLEAR,	PRIVATE | USERFAULT,	0 },
	{ KVM_MEMORY_ATTRIBUTES_SET,	PRIVATE,		PRIVATE },
	{ KVM_MEMORY_ATTRIBUTES_CLEAR,	PRIVATE,		0 },
	{ 0,				PRIVATE | USERFAULT,	PRIVATE | USERFAULT },
	{ 0,				USERFAULT,		USERFAULT },
	{ 0,				0,			0 },
};

userfault_test(private, attributes_change_independently)
{
	u64 result;
	int i;

	for (i = 0; i < ARRAY_SIZE(changes); i++) {
		result = changes[i].result;
		vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE,
				     changes[i].attributes, changes[i].flags);
		assert_page_state(self->vcpu, 0, result & PRIVATE, result & USERFAULT);
		assert_page_state(self->vcpu, 1, false, false);
	}
}

static u64 mixed_attributes(u64 page)
{
	return (page & 1 ? PRIVATE : 0) | (page & 2 ? USERFAULT : 0);
}

/* A delta over pages that differ changes one attribute of each of them. */
userfault_test(private, deltas_keep_what_differs)
{
	u64 attributes[] = { PRIVATE, USERFAULT };
	u64 expected, page;
	int i, set;

	for (i = 0; i < ARRAY_SIZE(attributes) * 2; i++) {
		set = i & 1;

		for (page = 0; page < 8; page++)
			vm_change_attributes(self->vm, page_gpa(page), PAGE_SIZE,
					     mixed_attributes(page), 0);
		vm_change_attributes(self->vm, page_gpa(0), 8 * PAGE_SIZE,
				     attributes[i / 2],
				     set ? KVM_MEMORY_ATTRIBUTES_SET :
					   KVM_MEMORY_ATTRIBUTES_CLEAR);

		for (page = 0; page < 8; page++) {
			expected = mixed_attributes(page);
			if (set)
				expected |= attributes[i / 2];
			else
				expected &= ~attributes[i / 2];
			assert_page_state(self->vcpu, page, expected & PRIVATE,
					  expected & USERFAULT);
		}
	}
}

userfault_test(private, disabling_keeps_what_is_private)
{
	vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, PRIVATE | USERFAULT, 0);
	vm_change_attributes(self->vm, page_gpa(1), PAGE_SIZE, USERFAULT, 0);
	vm_userfault_disable(self->vm);

	assert_page_state(self->vcpu, 0, true, false);
	assert_page_state(self->vcpu, 1, false, false);

	vm_userfault_enable(self->vm);
	assert_page_state(self->vcpu, 0, true, false);
	assert_page_state(self->vcpu, 1, false, false);
}

/*
 * Conversions while a fault is open, which then is one of the other kind: what the
 * guest accesses is always the kind that the page is at that time.
 */
userfault_test(private, conversions_with_an_open_fault)
{
	u64 private = KVM_MEMORY_EXIT_FLAG_PRIVATE;
	int i;

	vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, PRIVATE | USERFAULT, 0);
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(0), 0, page_gpa(0),
			       USERFAULT_READ | private);

	for (i = 0; i < 3; i++) {
		vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, PRIVATE,
				     KVM_MEMORY_ATTRIBUTES_CLEAR);
		vcpu_run_expect_userfault(self->vcpu, page_gpa(0), USERFAULT_READ);
		vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, PRIVATE,
				     KVM_MEMORY_ATTRIBUTES_SET);
		vcpu_run_expect_userfault(self->vcpu, page_gpa(0), USERFAULT_READ | private);
	}

	vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, PRIVATE,
			     KVM_MEMORY_ATTRIBUTES_CLEAR);
	vm_userfault_clear(self->vm, page_gpa(0), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), page_content(0, false));
}

/* A page that was converted and cleared is mapped as what it is now. */
userfault_test(private, conversion_before_the_vcpu_is_back)
{
	u64 private = KVM_MEMORY_EXIT_FLAG_PRIVATE;

	agent_do(self->vcpu, AGENT_READ, page_gpa(1), 0);
	vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, PRIVATE | USERFAULT, 0);
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(0), 0, page_gpa(0),
			       USERFAULT_READ | private);
	vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, 0, 0);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), page_content(0, false));
}

#define FLIP_MSECS	2000

struct flipper {
	struct kvm_vm *vm;
	bool stop;
	u64 nr;
};

/* Shared and there, or private and armed.  It ends with the former. */
static void flip_fn(void *arg)
{
	struct flipper *flipper = arg;

	while (!READ_ONCE(flipper->stop)) {
		vm_change_attributes(flipper->vm, page_gpa(0), PAGE_SIZE,
				     PRIVATE | USERFAULT, 0);
		vm_change_attributes(flipper->vm, page_gpa(0), PAGE_SIZE, 0, 0);
		flipper->nr++;
	}
}

/* Only because the page is armed, or was being converted, the guest gets no further. */
static void run_expect_exit_for_page_0(struct kvm_vcpu *vcpu)
{
	int ret = _vcpu_run(vcpu);

	TEST_ASSERT(ret == -1 && errno == EFAULT,
		    "The guest has read the private page: KVM_RUN returned %d, errno %d",
		    ret, errno);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.gpa, page_gpa(0));
}

/*
 * Both attributes change at once: the guest, which reads the page all the time, sees
 * nothing of the private page, as that is armed whenever it could be seen.
 */
userfault_test(private, conversion_of_armed_pages_is_atomic)
{
	u64 end = userfault_now_ms() + FLIP_MSECS, *word = self->hva;
	struct flipper flipper = { .vm = self->vm };
	struct waiter waiter;
	u64 nr_exits = 0;

	agent_request(self->vcpu, AGENT_SPIN, page_gpa(0), *word);
	waiter_start(&waiter, flip_fn, &flipper);
	while (userfault_now_ms() < end) {
		run_expect_exit_for_page_0(self->vcpu);
		nr_exits++;
	}
	WRITE_ONCE(flipper.stop, true);
	waiter_join(&waiter);

	WRITE_ONCE(*word, *word + 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), *word);
	pr_info("# %lu flips, %lu exits\n", flipper.nr, nr_exits);
}

/* Private and shared pages side by side: each has its own way to be filled. */
userfault_test(private, both_kinds_in_one_vm)
{
	u64 i, flags;

	for (i = 0; i < NR_PAGES; i += 2)
		vm_change_attributes(self->vm, page_gpa(i), PAGE_SIZE, PRIVATE,
				     KVM_MEMORY_ATTRIBUTES_SET);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * PAGE_SIZE);
	memset(self->hva, 0xdb, NR_PAGES * PAGE_SIZE);

	for (i = 0; i < NR_PAGES; i++) {
		flags = i & 1 ? 0 : KVM_MEMORY_EXIT_FLAG_PRIVATE;
		agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(i), 0,
				       page_gpa(i), USERFAULT_READ | flags);
		if (i & 1)
			agent_fill(self->hva + i * PAGE_SIZE, page_gpa(i), 1);
		vm_userfault_clear(self->vm, page_gpa(i), PAGE_SIZE);
		TEST_ASSERT_EQ(agent_finish(self->vcpu), page_content(i, !(i & 1)));
	}
}

/* Holes of a guest_memfd are zero, and no reason to release an armed page. */
userfault_test(private, punching_holes_while_armed)
{
	u64 flags = USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE;

	vm_change_attributes(self->vm, page_gpa(0), 4 * PAGE_SIZE, PRIVATE | USERFAULT, 0);
	vm_guest_mem_punch_hole(self->vm, page_gpa(0), PAGE_SIZE);
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(0), 0, page_gpa(0), flags);
	vm_userfault_clear(self->vm, page_gpa(0), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	/* With the fault open, */
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(1), 0, page_gpa(1), flags);
	vm_guest_mem_punch_hole(self->vm, page_gpa(1), PAGE_SIZE);
	vcpu_run_expect_userfault(self->vcpu, page_gpa(1), flags);
	vm_userfault_clear(self->vm, page_gpa(1), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	/* and allocated at once. */
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(2), 0, page_gpa(2), flags);
	vm_guest_mem_punch_hole(self->vm, page_gpa(2), PAGE_SIZE);
	vm_guest_mem_allocate(self->vm, page_gpa(2), PAGE_SIZE);
	vcpu_run_expect_userfault(self->vcpu, page_gpa(2), flags);
	vm_userfault_clear(self->vm, page_gpa(2), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	vm_userfault_clear(self->vm, page_gpa(3), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(3), 0),
		       private_content(3));
	/* The shared side has no part in it. */
	agent_assert_content(self->hva, AGENT_GPA, NR_PAGES);
}

#define OTHER_SLOT	(AGENT_SLOT + 1)
#define OTHER_GPA	(AGENT_GPA + SZ_1G)

userfault_test(private, two_slots_on_one_file)
{
	u64 flags = USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE;
	u64 size = NR_PAGES * PAGE_SIZE;
	int fd;

	fd = kvm_dup(memslot2region(self->vm, AGENT_SLOT)->region.guest_memfd);
	vm_mem_region_delete(self->vm, AGENT_SLOT);
	vm_mem_add(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA, AGENT_SLOT, NR_PAGES / 2,
		   KVM_MEM_GUEST_MEMFD, fd, 0);
	vm_mem_add(self->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT, NR_PAGES / 2,
		   KVM_MEM_GUEST_MEMFD, fd, size / 2);
	agent_map(self->vm, OTHER_GPA, OTHER_GPA, size / 2);
	vm_change_attributes(self->vm, AGENT_GPA, size / 2, PRIVATE, 0);
	vm_change_attributes(self->vm, OTHER_GPA, size / 2, PRIVATE, 0);

	/* The content is that of the file, which had one slot when it was filled. */
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, OTHER_GPA, 0),
		       private_content(NR_PAGES / 2));
	vm_userfault_arm(self->vm, OTHER_GPA, PAGE_SIZE);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(0), 0), private_content(0));
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(NR_PAGES / 2 - 1), 0),
		       private_content(NR_PAGES / 2 - 1));
	agent_expect_userfault(self->vcpu, AGENT_READ, OTHER_GPA, 0, OTHER_GPA, flags);
	vm_userfault_clear(self->vm, OTHER_GPA, PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), private_content(NR_PAGES / 2));

	/* A hole on both sides of the border, one of which is armed. */
	vm_userfault_arm(self->vm, OTHER_GPA, PAGE_SIZE);
	agent_expect_userfault(self->vcpu, AGENT_READ, OTHER_GPA, 0, OTHER_GPA, flags);
	kvm_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, size / 2 - PAGE_SIZE,
		      2 * PAGE_SIZE);
	vcpu_run_expect_userfault(self->vcpu, OTHER_GPA, flags);
	vm_userfault_clear(self->vm, OTHER_GPA, PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(NR_PAGES / 2 - 1), 0), 0);

	/* It ends there. */
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(NR_PAGES / 2 - 2), 0),
		       private_content(NR_PAGES / 2 - 2));
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, OTHER_GPA + PAGE_SIZE, 0),
		       private_content(NR_PAGES / 2 + 1));
	close(fd);
}

/* With the file gone, a page is an error as soon as it is released. */
userfault_test(private, closing_the_file_with_an_open_fault)
{
	u64 flags = USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE;
	struct userspace_mem_region *region = memslot2region(self->vm, AGENT_SLOT);
	int ret;

	vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, PRIVATE | USERFAULT, 0);
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(0), 0, page_gpa(0), flags);

	close(region->region.guest_memfd);
	region->region.guest_memfd = -1;
	vcpu_run_expect_userfault(self->vcpu, page_gpa(0), flags);

	vm_userfault_clear(self->vm, page_gpa(0), PAGE_SIZE);
	ret = _vcpu_run(self->vcpu);
	TEST_ASSERT(ret == -1 && errno == EFAULT, KVM_IOCTL_ERROR(KVM_RUN, ret));
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(self->vcpu->run->memory_fault.flags, KVM_MEMORY_EXIT_FLAG_PRIVATE);

	/* The shared memory of the same slot is still there. */
	vm_change_attributes(self->vm, page_gpa(0), PAGE_SIZE, 0, 0);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), page_content(0, false));
}

#define HWPOISON_FILE	"/sys/kernel/debug/hwpoison/corrupt-pfn"
/* KVM tells by it which page it is about to map. */
#define TRACE_EVENT	"events/kvmmmu/kvm_mmu_spte_requested/enable"
#define TRACE_FORMAT	"kvm_mmu_spte_requested: gfn %lx pfn %lx"

/* The page that KVM has mapped last at @gpa, or 0. */
static u64 traced_pfn(const char *dir, gpa_t gpa)
{
	FILE *file = trace_open(dir, "trace", "r");
	u64 gfn, pfn, found = 0;
	char line[512], *event;

	while (fgets(line, sizeof(line), file)) {
		event = strstr(line, "kvm_mmu_spte_requested");
		if (event && sscanf(event, TRACE_FORMAT, &gfn, &pfn) == 2 &&
		    gfn == gpa / PAGE_SIZE)
			found = pfn;
	}
	fclose(file);

	return found;
}

/* Have the vCPU read @nr pages, and get to know them.  Returns false if that can't be. */
static bool read_and_trace(struct kvm_vcpu *vcpu, u64 nr, u64 *pfns)
{
	const char *dir = trace_create();
	u64 i;

	if (!dir)
		return false;

	trace_write(dir, "set_event_pid", getpid());
	trace_write(dir, TRACE_EVENT, 1);
	for (i = 0; i < nr; i++) {
		agent_do(vcpu, AGENT_READ, page_gpa(i), 0);
		pfns[i] = traced_pfn(dir, page_gpa(i));
	}
	trace_write(dir, TRACE_EVENT, 0);
	trace_remove(dir);

	for (i = 0; i < nr; i++)
		TEST_ASSERT(pfns[i], "KVM did not say what it has mapped for page %lu", i);
	return true;
}

static void break_page(int fd, u64 pfn)
{
	/* EBUSY: it is broken, and still in use. */
	TEST_ASSERT(dprintf(fd, "%#lx", pfn) > 0 || errno == EBUSY,
		    "Cannot break page %#lx, errno %d", pfn, errno);
}

static void expect_hwpoison(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	int ret = _vcpu_run(vcpu);

	TEST_ASSERT(ret == -1 && errno == EHWPOISON, KVM_IOCTL_ERROR(KVM_RUN, ret));
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.flags, KVM_MEMORY_EXIT_FLAG_PRIVATE);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.gpa, gpa);
}

/*
 * Nobody can map private memory and use MADV_HWPOISON: its pages break by number.  One
 * does while it is mapped, and one while it is armed, which comes first.
 */
userfault_test(private, hwpoisoned_private_pages)
{
	u64 flags = USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE;
	int fd = open(HWPOISON_FILE, O_WRONLY);
	u64 pfns[2];

	if (fd < 0)
		SKIP(return, "The kernel has no CONFIG_HWPOISON_INJECT, or not for us");

	vm_change_attributes(self->vm, page_gpa(0), 3 * PAGE_SIZE, PRIVATE, 0);
	if (!read_and_trace(self->vcpu, 2, pfns))
		SKIP(return, "There is no tracefs, or not for us");

	vm_userfault_arm(self->vm, page_gpa(1), PAGE_SIZE);
	break_page(fd, pfns[0]);
	break_page(fd, pfns[1]);
	close(fd);

	agent_request(self->vcpu, AGENT_READ, page_gpa(0), 0);
	expect_hwpoison(self->vcpu, page_gpa(0));
	vm_userfault_arm(self->vm, page_gpa(0), PAGE_SIZE);
	vcpu_run_expect_userfault(self->vcpu, page_gpa(0), flags);
	vm_userfault_clear(self->vm, page_gpa(0), PAGE_SIZE);
	expect_hwpoison(self->vcpu, page_gpa(0));

	/* Without the page, there is no poison. */
	vm_guest_mem_punch_hole(self->vm, page_gpa(0), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(1), 0, page_gpa(1), flags);
	vm_userfault_clear(self->vm, page_gpa(1), PAGE_SIZE);
	expect_hwpoison(self->vcpu, page_gpa(1));
	vm_userfault_arm(self->vm, page_gpa(1), PAGE_SIZE);
	vm_guest_mem_punch_hole(self->vm, page_gpa(1), PAGE_SIZE);
	vcpu_run_expect_userfault(self->vcpu, page_gpa(1), flags);
	vm_userfault_clear(self->vm, page_gpa(1), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(2), 0), private_content(2));
}

/* A page that is there, so that a read could map it without a call of ->fault(). */
static void assert_host_cannot_read(int fd)
{
	u8 *mem = kvm_mmap(PAGE_SIZE, PROT_READ, MAP_SHARED, fd);

	TEST_EXPECT_SIGBUS((void)READ_ONCE(*mem));
	kvm_munmap(mem, PAGE_SIZE);
}

/*
 * A VM with private memory can have files that can be mapped, too, but none whose
 * memory is shared: the slot has no other memory, and all of it is private.
 */
userfault_test(private, file_that_can_be_mapped)
{
	u64 flags = USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE;
	u64 supported = vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_FLAGS);
	int fd;

	if (!(supported & GUEST_MEMFD_FLAG_MMAP))
		SKIP(return, "There is no guest_memfd that can be mapped");

	TEST_ASSERT_EQ(supported, GUEST_MEMFD_FLAG_MMAP);
	fd = vm_create_guest_memfd(self->vm, PAGE_SIZE, GUEST_MEMFD_FLAG_MMAP);
	vm_mem_add(self->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT, 1,
		   KVM_MEM_GUEST_MEMFD, fd, 0);
	agent_map(self->vm, OTHER_GPA, OTHER_GPA, PAGE_SIZE);
	vm_change_attributes(self->vm, OTHER_GPA, PAGE_SIZE, PRIVATE | USERFAULT, 0);

	agent_expect_userfault(self->vcpu, AGENT_READ, OTHER_GPA, 0, OTHER_GPA, flags);
	vm_userfault_clear(self->vm, OTHER_GPA, PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
	agent_do(self->vcpu, AGENT_WRITE, OTHER_GPA, 77);
	assert_host_cannot_read(fd);

	/* Mapped by now, and armed once more. */
	vm_userfault_arm(self->vm, OTHER_GPA, PAGE_SIZE);
	assert_host_cannot_read(fd);
	agent_expect_userfault(self->vcpu, AGENT_READ, OTHER_GPA, 0, OTHER_GPA, flags);
	vm_userfault_clear(self->vm, OTHER_GPA, PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 77);
	close(fd);
}

/* Other exits are what they were: this one has no bit for the access. */
userfault_test(private, other_exits_are_unchanged)
{
	gpa_t gpa = page_gpa(NR_PAGES);
	int ret;

	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, gpa, AGENT_SLOT + 1, 1, 0);
	vm_change_attributes(self->vm, gpa, PAGE_SIZE, PRIVATE,
			     KVM_MEMORY_ATTRIBUTES_SET);

	agent_request(self->vcpu, AGENT_READ, gpa, 0);
	ret = _vcpu_run(self->vcpu);
	TEST_ASSERT(ret == -1 && errno == EFAULT, KVM_IOCTL_ERROR(KVM_RUN, ret));
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(self->vcpu->run->memory_fault.flags, KVM_MEMORY_EXIT_FLAG_PRIVATE);
	TEST_ASSERT_EQ(self->vcpu->run->memory_fault.gpa, gpa);
}

static u64 guest_read_at_rdi(u64 gva)
{
	u64 val;

	asm volatile("mov (%1), %0" : "=r"(val) : "D"(gva) : "memory");
	return val;
}

/* Let the guest read something else than what it was about to read, where it is. */
static void redirect(struct kvm_vcpu *vcpu, gva_t from, gva_t to)
{
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	TEST_ASSERT_EQ(regs.rdi, from);
	regs.rdi = to;
	vcpu_regs_set(vcpu, &regs);
}

/*
 * KVM can't map the page that it has reported, as there is no private memory.  That is
 * the reason for an exit only if the guest comes back to that page.
 */
userfault_test(private, other_exits_after_a_userfault)
{
	gpa_t gpa = page_gpa(NR_PAGES);
	int ret;

	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, gpa, OTHER_SLOT, 1, 0);
	vm_userfault_arm(self->vm, gpa, PAGE_SIZE);
	agent_expect_userfault(self->vcpu, AGENT_EXEC, (gva_t)guest_read_at_rdi, gpa, gpa,
			       USERFAULT_READ);
	vm_change_attributes(self->vm, gpa, PAGE_SIZE, PRIVATE, 0);

	TEST_ASSERT(!mprotect(self->hva, PAGE_SIZE, PROT_NONE), "errno %d", errno);
	redirect(self->vcpu, gpa, AGENT_GPA);
	ret = _vcpu_run(self->vcpu);
	TEST_ASSERT(ret == -1 && errno == EFAULT, KVM_IOCTL_ERROR(KVM_RUN, ret));
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_UNKNOWN);
}

/*
 * Mappings, by the counters.
 */

FIXTURE(small) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
};

FIXTURE_SETUP(small)
{
	self->vm = agent_create_vm_with_memory(VM_MEM_SRC_ANONYMOUS, NR_PAGES,
					       &self->vcpu);
}

FIXTURE_TEARDOWN(small)
{
	kvm_vm_free(self->vm);
}

userfault_test(small, arming_unmaps_exactly_the_range)
{
	u64 before;

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);

	before = vm_get_stat(self->vm, pages_4k);
	vm_userfault_arm(self->vm, page_gpa(7), PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), before - 1);

	/* What is armed already has no mapping to lose. */
	vm_userfault_arm(self->vm, page_gpa(7), PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), before - 1);

	vm_userfault_arm(self->vm, page_gpa(20), 9 * PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), before - 10);
}

userfault_test(small, clearing_unmaps_nothing)
{
	u64 before;

	vm_userfault_arm(self->vm, page_gpa(7), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, 7), 0);

	before = vm_get_stat(self->vm, pages_4k);
	vm_userfault_clear(self->vm, AGENT_GPA, NR_PAGES * PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), before);
}

/*
 * Coming back from an exit.
 */

static void expect_userfault_of_page_7(struct kvm_vcpu *vcpu)
{
	/* All that the access needs but the page is there. */
	agent_do(vcpu, AGENT_READ, page_gpa(6), 0);

	vm_userfault_arm(vcpu->vm, page_gpa(7), PAGE_SIZE);
	agent_expect_userfault(vcpu, AGENT_READ, page_gpa(7), 0, page_gpa(7), USERFAULT_READ);
}

/* The fault that was reported is the last one for the page. */
userfault_test(small, resolved_page_is_mapped_at_once)
{
	u64 before;

	if (!kvm_is_tdp_enabled())
		SKIP(return, "Shadow paging takes a second fault");

	expect_userfault_of_page_7(self->vcpu);
	before = vcpu_get_stat(self->vcpu, pf_taken);
	vm_userfault_clear(self->vm, page_gpa(7), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(7)));
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, pf_taken), before);
}

/* What is mapped at once can be armed, too. */
userfault_test(small, resolved_page_is_armed_again)
{
	expect_userfault_of_page_7(self->vcpu);
	vm_userfault_clear(self->vm, page_gpa(7), PAGE_SIZE);
	agent_finish(self->vcpu);
	vm_userfault_arm(self->vm, page_gpa(7), PAGE_SIZE);
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(7), 0, page_gpa(7),
			       USERFAULT_READ);
}

/* The vCPU comes back to something else than what it left. */
userfault_test(small, memslot_goes_before_the_vcpu_is_back)
{
	expect_userfault_of_page_7(self->vcpu);
	vm_userfault_clear(self->vm, page_gpa(7), PAGE_SIZE);
	vm_mem_region_delete(self->vm, AGENT_SLOT);
	TEST_ASSERT_EQ(agent_run(self->vcpu), AGENT_OTHER);
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT_EQ(self->vcpu->run->mmio.phys_addr, page_gpa(7));
}

FIXTURE(huge) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
};

#define NR_BLOCKS	3
#define BLOCK_PAGES	(SZ_2M / PAGE_SIZE)

FIXTURE_SETUP(huge)
{
	if (!has_hugetlb(SZ_2M, NR_BLOCKS))
		SKIP(return, "6 MiB of reserved 2 MiB pages are needed");

	self->vm = agent_create_vm_with_memory(VM_MEM_SRC_ANONYMOUS_HUGETLB_2MB,
					       NR_BLOCKS * BLOCK_PAGES, &self->vcpu);
}

FIXTURE_TEARDOWN(huge)
{
	kvm_vm_free(self->vm);
}

static void sweep(struct kvm_vcpu *vcpu)
{
	TEST_ASSERT_EQ(agent_do(vcpu, AGENT_CHECK, AGENT_GPA, NR_BLOCKS * BLOCK_PAGES), 0);
}

static void resolve_all(struct kvm_vcpu *vcpu)
{
	u64 i;

	agent_request(vcpu, AGENT_CHECK, AGENT_GPA, NR_BLOCKS * BLOCK_PAGES);
	for (i = 0; i < NR_BLOCKS * BLOCK_PAGES; i++) {
		vcpu_run_expect_userfault(vcpu, page_gpa(i), USERFAULT_READ);
		vm_userfault_clear(vcpu->vm, page_gpa(i), PAGE_SIZE);
	}
	TEST_ASSERT_EQ(agent_finish(vcpu), 0);
}

static void assert_recovered(struct kvm_vcpu *vcpu)
{
	if (!recovers_in_place())
		sweep(vcpu);
	TEST_ASSERT_EQ(vm_get_stat(vcpu->vm, pages_2m), NR_BLOCKS);
}

userfault_test(huge, enabling_changes_no_mapping)
{
	vm_userfault_disable(self->vm);
	sweep(self->vcpu);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), NR_BLOCKS);

	vm_userfault_enable(self->vm);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), NR_BLOCKS);
	vm_userfault_arm(self->vm, AGENT_GPA + NR_BLOCKS * SZ_2M, PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), NR_BLOCKS);
}

userfault_test(huge, arming_unmaps_one_block)
{
	u64 small;

	sweep(self->vcpu);
	small = vm_get_stat(self->vm, pages_4k);

	vm_userfault_arm(self->vm, AGENT_GPA + SZ_2M + SZ_1M, PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), NR_BLOCKS - 1);
	TEST_ASSERT(vm_get_stat(self->vm, pages_4k) <= small + BLOCK_PAGES - 1,
		    "The page that is armed is still mapped");
}

userfault_test(huge, clean_blocks_are_mapped_huge)
{
	gpa_t armed = AGENT_GPA + SZ_2M + SZ_1M;

	vm_userfault_arm(self->vm, armed, PAGE_SIZE);
	TEST_ASSERT(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, BLOCK_PAGES) == 0 &&
		    agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA + 2 * SZ_2M, BLOCK_PAGES) == 0 &&
		    agent_do(self->vcpu, AGENT_CHECK, armed - SZ_1M, BLOCK_PAGES / 2) == 0,
		    "The guest read what is not in its memory");
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), NR_BLOCKS - 1);

	TEST_ASSERT(agent_probe(self->vcpu, armed, armed, USERFAULT_READ),
		    "A page was mapped as part of a block");
}

/* The last fault of a block finds all of it clean, and maps all of it. */
userfault_test(huge, complete_blocks_are_mapped_huge)
{
	u64 small;

	vm_userfault_arm(self->vm, AGENT_GPA, NR_BLOCKS * SZ_2M);
	small = vm_get_stat(self->vm, pages_4k);
	resolve_all(self->vcpu);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), NR_BLOCKS);

	/* Only shadow pages outlive being replaced by a huge mapping. */
	if (recovers_in_place())
		TEST_ASSERT(vm_get_stat(self->vm, pages_4k) < small + BLOCK_PAGES,
			    "Small mappings are left behind");
}

/* Map all of each block but its first page, which is armed, page by page. */
static void map_small(struct kvm_vcpu *vcpu)
{
	u64 i;

	for (i = 0; i < NR_BLOCKS; i++) {
		vm_userfault_arm(vcpu->vm, AGENT_GPA + i * SZ_2M, PAGE_SIZE);
		TEST_ASSERT_EQ(agent_do(vcpu, AGENT_CHECK,
					AGENT_GPA + i * SZ_2M + PAGE_SIZE,
					BLOCK_PAGES - 1), 0);
	}
	TEST_ASSERT_EQ(vm_get_stat(vcpu->vm, pages_2m), 0);
}

/* What is clean by now is huge at once, without anything that faults. */
userfault_test(huge, disabling_recovers)
{
	u64 small;

	map_small(self->vcpu);
	vm_userfault_clear(self->vm, AGENT_GPA, NR_BLOCKS * SZ_2M);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), 0);
	small = vm_get_stat(self->vm, pages_4k);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k),
		       small - NR_BLOCKS * (BLOCK_PAGES - 1));
	assert_recovered(self->vcpu);
	sweep(self->vcpu);
}

/* One page of each block was never filled, and it is nobody's loss. */
userfault_test(huge, disabling_with_armed_pages_recovers)
{
	map_small(self->vcpu);
	vm_userfault_disable(self->vm);
	assert_recovered(self->vcpu);
	sweep(self->vcpu);
}

#define DISABLE_MSECS	3000

struct sweeper {
	struct kvm_vcpu *vcpu;
	bool stop;
	u64 nr;
};

/* A page that is armed will be there when it is clear. */
static void sweep_fn(void *arg)
{
	struct sweeper *sweeper = arg;
	enum agent_exit exit;

	while (!READ_ONCE(sweeper->stop)) {
		agent_request(sweeper->vcpu, AGENT_CHECK, AGENT_GPA,
			      NR_BLOCKS * BLOCK_PAGES);
		while ((exit = agent_run(sweeper->vcpu)) == AGENT_USERFAULT)
			usleep(200);
		TEST_ASSERT_EQ(exit, AGENT_DONE);
		TEST_ASSERT_EQ(agent_result(sweeper->vcpu), 0);
		WRITE_ONCE(sweeper->nr, sweeper->nr + 1);
	}
}

/* What the guest was just about to have mapped small is huge in the end, too. */
static void disable_while_sweeping(struct kvm_vm *vm, struct sweeper *sweeper,
				   useconds_t delay)
{
	u64 nr;

	vm_userfault_arm(vm, AGENT_GPA + NR_BLOCKS * SZ_2M - PAGE_SIZE, PAGE_SIZE);
	usleep(delay);
	vm_userfault_disable(vm);

	nr = READ_ONCE(sweeper->nr);
	userfault_wait_until(READ_ONCE(sweeper->nr) >= nr + 2);
	TEST_ASSERT_EQ(vm_get_stat(vm, pages_2m), NR_BLOCKS);
	vm_userfault_enable(vm);
}

userfault_test(huge, disabling_while_the_guest_faults)
{
	struct kvm_random_state rng = new_kvm_random_state(1);
	u64 end = userfault_now_ms() + DISABLE_MSECS, nr = 0;
	struct sweeper sweeper = { .vcpu = self->vcpu };
	struct waiter waiter;

	waiter_start(&waiter, sweep_fn, &sweeper);
	for (; userfault_now_ms() < end; nr++)
		disable_while_sweeping(self->vm, &sweeper, kvm_random_u32(&rng) % 10000);
	WRITE_ONCE(sweeper.stop, true);
	waiter_join(&waiter);
	pr_info("# %lu times off and on\n", nr);
}

/* The log needs small pages: they stay until it is switched off. */
userfault_test(huge, dirty_logging_defers_recovery)
{
	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_BLOCKS * SZ_2M);
	resolve_all(self->vcpu);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), 0);
	sweep(self->vcpu);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), 0);

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, 0);
	assert_recovered(self->vcpu);
	sweep(self->vcpu);
}

/* Switching the log off while a page is armed recovers the other blocks. */
userfault_test(huge, dirty_logging_recovers_clean_blocks)
{
	gpa_t armed = AGENT_GPA + SZ_2M;

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	sweep(self->vcpu);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), 0);
	vm_userfault_arm(self->vm, armed, PAGE_SIZE);

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, BLOCK_PAGES), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA + 2 * SZ_2M,
				BLOCK_PAGES), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, armed + PAGE_SIZE,
				BLOCK_PAGES - 1), 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), NR_BLOCKS - 1);
	TEST_ASSERT(agent_probe(self->vcpu, armed, armed, USERFAULT_READ),
		    "A page was recovered as part of a block");
}

/*
 * KVM_PRE_FAULT_MEMORY.
 */

static bool can_pre_fault(void)
{
	return kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY) && kvm_is_tdp_enabled();
}

/* What is in vcpu->run must not change: there is no exit that would explain it. */
static void pre_fault(struct kvm_vcpu *vcpu, struct kvm_pre_fault_memory *range,
		      int expected_errno)
{
	struct kvm_run before;
	int ret;

	vcpu->run->exit_reason = KVM_EXIT_UNKNOWN;
	memset(&vcpu->run->memory_fault, 0x5a, sizeof(vcpu->run->memory_fault));
	before = *vcpu->run;

	do {
		ret = __vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, range);
	} while (ret && errno == EINTR);

	TEST_ASSERT(expected_errno ? ret == -1 && errno == expected_errno : !ret,
		    "Expected errno %d, KVM_PRE_FAULT_MEMORY returned %d, errno %d",
		    expected_errno, ret, errno);
	TEST_ASSERT_EQ(vcpu->run->exit_reason, before.exit_reason);
	TEST_ASSERT(!memcmp(&vcpu->run->memory_fault, &before.memory_fault,
			    sizeof(before.memory_fault)),
		    "KVM_PRE_FAULT_MEMORY wrote an exit");
}

static void assert_pre_fault_left(struct kvm_pre_fault_memory *range, gpa_t gpa,
				  u64 size)
{
	TEST_ASSERT_EQ(range->gpa, gpa);
	TEST_ASSERT_EQ(range->size, size);
}

userfault_test(small, pre_fault_stops_at_an_armed_page)
{
	struct kvm_pre_fault_memory range = {
		.gpa = AGENT_GPA,
		.size = NR_PAGES * PAGE_SIZE,
	};
	u64 before;

	if (!can_pre_fault())
		SKIP(return, "KVM_PRE_FAULT_MEMORY is not available");

	vm_userfault_arm(self->vm, page_gpa(5), PAGE_SIZE);
	before = vm_get_stat(self->vm, pages_4k);

	pre_fault(self->vcpu, &range, 0);
	assert_pre_fault_left(&range, page_gpa(5), (NR_PAGES - 5) * PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), before + 5);

	pre_fault(self->vcpu, &range, EFAULT);
	assert_pre_fault_left(&range, page_gpa(5), (NR_PAGES - 5) * PAGE_SIZE);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), before + 5);

	vm_userfault_clear(self->vm, page_gpa(5), PAGE_SIZE);
	pre_fault(self->vcpu, &range, 0);
	assert_pre_fault_left(&range, page_gpa(NR_PAGES), 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), before + NR_PAGES);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

userfault_test(small, pre_fault_leaves_the_page_armed)
{
	struct kvm_pre_fault_memory range = {
		.gpa = AGENT_GPA,
		.size = PAGE_SIZE,
	};

	if (!can_pre_fault())
		SKIP(return, "KVM_PRE_FAULT_MEMORY is not available");

	vm_userfault_arm(self->vm, AGENT_GPA, PAGE_SIZE);
	pre_fault(self->vcpu, &range, EFAULT);
	assert_pre_fault_left(&range, AGENT_GPA, PAGE_SIZE);
	TEST_ASSERT(agent_probe(self->vcpu, AGENT_GPA, AGENT_GPA, USERFAULT_READ),
		    "KVM_PRE_FAULT_MEMORY mapped an armed page");
}

/* What the ioctl maps is as large as it may be, and no larger. */
userfault_test(huge, pre_fault_maps_no_armed_page)
{
	struct kvm_pre_fault_memory range = {
		.gpa = AGENT_GPA,
		.size = 2 * SZ_2M,
	};
	gpa_t armed = page_gpa(BLOCK_PAGES + 5);

	if (!can_pre_fault())
		SKIP(return, "KVM_PRE_FAULT_MEMORY is not available");

	vm_userfault_arm(self->vm, armed, PAGE_SIZE);

	pre_fault(self->vcpu, &range, 0);
	assert_pre_fault_left(&range, armed, 2 * SZ_2M - (armed - AGENT_GPA));
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), 1);

	range.gpa += PAGE_SIZE;
	range.size -= PAGE_SIZE;
	pre_fault(self->vcpu, &range, 0);
	assert_pre_fault_left(&range, AGENT_GPA + 2 * SZ_2M, 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_2m), 1);

	TEST_ASSERT(agent_probe(self->vcpu, armed, armed, USERFAULT_READ),
		    "KVM_PRE_FAULT_MEMORY mapped an armed page");
	sweep(self->vcpu);
}

userfault_test(private, pre_fault_stops_at_an_armed_page)
{
	struct kvm_pre_fault_memory range = {
		.gpa = AGENT_GPA,
		.size = 4 * PAGE_SIZE,
	};

	if (!can_pre_fault())
		SKIP(return, "KVM_PRE_FAULT_MEMORY is not available");

	vm_change_attributes(self->vm, AGENT_GPA, 4 * PAGE_SIZE, PRIVATE,
			     KVM_MEMORY_ATTRIBUTES_SET);
	vm_userfault_arm(self->vm, page_gpa(2), PAGE_SIZE);

	pre_fault(self->vcpu, &range, 0);
	assert_pre_fault_left(&range, page_gpa(2), 2 * PAGE_SIZE);
	pre_fault(self->vcpu, &range, EFAULT);
	assert_pre_fault_left(&range, page_gpa(2), 2 * PAGE_SIZE);
	assert_page_state(self->vcpu, 2, true, true);
}

/*
 * The second address space: memory that only the SMI handler sees.
 */

#define SMRAM_GPA		0x1000000
#define SMM_GPA			0xc0000000
#define SMM_PORT		0xe
#define SMM_AS_SLOT(slot)	((1 << 16) | (slot))

FIXTURE(smm) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	u8 *smm_hva;
};

/* In real mode: report the byte at SMM_GPA. */
static const u8 smi_handler[] = {
	0x67, 0xa0, 0x00, 0x00, 0x00, 0xc0,	/* addr32 mov SMM_GPA, %al */
	0xe4, SMM_PORT,				/* in $SMM_PORT, %al */
	0x0f, 0xaa,				/* rsm */
};

FIXTURE_SETUP(smm)
{
	if (!kvm_has_cap(KVM_CAP_X86_SMM))
		SKIP(return, "There is no SMM");

	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);
	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, SMM_GPA, AGENT_SLOT, 1, 0);
	setup_smram(self->vm, self->vcpu, SMRAM_GPA, smi_handler, sizeof(smi_handler));

	self->smm_hva = kvm_mmap(PAGE_SIZE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1);
	memset(self->smm_hva, 0x22, PAGE_SIZE);
	vm_set_user_memory_region(self->vm, SMM_AS_SLOT(AGENT_SLOT), 0, SMM_GPA,
				  PAGE_SIZE, self->smm_hva);
	vm_userfault_enable(self->vm);
}

FIXTURE_TEARDOWN(smm)
{
	kvm_vm_free(self->vm);
	kvm_munmap(self->smm_hva, PAGE_SIZE);
}

/* The SMI comes first, and the access is performed when its handler is done. */
static void request_with_smi(struct kvm_vcpu *vcpu, gva_t gva)
{
	agent_request(vcpu, AGENT_READ, gva, 0);
	inject_smi(vcpu);
}

static void expect_smi_report(struct kvm_vcpu *vcpu, u8 content)
{
	struct kvm_regs regs;

	TEST_ASSERT_EQ(agent_run(vcpu), AGENT_OTHER);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(vcpu->run->io.port, SMM_PORT);
	vcpu_regs_get(vcpu, &regs);
	TEST_ASSERT_EQ(regs.rax & 0xff, content);
}

static void assert_faults_in_smm(struct kvm_vcpu *vcpu, u8 *smm_hva)
{
	request_with_smi(vcpu, SMM_GPA + PAGE_SIZE / 2);
	vcpu_run_expect_userfault(vcpu, SMM_GPA, USERFAULT_READ);
	TEST_ASSERT(vcpu->run->flags & KVM_RUN_X86_SMM,
		    "The fault is not that of the SMI handler");

	memset(smm_hva, 0x33, PAGE_SIZE);
	vm_userfault_clear(vcpu->vm, SMM_GPA, PAGE_SIZE);
	expect_smi_report(vcpu, 0x33);
	TEST_ASSERT_EQ(agent_finish(vcpu), agent_page_content(SMM_GPA));
}

userfault_test(smm, armed_before_it_is_mapped)
{
	vm_userfault_arm(self->vm, SMM_GPA, PAGE_SIZE);
	assert_faults_in_smm(self->vcpu, self->smm_hva);
}

/* Mapped by the SMI handler alone, so nothing else makes KVM unmap it. */
userfault_test(smm, armed_while_it_is_mapped)
{
	request_with_smi(self->vcpu, (gva_t)&smi_handler);
	expect_smi_report(self->vcpu, 0x22);
	agent_finish(self->vcpu);

	vm_userfault_arm(self->vm, SMM_GPA, PAGE_SIZE);
	assert_faults_in_smm(self->vcpu, self->smm_hva);
}

/* The attribute has no address space: both uses of the address are armed. */
userfault_test(smm, armed_in_both_address_spaces)
{
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, SMM_GPA, 1), 0);
	request_with_smi(self->vcpu, SMM_GPA);
	expect_smi_report(self->vcpu, 0x22);
	agent_finish(self->vcpu);

	vm_userfault_arm(self->vm, SMM_GPA, PAGE_SIZE);
	TEST_ASSERT(agent_probe(self->vcpu, SMM_GPA, SMM_GPA, USERFAULT_READ),
		    "Not armed outside of SMM");

	vm_userfault_arm(self->vm, SMM_GPA, PAGE_SIZE);
	assert_faults_in_smm(self->vcpu, self->smm_hva);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, SMM_GPA, 1), 0);
}

/*
 * Nested guests.
 */

/* Where L2 has the memory of which L1 says that it is at AGENT_GPA. */
#define L2_GPA			(AGENT_GPA + SZ_4G)

FIXTURE(nested) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
	gva_t l2_gva;
};

FIXTURE_VARIANT(nested) {
	bool tdp;
};

FIXTURE_VARIANT_ADD(nested, shadow) {
	.tdp = false,
};

FIXTURE_VARIANT_ADD(nested, tdp) {
	.tdp = true,
};

static void l2_guest_code(void)
{
	agent_guest_code(0);
}

static void l1_guest_code(void *data)
{
	struct svm_test_data *svm = data;
	struct vmx_pages *vmx = data;

	if (this_cpu_has(X86_FEATURE_VMX)) {
		GUEST_ASSERT(prepare_for_vmx_operation(vmx));
		GUEST_ASSERT(load_vmcs(vmx));
		prepare_vmcs(vmx, l2_guest_code);
		GUEST_ASSERT(!vmlaunch());
	} else {
		generic_svm_setup(svm, l2_guest_code);
		run_guest(svm->vmcb, svm->vmcb_gpa);
	}
	GUEST_FAIL("L2 must not exit to L1");
}

FIXTURE_SETUP(nested)
{
	gva_t nested_gva;

	if (!kvm_cpu_has(X86_FEATURE_VMX) && !kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There are no nested guests");
	if (variant->tdp && !kvm_cpu_has_tdp())
		SKIP(return, "There is no nested TDP");

	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);
	vcpu_arch_set_entry_point(self->vcpu, l1_guest_code);
	if (variant->tdp)
		vm_enable_tdp(self->vm);
	if (kvm_cpu_has(X86_FEATURE_VMX))
		vcpu_alloc_vmx(self->vm, &nested_gva);
	else
		vcpu_alloc_svm(self->vm, &nested_gva);
	vcpu_args_set(self->vcpu, 1, nested_gva);

	self->hva = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA,
				     AGENT_SLOT, NR_PAGES, 0);
	self->l2_gva = AGENT_GPA;
	if (variant->tdp) {
		self->l2_gva = L2_GPA;
		agent_fill(self->hva, L2_GPA, NR_PAGES);
		virt_map(self->vm, L2_GPA, L2_GPA, NR_PAGES);
		tdp_identity_map_default_memslots(self->vm);
		tdp_map(self->vm, L2_GPA, AGENT_GPA, NR_PAGES * PAGE_SIZE);
	}
	vm_userfault_enable(self->vm);
}

FIXTURE_TEARDOWN(nested)
{
	kvm_vm_free(self->vm);
}

/* The address is the one that the VMM knows, not the one that L1 invented. */
userfault_test(nested, every_access_is_reported)
{
	gva_t gva = self->l2_gva;
	u8 *code = self->hva;

	code[2 * PAGE_SIZE] = 0xc3;
	vm_userfault_arm(self->vm, AGENT_GPA, 3 * PAGE_SIZE);

	agent_expect_userfault(self->vcpu, AGENT_READ, gva, 0, page_gpa(0),
			       USERFAULT_READ);
	vm_userfault_clear(self->vm, page_gpa(0), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(gva));

	agent_expect_userfault(self->vcpu, AGENT_WRITE, gva + PAGE_SIZE, 7, page_gpa(1),
			       USERFAULT_WRITE);
	vm_userfault_clear(self->vm, page_gpa(1), PAGE_SIZE);
	agent_finish(self->vcpu);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + PAGE_SIZE), 7);

	agent_expect_userfault(self->vcpu, AGENT_EXEC, gva + 2 * PAGE_SIZE, 0,
			       page_gpa(2), USERFAULT_EXEC);
	vm_userfault_clear(self->vm, page_gpa(2), PAGE_SIZE);
	agent_finish(self->vcpu);
}

userfault_test(nested, arming_mapped_memory)
{
	gva_t gva = self->l2_gva;

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, gva, NR_PAGES), 0);
	vm_userfault_arm(self->vm, page_gpa(9), PAGE_SIZE);
	memset(self->hva + 9 * PAGE_SIZE, 0xdb, PAGE_SIZE);

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, gva, 9), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, gva + 10 * PAGE_SIZE,
				NR_PAGES - 10), 0);

	agent_expect_userfault(self->vcpu, AGENT_READ, gva + 9 * PAGE_SIZE, 0,
			       page_gpa(9), USERFAULT_READ);
	agent_fill(self->hva + 9 * PAGE_SIZE, gva + 9 * PAGE_SIZE, 1);
	vm_userfault_clear(self->vm, page_gpa(9), PAGE_SIZE);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(gva + 9 * PAGE_SIZE));
}

/* KVM maps L2's memory by shadow paging, which takes neighbours along. */
userfault_test(nested, neighbours_are_not_mapped_along)
{
	gva_t gva = self->l2_gva;
	u64 i;

	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, gva, NR_PAGES), 0);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * PAGE_SIZE);
	for (i = 0; i < NR_PAGES; i += 2)
		vm_userfault_clear(self->vm, page_gpa(i), PAGE_SIZE);

	for (i = 0; i < NR_PAGES; i += 2)
		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, gva + i * PAGE_SIZE,
					1), 0);
	for (i = 1; i < NR_PAGES; i += 2)
		TEST_ASSERT(agent_probe(self->vcpu, gva + i * PAGE_SIZE, page_gpa(i),
					USERFAULT_READ),
			    "Page %lu was mapped along with a neighbour", i);
}

/*
 * KVM's own memslots.
 */

static void apic_guest_code(void)
{
	xapic_enable();
	for (;;)
		GUEST_SYNC(xapic_read_reg(APIC_LVR));
}

/* Whether there is such a memslot for the page of the APIC, which a guest maps. */
static bool has_apic_access_page(void)
{
	if (host_cpu_is_intel)
		return get_kvm_intel_param_bool("flexpriority");

	return get_kvm_amd_param_bool("avic");
}

/* Userspace has no way to fill them, so arming them means nothing. */
TEST(internal_memslots_are_exempt)
{
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct ucall uc;
	u64 version;

	if (!has_apic_access_page())
		SKIP(return, "No memslot of KVM's own without VMX's flexpriority or AVIC");

	vm = vm_create_with_one_vcpu(&vcpu, apic_guest_code);
	virt_pg_map(vm, APIC_DEFAULT_GPA, APIC_DEFAULT_GPA);
	vm_ioctl(vm, KVM_SET_TSS_ADDR, (void *)0xfffbd000ul);
	vm_userfault_enable(vm);

	vm_userfault_arm(vm, APIC_DEFAULT_GPA, PAGE_SIZE);
	vm_userfault_arm(vm, 0xfffbc000ul, 4 * PAGE_SIZE);
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	version = uc.args[1];

	/* Mapped now, and armed once more. */
	vm_userfault_clear(vm, APIC_DEFAULT_GPA, PAGE_SIZE);
	vm_userfault_arm(vm, APIC_DEFAULT_GPA, PAGE_SIZE);
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	TEST_ASSERT_EQ(uc.args[1], version);
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, userfault_exits), 0);

	kvm_vm_free(vm);
}

/*
 * KVM's own accesses.
 */

#define OUTS_PORT	0x80

static void outs_guest_code(void)
{
	u64 page = AGENT_GPA;

	asm volatile("outsb" : "+S"(page) : "d"(OUTS_PORT) : "memory");
	GUEST_SYNC(READ_ONCE(*(u64 *)AGENT_GPA));
}

/*
 * String I/O is emulated: it is KVM that reads the memory, which is as before,
 * while the guest's own access to the same page is a userfault.
 */
TEST(accesses_of_kvm_are_not_intercepted)
{
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	struct ucall uc;
	u8 *data;

	vm = vm_create_with_one_vcpu(&vcpu, outs_guest_code);
	agent_add_memory(vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA, AGENT_SLOT, 1, 0);
	vm_userfault_enable(vm);
	vm_userfault_arm(vm, AGENT_GPA, PAGE_SIZE);

	vcpu_run(vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(vcpu->run->io.port, OUTS_PORT);
	data = (u8 *)vcpu->run + vcpu->run->io.data_offset;
	TEST_ASSERT_EQ(*data, agent_page_content(AGENT_GPA) & 0xff);

	vcpu_run_expect_userfault(vcpu, AGENT_GPA, USERFAULT_READ);
	vm_userfault_clear(vm, AGENT_GPA, PAGE_SIZE);
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	TEST_ASSERT_EQ(uc.args[1], agent_page_content(AGENT_GPA));

	kvm_vm_free(vm);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));

	return test_harness_run(argc, argv);
}
