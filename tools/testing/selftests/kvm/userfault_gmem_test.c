// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault on a guest_memfd that can be mapped: one function per
 * rule.
 *
 * The memory starts with no page in the file.  Whether there is one is what
 * mincore() tells, without allocating it, of pages that were filled or cleared;
 * that there is one which was just allocated is what write() tells, by EEXIST.
 */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "userfaultfd_util.h"

#define GMEM_PAGES		32
#define NR_VCPUS		2

#define OTHER_SLOT		(AGENT_SLOT + 1)
#define OTHER_GPA		(AGENT_GPA + SZ_1G)

/* What freed memory is full of, which no page may ever show. */
#define STALE_BYTE		0xa5

static u64 page_size;

FIXTURE(gmem) {
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	u64 size;
	u8 *hva;
	int fd;
};

#define gmem_data FIXTURE_DATA(gmem)

static bool can_write(void)
{
	return kvm_has_guest_memfd_flags(GUEST_MEMFD_FLAG_WRITE);
}

FIXTURE_SETUP(gmem)
{
	u64 flags = MAPPABLE_GUEST_MEMFD_FLAGS;

	if (can_write())
		flags |= GUEST_MEMFD_FLAG_WRITE;

	self->size = GMEM_PAGES * page_size;
	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, NR_VCPUS, self->vcpus);
	self->vcpu = self->vcpus[0];
	self->fd = vm_create_guest_memfd(self->vm, self->size, flags);
	vm_mem_add(self->vm, VM_MEM_SRC_GUEST_MEMFD, AGENT_GPA, AGENT_SLOT,
		   self->size / self->vm->page_size, 0, self->fd, 0);
	agent_map(self->vm, AGENT_GPA, AGENT_GPA, self->size);
	self->hva = memslot2region(self->vm, AGENT_SLOT)->host_mem;
	vm_userfault_enable(self->vm);
}

FIXTURE_TEARDOWN(gmem)
{
	if (self->fd >= 0)
		close(self->fd);
	kvm_vm_free(self->vm);
}

static u8 *hva_page(gmem_data *self, u64 page)
{
	return self->hva + page * page_size;
}

static bool is_in_file(gmem_data *self, u64 page)
{
	unsigned char vec;

	TEST_ASSERT(!mincore(hva_page(self, page), page_size, &vec),
		    "mincore() failed, errno %d", errno);
	return vec & 1;
}

static void assert_in_file(gmem_data *self, u64 page, bool expected)
{
	TEST_ASSERT(is_in_file(self, page) == expected, "Page %lu must%s be in the file",
		    page, expected ? "" : " not");
}

static void fill(gmem_data *self, u64 page, u64 nr)
{
	agent_fill(hva_page(self, page), page_gpa(page), nr);
}

static void arm(gmem_data *self, u64 page, u64 nr)
{
	vm_userfault_arm(self->vm, page_gpa(page), nr * page_size);
}

static void clear(gmem_data *self, u64 page, u64 nr)
{
	vm_userfault_clear(self->vm, page_gpa(page), nr * page_size);
}

static void punch(gmem_data *self, u64 page, u64 nr)
{
	kvm_fallocate(self->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      page * page_size, nr * page_size);
}

static void expect_read_fault(gmem_data *self, u64 page)
{
	agent_expect_userfault(self->vcpu, AGENT_READ, page_gpa(page), 0,
			       page_gpa(page), USERFAULT_READ);
}

static void assert_guest_reads(gmem_data *self, u64 page, u64 val)
{
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(page), 0), val);
}

/*
 * Holes.
 */

/* What userspace is to fill must not be there when it comes to fill it. */
userfault_test(gmem, exits_allocate_nothing)
{
	u64 i;

	arm(self, 0, GMEM_PAGES);
	expect_read_fault(self, 0);
	for (i = 0; i < 3; i++)
		vcpu_run_expect_userfault(self->vcpu, page_gpa(0), USERFAULT_READ);
	for (i = 0; i < GMEM_PAGES; i++)
		assert_in_file(self, i, false);

	fill(self, 0, 1);
	clear(self, 0, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(0)));
	for (i = 1; i < GMEM_PAGES; i++)
		assert_in_file(self, i, false);

	agent_expect_userfault(self->vcpu, AGENT_WRITE, page_gpa(1), 7, page_gpa(1),
			       USERFAULT_WRITE);
	assert_in_file(self, 1, false);
	clear(self, 1, 1);
	agent_finish(self->vcpu);
	assert_in_file(self, 1, true);
}

userfault_test(gmem, filled_by_write)
{
	u64 *src = kvm_mmap(page_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1);
	u64 i;

	if (!can_write())
		SKIP(return, "guest_memfd cannot be written");

	arm(self, 0, GMEM_PAGES);
	agent_request(self->vcpu, AGENT_CHECK, AGENT_GPA, GMEM_PAGES);
	for (i = 0; i < GMEM_PAGES; i++) {
		vcpu_run_expect_userfault(self->vcpu, page_gpa(i), USERFAULT_READ);
		agent_fill(src, page_gpa(i), 1);
		TEST_ASSERT_EQ(pwrite(self->fd, src, page_size, i * page_size), page_size);
		/* Filled is not released. */
		vcpu_run_expect_userfault(self->vcpu, page_gpa(i), USERFAULT_READ);
		clear(self, i, 1);
	}
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
	kvm_munmap(src, page_size);
}

