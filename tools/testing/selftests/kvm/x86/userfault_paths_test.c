// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault for the ways by which KVM itself gets at guest memory on
 * x86: one test for each that can be reached.  Documentation/virt/kvm/userfault.rst
 * has the list.
 *
 * Each of them has to wait for the page, and then to do what it always does, with the
 * content that the page has got in the meantime.  The guest itself has no business with
 * the page: if it did it would exit.
 */
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <asm/kvm_para.h>
#include <asm/pvclock-abi.h>
#include <linux/kvm_para.h>
#include <linux/sizes.h>

#include "apic.h"
#include "hyperv.h"
#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "smm.h"
#include "svm_util.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "userfaultfd_util.h"

#define TEST_PORT		0x80
#define MMIO_GPA		0xd0000000

FIXTURE(paths) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
	gva_t svm_gva;
	int fd;
};

#define paths_data FIXTURE_DATA(paths)

FIXTURE_SETUP(paths)
{
	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);
	self->hva = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA,
				     AGENT_SLOT, NR_PAGES, 0);
	memset(self->hva, 0, NR_PAGES * PAGE_SIZE);
	virt_map(self->vm, MMIO_GPA, MMIO_GPA, 1);
	vm_userfault_enable_async(self->vm, 0);
	self->fd = vm_create_userfault_fd(self->vm);
}

FIXTURE_TEARDOWN(paths)
{
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

static void arm(paths_data *self, struct armed_page *page, gpa_t gpa)
{
	armed_page_init(page, self->vm, gpa);
}

static void fill(paths_data *self, const struct armed_page *page)
{
	armed_page_fill(page, self->fd);
}

/* Ioctls of the VM are for no vCPU. */
static void set_shared_info_fn(void *arg);
static void send_xen_event_fn(void *arg);

static u32 expected_vcpu_id(paths_data *self, const struct waiter *waiter)
{
	return waiter->fn == set_shared_info_fn || waiter->fn == send_xen_event_fn ?
	       ~0u : self->vcpu->id;
}

/* The next access that waits, in @waiter, must be one to the page, which is filled. */
static void expect_access(paths_data *self, struct waiter *waiter,
			  const struct armed_page *page, u64 flags, u32 as_id)
{
	armed_page_expect_access(page, self->fd, waiter, flags,
				 expected_vcpu_id(self, waiter), as_id);
}

/*
 * Arm the page, do what needs it, and resolve it only once that is seen to wait.
 * There must be exactly one access to wait for, of the type that @flags tells.
 */
static void expect_wait_as(paths_data *self, gpa_t gpa, u64 flags, u32 as_id,
			   void (*fn)(void *arg), void *arg)
{
	u64 nr = vm_get_stat(self->vm, userfault_records);
	struct armed_page page;
	struct waiter waiter;

	arm(self, &page, gpa);
	waiter_start(&waiter, fn, arg);
	expect_access(self, &waiter, &page, flags, as_id);
	waiter_join(&waiter);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), nr + 1);
}

static void expect_wait(paths_data *self, gpa_t gpa, u64 flags,
			void (*fn)(void *arg), void *arg)
{
	expect_wait_as(self, gpa, flags, 0, fn, arg);
}

static bool is_port_exit(struct kvm_run *run)
{
	return run->exit_reason == KVM_EXIT_IO && run->io.port == TEST_PORT;
}

/* Complete exits for the port and for MMIO, and those that only inform. */
static bool complete_exit(struct kvm_run *run)
{
	if (is_port_exit(run)) {
		if (run->io.direction == KVM_EXIT_IO_IN)
			memset((void *)run + run->io.data_offset, 0x5a,
			       run->io.size * run->io.count);
		return true;
	}

	if (run->exit_reason == KVM_EXIT_MMIO) {
		TEST_ASSERT(!run->mmio.is_write, "A write to MMIO");
		memset(run->mmio.data, 0xa5, sizeof(run->mmio.data));
		return true;
	}

	return run->exit_reason == KVM_EXIT_HYPERV;
}

/* Finish the access of the guest, with other exits on the way. */
static void finish_fn(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct ucall uc;

	do {
		int ret = _vcpu_run(vcpu);

		if (ret)
			vcpu_fail_run(vcpu, ret, "that the access is finished");
	} while (complete_exit(vcpu->run));

	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
}

static void assert_failed(struct kvm_vcpu *vcpu, int ret, int error, gpa_t gpa, u64 flags)
{
	if (ret != -1 || errno != error)
		vcpu_fail_run(vcpu, ret, "that KVM_RUN fails");
	vcpu_assert_userfault(vcpu, gpa, flags);
}

/*
 * Arm the page, and run the vCPU: it has to exit to userspace for that, although it is KVM
 * that needs the page.  All that has been done by then is done again.
 */
static void expect_exit(paths_data *self, gpa_t gpa, u64 flags)
{
	struct armed_page page;

	arm(self, &page, gpa);
	vcpu_run_expect_userfault(self->vcpu, gpa, flags);
	fill(self, &page);
	finish_fn(self->vcpu);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
}

/* Exits for userfaults wait, too. */
static void enable_async_vcpu(paths_data *self)
{
	kvm_close(self->fd);
	vm_userfault_disable(self->vm);
	vm_userfault_enable_async(self->vm, KVM_USERFAULT_ASYNC_VCPU);
	self->fd = vm_create_userfault_fd(self->vm);
}

/* Let the guest call @fn, a function of this program. */
static void request_call(paths_data *self, u64 (*fn)(u64 arg), u64 arg)
{
	agent_request(self->vcpu, AGENT_EXEC, (gva_t)fn, arg);
}

static u64 guest_nothing(u64 arg)
{
	return arg;
}

/* What comes before is mapped, so that it does not count. */
static void warm_up(paths_data *self)
{
	request_call(self, guest_nothing, 0);
	finish_fn(self->vcpu);
}

/* The guest must be at the port. */
static void run_to_port(paths_data *self)
{
	vcpu_run(self->vcpu);
	TEST_ASSERT(is_port_exit(self->vcpu->run), "Exit %s instead of one for the port",
		    exit_reason_str(self->vcpu->run->exit_reason));
}

static void run_to_port_fn(void *arg)
{
	run_to_port(arg);
}

/* Let KVM look for what it may have to inject when the vCPU runs. */
static void request_event(paths_data *self)
{
	struct kvm_vcpu_events events;

	vcpu_events_get(self->vcpu, &events);
	vcpu_events_set(self->vcpu, &events);
}

static void handle_signal(int sig)
{
}

/* Run the vCPU, which does nothing until stop_spinning(). */
static void start_spinning(paths_data *self, struct waiter *waiter)
{
	struct sigaction action = { .sa_handler = handle_signal };

	TEST_ASSERT(!sigaction(SIGUSR1, &action, NULL), "errno %d", errno);
	agent_request(self->vcpu, AGENT_SPIN, AGENT_GPA, 0);
	waiter_start(waiter, finish_fn, self->vcpu);
}

static void wait_for_spinning(paths_data *self)
{
	userfault_wait_until(agent_is_spinning(self->vcpu));
}

/* Let the vCPU leave KVM_RUN, and come back. */
static void kick(struct waiter *waiter)
{
	pthread_kill(waiter->thread, SIGUSR1);
}

#define VCPU_CPU		0
#define OTHER_CPU		1

/* Like start_spinning(), but for preempt() to be called afterwards. */
static void start_spinning_to_be_preempted(paths_data *self, struct waiter *waiter)
{
	pin_self_to_cpu(OTHER_CPU);
	start_spinning(self, waiter);
	pin_task_to_cpu(waiter->thread, VCPU_CPU);
	wait_for_spinning(self);
}

/* Take its CPU away from the vCPU, until that needs a page when it runs again. */
static void preempt(paths_data *self)
{
	pin_self_to_cpu(VCPU_CPU);
	userfault_wait_until(userfault_is_readable(self->fd, 0));
}

static void stop_spinning(paths_data *self, struct waiter *waiter)
{
	WRITE_ONCE(*(u64 *)self->hva, 1);
	waiter_join(waiter);
	WRITE_ONCE(*(u64 *)self->hva, 0);
}

/*
 * Emulated instructions.
 */

static u64 guest_outsb(u64 addr)
{
	u64 count = 4;

	asm volatile("cld; rep outsb" : "+S"(addr), "+c"(count) : "d"(TEST_PORT) : "memory");
	return count;
}

static u64 guest_outsl(u64 addr)
{
	asm volatile("cld; outsl" : "+S"(addr) : "d"(TEST_PORT) : "memory");
	return 0;
}

static u64 guest_insb(u64 addr)
{
	u64 count = 4;

	asm volatile("cld; rep insb" : "+D"(addr), "+c"(count) : "d"(TEST_PORT) : "memory");
	return count;
}

static u64 guest_insl(u64 addr)
{
	asm volatile("cld; insl" : "+D"(addr) : "d"(TEST_PORT) : "memory");
	return 0;
}

/* The hardware does not get as far as the destination. */
static u64 guest_movs_from_mmio(u64 addr)
{
	u64 mmio = MMIO_GPA;

	asm volatile("cld; movsl" : "+D"(addr), "+S"(mmio) : : "memory");
	return 0;
}

userfault_test(paths, string_output)
{
	request_call(self, guest_outsb, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
}

userfault_test(paths, string_output_into_the_next_page)
{
	request_call(self, guest_outsl, page_gpa(2) - 2);
	expect_wait(self, page_gpa(2), USERFAULT_READ, finish_fn, self->vcpu);
}

userfault_test(paths, string_input)
{
	request_call(self, guest_insb, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + PAGE_SIZE), 0x5a5a5a5a);
}

userfault_test(paths, string_input_into_the_next_page)
{
	u8 *hva = self->hva + 2 * PAGE_SIZE;

	request_call(self, guest_insl, page_gpa(2) - 2);
	expect_wait(self, page_gpa(2), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*(u64 *)(hva - 8), 0x5a5aull << 48);
	TEST_ASSERT_EQ(*(u64 *)hva, 0x5a5a);
}

userfault_test(paths, copy_from_mmio)
{
	request_call(self, guest_movs_from_mmio, page_gpa(1) + 8);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + PAGE_SIZE + 8), 0xa5a5a5a5);
}

static u64 guest_emulated_read(u64 addr)
{
	u64 val;

	asm volatile(KVM_FEP "mov (%1), %0" : "=r"(val) : "r"(addr) : "memory");
	return val;
}

static u64 guest_emulated_write(u64 addr)
{
	asm volatile(KVM_FEP "mov %0, (%0)" : : "r"(addr) : "memory");
	return 0;
}

static u64 guest_emulated_cmpxchg(u64 addr)
{
	u64 old = 0;

	asm volatile(KVM_FEP "lock cmpxchg %1, (%1)" : "+a"(old) : "r"(addr) : "memory", "cc");
	return old;
}

userfault_test(paths, emulated_read)
{
	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	request_call(self, guest_emulated_read, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
}

userfault_test(paths, emulated_write)
{
	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	request_call(self, guest_emulated_write, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + PAGE_SIZE), page_gpa(1));
}

/* Reads the old value first. */
userfault_test(paths, emulated_cmpxchg)
{
	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	request_call(self, guest_emulated_cmpxchg, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + PAGE_SIZE), page_gpa(1));
}

/*
 * The address is translated once more for the write.  If the guest has changed its page
 * tables since the read, that leads to a page that nobody has waited for.
 */
userfault_test(paths, emulated_cmpxchg_of_another_page)
{
	struct armed_page pages[2];
	struct waiter waiter;
	u64 *pte;

	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	arm(self, &pages[0], page_gpa(1));
	arm(self, &pages[1], page_gpa(2));

	request_call(self, guest_emulated_cmpxchg, page_gpa(1));
	waiter_start(&waiter, finish_fn, self->vcpu);
	TEST_ASSERT(userfault_is_readable(self->fd, USERFAULT_TIMEOUT_SECS * 1000),
		    "There is no record");

	pte = vm_get_pte(self->vm, page_gpa(1));
	TEST_ASSERT_EQ(PTE_GET_PA(*pte), page_gpa(1));
	*pte += PAGE_SIZE;

	expect_access(self, &waiter, &pages[0], USERFAULT_READ, 0);
	expect_access(self, &waiter, &pages[1], USERFAULT_WRITE, 0);
	waiter_join(&waiter);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + PAGE_SIZE), 0);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + 2 * PAGE_SIZE), page_gpa(1));
}

static u64 guest_emulated_movs(u64 dst)
{
	u64 src = page_gpa(2) - 2;

	asm volatile("cld; " KVM_FEP "movsl" : "+D"(dst), "+S"(src) : : "memory");
	return 0;
}

/* Each of the four pages is waited for when it is needed, and not a second time. */
userfault_test(paths, emulated_copy_across_pages)
{
	struct armed_page pages[4];
	struct waiter waiter;
	int i;

	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	*(u16 *)(self->hva + 2 * PAGE_SIZE - 2) = 0x1234;
	*(u16 *)(self->hva + 2 * PAGE_SIZE) = 0x5678;
	for (i = 0; i < ARRAY_SIZE(pages); i++)
		arm(self, &pages[i], page_gpa(i + 1));

	request_call(self, guest_emulated_movs, page_gpa(4) - 2);
	waiter_start(&waiter, finish_fn, self->vcpu);
	expect_access(self, &waiter, &pages[0], USERFAULT_READ, 0);
	expect_access(self, &waiter, &pages[1], USERFAULT_READ, 0);
	expect_access(self, &waiter, &pages[2], USERFAULT_WRITE, 0);
	expect_access(self, &waiter, &pages[3], USERFAULT_WRITE, 0);
	waiter_join(&waiter);

	TEST_ASSERT_EQ(*(u16 *)(self->hva + 4 * PAGE_SIZE - 2), 0x1234);
	TEST_ASSERT_EQ(*(u16 *)(self->hva + 4 * PAGE_SIZE), 0x5678);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 4);
}

/* ud2; "kvm", which is the forced emulation prefix, at the end of page 1. */
static const u8 fetch_prefix[] = { 0x0f, 0x0b, 'k', 'v', 'm' };
/* lea 1(%rdi), %rax; ret */
static const u8 fetch_insn[] = { 0x48, 0x8d, 0x47, 0x01, 0xc3 };

static gva_t prepare_fetch(paths_data *self)
{
	void *hva = self->hva + 2 * PAGE_SIZE;

	memcpy(hva - sizeof(fetch_prefix), fetch_prefix, sizeof(fetch_prefix));
	memcpy(hva, fetch_insn, sizeof(fetch_insn));
	return page_gpa(2) - sizeof(fetch_prefix);
}

/* The guest does not get past the prefix, KVM has to fetch the instruction itself. */
userfault_test(paths, emulated_fetch)
{
	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	agent_request(self->vcpu, AGENT_EXEC, prepare_fetch(self), 41);
	expect_wait(self, page_gpa(2), USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(agent_result(self->vcpu), 42);
}

/*
 * Page tables of the guest.
 */

/* The page with the entry of the last level for @gva. */
static gpa_t last_level_table(paths_data *self, gva_t gva)
{
	return addr_hva2gpa(self->vm, vm_get_pte(self->vm, gva)) & PAGE_MASK;
}

static void translate_fn(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct kvm_translation tr = { .linear_address = AGENT_GPA };

	vcpu_ioctl(vcpu, KVM_TRANSLATE, &tr);
	TEST_ASSERT(tr.valid, "The address was not found");
	TEST_ASSERT_EQ(tr.physical_address, AGENT_GPA);
}

userfault_test(paths, walk_of_page_tables)
{
	warm_up(self);
	expect_wait(self, self->vm->mmu.pgd, USERFAULT_READ, translate_fn, self->vcpu);
	expect_wait(self, last_level_table(self, AGENT_GPA), USERFAULT_READ,
		    translate_fn, self->vcpu);
}

static u64 guest_read(u64 addr)
{
	return READ_ONCE(*(u64 *)addr);
}

userfault_test(paths, walk_for_a_page_fault)
{
	if (kvm_is_tdp_enabled())
		SKIP(return, "KVM does not see page faults of the guest");

	warm_up(self);
	request_call(self, guest_read, page_gpa(1));
	expect_exit(self, last_level_table(self, AGENT_GPA), USERFAULT_READ);

	enable_async_vcpu(self);
	request_call(self, guest_read, page_gpa(2));
	expect_wait(self, last_level_table(self, AGENT_GPA), USERFAULT_READ, finish_fn,
		    self->vcpu);
}

#define TABLE_GVA		(MMIO_GPA + PAGE_SIZE)

static u64 guest_flush_and_read(u64 addr)
{
	set_cr3(get_cr3());
	return READ_ONCE(*(u64 *)addr);
}

/*
 * Before that, KVM looks at a page table that the guest has written to in order to
 * update its shadow, and can't wait.  It must not take over what is there.
 */
userfault_test(paths, update_of_shadow_page_tables)
{
	gpa_t table = last_level_table(self, AGENT_GPA);
	u64 *pte = vm_get_pte(self->vm, page_gpa(1));
	u64 right;

	if (kvm_is_tdp_enabled())
		SKIP(return, "KVM does not shadow the guest's page tables");

	virt_map(self->vm, TABLE_GVA, table, 1);
	*(u64 *)(self->hva + PAGE_SIZE) = 1;
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(1), 0), 1);

	right = *pte;
	agent_do(self->vcpu, AGENT_WRITE, TABLE_GVA + (u64)pte % PAGE_SIZE, right);
	vm_userfault_arm(self->vm, table, PAGE_SIZE);
	*pte = right & ~PTE_WRITABLE_MASK(&self->vm->mmu);
	request_call(self, guest_flush_and_read, page_gpa(1));
	vcpu_run_expect_userfault(self->vcpu, table, USERFAULT_READ);

	*pte = right;
	userfault_resolve(self->fd, table, PAGE_SIZE, 0, 0);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 1);
}

userfault_test(paths, walk_for_an_emulated_read)
{
	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	request_call(self, guest_emulated_read, page_gpa(1));
	expect_wait(self, last_level_table(self, AGENT_GPA), USERFAULT_READ, finish_fn,
		    self->vcpu);
}

/* KVM has waited for the entry when it read it, and updates what it has read. */
userfault_test(paths, walk_that_sets_accessed_and_dirty_bits)
{
	struct kvm_mmu *mmu = &self->vm->mmu;
	u64 *pte = vm_get_pte(self->vm, page_gpa(1));

	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	*pte &= ~(PTE_ACCESSED_MASK(mmu) | PTE_DIRTY_MASK(mmu));
	request_call(self, guest_emulated_write, page_gpa(1));
	expect_wait(self, last_level_table(self, page_gpa(1)), USERFAULT_READ, finish_fn,
		    self->vcpu);
	TEST_ASSERT(is_accessed_pte(mmu, pte) && is_dirty_pte(mmu, pte),
		    "The bits were not set: %#lx", *pte);
}

/* The entry that leads to the table of the last level for @gva. */
static u64 *last_level_table_entry(paths_data *self, gva_t gva)
{
	u64 *table = addr_gpa2hva(self->vm, self->vm->mmu.pgd);
	int level;

	for (level = self->vm->mmu.pgtable_levels; level > PG_LEVEL_2M; level--) {
		u64 entry = table[(gva >> PG_LEVEL_SHIFT(level)) % 512];

		table = addr_gpa2hva(self->vm, PTE_GET_PA(entry));
	}

	return &table[(gva >> PG_LEVEL_SHIFT(PG_LEVEL_2M)) % 512];
}

static void translate_to_page_2_fn(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct kvm_translation tr = { .linear_address = AGENT_GPA };

	vcpu_ioctl(vcpu, KVM_TRANSLATE, &tr);
	TEST_ASSERT(tr.valid, "The address was not found");
	TEST_ASSERT_EQ(tr.physical_address, page_gpa(2));
}

/*
 * When the walk is to mark the entries that it has used, and finds that the guest has
 * changed one while it waited, it has to use and mark the new one, and nothing else.
 */
userfault_test(paths, walk_of_page_tables_that_change)
{
	u64 *entry = last_level_table_entry(self, AGENT_GPA);
	gva_t other_gva = vm_alloc_page(self->vm);
	u64 *other = addr_gva2hva(self->vm, other_gva);
	u64 *pte = vm_get_pte(self->vm, AGENT_GPA);
	struct kvm_mmu *mmu = &self->vm->mmu;
	struct armed_page page;
	struct waiter waiter;

	warm_up(self);
	*pte &= ~PTE_ACCESSED_MASK(mmu);
	*entry &= ~PTE_ACCESSED_MASK(mmu);
	other[0] = *pte + 2 * PAGE_SIZE;
	arm(self, &page, last_level_table(self, AGENT_GPA));
	waiter_start(&waiter, translate_to_page_2_fn, self->vcpu);
	userfault_wait_for_waiters(self->fd, 1);

	*entry += addr_gva2gpa(self->vm, other_gva) - page.gpa;
	expect_access(self, &waiter, &page, USERFAULT_READ, 0);
	waiter_join(&waiter);
	TEST_ASSERT(!memcmp(page.hva, page.content, PAGE_SIZE), "The old table was changed");
	TEST_ASSERT(is_accessed_pte(mmu, entry) && is_accessed_pte(mmu, other),
		    "The bits were not set: %#lx, %#lx", *entry, *other);
}

static void set_pae_fn(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct kvm_sregs sregs;

	vcpu_sregs_get(vcpu, &sregs);
	sregs.efer &= ~(EFER_LME | EFER_LMA);
	sregs.cs.l = 0;
	sregs.cs.db = 1;
	sregs.cr3 = page_gpa(1);
	vcpu_sregs_set(vcpu, &sregs);
}