userfault_test(gmem, punching_holes_while_armed)
{
	fill(self, 0, GMEM_PAGES);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, GMEM_PAGES), 0);
	arm(self, 0, 4);
	punch(self, 0, GMEM_PAGES / 2);

	/* Page 0 is filled anew, page 1 is released as the hole that it is. */
	expect_read_fault(self, 0);
	assert_in_file(self, 0, false);
	fill(self, 0, 1);
	clear(self, 0, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(0)));

	expect_read_fault(self, 1);
	clear(self, 1, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	/* Between exit and release: what counts is what is there at the end. */
	fill(self, 2, 1);
	expect_read_fault(self, 2);
	punch(self, 2, 1);
	vcpu_run_expect_userfault(self->vcpu, page_gpa(2), USERFAULT_READ);
	clear(self, 2, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	/* Nobody else is concerned. */
	assert_guest_reads(self, 4, 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(GMEM_PAGES / 2),
				GMEM_PAGES / 2), 0);
	expect_read_fault(self, 3);
}

/* Punched, filled and punched again while the page stays armed all the time. */
userfault_test(gmem, holes_come_and_go)
{
	int i;

	arm(self, 0, 1);
	expect_read_fault(self, 0);
	for (i = 0; i < 20; i++) {
		memset(hva_page(self, 0), i, page_size);
		vcpu_run_expect_userfault(self->vcpu, page_gpa(0), USERFAULT_READ);
		punch(self, 0, 1);
		vcpu_run_expect_userfault(self->vcpu, page_gpa(0), USERFAULT_READ);
		assert_in_file(self, 0, false);
	}
	fill(self, 0, 1);
	clear(self, 0, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(0)));
}

/*
 * The same for a memslot that names no mapping, so that the file is all that KVM
 * learns of the hole by.
 */
userfault_test(gmem, punching_holes_without_a_mapping)
{
	u8 *mem;

	fill(self, 0, GMEM_PAGES);
	vm_mem_region_delete(self->vm, AGENT_SLOT);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   self->size, NULL, self->fd, 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, GMEM_PAGES), 0);

	punch(self, 0, 1);
	assert_guest_reads(self, 0, 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, page_gpa(1), GMEM_PAGES - 1), 0);

	arm(self, 1, 2);
	punch(self, 1, 1);
	expect_read_fault(self, 1);
	mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	agent_fill(mem + page_size, page_gpa(1), 1);
	clear(self, 1, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(1)));

	expect_read_fault(self, 2);
	punch(self, 2, 1);
	clear(self, 2, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	kvm_munmap(mem, self->size);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   0, NULL, -1, 0);
}

static void assert_guest_page_is_zero(gmem_data *self, u64 page)
{
	u64 off;

	for (off = 0; off < page_size; off += 64)
		TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(page) + off, 0),
			       0);
}

/* fallocate() neither fills a page nor releases it, nor shows what it was before. */
userfault_test(gmem, allocating_while_armed)
{
	u64 i;

	arm(self, 0, 4);
	expect_read_fault(self, 0);
	vm_stain_free_memory(self->vm, STALE_BYTE);
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, 0, 6 * page_size);
	vcpu_run_expect_userfault(self->vcpu, page_gpa(0), USERFAULT_READ);

	fill(self, 1, 1);
	clear(self, 0, 4);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
	assert_guest_reads(self, 1, agent_page_content(page_gpa(1)));
	for (i = 2; i < 6; i++)
		assert_guest_page_is_zero(self, i);
}

/* Of pages that vCPUs allocate: one by one, each from the other node. */
userfault_test(gmem, memory_policy_is_honoured)
{
	void *pages[4];
	unsigned long node;
	int nodes[4];
	u64 i;

	if (!is_multi_numa_node_system())
		SKIP(return, "There is one NUMA node only");

	arm(self, 0, 4);
	for (i = 0; i < 4; i++) {
		pages[i] = hva_page(self, i);
		node = BIT(!(i % 2));
		kvm_mbind(pages[i], page_size, MPOL_BIND, &node, 8, 0);
		expect_read_fault(self, i);
		assert_in_file(self, i, false);
		clear(self, i, 1);
		TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
		assert_in_file(self, i, true);
		READ_ONCE(*hva_page(self, i));
	}

	kvm_move_pages(0, 4, pages, NULL, nodes, 0);
	for (i = 0; i < 4; i++)
		TEST_ASSERT_EQ(nodes[i], !(i % 2));
}

/*
 * Memslots.
 */

/* The second half of the file, at another place. */
static void add_second_slot(gmem_data *self)
{
	vm_mem_region_delete(self->vm, AGENT_SLOT);
	vm_mem_add(self->vm, VM_MEM_SRC_GUEST_MEMFD, AGENT_GPA, AGENT_SLOT,
		   self->size / 2 / self->vm->page_size, 0, self->fd, 0);
	vm_mem_add(self->vm, VM_MEM_SRC_GUEST_MEMFD, OTHER_GPA, OTHER_SLOT,
		   self->size / 2 / self->vm->page_size, 0, self->fd, self->size / 2);
	agent_map(self->vm, OTHER_GPA, OTHER_GPA, self->size / 2);
	self->hva = memslot2region(self->vm, AGENT_SLOT)->host_mem;
}