userfault_test(paths, page_directory_pointers)
{
	expect_wait(self, page_gpa(1), USERFAULT_READ, set_pae_fn, self->vcpu);
}

/*
 * MSRs that point into memory.
 */

static u64 guest_wrmsr_wall_clock(u64 gpa)
{
	wrmsr(MSR_KVM_WALL_CLOCK_NEW, gpa);
	return 0;
}

userfault_test(paths, wall_clock)
{
	request_call(self, guest_wrmsr_wall_clock, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*(u32 *)(self->hva + PAGE_SIZE), 2);
}

userfault_test(paths, kvmclock)
{
	struct pvclock_vcpu_time_info *clock = self->hva + PAGE_SIZE;

	warm_up(self);
	vcpu_set_msr(self->vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(1) | 1);
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT(clock->system_time, "The clock was not updated");
}

/* Armed while KVM knows where the page is. */
userfault_test(paths, kvmclock_again)
{
	u32 *version = self->hva + PAGE_SIZE;
	u32 before;

	vcpu_set_msr(self->vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(1) | 1);
	warm_up(self);
	before = *version;
	TEST_ASSERT(before, "The clock was not updated");

	vcpu_ioctl(self->vcpu, KVM_KVMCLOCK_CTRL, NULL);
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT(*version != before, "The clock was not updated");
}

userfault_test(paths, steal_time)
{
	if (_vcpu_set_msr(self->vcpu, MSR_KVM_STEAL_TIME, page_gpa(1) | 1) != 1)
		SKIP(return, "There is no steal time");

	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);

	/* Armed while KVM knows where the page is. */
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
}

/* The flag is not set when the vCPU is preempted.  It waits when it runs again. */
userfault_test(paths, steal_time_when_preempted)
{
	struct armed_page page;
	struct waiter waiter;

	if (get_nprocs() < 2)
		SKIP(return, "Two CPUs are needed");
	if (_vcpu_set_msr(self->vcpu, MSR_KVM_STEAL_TIME, page_gpa(1) | 1) != 1)
		SKIP(return, "There is no steal time");

	start_spinning_to_be_preempted(self, &waiter);
	arm(self, &page, page_gpa(1));
	preempt(self);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	stop_spinning(self, &waiter);
}

static u64 guest_pair_clock(u64 gpa)
{
	return kvm_hypercall(KVM_HC_CLOCK_PAIRING, gpa, KVM_CLOCK_PAIRING_WALLCLOCK, 0, 0);
}

userfault_test(paths, clock_pairing)
{
	struct kvm_clock_pairing *pairing = self->hva + PAGE_SIZE;

	request_call(self, guest_pair_clock, page_gpa(1));
	finish_fn(self->vcpu);
	if (agent_result(self->vcpu) == (u64)-KVM_EOPNOTSUPP)
		SKIP(return, "The host has no TSC that is stable, and that KVM can use");

	memset(pairing, 0, sizeof(*pairing));
	request_call(self, guest_pair_clock, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(agent_result(self->vcpu), 0);
	TEST_ASSERT(pairing->sec, "The clock was not written");
}

static u64 guest_enable_apic(u64 arg)
{
	x2apic_enable();
	return 0;
}

/* For what KVM does only then. */
static void enable_apic(paths_data *self)
{
	request_call(self, guest_enable_apic, 0);
	finish_fn(self->vcpu);
}

userfault_test(paths, async_page_fault_data)
{
	u32 *token = self->hva + PAGE_SIZE + 4;

	enable_apic(self);
	vcpu_set_msr(self->vcpu, MSR_KVM_ASYNC_PF_INT, 0xf1);
	vcpu_set_msr(self->vcpu, MSR_KVM_ASYNC_PF_EN,
		     page_gpa(1) | KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_DELIVERY_AS_INT);

	/* Enabling it tells the guest that all pages are there. */
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*token, ~0u);
}

/* With interrupts, without which KVM waits itself. */
static u64 guest_read_with_interrupts(u64 addr)
{
	u64 val;

	sti_nop();
	val = READ_ONCE(*(u64 *)addr);
	cli();
	return val;
}

/* A page that isn't there, and that KVM has to wait for. */
static int uffd_create_hole(void *hva)
{
	int uffd = uffd_open(0);

	kvm_madvise(hva, PAGE_SIZE, MADV_DONTNEED);
	uffd_register(uffd, hva, PAGE_SIZE, UFFDIO_REGISTER_MODE_MISSING);
	return uffd;
}

static void uffd_fill_hole(int uffd, void *hva, u64 val)
{
	u64 src[PAGE_SIZE / sizeof(u64)] = { val };

	TEST_ASSERT_EQ(__uffd_copy(uffd, hva, src, PAGE_SIZE, 0), PAGE_SIZE);
}

/*
 * The vCPU is halted until page 1 is there.  Then KVM maps it in advance, or finds that
 * it can't, because the page at @gpa is armed: this is not an access that could wait, or
 * could fail.  The guest's access is one, which exits.
 */
static void test_async_page_fault(paths_data *self, gpa_t gpa)
{
	struct vcpu_call call = { .vcpu = self->vcpu };
	void *hva = self->hva + PAGE_SIZE;
	struct waiter waiter;
	int uffd;

	warm_up(self);
	uffd = uffd_create_hole(hva);
	request_call(self, guest_read_with_interrupts, page_gpa(1));
	waiter_start(&waiter, vcpu_call_run_fn, &call);
	userfault_wait_until(vcpu_get_stat(self->vcpu, blocking));
	vm_userfault_arm(self->vm, gpa, PAGE_SIZE);
	uffd_fill_hole(uffd, hva, 77);
	waiter_join(&waiter);

	errno = call.error;
	assert_failed(self->vcpu, call.ret, EFAULT, gpa, USERFAULT_READ);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
	userfault_resolve(self->fd, gpa, PAGE_SIZE, 0, 0);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 77);
	kvm_close(uffd);
}

userfault_test(paths, async_page_fault)
{
	test_async_page_fault(self, page_gpa(1));
}

/* Mapping it takes a walk of page tables, which is not one that the guest does. */
userfault_test(paths, async_page_fault_and_its_page_table)
{
	if (kvm_is_tdp_enabled())
		SKIP(return, "KVM does not see page faults of the guest");

	test_async_page_fault(self, last_level_table(self, AGENT_GPA));
}

#define IRQ_VECTOR		0x51

static bool guest_saw_irq;

static u64 guest_open_irq_window(u64 arg)
{
	sti_nop_cli();
	return READ_ONCE(guest_saw_irq);
}

#define APF_DATA		page_gpa(2)

static u32 guest_apf_flags;

/* The access is repeated, and KVM halts the vCPU instead of telling it once more. */
static void page_not_present_handler(struct ex_regs *regs)
{
	struct kvm_vcpu_pv_apf_data *data = (void *)APF_DATA;

	WRITE_ONCE(guest_apf_flags, READ_ONCE(data->flags));
	WRITE_ONCE(data->flags, 0);
	GUEST_ASSERT(READ_ONCE(guest_apf_flags));
}

static void page_ready_handler(struct ex_regs *regs)
{
	struct kvm_vcpu_pv_apf_data *data = (void *)APF_DATA;

	WRITE_ONCE(guest_saw_irq, true);
	WRITE_ONCE(data->token, 0);
	wrmsr(MSR_KVM_ASYNC_PF_ACK, 1);
	x2apic_write_reg(APIC_EOI, 0);
}

/* Also in the kernel, and with KVM having told the guest already that all pages are there. */
static void enable_async_page_faults(paths_data *self)
{
	vm_install_exception_handler(self->vm, PF_VECTOR, page_not_present_handler);
	vm_install_exception_handler(self->vm, IRQ_VECTOR, page_ready_handler);
	enable_apic(self);
	vcpu_set_msr(self->vcpu, MSR_KVM_ASYNC_PF_INT, IRQ_VECTOR);
	vcpu_set_msr(self->vcpu, MSR_KVM_ASYNC_PF_EN,
		     APF_DATA | KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_SEND_ALWAYS |
		     KVM_ASYNC_PF_DELIVERY_AS_INT);
	request_call(self, guest_open_irq_window, 0);
	finish_fn(self->vcpu);
	TEST_ASSERT(agent_result(self->vcpu), "The guest was not told");
}

/* If KVM could not tell the guest that page 1 is not there, it would halt the vCPU. */
userfault_test(paths, async_page_fault_data_for_a_page_not_present)
{
	void *hva = self->hva + PAGE_SIZE;
	struct armed_page page;
	struct waiter waiter;
	int uffd;

	enable_async_page_faults(self);
	uffd = uffd_create_hole(hva);
	arm(self, &page, APF_DATA);
	request_call(self, guest_read_with_interrupts, page_gpa(1));
	waiter_start(&waiter, finish_fn, self->vcpu);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	userfault_wait_until(vcpu_get_stat(self->vcpu, blocking));
	uffd_fill_hole(uffd, hva, 77);
	waiter_join(&waiter);

	TEST_ASSERT_EQ(agent_result(self->vcpu), 77);
	sync_global_from_guest(self->vm, guest_apf_flags);
	TEST_ASSERT_EQ(guest_apf_flags, KVM_PV_REASON_PAGE_NOT_PRESENT);
	kvm_close(uffd);
}

/* Without an EOI. */
static void irq_handler(struct ex_regs *regs)
{
	WRITE_ONCE(guest_saw_irq, true);
}

static u64 guest_take_irq(u64 arg)
{
	sti_nop();
	x2apic_write_reg(APIC_SELF_IPI, IRQ_VECTOR);
	while (!READ_ONCE(guest_saw_irq))
		cpu_relax();
	cli();
	return 0;
}

static u64 guest_is_irq_in_service(u64 arg)
{
	u64 isr = x2apic_read_reg(APIC_ISR + APIC_VECTOR_TO_REG_OFFSET(IRQ_VECTOR));

	return isr & BIT(APIC_VECTOR_TO_BIT_NUMBER(IRQ_VECTOR));
}

static bool is_irq_in_service(paths_data *self)
{
	request_call(self, guest_is_irq_in_service, 0);
	finish_fn(self->vcpu);
	return agent_result(self->vcpu);
}

static void prepare_pv_eoi(paths_data *self)
{
	vm_install_exception_handler(self->vm, IRQ_VECTOR, irq_handler);
	vcpu_set_msr(self->vcpu, MSR_KVM_PV_EOI_EN, page_gpa(1) | 1);
	enable_apic(self);
	request_call(self, guest_take_irq, 0);
	finish_fn(self->vcpu);
	TEST_ASSERT(is_irq_in_service(self), "There was an EOI");
}

userfault_test(paths, pv_eoi_enable)
{
	prepare_pv_eoi(self);
	request_event(self);
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT(is_irq_in_service(self), "There was an EOI");
}

/*
 * KVM asks for it when the guest exits, and no longer than until then: that may happen
 * before the page is armed.
 */