userfault_test(gmem, two_slots_on_one_file)
{
	u64 nr = GMEM_PAGES / 2;
	u8 *other;

	add_second_slot(self);
	other = memslot2region(self->vm, OTHER_SLOT)->host_mem;
	fill(self, 0, nr);
	agent_fill(other, OTHER_GPA, nr);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, nr), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, OTHER_GPA, nr), 0);

	/* The page at the border of the two, in one of them. */
	vm_userfault_arm(self->vm, OTHER_GPA, page_size);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, AGENT_GPA, nr), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_CHECK, OTHER_GPA + page_size, nr - 1), 0);
	agent_expect_userfault(self->vcpu, AGENT_READ, OTHER_GPA, 0, OTHER_GPA,
			       USERFAULT_READ);

	/* A hole on both sides of it. */
	punch(self, nr - 1, 2);
	vcpu_run_expect_userfault(self->vcpu, OTHER_GPA, USERFAULT_READ);
	agent_fill(other, OTHER_GPA, 1);
	vm_userfault_clear(self->vm, OTHER_GPA, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(OTHER_GPA));
	assert_guest_reads(self, nr - 1, 0);

	/* One slot goes, the other one stays as it is. */
	vm_userfault_arm(self->vm, OTHER_GPA, page_size);
	vm_mem_region_delete(self->vm, AGENT_SLOT);
	TEST_ASSERT(agent_probe(self->vcpu, OTHER_GPA, OTHER_GPA, USERFAULT_READ),
		    "Deleting a memslot cleared a page of another one");
}

/* Each kind of memory in one VM, and vCPUs that fault on both at a time. */
userfault_test(gmem, next_to_other_memory)
{
	u8 *other;

	other = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT,
				 GMEM_PAGES, 0);
	arm(self, 0, GMEM_PAGES);
	vm_userfault_arm(self->vm, OTHER_GPA, self->size);

	expect_read_fault(self, 5);
	agent_expect_userfault(self->vcpus[1], AGENT_READ, OTHER_GPA + 5 * page_size, 0,
			       OTHER_GPA + 5 * page_size, USERFAULT_READ);
	assert_in_file(self, 5, false);

	agent_fill(other + 5 * page_size, OTHER_GPA + 5 * page_size, 1);
	vm_userfault_clear(self->vm, OTHER_GPA + 5 * page_size, page_size);
	TEST_ASSERT_EQ(agent_finish(self->vcpus[1]),
		       agent_page_content(OTHER_GPA + 5 * page_size));

	vcpu_run_expect_userfault(self->vcpu, page_gpa(5), USERFAULT_READ);
	fill(self, 5, 1);
	clear(self, 5, 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(5)));
}

/*
 * Memory that is private, of a file that can be mapped: with the page there, it still is
 * no fault that userfaultfd or anybody could resolve.
 */
userfault_test(gmem, memory_that_is_not_shared)
{
	int fd = vm_create_guest_memfd(self->vm, page_size, GUEST_MEMFD_FLAG_MMAP);
	u8 *mem = kvm_mmap(page_size, PROT_READ, MAP_SHARED, fd);
	gpa_t gpa = OTHER_GPA;

	vm_set_user_memory_region2(self->vm, OTHER_SLOT, KVM_MEM_GUEST_MEMFD, gpa, page_size,
				   NULL, fd, 0);
	agent_map(self->vm, gpa, gpa, page_size);

	vm_userfault_arm(self->vm, gpa, page_size);
	agent_expect_userfault(self->vcpu, AGENT_WRITE, gpa, 77, gpa, USERFAULT_WRITE);
	TEST_EXPECT_SIGBUS((void)READ_ONCE(*mem));
	vm_userfault_clear(self->vm, gpa, page_size);
	agent_finish(self->vcpu);

	TEST_EXPECT_SIGBUS((void)READ_ONCE(*mem));
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, gpa, 0), 77);
	kvm_munmap(mem, page_size);
	close(fd);
}

/*
 * The last file goes while faults are open.  Nothing is left to be mapped, which
 * is an error as soon as the page is released, and no reason to wait any more.
 */
userfault_test(gmem, closing_the_file_with_open_faults)
{
	int ret, i;

	vm_mem_region_delete(self->vm, AGENT_SLOT);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   self->size, NULL, self->fd, 0);
	arm(self, 0, GMEM_PAGES);
	for (i = 0; i < NR_VCPUS; i++)
		agent_expect_userfault(self->vcpus[i], AGENT_READ, page_gpa(i), 0,
				       page_gpa(i), USERFAULT_READ);

	close(self->fd);
	self->fd = -1;
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_run_expect_userfault(self->vcpus[i], page_gpa(i), USERFAULT_READ);

	clear(self, 0, GMEM_PAGES);
	for (i = 0; i < NR_VCPUS; i++) {
		ret = _vcpu_run(self->vcpus[i]);
		TEST_ASSERT(ret == -1 && errno == EFAULT, KVM_IOCTL_ERROR(KVM_RUN, ret));
		TEST_ASSERT_KVM_EXIT_REASON(self->vcpus[i], KVM_EXIT_MEMORY_FAULT);
		TEST_ASSERT_EQ(self->vcpus[i]->run->memory_fault.flags, 0);
		TEST_ASSERT_EQ(self->vcpus[i]->run->memory_fault.gpa, page_gpa(i));
	}
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   0, NULL, -1, 0);
}