userfault_test(paths, pv_eoi)
{
	struct armed_page page;
	struct waiter waiter;
	int i;

	prepare_pv_eoi(self);
	for (i = 0; i < 1000; i++) {
		request_event(self);
		start_spinning(self, &waiter);
		wait_for_spinning(self);
		arm(self, &page, page_gpa(1));
		kick(&waiter);
		if (userfault_is_readable(self->fd, 100))
			break;

		fill(self, &page);
		stop_spinning(self, &waiter);
	}

	/* The guest has cleared the flag, as it is to find out. */
	page.content[0] &= ~KVM_PV_EOI_ENABLED;
	expect_access(self, &waiter, &page, USERFAULT_READ, 0);
	stop_spinning(self, &waiter);
	TEST_ASSERT(!is_irq_in_service(self), "The EOI was lost");
}

userfault_test(paths, vapic_page)
{
	struct kvm_vapic_addr addr = { .vapic_addr = page_gpa(1) };
	u32 *tpr = self->hva + PAGE_SIZE;
	struct armed_page page;
	struct waiter waiter;

	enable_apic(self);
	vcpu_ioctl(self->vcpu, KVM_SET_VAPIC_ADDR, &addr);
	*tpr = -1;
	request_event(self);
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*tpr & 0xff, 0);

	/* It is read again when the guest exits. */
	start_spinning(self, &waiter);
	wait_for_spinning(self);
	arm(self, &page, page_gpa(1));
	kick(&waiter);
	page.content[0] = 0x20;
	expect_access(self, &waiter, &page, USERFAULT_READ, 0);
	stop_spinning(self, &waiter);
	TEST_ASSERT_EQ(self->vcpu->run->cr8, 2);
}

static void set_vp_assist_fn(void *arg)
{
	vcpu_set_msr((struct kvm_vcpu *)arg, HV_X64_MSR_VP_ASSIST_PAGE, page_gpa(1) | 1);
}

userfault_test(paths, hyperv_vp_assist_page)
{
	if (!kvm_has_cap(KVM_CAP_HYPERV))
		SKIP(return, "There is no Hyper-V emulation");

	expect_wait(self, page_gpa(1), USERFAULT_WRITE, set_vp_assist_fn, self->vcpu);
}

static void set_hypercall_fn(void *arg)
{
	vcpu_set_msr((struct kvm_vcpu *)arg, HV_X64_MSR_HYPERCALL, page_gpa(1) | 1);
}

userfault_test(paths, hyperv_hypercall_page)
{
	if (!kvm_has_cap(KVM_CAP_HYPERV))
		SKIP(return, "There is no Hyper-V emulation");

	vcpu_set_msr(self->vcpu, HV_X64_MSR_GUEST_OS_ID, HYPERV_LINUX_OS_ID);
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, set_hypercall_fn, self->vcpu);
	TEST_ASSERT(*(u64 *)(self->hva + PAGE_SIZE), "The page was not written");
}

struct hv_send_ipi_args {
	u32 vector;
	u32 reserved;
	u64 cpu_mask;
};

static u64 guest_hv_send_ipi(u64 gpa)
{
	return kvm_hypercall(0, 0, HVCALL_SEND_IPI, gpa, 0);
}

/* An IPI to nobody: what was in the page before is no valid vector. */
userfault_test(paths, hyperv_hypercall_arguments)
{
	struct hv_send_ipi_args *args = self->hva + PAGE_SIZE;

	if (!kvm_has_cap(KVM_CAP_HYPERV))
		SKIP(return, "There is no Hyper-V emulation");

	vcpu_set_hv_cpuid(self->vcpu);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_GUEST_OS_ID, HYPERV_LINUX_OS_ID);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_HYPERCALL, page_gpa(2) | 1);
	warm_up(self);
	args->vector = IRQ_VECTOR;
	request_call(self, guest_hv_send_ipi, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(agent_result(self->vcpu), 0);
}

userfault_test(paths, hyperv_tsc_page)
{
	if (!kvm_has_cap(KVM_CAP_HYPERV))
		SKIP(return, "There is no Hyper-V emulation");

	warm_up(self);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_GUEST_OS_ID, HYPERV_LINUX_OS_ID);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_REFERENCE_TSC, page_gpa(1) | 1);
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
}

#define SYNIC_SINT		2
#define SYNIC_VECTOR		0xf1
#define SYNIC_MESSAGE_SIZE	256
#define HVMSG_TIMER_EXPIRED	0x80000010

static bool enable_synic(paths_data *self)
{
	if (!kvm_has_cap(KVM_CAP_HYPERV_SYNIC))
		return false;

	vcpu_set_hv_cpuid(self->vcpu);
	vcpu_enable_cap(self->vcpu, KVM_CAP_HYPERV_SYNIC, 0);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_SCONTROL, 1);
	return true;
}

static u64 guest_wrmsr_simp(u64 gpa)
{
	wrmsr(HV_X64_MSR_SIMP, gpa | 1);
	return 0;
}

static u64 guest_wrmsr_siefp(u64 gpa)
{
	wrmsr(HV_X64_MSR_SIEFP, gpa | 1);
	return 0;
}

/* They are cleared. */
userfault_test(paths, hyperv_synic_pages)
{
	if (!enable_synic(self))
		SKIP(return, "There is no SynIC");

	memset(self->hva + PAGE_SIZE, 1, 2 * PAGE_SIZE);
	request_call(self, guest_wrmsr_simp, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	request_call(self, guest_wrmsr_siefp, page_gpa(2));
	expect_wait(self, page_gpa(2), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + PAGE_SIZE), 0);
	TEST_ASSERT_EQ(*(u64 *)(self->hva + 3 * PAGE_SIZE - 8), 0);
}

userfault_test(paths, hyperv_synic_message)
{
	u32 *type = self->hva + PAGE_SIZE + SYNIC_SINT * SYNIC_MESSAGE_SIZE;

	if (!enable_synic(self))
		SKIP(return, "There is no SynIC");

	warm_up(self);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_SIMP, page_gpa(1) | 1);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_SINT0 + SYNIC_SINT, SYNIC_VECTOR);

	/* A timer, which expired long ago. */
	vcpu_set_msr(self->vcpu, HV_X64_MSR_STIMER0_COUNT, 1);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_STIMER0_CONFIG, SYNIC_SINT << 16 | 1);
	request_call(self, guest_nothing, 0);
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(*type, HVMSG_TIMER_EXPIRED);
}

/*
 * Xen, with these pages.
 */

#define XEN_SHARED_INFO		page_gpa(1)
#define XEN_VCPU_INFO		page_gpa(2)
#define XEN_RUNSTATE		page_gpa(3)
#define XEN_HYPERCALL_MSR	0x40000000
#define XEN_PORT		66
#define XEN_GSI			32

static void xen_set_vm_attr(paths_data *self, struct kvm_xen_hvm_attr attr)
{
	vm_ioctl(self->vm, KVM_XEN_HVM_SET_ATTR, &attr);
}

static void xen_set_vcpu_attr(struct kvm_vcpu *vcpu, u16 type, u64 gpa)
{
	struct kvm_xen_vcpu_attr attr = { .type = type, .u.gpa = gpa };

	vcpu_ioctl(vcpu, KVM_XEN_VCPU_SET_ATTR, &attr);
}

static bool enable_xen(paths_data *self)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND,
		.msr = XEN_HYPERCALL_MSR,
	};
	u32 needed = KVM_XEN_HVM_CONFIG_SHARED_INFO | KVM_XEN_HVM_CONFIG_RUNSTATE |
		     KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND;

	if ((kvm_check_cap(KVM_CAP_XEN_HVM) & needed) != needed)
		return false;

	vm_ioctl(self->vm, KVM_XEN_HVM_CONFIG, &config);
	xen_set_vm_attr(self, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE,
		.u.long_mode = 1,
	});
	return true;
}

static void set_shared_info_fn(void *arg)
{
	xen_set_vm_attr(arg, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = XEN_SHARED_INFO / PAGE_SIZE,
	});
}

static bool enable_xen_events(paths_data *self)
{
	if (!enable_xen(self))
		return false;

	set_shared_info_fn(self);
	xen_set_vcpu_attr(self->vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, XEN_VCPU_INFO);
	warm_up(self);
	return true;
}

static bool is_xen_port_pending(paths_data *self)
{
	u64 *pending = self->hva + PAGE_SIZE + 0x800;

	return pending[XEN_PORT / 64] & BIT_ULL(XEN_PORT % 64);
}

/* In the shared info, and said so in the vCPU info. */
static bool is_xen_event_pending(paths_data *self)
{
	u8 *vcpu_info = self->hva + 2 * PAGE_SIZE;

	if (!is_xen_port_pending(self))
		return false;

	TEST_ASSERT_EQ(vcpu_info[0], 1);
	TEST_ASSERT(*(u64 *)(vcpu_info + 8) & BIT_ULL(XEN_PORT / 64),
		    "The event is not selected");
	return true;
}

userfault_test(paths, xen_shared_info)
{
	u32 *version = self->hva + PAGE_SIZE + 0xc00;

	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");

	expect_wait(self, XEN_SHARED_INFO, USERFAULT_WRITE, set_shared_info_fn, self);
	TEST_ASSERT(*version, "The wall clock was not written");
}

static void test_xen_time(paths_data *self, u16 type, u64 offset)
{
	struct pvclock_vcpu_time_info *time = self->hva + 2 * PAGE_SIZE + offset;

	warm_up(self);
	xen_set_vcpu_attr(self->vcpu, type, XEN_VCPU_INFO);
	request_call(self, guest_nothing, 0);
	expect_wait(self, XEN_VCPU_INFO, USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT(time->system_time, "The clock was not updated");
}

userfault_test(paths, xen_vcpu_info)
{
	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");

	test_xen_time(self, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, 32);
}

/* Telling KVM where the structure is does not touch it, nor have its page allocated. */
userfault_test(paths, xen_vcpu_info_before_there_is_a_page)
{
	void *hva = self->hva + 2 * PAGE_SIZE;
	unsigned char present;

	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");

	warm_up(self);
	kvm_madvise(hva, PAGE_SIZE, MADV_DONTNEED);
	vm_userfault_arm(self->vm, XEN_VCPU_INFO, PAGE_SIZE);
	xen_set_vcpu_attr(self->vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, XEN_VCPU_INFO);
	TEST_ASSERT(!mincore(hva, PAGE_SIZE, &present), "mincore() failed, errno %d", errno);
	TEST_ASSERT(!(present & 1), "KVM has allocated an armed page");
}

userfault_test(paths, xen_vcpu_time_info)
{
	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");

	test_xen_time(self, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, 0);
}

/* The first 16 bytes are in one page, the rest in the other. */
#define XEN_SPLIT_RUNSTATE	(XEN_RUNSTATE + PAGE_SIZE - 16)

static void set_runstate_fn(void *arg)
{
	xen_set_vcpu_attr(arg, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, XEN_RUNSTATE);
}

static void set_split_runstate_fn(void *arg)
{
	xen_set_vcpu_attr(arg, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, XEN_SPLIT_RUNSTATE);
}

/* The time since it entered the state, and those spent in all of the states. */
static void assert_runstate(u64 *entry_time)
{
	TEST_ASSERT(entry_time[0], "There is no runstate");
	TEST_ASSERT_EQ(entry_time[0], entry_time[1] + entry_time[2] + entry_time[3] +
				      entry_time[4]);
}

userfault_test(paths, xen_runstate)
{
	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");

	warm_up(self);
	expect_wait(self, XEN_RUNSTATE, USERFAULT_WRITE, set_runstate_fn, self->vcpu);
	assert_runstate(self->hva + 3 * PAGE_SIZE + 8);

	request_call(self, guest_nothing, 0);
	expect_wait(self, XEN_RUNSTATE, USERFAULT_WRITE, finish_fn, self->vcpu);
	assert_runstate(self->hva + 3 * PAGE_SIZE + 8);
}

userfault_test(paths, xen_runstate_in_two_pages)
{
	struct armed_page pages[2];
	struct waiter waiter;

	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");

	warm_up(self);
	arm(self, &pages[0], page_gpa(3));
	arm(self, &pages[1], page_gpa(4));
	waiter_start(&waiter, set_split_runstate_fn, self->vcpu);
	expect_access(self, &waiter, &pages[0], USERFAULT_WRITE, 0);
	expect_access(self, &waiter, &pages[1], USERFAULT_WRITE, 0);
	waiter_join(&waiter);
	assert_runstate(self->hva + 4 * PAGE_SIZE - 8);
}

/* It is not updated when the vCPU is preempted, which waits when it runs again. */
userfault_test(paths, xen_runstate_when_preempted)
{
	struct armed_page page;
	struct waiter waiter;

	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");
	if (get_nprocs() < 2)
		SKIP(return, "Two CPUs are needed");

	set_runstate_fn(self->vcpu);
	start_spinning_to_be_preempted(self, &waiter);
	arm(self, &page, XEN_RUNSTATE);
	preempt(self);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	stop_spinning(self, &waiter);
	assert_runstate(self->hva + 3 * PAGE_SIZE + 8);
}

static int __send_xen_event(struct kvm_vcpu *vcpu)
{
	struct kvm_irq_routing_xen_evtchn evtchn = {
		.port = XEN_PORT,
		.vcpu = vcpu->id,
		.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
	};

	return __vm_ioctl(vcpu->vm, KVM_XEN_HVM_EVTCHN_SEND, &evtchn);
}

static void send_xen_event_fn(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	int ret = __send_xen_event(vcpu);

	TEST_ASSERT_VM_VCPU_IOCTL(!ret, KVM_XEN_HVM_EVTCHN_SEND, ret, vcpu->vm);
}

static void fail_to_send_xen_event_fn(void *arg)
{
	int ret = __send_xen_event(arg);

	TEST_ASSERT(ret == -1 && errno == EINVAL,
		    KVM_IOCTL_ERROR(KVM_XEN_HVM_EVTCHN_SEND, ret));
}

userfault_test(paths, xen_event_from_userspace)
{
	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	expect_wait(self, XEN_SHARED_INFO, USERFAULT_WRITE, send_xen_event_fn, self->vcpu);
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
}

/* There is no page to wait for, although KVM still knows which one it was. */
userfault_test(paths, xen_event_without_shared_info)
{
	struct waiter waiter;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	xen_set_vm_attr(self, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = KVM_XEN_INVALID_GFN,
	});
	vm_userfault_arm(self->vm, XEN_SHARED_INFO, PAGE_SIZE);
	waiter_start(&waiter, fail_to_send_xen_event_fn, self->vcpu);
	waiter_join(&waiter);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
}

/* The vCPU has to write it, whoever it comes from. */
userfault_test(paths, xen_event_in_the_vcpu_info)
{
	struct armed_page page;
	struct waiter waiter;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	arm(self, &page, XEN_VCPU_INFO);
	send_xen_event_fn(self->vcpu);
	request_call(self, guest_nothing, 0);
	waiter_start(&waiter, finish_fn, self->vcpu);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	waiter_join(&waiter);
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
}

static const struct kvm_xen_vcpu_attr past_xen_timer = {
	.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
	.u.timer.port = XEN_PORT,
	.u.timer.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
	.u.timer.expires_ns = 1,
};

userfault_test(paths, xen_timer)
{
	struct kvm_xen_vcpu_attr timer = past_xen_timer;
	struct armed_page page;
	struct waiter waiter;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	arm(self, &page, XEN_SHARED_INFO);
	vcpu_ioctl(self->vcpu, KVM_XEN_VCPU_SET_ATTR, &timer);
	start_spinning(self, &waiter);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	stop_spinning(self, &waiter);
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
}

/* If nobody fills the page it fails, and is not over. */
userfault_test(paths, xen_timer_that_fails)
{
	struct kvm_xen_vcpu_attr timer = past_xen_timer;
	struct armed_page page;
	int ret;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	arm(self, &page, XEN_SHARED_INFO);
	vcpu_ioctl(self->vcpu, KVM_XEN_VCPU_SET_ATTR, &timer);
	kvm_close(self->fd);
	ret = __vcpu_ioctl(self->vcpu, KVM_XEN_VCPU_GET_ATTR, &timer);
	TEST_ASSERT(ret == -1 && errno == EFAULT,
		    KVM_IOCTL_ERROR(KVM_XEN_VCPU_GET_ATTR, ret));

	self->fd = vm_create_userfault_fd(self->vm);
	fill(self, &page);
	vcpu_ioctl(self->vcpu, KVM_XEN_VCPU_GET_ATTR, &timer);
	TEST_ASSERT_EQ(timer.u.timer.port, XEN_PORT);
	TEST_ASSERT(is_xen_port_pending(self) || timer.u.timer.expires_ns,
		    "The event was lost");
}

static u64 guest_wrmsr_xen_hypercall(u64 gpa)
{
	wrmsr(XEN_HYPERCALL_MSR, gpa);
	return 0;
}

/* It is written piece by piece. */
userfault_test(paths, xen_hypercall_page)
{
	u8 *code = self->hva + PAGE_SIZE;

	if (!enable_xen(self))
		SKIP(return, "There is no Xen emulation");

	request_call(self, guest_wrmsr_xen_hypercall, page_gpa(1));
	expect_wait(self, page_gpa(1), USERFAULT_WRITE, finish_fn, self->vcpu);
	TEST_ASSERT(code[0] == 0xb8 && code[PAGE_SIZE - 1] == 0xcc,
		    "The page was not written");
}

#define XEN_SCHED_OP		29
#define XEN_SCHEDOP_POLL	3

struct xen_sched_poll {
	u64 ports;
	u32 nr_ports;
	u64 timeout;
};

static u64 guest_xen_poll(u64 arg)
{
	return __xen_hypercall(XEN_SCHED_OP, XEN_SCHEDOP_POLL, (void *)arg);
}

/* Both the arguments and the ports that they point to.  There is an event already. */
userfault_test(paths, xen_poll)
{
	struct xen_sched_poll *poll = self->hva + 4 * PAGE_SIZE;
	struct armed_page pages[2];
	struct waiter waiter;
	int i;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	send_xen_event_fn(self->vcpu);
	poll->ports = page_gpa(5);
	poll->nr_ports = 1;
	*(u32 *)(self->hva + 5 * PAGE_SIZE) = XEN_PORT;
	for (i = 0; i < ARRAY_SIZE(pages); i++)
		arm(self, &pages[i], page_gpa(4 + i));

	request_call(self, guest_xen_poll, page_gpa(4));
	waiter_start(&waiter, finish_fn, self->vcpu);
	for (i = 0; i < ARRAY_SIZE(pages); i++)
		expect_access(self, &waiter, &pages[i], USERFAULT_READ, 0);
	waiter_join(&waiter);
	TEST_ASSERT_EQ(agent_result(self->vcpu), 0);
}

static bool enable_xen_events_by_hva(paths_data *self)
{
	struct kvm_xen_vcpu_attr vcpu_info = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA,
		.u.hva = (unsigned long)self->hva + 2 * PAGE_SIZE,
	};

	if (!(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA) ||
	    !enable_xen(self))
		return false;

	xen_set_vm_attr(self, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA,
		.u.shared_info.hva = (unsigned long)self->hva + PAGE_SIZE,
	});
	vcpu_ioctl(self->vcpu, KVM_XEN_VCPU_SET_ATTR, &vcpu_info);
	warm_up(self);
	return true;
}

/*
 * Memory that KVM knows by its hva is that of the VMM: that a memslot has it, too, is
 * of no importance.  Without the pages, KVM has to look them up again.
 */
userfault_test(paths, xen_event_by_hva_is_exempt)
{
	struct waiter waiter;

	if (!enable_xen_events_by_hva(self))
		SKIP(return, "There is no Xen emulation that uses an hva");

	vm_userfault_arm(self->vm, XEN_SHARED_INFO, 2 * PAGE_SIZE);
	kvm_madvise(self->hva + PAGE_SIZE, 2 * PAGE_SIZE, MADV_DONTNEED);
	waiter_start(&waiter, send_xen_event_fn, self->vcpu);
	waiter_join(&waiter);
	request_call(self, guest_nothing, 0);
	waiter_start(&waiter, finish_fn, self->vcpu);
	waiter_join(&waiter);
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
}

static void add_xen_irqfds(paths_data *self, int *fds, int nr)
{
	struct kvm_irq_routing *routing = kvm_gsi_routing_create();
	int i;

	for (i = 0; i < nr; i++) {
		routing->entries[i] = (struct kvm_irq_routing_entry) {
			.gsi = XEN_GSI + i,
			.type = KVM_IRQ_ROUTING_XEN_EVTCHN,
			.u.xen_evtchn.port = XEN_PORT + i,
			.u.xen_evtchn.vcpu = self->vcpu->id,
			.u.xen_evtchn.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
		};
	}
	routing->nr = nr;
	kvm_gsi_routing_write(self->vm, routing);

	for (i = 0; i < nr; i++) {
		fds[i] = kvm_new_eventfd();
		kvm_assign_irqfd(self->vm, XEN_GSI + i, fds[i]);
	}
}

struct deassign {
	struct kvm_vm *vm;
	int fd;
};

static void deassign_fn(void *arg)
{
	struct deassign *deassign = arg;

	kvm_deassign_irqfd(deassign->vm, XEN_GSI + 1, deassign->fd);
}

/*
 * The worker doesn't wait, as is seen by who waits for it because of another irqfd.
 * The vCPU does, and no event is lost.
 */
userfault_test(paths, xen_event_from_an_irqfd)
{
	struct waiter waiter, deassigner;
	struct armed_page page;
	int fds[2];

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	add_xen_irqfds(self, fds, 2);
	arm(self, &page, XEN_SHARED_INFO);
	eventfd_write(fds[0], 1);
	waiter_start(&deassigner, deassign_fn,
		     &(struct deassign) { .vm = self->vm, .fd = fds[1] });
	waiter_join(&deassigner);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);

	request_call(self, guest_nothing, 0);
	waiter_start(&waiter, finish_fn, self->vcpu);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	waiter_join(&waiter);
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
	kvm_close(fds[0]);
	kvm_close(fds[1]);
}