/* Armed comes first: userspace cannot have filled the page with poison. */
userfault_test(gmem, hwpoisoned_page)
{
	int ret;

	fill(self, 0, 2);
	if (!poison_page(hva_page(self, 0)))
		SKIP(return, "MADV_HWPOISON is not available");

	arm(self, 0, 2);
	expect_read_fault(self, 0);
	clear(self, 0, 1);
	ret = _vcpu_run(self->vcpu);
	TEST_ASSERT(ret == -1 && errno == EHWPOISON, KVM_IOCTL_ERROR(KVM_RUN, ret));
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(self->vcpu->run->memory_fault.flags, 0);

	/* A hole takes the poison away, and the page can be filled again. */
	arm(self, 0, 1);
	punch(self, 0, 1);
	kvm_madvise(hva_page(self, 0), page_size, MADV_DONTNEED);
	fill(self, 0, 1);
	clear(self, 0, 2);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(page_gpa(0)));
	assert_guest_reads(self, 1, agent_page_content(page_gpa(1)));
}

#define TOGGLE_MSECS	3000

struct sweeper {
	struct kvm_vcpu *vcpu;
	struct waiter waiter;
	bool stop;
};

/* Whatever is in the pages: that they are looked at allocates them. */
static void sweep_fn(void *arg)
{
	struct sweeper *sweeper = arg;
	enum agent_exit exit;

	while (!READ_ONCE(sweeper->stop)) {
		agent_request(sweeper->vcpu, AGENT_CHECK, AGENT_GPA, GMEM_PAGES);
		while ((exit = agent_run(sweeper->vcpu)) == AGENT_USERFAULT)
			usleep(200);
		TEST_ASSERT_EQ(exit, AGENT_DONE);
	}
}

/* vCPUs allocate pages, which are armed and removed meanwhile. */
static void toggle(gmem_data *self, useconds_t delay)
{
	u64 i;

	punch(self, 0, GMEM_PAGES);
	usleep(delay);
	vm_userfault_enable(self->vm);
	arm(self, 0, GMEM_PAGES);
	punch(self, 0, GMEM_PAGES);

	usleep(500);
	for (i = 0; i < GMEM_PAGES; i++)
		assert_in_file(self, i, false);
	vm_userfault_disable(self->vm);
}

/* A fault that was on its way before userfault was enabled allocates nothing after. */
userfault_test(gmem, enabling_while_vcpus_fault)
{
	struct kvm_random_state rng = new_kvm_random_state(1);
	u64 end = userfault_now_ms() + TOGGLE_MSECS, nr = 0;
	struct sweeper sweepers[NR_VCPUS] = {};
	int i;

	vm_userfault_disable(self->vm);
	for (i = 0; i < NR_VCPUS; i++) {
		sweepers[i].vcpu = self->vcpus[i];
		waiter_start(&sweepers[i].waiter, sweep_fn, &sweepers[i]);
	}

	for (; userfault_now_ms() < end; nr++)
		toggle(self, kvm_random_u32(&rng) % 1000);

	for (i = 0; i < NR_VCPUS; i++) {
		WRITE_ONCE(sweepers[i].stop, true);
		waiter_join(&sweepers[i].waiter);
	}
	pr_info("# %lu times off and on\n", nr);
}

/*
 * Everything at once.  vCPUs read all pages, over and over, and must see nothing
 * but their content.  Meanwhile pages are armed, and then spoilt or removed, and
 * whoever gets the exit fills them again.  Others write pages that happen to be
 * missing, and make and close files and memslots, where vCPUs read as well.
 */

#define RACE_MSECS	3000
/* In case that is not enough for all that can happen to happen. */
#define RACE_MAX_MSECS	(USERFAULT_TIMEOUT_SECS * 1000)

/* What vCPUs read where there is no memory. */
#define RACE_MMIO	0x0badc0de0badc0deull

struct race {
	gmem_data *gmem;
	atomic_bool stop;
	/* Protects filling and releasing against arming and spoiling. */
	pthread_mutex_t locks[GMEM_PAGES];
	bool spoilt[GMEM_PAGES];
	/* What vCPUs sweep: the first pages, followed by some reads of something else. */
	u64 nr_swept;
	void (*read)(struct race *r, struct kvm_vcpu *vcpu, struct kvm_random_state *rng);
	bool (*has_seen_all)(struct race *r);
	atomic_ullong nr_sweeps, nr_exits, nr_holes, nr_writes;
	/* Files that have come and gone at OTHER_GPA, and what vCPUs met there. */
	atomic_ullong nr_files;
	atomic_ullong nr_contents, nr_mmios, nr_armed, nr_closed;
	/* A mapping with a userfaultfd, and what is filled and read by that. */
	u8 *mem;
	int uffd;
	atomic_bool stop_pager;
	atomic_ullong nr_copies, nr_existing, nr_missing, nr_minor, nr_reads;
	/* Memslots and mappings of other descriptors of the file. */
	atomic_ullong nr_slots, nr_fleeting;
};

/*
 * A page that was removed while it was armed is still missing, or has been written
 * since.  If it is there and empty, then KVM itself has put it there, and whoever
 * fills what is missing would leave it at that.
 */
static void race_write(struct race *r, u64 page, u64 *buf)
{
	gmem_data *gmem = r->gmem;
	ssize_t ret;

	agent_fill(buf, page_gpa(page), 1);
	ret = pwrite(gmem->fd, buf, page_size, page * page_size);
	TEST_ASSERT(ret == page_size || errno == EEXIST, "write() failed, errno %d", errno);
	if (ret < 0)
		agent_assert_content(hva_page(gmem, page), page_gpa(page), 1);
}

/* Returns whether it is a page that was missing. */
static bool race_copy(struct race *r, int uffd, u8 *mem, u64 page, u64 *buf)
{
	s64 ret;

	agent_fill(buf, page_gpa(page), 1);
	ret = __uffd_copy(uffd, mem + page * page_size, buf, page_size, 0);
	TEST_ASSERT(ret == page_size || ret == -EEXIST, "COPY returned %ld", ret);
	atomic_fetch_add(&r->nr_copies, ret == page_size);
	atomic_fetch_add(&r->nr_existing, ret == -EEXIST);
	return ret == page_size;
}

static void race_fill_missing(struct race *r, u64 page, u64 *buf)
{
	/* Every other page, to have either of the two meet the other one. */
	if (!r->mem || (can_write() && page % 2))
		race_write(r, page, buf);
	else if (!race_copy(r, r->uffd, r->mem, page, buf))
		agent_assert_content(hva_page(r->gmem, page), page_gpa(page), 1);
}

static void race_fill(struct race *r, u64 page, u64 *buf)
{
	pthread_mutex_lock(&r->locks[page]);
	if (r->spoilt[page] || !buf)
		fill(r->gmem, page, 1);
	else
		race_fill_missing(r, page, buf);
	r->spoilt[page] = false;
	clear(r->gmem, page, 1);
	pthread_mutex_unlock(&r->locks[page]);
}

/* For what fills pages that are missing, if there is anything. */
static u64 *race_alloc_buf(struct race *r)
{
	return can_write() || r->mem ? malloc(page_size) : NULL;
}

/* Each file has a content of its own, for none to be taken for another one. */
static u64 race_file_content(u64 nr)
{
	return agent_page_content(OTHER_GPA) + nr;
}

static void race_assert_closed(struct kvm_vcpu *vcpu, int ret)
{
	struct kvm_run *run = vcpu->run;

	if (errno != EFAULT || run->exit_reason != KVM_EXIT_MEMORY_FAULT ||
	    run->memory_fault.flags || run->memory_fault.gpa != OTHER_GPA)
		vcpu_fail_run(vcpu, ret, "an exit for a file that is closed");
}

/* Returns whether the read was performed, otherwise it is to be tried again. */
static bool race_run_file(struct race *r, struct kvm_vcpu *vcpu, bool *mmio)
{
	struct kvm_run *run = vcpu->run;
	int ret = _vcpu_run(vcpu);
	u64 val = RACE_MMIO;
	struct ucall uc;

	if (vcpu_has_userfault(vcpu, ret)) {
		vcpu_assert_userfault(vcpu, OTHER_GPA, USERFAULT_READ);
		atomic_fetch_add(&r->nr_armed, 1);
	} else if (ret) {
		race_assert_closed(vcpu, ret);
		atomic_fetch_add(&r->nr_closed, 1);
	} else if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr == OTHER_GPA) {
		memcpy(run->mmio.data, &val, sizeof(val));
		*mmio = true;
		atomic_fetch_add(&r->nr_mmios, 1);
	} else {
		TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
		return true;
	}

	return false;
}

/*
 * Whatever becomes of the read, it ends: with the content of a file that was there in
 * the meantime, or because there is no memslot.
 */
static void race_read_file(struct race *r, struct kvm_vcpu *vcpu,
			   struct kvm_random_state *rng)
{
	u64 first = atomic_load(&r->nr_files);
	bool mmio = false;
	u64 val, last;

	agent_request(vcpu, AGENT_READ, OTHER_GPA, 0);
	while (!race_run_file(r, vcpu, &mmio))
		usleep(20);
	val = agent_result(vcpu);
	last = atomic_load(&r->nr_files);

	if (mmio) {
		TEST_ASSERT_EQ(val, RACE_MMIO);
		return;
	}
	TEST_ASSERT(val - race_file_content(first) <= last - first,
		    "vCPU %u read %#lx, which none of the files %lu to %lu holds",
		    vcpu->id, val, first, last);
	atomic_fetch_add(&r->nr_contents, 1);
}