/* Nor does it take an exit for another reason. */
userfault_test(paths, xen_event_from_an_irqfd_while_running)
{
	struct armed_page page;
	struct waiter waiter;
	int fd;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	add_xen_irqfds(self, &fd, 1);
	start_spinning(self, &waiter);
	wait_for_spinning(self);
	arm(self, &page, XEN_SHARED_INFO);
	eventfd_write(fd, 1);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	/* The vCPU info is written last. */
	userfault_wait_until(READ_ONCE(*(u8 *)(self->hva + 2 * PAGE_SIZE)));
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
	stop_spinning(self, &waiter);
	kvm_close(fd);
}

static void get_xen_vcpu_attr_fn(void *arg)
{
	struct kvm_xen_vcpu_attr attr = { .type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO };

	vcpu_ioctl((struct kvm_vcpu *)arg, KVM_XEN_VCPU_GET_ATTR, &attr);
	TEST_ASSERT_EQ(attr.u.gpa, XEN_VCPU_INFO);
}

/* The irqfd goes once its worker is done, i.e. has left the event to the vCPU. */
static void defer_xen_event(paths_data *self, struct armed_page *page)
{
	int fd;

	add_xen_irqfds(self, &fd, 1);
	arm(self, page, XEN_SHARED_INFO);
	eventfd_write(fd, 1);
	kvm_deassign_irqfd(self->vm, XEN_GSI, fd);
	kvm_close(fd);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
}

/* Who saves the state of a vCPU that does not run any more saves the event, too. */
userfault_test(paths, xen_event_from_an_irqfd_when_state_is_saved)
{
	struct armed_page page;
	struct waiter waiter;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	defer_xen_event(self, &page);
	fill(self, &page);
	TEST_ASSERT(!is_xen_event_pending(self), "The event was not deferred");
	get_xen_vcpu_attr_fn(self->vcpu);
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");

	/* With the page still armed, that waits. */
	memset(self->hva + PAGE_SIZE, 0, 2 * PAGE_SIZE);
	defer_xen_event(self, &page);
	waiter_start(&waiter, get_xen_vcpu_attr_fn, self->vcpu);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	waiter_join(&waiter);
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
}

static u64 guest_upcall_pending(u64 arg)
{
	return READ_ONCE(*(u8 *)XEN_VCPU_INFO);
}

static bool guest_sees_xen_event(paths_data *self)
{
	request_call(self, guest_upcall_pending, 0);
	finish_fn(self->vcpu);
	return agent_result(self->vcpu);
}

/* The guest doesn't run before it is there, even if there is no exit in between. */
userfault_test(paths, xen_event_from_an_irqfd_before_running)
{
	struct armed_page page;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	/* All that the guest needs to look for it is mapped. */
	TEST_ASSERT(!guest_sees_xen_event(self), "There was no event");
	defer_xen_event(self, &page);
	fill(self, &page);
	TEST_ASSERT(guest_sees_xen_event(self), "The event came late");
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
}

/* Nor if the first try has failed. */
userfault_test(paths, xen_event_from_an_irqfd_that_fails_first)
{
	struct armed_page page;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	TEST_ASSERT(!guest_sees_xen_event(self), "There was no event");
	defer_xen_event(self, &page);
	request_call(self, guest_upcall_pending, 0);
	kvm_close(self->fd);
	assert_failed(self->vcpu, _vcpu_run(self->vcpu), EFAULT, XEN_SHARED_INFO,
		      USERFAULT_WRITE | KVM_MEMORY_EXIT_FLAG_FAILED);

	self->fd = vm_create_userfault_fd(self->vm);
	fill(self, &page);
	finish_fn(self->vcpu);
	TEST_ASSERT(agent_result(self->vcpu), "The event came late");
	TEST_ASSERT(is_xen_event_pending(self), "The event was lost");
}

#define NR_XEN_PORTS		8
#define XEN_EVENTS_MSECS	2000

/* All of the ports are in one word. */
static bool take_xen_events(paths_data *self)
{
	u64 *pending = self->hva + PAGE_SIZE + 0x800 + XEN_PORT / 64 * 8;
	u64 ports = GENMASK_ULL(NR_XEN_PORTS - 1, 0) << XEN_PORT % 64;

	if ((READ_ONCE(*pending) & ports) != ports)
		return false;

	__atomic_fetch_and(pending, ~ports, __ATOMIC_SEQ_CST);
	return true;
}

/* The vCPU delivers events while the worker leaves more of them to it. */
userfault_test(paths, many_xen_events_from_irqfds)
{
	u64 end = userfault_now_ms() + XEN_EVENTS_MSECS, nr = 0;
	struct waiter waiter;
	int fds[NR_XEN_PORTS], i;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	add_xen_irqfds(self, fds, NR_XEN_PORTS);
	start_spinning(self, &waiter);
	wait_for_spinning(self);
	for (; userfault_now_ms() < end; nr++) {
		vm_userfault_arm(self->vm, XEN_SHARED_INFO, PAGE_SIZE);
		for (i = 0; i < NR_XEN_PORTS; i++)
			eventfd_write(fds[i], 1);
		userfault_resolve(self->fd, XEN_SHARED_INFO, PAGE_SIZE, 0, 0);
		userfault_wait_until(take_xen_events(self));
	}
	stop_spinning(self, &waiter);
	pr_info("# %lu times %d events\n", nr, NR_XEN_PORTS);
	for (i = 0; i < NR_XEN_PORTS; i++)
		kvm_close(fds[i]);
}

static u64 guest_halt(u64 arg)
{
	asm volatile("sti; hlt; cli");
	return 0;
}

static void upcall_handler(struct ex_regs *regs)
{
	u8 *vcpu_info = (u8 *)XEN_VCPU_INFO;

	WRITE_ONCE(vcpu_info[0], 0);
	WRITE_ONCE(guest_saw_irq, true);
}

static void enable_xen_upcall(paths_data *self)
{
	vm_install_exception_handler(self->vm, IRQ_VECTOR, upcall_handler);
	xen_set_vm_attr(self, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR,
		.u.vector = IRQ_VECTOR,
	});
}

/* And it wakes the vCPU. */
userfault_test(paths, xen_event_from_an_irqfd_while_halted)
{
	struct armed_page page;
	struct waiter waiter;
	int fd;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	enable_xen_upcall(self);
	add_xen_irqfds(self, &fd, 1);
	request_call(self, guest_halt, 0);
	waiter_start(&waiter, finish_fn, self->vcpu);
	userfault_wait_until(vcpu_get_stat(self->vcpu, blocking));
	arm(self, &page, XEN_SHARED_INFO);
	eventfd_write(fd, 1);
	expect_access(self, &waiter, &page, USERFAULT_WRITE, 0);
	waiter_join(&waiter);
	sync_global_from_guest(self->vm, guest_saw_irq);
	TEST_ASSERT(guest_saw_irq, "The event was lost");
	kvm_close(fd);
}

/* Nothing makes the vCPU exit before the guest looks whether it got the upcall. */
static bool guest_gets_upcall(paths_data *self)
{
	finish_fn(self->vcpu);
	return agent_result(self->vcpu);
}

static void forget_xen_event(paths_data *self)
{
	guest_saw_irq = false;
	sync_global_to_guest(self->vm, guest_saw_irq);
	memset(self->hva + PAGE_SIZE, 0, 2 * PAGE_SIZE);
}

/* An event that is pending in the shared info reaches the guest at once, too. */
userfault_test(paths, xen_upcall_that_fails_first)
{
	struct armed_page page;
	int fails;

	if (!enable_xen_events(self))
		SKIP(return, "There is no Xen emulation");

	enable_xen_upcall(self);
	request_call(self, guest_open_irq_window, 0);
	TEST_ASSERT(!guest_gets_upcall(self), "There was no event");

	for (fails = 0; fails < 2; fails++) {
		forget_xen_event(self);
		arm(self, &page, XEN_VCPU_INFO);
		send_xen_event_fn(self->vcpu);
		request_call(self, guest_open_irq_window, 0);
		if (fails) {
			kvm_close(self->fd);
			assert_failed(self->vcpu, _vcpu_run(self->vcpu), EFAULT, XEN_VCPU_INFO,
				      USERFAULT_WRITE | KVM_MEMORY_EXIT_FLAG_FAILED);
			self->fd = vm_create_userfault_fd(self->vm);
		}
		fill(self, &page);
		TEST_ASSERT(guest_gets_upcall(self), "The upcall came late, or never");
	}
}

/*
 * Prefetching.
 */