static void race_run_vcpu(struct race *r, struct kvm_vcpu *vcpu)
{
	struct kvm_random_state rng = new_kvm_random_state(10 + vcpu->id);
	u64 *buf = race_alloc_buf(r);
	enum agent_exit exit;
	u32 i;

	do {
		agent_request(vcpu, AGENT_CHECK, AGENT_GPA, r->nr_swept);
		for (;;) {
			exit = agent_run(vcpu);
			if (exit != AGENT_USERFAULT)
				break;
			atomic_fetch_add(&r->nr_exits, 1);
			race_fill(r, (vcpu->run->memory_fault.gpa - AGENT_GPA) / page_size,
				  buf);
		}
		TEST_ASSERT_EQ(exit, AGENT_DONE);
		TEST_ASSERT(!agent_result(vcpu), "vCPU %u read %lu pages that were not filled",
			    vcpu->id, agent_result(vcpu));
		atomic_fetch_add(&r->nr_sweeps, 1);
		for (i = kvm_random_u32(&rng) % 8; i; i--)
			r->read(r, vcpu, &rng);
	} while (!atomic_load(&r->stop));
	free(buf);
}

static void *race_vcpu0(void *arg)
{
	struct race *r = arg;

	race_run_vcpu(r, r->gmem->vcpus[0]);
	return NULL;
}

static void *race_vcpu1(void *arg)
{
	struct race *r = arg;

	race_run_vcpu(r, r->gmem->vcpus[1]);
	return NULL;
}

static void *race_spoiler(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(1);
	struct race *r = arg;

	while (!atomic_load(&r->stop)) {
		u64 page = kvm_random_u32(&rng) % GMEM_PAGES;

		pthread_mutex_lock(&r->locks[page]);
		arm(r->gmem, page, 1);
		r->spoilt[page] = kvm_random_bool(&rng);
		if (r->spoilt[page])
			memset(hva_page(r->gmem, page), STALE_BYTE, page_size);
		else
			punch(r->gmem, page, 1);
		pthread_mutex_unlock(&r->locks[page]);
		atomic_fetch_add(&r->nr_holes, 1);
	}

	return NULL;
}

/* Without the lock: filling what is missing is right at any time. */
static void *race_writer(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(2);
	struct race *r = arg;
	u64 *buf = race_alloc_buf(r);

	while (can_write() && !atomic_load(&r->stop)) {
		u64 page = kvm_random_u32(&rng) % GMEM_PAGES;
		ssize_t ret;

		agent_fill(buf, page_gpa(page), 1);
		ret = pwrite(r->gmem->fd, buf, page_size, page * page_size);
		TEST_ASSERT(ret == page_size || errno == EEXIST,
			    "write() failed, errno %d", errno);
		atomic_fetch_add(&r->nr_writes, ret == page_size);
		usleep(100);
	}
	free(buf);

	return NULL;
}

static void race_fill_file(int fd, u64 nr)
{
	u64 *mem = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	u64 i;

	for (i = 0; i < page_size / sizeof(*mem); i++)
		mem[i] = race_file_content(nr);
	kvm_munmap(mem, page_size);
}

static void race_set_slot(struct race *r, u64 size, int fd)
{
	vm_set_user_memory_region2(r->gmem->vm, OTHER_SLOT, KVM_MEM_GUEST_MEMFD, OTHER_GPA,
				   size, NULL, fd, 0);
}

/* The page is armed before it is there, and may never be filled. */
static void race_use_file(struct race *r, struct kvm_random_state *rng, bool fill,
			  bool close_first)
{
	struct kvm_vm *vm = r->gmem->vm;
	int fd;

	vm_userfault_arm(vm, OTHER_GPA, page_size);
	fd = vm_create_guest_memfd(vm, page_size, MAPPABLE_GUEST_MEMFD_FLAGS);
	race_set_slot(r, page_size, fd);
	usleep(kvm_random_u32(rng) % 500);
	if (fill) {
		race_fill_file(fd, atomic_load(&r->nr_files));
		vm_userfault_clear(vm, OTHER_GPA, page_size);
		usleep(kvm_random_u32(rng) % 500);
	}

	if (close_first) {
		close(fd);
		/* There is nothing left to be filled, nor to be read. */
		vm_userfault_clear(vm, OTHER_GPA, page_size);
		usleep(kvm_random_u32(rng) % 500);
	}
	race_set_slot(r, 0, -1);
	if (!close_first)
		close(fd);
	vm_userfault_clear(vm, OTHER_GPA, page_size);
}

/* The file goes before the memslot, or after it. */
static void *race_closer(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(3);
	struct race *r = arg;

	while (!atomic_load(&r->stop)) {
		race_use_file(r, &rng, kvm_random_bool(&rng), kvm_random_bool(&rng));
		atomic_fetch_add(&r->nr_files, 1);
	}

	return NULL;
}

static bool race_has_seen_all(struct race *r)
{
	return r->nr_sweeps && r->nr_exits && r->nr_holes && r->nr_files &&
	       r->nr_contents && r->nr_mmios && r->nr_armed && r->nr_closed &&
	       (r->nr_writes || !can_write());
}

static void race_wait(struct race *r)
{
	u64 end = userfault_now_ms() + RACE_MAX_MSECS;

	usleep(RACE_MSECS * 1000);
	while (!r->has_seen_all(r) && userfault_now_ms() < end)
		usleep(1000);
	atomic_store(&r->stop, true);
}

static void race_run(struct race *r, pthread_fn_t *fns, int nr_fns)
{
	pthread_t threads[8];
	int i;

	TEST_ASSERT(nr_fns <= ARRAY_SIZE(threads), "%d threads", nr_fns);
	for (i = 0; i < GMEM_PAGES; i++)
		pthread_mutex_init(&r->locks[i], NULL);
	for (i = 0; i < nr_fns; i++)
		kvm_pthread_create(&threads[i], NULL, fns[i], r);
	race_wait(r);
	for (i = 0; i < nr_fns; i++)
		kvm_pthread_join(threads[i], NULL);

	pr_info("# %llu sweeps, %llu exits, %llu holes, %llu writes\n", r->nr_sweeps,
		r->nr_exits, r->nr_holes, r->nr_writes);
}

userfault_test(gmem, races)
{
	pthread_fn_t fns[] = {
		race_vcpu0, race_vcpu1, race_spoiler, race_writer, race_closer,
	};
	struct race r = {
		.gmem = self,
		.nr_swept = GMEM_PAGES,
		.read = race_read_file,
		.has_seen_all = race_has_seen_all,
	};

	arm(self, 0, GMEM_PAGES);
	agent_map(self->vm, OTHER_GPA, OTHER_GPA, page_size);
	race_run(&r, fns, ARRAY_SIZE(fns));

	pr_info("# %llu files: %llu reads, %llu of nothing, %llu while armed, %llu of closed ones\n",
		r.nr_files, r.nr_contents, r.nr_mmios, r.nr_armed, r.nr_closed);
	TEST_ASSERT(race_has_seen_all(&r), "Somebody did nothing");
}

/*
 * Everything at once on one file.  As before, and in addition: pages that are missing
 * are filled by a userfaultfd, whose faults are others that fill them.  The second half
 * of the file has a memslot of its own that comes and goes, with a descriptor and a
 * mapping of its own.  All of them must see nothing but the content.
 */

#define RACE_SLOT_PAGES		(GMEM_PAGES / 2)

/* Returns whether the read was performed. */
static bool race_run_slot(struct race *r, struct kvm_vcpu *vcpu, u64 page, u64 *buf)
{
	struct kvm_run *run = vcpu->run;
	u64 val = agent_page_content(page_gpa(page));
	enum agent_exit exit = agent_run(vcpu);

	if (exit == AGENT_USERFAULT) {
		vcpu_assert_userfault(vcpu, page_gpa(page), USERFAULT_READ);
		atomic_fetch_add(&r->nr_armed, 1);
		race_fill(r, page, buf);
	} else if (exit == AGENT_OTHER) {
		TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MMIO);
		TEST_ASSERT_EQ(run->mmio.phys_addr, page_gpa(page));
		memcpy(run->mmio.data, &val, sizeof(val));
		atomic_fetch_add(&r->nr_mmios, 1);
	} else {
		atomic_fetch_add(&r->nr_contents, 1);
	}

	return exit == AGENT_DONE;
}

static void race_read_slot(struct race *r, struct kvm_vcpu *vcpu,
			   struct kvm_random_state *rng)
{
	u64 page = RACE_SLOT_PAGES + kvm_random_u32(rng) % RACE_SLOT_PAGES;
	u64 *buf = race_alloc_buf(r);

	agent_request(vcpu, AGENT_READ, page_gpa(page), 0);
	while (!race_run_slot(r, vcpu, page, buf))
		usleep(20);
	TEST_ASSERT_EQ(agent_result(vcpu), agent_page_content(page_gpa(page)));
	free(buf);
}

static void race_set_second_slot(struct race *r, u64 size, int fd)
{
	vm_set_user_memory_region2(r->gmem->vm, OTHER_SLOT, KVM_MEM_GUEST_MEMFD,
				   page_gpa(RACE_SLOT_PAGES), size, NULL, fd,
				   RACE_SLOT_PAGES * page_size);
}

static void *race_slots(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(4);
	struct race *r = arg;
	int fd;

	while (!atomic_load(&r->stop)) {
		fd = kvm_dup(r->gmem->fd);
		race_set_second_slot(r, RACE_SLOT_PAGES * page_size, fd);
		close(fd);
		usleep(kvm_random_u32(&rng) % 1000);
		race_set_second_slot(r, 0, -1);
		usleep(kvm_random_u32(&rng) % 500);
		atomic_fetch_add(&r->nr_slots, 1);
	}

	return NULL;
}

/* Without the lock, as with write(). */
static void *race_copier(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(5);
	struct race *r = arg;
	u64 *buf = race_alloc_buf(r);

	while (!atomic_load(&r->stop)) {
		race_copy(r, r->uffd, r->mem, kvm_random_u32(&rng) % GMEM_PAGES, buf);
		usleep(100);
	}
	free(buf);

	return NULL;
}