/* What the guest has not asked for yet is not waited for. */
static void pre_fault_armed_page(paths_data *self)
{
	struct kvm_pre_fault_memory range = { .gpa = page_gpa(1), .size = PAGE_SIZE };
	int ret;

	vm_userfault_arm(self->vm, page_gpa(1), PAGE_SIZE);
	do {
		ret = __vcpu_ioctl(self->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while (ret && errno == EINTR);

	TEST_ASSERT(ret == -1 && errno == EFAULT, KVM_IOCTL_ERROR(KVM_PRE_FAULT_MEMORY, ret));
	TEST_ASSERT_EQ(range.gpa, page_gpa(1));
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
}

userfault_test(paths, pre_fault_does_not_wait)
{
	if (!kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY) || !kvm_is_tdp_enabled())
		SKIP(return, "KVM_PRE_FAULT_MEMORY is not available");

	pre_fault_armed_page(self);
	enable_async_vcpu(self);
	pre_fault_armed_page(self);
}

/*
 * System management mode.
 */

#define SMRAM_GPA		0x1000000

#define SMRAM_STATE_GPA		(SMRAM_GPA + SMRAM_SIZE - PAGE_SIZE)

static const u8 smi_handler[] = {
	0xe6, TEST_PORT,			/* out %al, $TEST_PORT */
	0x0f, 0xaa,				/* rsm */
};

/* KVM saves the state of the vCPU at the end of SMRAM, in the second address space. */
userfault_test(paths, smm_state)
{
	if (!kvm_has_cap(KVM_CAP_X86_SMM))
		SKIP(return, "There is no SMM");

	setup_smram(self->vm, self->vcpu, SMRAM_GPA, smi_handler, sizeof(smi_handler));
	warm_up(self);
	inject_smi(self->vcpu);
	request_call(self, guest_nothing, 0);
	expect_wait_as(self, SMRAM_STATE_GPA, USERFAULT_WRITE, 1, finish_fn, self->vcpu);
}

/* And loads it again at its end. */
userfault_test(paths, smm_state_at_rsm)
{
	if (!kvm_has_cap(KVM_CAP_X86_SMM))
		SKIP(return, "There is no SMM");

	setup_smram(self->vm, self->vcpu, SMRAM_GPA, smi_handler, sizeof(smi_handler));
	warm_up(self);
	inject_smi(self->vcpu);
	request_call(self, guest_nothing, 0);
	run_to_port(self);
	expect_wait_as(self, SMRAM_STATE_GPA, USERFAULT_READ, 1, finish_fn, self->vcpu);
}

/*
 * Nested guests.
 */

static void l2_guest_code(void)
{
	asm volatile("out %%al, %0" : : "i"(TEST_PORT));
	vmmcall();
}

static u64 guest_prepare_l2(u64 gva)
{
	struct svm_test_data *svm = (struct svm_test_data *)gva;

	generic_svm_setup(svm, l2_guest_code);
	svm->vmcb->control.intercept |= BIT_ULL(INTERCEPT_MSR_PROT);
	return 0;
}

static u64 guest_run_l2(u64 vmcb_gpa)
{
	asm volatile("vmrun %0" : : "a"(vmcb_gpa) : "memory", "cc");
	return 0;
}

static u64 guest_vmload(u64 vmcb_gpa)
{
	asm volatile("vmload %0" : : "a"(vmcb_gpa) : "memory");
	return 0;
}

static u64 guest_vmsave(u64 vmcb_gpa)
{
	asm volatile("vmsave %0" : : "a"(vmcb_gpa) : "memory");
	return 0;
}

static struct svm_test_data *prepare_svm(paths_data *self)
{
	struct svm_test_data *svm = vcpu_alloc_svm(self->vm, &self->svm_gva);

	request_call(self, guest_prepare_l2, self->svm_gva);
	finish_fn(self->vcpu);
	return svm;
}

static void assert_l2_done(struct svm_test_data *svm)
{
	struct vmcb *vmcb = svm->vmcb_hva;

	TEST_ASSERT_EQ(vmcb->control.exit_code, SVM_EXIT_VMMCALL);
}

userfault_test(paths, nested_vmload_and_vmsave)
{
	gpa_t vmcb_gpa;

	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There is no SVM");

	vmcb_gpa = prepare_svm(self)->vmcb_gpa;
	if (get_kvm_amd_param_integer("vls"))
		SKIP(return, "KVM does not see VMLOAD and VMSAVE");
	request_call(self, guest_vmsave, vmcb_gpa);
	expect_wait(self, vmcb_gpa, USERFAULT_WRITE, finish_fn, self->vcpu);
	request_call(self, guest_vmload, vmcb_gpa);
	expect_wait(self, vmcb_gpa, USERFAULT_WRITE, finish_fn, self->vcpu);
}

userfault_test(paths, nested_vmcb)
{
	struct svm_test_data *svm;

	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There is no SVM");

	svm = prepare_svm(self);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	expect_exit(self, svm->vmcb_gpa, USERFAULT_WRITE);
	assert_l2_done(svm);

	enable_async_vcpu(self);
	request_call(self, guest_prepare_l2, self->svm_gva);
	finish_fn(self->vcpu);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	expect_wait(self, svm->vmcb_gpa, USERFAULT_WRITE, finish_fn, self->vcpu);
	assert_l2_done(svm);
}

userfault_test(paths, nested_vmcb_at_exit)
{
	struct svm_test_data *svm;

	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There is no SVM");

	svm = prepare_svm(self);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	run_to_port(self);
	expect_wait(self, svm->vmcb_gpa, USERFAULT_WRITE, finish_fn, self->vcpu);
	assert_l2_done(svm);
}

userfault_test(paths, nested_msr_bitmap)
{
	struct svm_test_data *svm;

	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There is no SVM");

	svm = prepare_svm(self);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	expect_wait(self, svm->msr_gpa, USERFAULT_READ, finish_fn, self->vcpu);
	assert_l2_done(svm);
}

static u64 guest_use_io_bitmap(u64 gva)
{
	struct svm_test_data *svm = (struct svm_test_data *)gva;

	svm->vmcb->control.intercept |= BIT_ULL(INTERCEPT_IOIO_PROT);
	svm->vmcb->control.iopm_base_pa = page_gpa(1);
	return 0;
}

/* If it were read too early, L1 would get the exit. */
userfault_test(paths, nested_io_bitmap)
{
	struct svm_test_data *svm;

	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There is no SVM");

	svm = prepare_svm(self);
	request_call(self, guest_use_io_bitmap, self->svm_gva);
	finish_fn(self->vcpu);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	expect_wait(self, page_gpa(1), USERFAULT_READ, finish_fn, self->vcpu);
	assert_l2_done(svm);
}

userfault_test(paths, nested_page_tables)
{
	struct svm_test_data *svm;

	if (!kvm_cpu_has(X86_FEATURE_SVM) || !kvm_cpu_has_npt())
		SKIP(return, "There is no nested paging");

	vm_enable_npt(self->vm);
	svm = prepare_svm(self);
	tdp_identity_map_default_memslots(self->vm);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	expect_exit(self, svm->ncr3_gpa, USERFAULT_READ);
	assert_l2_done(svm);
}

static void l2_string_output(void)
{
	asm volatile("out %%al, %0" : : "i"(TEST_PORT));
	guest_outsb(page_gpa(1));
	vmmcall();
}

/* Here, KVM itself translates an address of L2.  If it failed, L1 would get the exit. */
userfault_test(paths, nested_page_tables_for_string_output)
{
	struct svm_test_data *svm;
	struct vmcb *vmcb;
	gpa_t table;

	if (!kvm_cpu_has(X86_FEATURE_SVM) || !kvm_cpu_has_npt())
		SKIP(return, "There is no nested paging");

	vm_enable_npt(self->vm);
	svm = prepare_svm(self);
	vmcb = svm->vmcb_hva;
	vmcb->save.rip = (u64)l2_string_output;
	tdp_identity_map_default_memslots(self->vm);
	tdp_map(self->vm, AGENT_GPA, AGENT_GPA, NR_PAGES * PAGE_SIZE);
	table = addr_hva2gpa(self->vm, tdp_get_pte(self->vm, page_gpa(1))) & PAGE_MASK;

	request_call(self, guest_run_l2, svm->vmcb_gpa);
	run_to_port(self);
	expect_wait(self, table, USERFAULT_READ, finish_fn, self->vcpu);
	assert_l2_done(svm);
}

/*
 * Nested guests of a guest that is like Hyper-V, with these pages.
 */

#define HV_VP_ASSIST		page_gpa(1)
#define HV_PARTITION_ASSIST	page_gpa(2)
#define HV_HYPERCALL_PAGE	page_gpa(3)

static bool has_nested_hyperv(void)
{
	return kvm_cpu_has(X86_FEATURE_SVM) && kvm_has_cap(KVM_CAP_HYPERV) &&
	       kvm_hv_cpu_has(HV_X64_NESTED_DIRECT_FLUSH);
}

/* KVM is told to handle TLB flushes of L2. */
static struct svm_test_data *prepare_hyperv_svm(paths_data *self)
{
	struct hv_vp_assist_page *vp_assist = self->hva + PAGE_SIZE;
	struct hv_vmcb_enlightenments *hve;
	struct svm_test_data *svm;

	vcpu_set_hv_cpuid(self->vcpu);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_GUEST_OS_ID, HYPERV_LINUX_OS_ID);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_HYPERCALL, HV_HYPERCALL_PAGE | 1);
	vcpu_set_msr(self->vcpu, HV_X64_MSR_VP_ASSIST_PAGE, HV_VP_ASSIST | 1);
	vp_assist->nested_control.features.directhypercall = 1;

	svm = prepare_svm(self);
	hve = &((struct vmcb *)svm->vmcb_hva)->control.hv_enlightenments;
	hve->partition_assist_page = HV_PARTITION_ASSIST;
	hve->hv_enlightenments_control.nested_flush_hypercall = 1;
	hve->hv_vm_id = 1;
	hve->hv_vp_id = 1;
	return svm;
}

/* If it could not be read, VMRUN would fail. */
userfault_test(paths, hyperv_vp_assist_page_at_vmrun)
{
	struct svm_test_data *svm;

	if (!has_nested_hyperv())
		SKIP(return, "There is no Hyper-V emulation for nested guests");

	svm = prepare_hyperv_svm(self);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	expect_wait(self, HV_VP_ASSIST, USERFAULT_READ, finish_fn, self->vcpu);
	assert_l2_done(svm);
}

static void l2_flush_tlb(void)
{
	u64 flags = HV_FLUSH_ALL_VIRTUAL_ADDRESS_SPACES | HV_FLUSH_ALL_PROCESSORS;
	u64 control = HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE | HV_HYPERCALL_FAST_BIT;
	u64 status = 0;

	asm volatile("out %%al, %0" : : "i"(TEST_PORT));
	asm volatile("mov %1, %%r8; vmmcall"
		     : "+a"(status) : "r"(flags), "c"(control), "d"(0) : "r8", "memory");
	vmmcall();
}

/* It says that L1 is to get an exit after the flush. */
userfault_test(paths, hyperv_partition_assist_page)
{
	u32 *lock_count = self->hva + 2 * PAGE_SIZE;
	struct svm_test_data *svm;
	struct vmcb *vmcb;

	if (!has_nested_hyperv())
		SKIP(return, "There is no Hyper-V emulation for nested guests");

	svm = prepare_hyperv_svm(self);
	vmcb = svm->vmcb_hva;
	vmcb->save.rip = (u64)l2_flush_tlb;
	*lock_count = 1;
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	run_to_port(self);
	expect_wait(self, HV_PARTITION_ASSIST, USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT_EQ(vmcb->control.exit_code, HV_SVM_EXITCODE_ENL);
	TEST_ASSERT_EQ(vmcb->control.exit_info_1, HV_SVM_ENL_EXITCODE_TRAP_AFTER_FLUSH);
}

/* A state of L1 that KVM saves when an SMI interrupts L2, and loads again. */
userfault_test(paths, nested_smm)
{
	struct armed_page vmcb, save_area;
	struct svm_test_data *svm;
	struct waiter waiter;

	if (!kvm_cpu_has(X86_FEATURE_SVM) || !kvm_has_cap(KVM_CAP_X86_SMM))
		SKIP(return, "There is no SVM, or no SMM");

	setup_smram(self->vm, self->vcpu, SMRAM_GPA, smi_handler, sizeof(smi_handler));
	svm = prepare_svm(self);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	run_to_port(self);

	inject_smi(self->vcpu);
	arm(self, &save_area, svm->save_area_gpa);
	waiter_start(&waiter, run_to_port_fn, self);
	expect_access(self, &waiter, &save_area, USERFAULT_WRITE, 0);
	waiter_join(&waiter);

	arm(self, &vmcb, svm->vmcb_gpa);
	arm(self, &save_area, svm->save_area_gpa);
	waiter_start(&waiter, finish_fn, self->vcpu);
	expect_access(self, &waiter, &vmcb, USERFAULT_WRITE, 0);
	expect_access(self, &waiter, &save_area, USERFAULT_WRITE, 0);
	waiter_join(&waiter);
	assert_l2_done(svm);
}

/*
 * Accesses that fail: KVM_RUN ends before the guest or userspace sees what KVM made of
 * it.
 */

#define FAILED_READ		(USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_FAILED)
#define FAILED_WRITE		(USERFAULT_WRITE | KVM_MEMORY_EXIT_FLAG_FAILED)

/* Nobody will fill the page that the guest's access needs. */
static void expect_failure(paths_data *self, gpa_t gpa, u64 flags)
{
	u64 nr = vcpu_get_stat(self->vcpu, userfault_exits);
	struct armed_page page;
	int ret;

	arm(self, &page, gpa);
	kvm_close(self->fd);

	do {
		ret = _vcpu_run(self->vcpu);
	} while (!ret && complete_exit(self->vcpu->run));

	assert_failed(self->vcpu, ret, EFAULT, gpa, flags);
	armed_page_assert_untouched(&page);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits), nr + 1);
	TEST_ASSERT(agent_is_busy(self->vcpu), "The guest went on");
	self->fd = vm_create_userfault_fd(self->vm);
}

/* The guest is still where the access that failed was for, not in a handler. */
static void assert_still_at(paths_data *self, const void *code)
{
	struct kvm_regs regs;

	vcpu_regs_get(self->vcpu, &regs);
	TEST_ASSERT(regs.rip - (u64)code < 32, "The guest is at %#llx, not at %p",
		    regs.rip, code);
}

userfault_test(paths, failed_string_output)
{
	request_call(self, guest_outsb, page_gpa(1));
	expect_failure(self, page_gpa(1), FAILED_READ);
	assert_still_at(self, guest_outsb);
}

userfault_test(paths, failed_string_input)
{
	request_call(self, guest_insb, page_gpa(1));
	expect_failure(self, page_gpa(1), FAILED_WRITE);
	assert_still_at(self, guest_insb);
}

/* Not one to MMIO. */
userfault_test(paths, failed_copy_from_mmio)
{
	request_call(self, guest_movs_from_mmio, page_gpa(1));
	expect_failure(self, page_gpa(1), FAILED_WRITE);
	assert_still_at(self, guest_movs_from_mmio);
}

/* Nor does KVM take what tells of the failure for the data of MMIO. */
userfault_test(paths, failed_read_is_not_completed)
{
	struct kvm_vcpu *vcpu = self->vcpu;
	u64 *word = self->hva + PAGE_SIZE;
	int ret;

	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	request_call(self, guest_emulated_read, page_gpa(1));
	expect_failure(self, page_gpa(1), FAILED_READ);
	*word = 0x600d;
	vm_userfault_clear(self->vm, page_gpa(1), PAGE_SIZE);

	/* When state is to be saved, all that is pending gets completed first. */
	vcpu->run->immediate_exit = 1;
	ret = __vcpu_run(vcpu);
	TEST_ASSERT(ret == -1 && errno == EINTR, KVM_IOCTL_ERROR(KVM_RUN, ret));
	assert_still_at(self, guest_emulated_read);

	vcpu->run->immediate_exit = 0;
	finish_fn(vcpu);
	TEST_ASSERT_EQ(agent_result(vcpu), 0x600d);
}

/* No page fault. */
userfault_test(paths, failed_walk)
{
	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	request_call(self, guest_emulated_read, page_gpa(1));
	expect_failure(self, last_level_table(self, AGENT_GPA), FAILED_READ);
	assert_still_at(self, guest_emulated_read);
}

userfault_test(paths, failed_fetch)
{
	if (!is_forced_emulation_enabled)
		SKIP(return, "kvm.force_emulation_prefix is needed");

	agent_request(self->vcpu, AGENT_EXEC, prepare_fetch(self), 41);
	expect_failure(self, page_gpa(2), FAILED_READ);
	assert_still_at(self, (void *)page_gpa(2));
}

/* No triple fault. */
userfault_test(paths, failed_nested_exit)
{
	struct svm_test_data *svm;

	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There is no SVM");

	svm = prepare_svm(self);
	request_call(self, guest_run_l2, svm->vmcb_gpa);
	run_to_port(self);
	expect_failure(self, svm->vmcb_gpa, FAILED_WRITE);
}

/* Not only that there is no clock. */
userfault_test(paths, failed_kvmclock)
{
	warm_up(self);
	vcpu_set_msr(self->vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(1) | 1);
	request_call(self, guest_nothing, 0);
	expect_failure(self, page_gpa(1), FAILED_WRITE);
}

static void fail_access(paths_data *self, gpa_t gpa, int error)
{
	struct kvm_userfault_event event = userfault_read(self->fd);

	TEST_ASSERT_EQ(event.gpa, gpa);
	userfault_resolve(self->fd, gpa, PAGE_SIZE, 0, error);
}

/* What fails later may be a consequence. */
userfault_test(paths, first_failure_is_reported)
{
	struct vcpu_call call = { .vcpu = self->vcpu };
	struct armed_page pages[2];
	struct waiter waiter;

	warm_up(self);
	vcpu_set_msr(self->vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(1) | 1);
	if (_vcpu_set_msr(self->vcpu, MSR_KVM_STEAL_TIME, page_gpa(2) | 1) != 1)
		SKIP(return, "There is no steal time");

	arm(self, &pages[0], page_gpa(1));
	arm(self, &pages[1], page_gpa(2));
	request_call(self, guest_read, page_gpa(2));
	waiter_start(&waiter, vcpu_call_run_fn, &call);
	fail_access(self, page_gpa(1), EHWPOISON);
	fail_access(self, page_gpa(2), EFAULT);
	waiter_join(&waiter);

	errno = call.error;
	assert_failed(self->vcpu, call.ret, EHWPOISON, page_gpa(1), FAILED_WRITE);
}

/* Another ioctl fails itself, even one that makes nothing of failed accesses. */
userfault_test(paths, failed_ioctl_does_not_fail_kvm_run)
{
	struct kvm_translation tr = { .linear_address = AGENT_GPA };
	struct armed_page page;
	int ret;

	warm_up(self);
	arm(self, &page, last_level_table(self, AGENT_GPA));
	kvm_close(self->fd);
	ret = __vcpu_ioctl(self->vcpu, KVM_TRANSLATE, &tr);
	TEST_ASSERT(ret == -1 && errno == EFAULT, KVM_IOCTL_ERROR(KVM_TRANSLATE, ret));

	self->fd = vm_create_userfault_fd(self->vm);
	fill(self, &page);
	warm_up(self);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits), 0);
}

/*
 * Private memory: records and exits say whether they are about the private page of a
 * gfn.
 */

#define PRIVATE_READ		(USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE)
#define PRIVATE_WRITE		(USERFAULT_WRITE | KVM_MEMORY_EXIT_FLAG_PRIVATE)

static bool has_sw_protected_vms(void)
{
	return kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM);
}

/* All of its memory from AGENT_GPA on is private. */
static struct kvm_vm *create_private_vm(struct kvm_vcpu **vcpu)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};
	struct kvm_vm *vm = agent_create_vm(shape, 1, vcpu);

	agent_add_memory(vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA, AGENT_SLOT, NR_PAGES,
			 KVM_MEM_GUEST_MEMFD);
	vm_mem_set_private(vm, AGENT_GPA, NR_PAGES * PAGE_SIZE);
	return vm;
}

/* There must be an access to a page that waits, which is released. */
static void expect_private_record(int fd, struct waiter *waiter)
{
	struct kvm_userfault_event event = userfault_read(fd);

	TEST_ASSERT_EQ(event.gpa, AGENT_GPA);
	TEST_ASSERT_EQ(event.flags, PRIVATE_READ);
	waiter_assert_asleep(waiter);
	userfault_resolve(fd, AGENT_GPA, PAGE_SIZE, 0, 0);
	waiter_join(waiter);
}

/* vCPUs alone get at such memory, and they wait only if they are to. */
TEST(private_memory)
{
	struct kvm_vcpu *vcpu;
	struct waiter waiter;
	struct kvm_vm *vm;
	int fd;

	if (!has_sw_protected_vms())
		SKIP(return, "There are no VMs of type KVM_X86_SW_PROTECTED_VM");

	vm = create_private_vm(&vcpu);
	agent_do(vcpu, AGENT_WRITE, AGENT_GPA, 5);

	vm_userfault_enable_async(vm, KVM_USERFAULT_ASYNC_VCPU);
	fd = vm_create_userfault_fd(vm);
	vm_userfault_arm(vm, AGENT_GPA, PAGE_SIZE);
	agent_request(vcpu, AGENT_READ, AGENT_GPA, 0);
	waiter_start(&waiter, finish_fn, vcpu);
	expect_private_record(fd, &waiter);
	TEST_ASSERT_EQ(agent_result(vcpu), 5);
	kvm_close(fd);
	kvm_vm_free(vm);
}

/* KVM itself does not, but the bit that it waits for is one of a private page. */
TEST(access_by_kvm_to_private_memory)
{
	struct kvm_access access;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	int fd;

	if (!has_sw_protected_vms())
		SKIP(return, "There are no VMs of type KVM_X86_SW_PROTECTED_VM");

	vm = create_private_vm(&vcpu);
	vm_userfault_enable_async(vm, 0);
	fd = vm_create_userfault_fd(vm);
	vm_userfault_arm(vm, AGENT_GPA, PAGE_SIZE);
	kvm_access_start(&access, vcpu, AGENT_GPA);
	expect_private_record(fd, &access.waiter);
	kvm_close(fd);
	kvm_vm_free(vm);
}

/* The same for an exit that KVM takes because it can't wait. */
TEST(exit_by_kvm_for_private_memory)
{
	struct svm_test_data *svm;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	gva_t svm_gva;
	int fd;

	if (!has_sw_protected_vms() || !kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "There is no SVM, or no KVM_X86_SW_PROTECTED_VM");

	vm = create_private_vm(&vcpu);
	svm = vcpu_alloc_svm(vm, &svm_gva);
	agent_do(vcpu, AGENT_EXEC, (gva_t)guest_prepare_l2, svm_gva);
	vm_userfault_enable_async(vm, 0);
	fd = vm_create_userfault_fd(vm);
	vm_change_attributes(vm, svm->vmcb_gpa, PAGE_SIZE,
			     KVM_MEMORY_ATTRIBUTE_PRIVATE | KVM_MEMORY_ATTRIBUTE_USERFAULT,
			     KVM_MEMORY_ATTRIBUTES_SET);
	agent_request(vcpu, AGENT_EXEC, (gva_t)guest_run_l2, svm->vmcb_gpa);
	vcpu_run_expect_userfault(vcpu, svm->vmcb_gpa, PRIVATE_WRITE);

	vm_change_attributes(vm, svm->vmcb_gpa, PAGE_SIZE, 0, 0);
	finish_fn(vcpu);
	assert_l2_done(svm);
	kvm_close(fd);
	kvm_vm_free(vm);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_USERFAULT) & KVM_USERFAULT_ASYNC);

	return test_harness_run(argc, argv);
}