/* The same by a mapping that is made for a few copies. */
static void *race_mapper(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(6);
	struct race *r = arg;
	u64 *buf = race_alloc_buf(r);
	int fd, uffd, i;
	u8 *mem;

	while (!atomic_load(&r->stop)) {
		fd = kvm_dup(r->gmem->fd);
		mem = kvm_mmap(r->gmem->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		close(fd);
		uffd = uffd_open(0);
		uffd_register(uffd, mem, r->gmem->size, UFFDIO_REGISTER_MODE_MISSING);
		for (i = 0; i < 4; i++)
			race_copy(r, uffd, mem, kvm_random_u32(&rng) % GMEM_PAGES, buf);
		kvm_munmap(mem, r->gmem->size);
		close(uffd);
		atomic_fetch_add(&r->nr_fleeting, 1);
		usleep(100);
	}
	free(buf);

	return NULL;
}

/* Unless it was spoilt, a page has its content, or gets that when it is read. */
static void *race_reader(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(7);
	struct race *r = arg;

	while (!atomic_load(&r->stop)) {
		u64 page = kvm_random_u32(&rng) % GMEM_PAGES;

		pthread_mutex_lock(&r->locks[page]);
		if (!r->spoilt[page]) {
			agent_assert_content(r->mem + page * page_size, page_gpa(page), 1);
			atomic_fetch_add(&r->nr_reads, 1);
		}
		pthread_mutex_unlock(&r->locks[page]);
		usleep(100);
	}

	return NULL;
}

static void race_resolve(struct race *r, const struct uffd_msg *msg, u64 *buf)
{
	u8 *addr = (u8 *)msg->arg.pagefault.address;
	s64 ret;

	TEST_ASSERT_EQ(msg->event, UFFD_EVENT_PAGEFAULT);
	if (msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) {
		ret = __uffd_continue(r->uffd, addr, page_size, 0);
		/* Who reads the page has locked it, but others may map it. */
		TEST_ASSERT(ret == page_size || ret == -EEXIST, "CONTINUE returned %ld", ret);
		atomic_fetch_add(&r->nr_minor, 1);
	} else {
		race_copy(r, r->uffd, r->mem, (addr - r->mem) / page_size, buf);
		atomic_fetch_add(&r->nr_missing, 1);
	}
	TEST_ASSERT_EQ(__uffd_wake(r->uffd, addr, page_size), 0);
}

static void *race_pager(void *arg)
{
	struct race *r = arg;
	struct pollfd pollfd = { .fd = r->uffd, .events = POLLIN };
	u64 *buf = race_alloc_buf(r);
	struct uffd_msg msg;

	while (!atomic_load(&r->stop_pager)) {
		if (poll(&pollfd, 1, 20) && read(r->uffd, &msg, sizeof(msg)) == sizeof(msg))
			race_resolve(r, &msg, buf);
	}
	free(buf);

	return NULL;
}

static bool race_one_file_has_seen_all(struct race *r)
{
	return r->nr_sweeps && r->nr_exits && r->nr_holes && r->nr_contents &&
	       r->nr_mmios && r->nr_armed && r->nr_copies && r->nr_existing &&
	       r->nr_missing && r->nr_minor && r->nr_reads && r->nr_slots &&
	       r->nr_fleeting && (r->nr_writes || !can_write());
}

/*
 * The memslots name no mapping, so that the file is all that KVM knows of, and what is
 * left to its emulator, when a memslot comes too late for the vCPU, is MMIO.
 */
static void race_init_one_file(struct race *r)
{
	gmem_data *gmem = r->gmem;

	arm(gmem, 0, GMEM_PAGES);
	vm_mem_region_delete(gmem->vm, AGENT_SLOT);
	vm_set_user_memory_region2(gmem->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   RACE_SLOT_PAGES * page_size, NULL, gmem->fd, 0);
	gmem->hva = kvm_mmap(gmem->size, PROT_READ | PROT_WRITE, MAP_SHARED, gmem->fd);
	r->mem = kvm_mmap(gmem->size, PROT_READ | PROT_WRITE, MAP_SHARED, gmem->fd);
	r->uffd = uffd_open(0);
	uffd_register(r->uffd, r->mem, gmem->size,
		      UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
}

userfault_test(gmem, races_on_one_file)
{
	pthread_fn_t fns[] = {
		race_vcpu0, race_vcpu1, race_spoiler, race_writer, race_slots,
		race_copier, race_mapper, race_reader,
	};
	struct race r = {
		.gmem = self,
		.nr_swept = RACE_SLOT_PAGES,
		.read = race_read_slot,
		.has_seen_all = race_one_file_has_seen_all,
	};
	pthread_t pager;

	if (!has_uffd(UFFD_FEATURE_MISSING_GUEST_MEMFD | UFFD_FEATURE_MINOR_GUEST_MEMFD))
		SKIP(return, "There is no userfaultfd for guest_memfd");

	race_init_one_file(&r);
	kvm_pthread_create(&pager, NULL, race_pager, &r);
	race_run(&r, fns, ARRAY_SIZE(fns));
	atomic_store(&r.stop_pager, true);
	kvm_pthread_join(pager, NULL);

	pr_info("# %llu copies, %llu of pages that were there, %llu mappings\n", r.nr_copies,
		r.nr_existing, r.nr_fleeting);
	pr_info("# %llu reads, %llu missing, %llu minor faults\n", r.nr_reads, r.nr_missing,
		r.nr_minor);
	pr_info("# %llu slots: %llu reads, %llu of nothing, %llu while armed\n", r.nr_slots,
		r.nr_contents, r.nr_mmios, r.nr_armed);
	TEST_ASSERT(race_one_file_has_seen_all(&r), "Somebody did nothing");

	close(r.uffd);
	kvm_munmap(r.mem, self->size);
	kvm_munmap(self->hva, self->size);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   0, NULL, -1, 0);
}

int main(int argc, char *argv[])
{
	page_size = getpagesize();

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));
	TEST_REQUIRE(kvm_has_mappable_guest_memfd());

	return test_harness_run(argc, argv);
}
