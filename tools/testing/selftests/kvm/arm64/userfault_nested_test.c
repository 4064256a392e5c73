// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault for a guest that is a hypervisor, on arm64: the memory of
 * the guest that it runs, the stage-2 tables that it has for that, what its VNCR_EL2
 * points to, and page tables that its AT instructions walk.
 *
 * L1 is the agent, at EL2.  L2 is at EL1, has L1's own page tables for its stage 1,
 * and does one thing before it returns to L1 by HVC.
 */
#include <signal.h>

#include <linux/bitfield.h>
#include <linux/sizes.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"

#include <asm/esr.h>
#include <asm/sysreg.h>

/* Interrupts are masked. */
#define PSTATE_EL1H		0x3c5
#define PSTATE_EL2H		0x3c9

/* The test's memory as L2 knows it: a stage 2 of L1 leads from here to AGENT_GPA. */
#define L2_IPA			(AGENT_GPA + SZ_1G)

/* 39 bits, from level 1 on, 4 KiB pages, 40 bits of output, inner shareable, cached. */
#define L2_VTCR			(BIT_ULL(31) | 2 << 16 | 3 << 12 | 1 << 10 | 1 << 8 | 1 << 6 | 25)
#define L2_VTCR_HA		BIT_ULL(21)
#define S2_BLOCK		(PTE_VALID | PTE_AF | PTE_SHARED | 0xf << 2 | 3 << 6)
#define S2_TABLE		(PTE_VALID | PMD_TYPE_TABLE)

/* Where a hypervisor with a VNCR_EL2 finds its VTTBR_EL2. */
#define VNCR_VTTBR_EL2		0x20

#define copy_el2_to_el1(reg)						\
	write_sysreg_s(read_sysreg_s(SYS_##reg##_EL1), SYS_##reg##_EL12)

/* Both as L1 knows them: what L2 is to access, and L1's stage-2 table for it or 0. */
static u64 l2_gva;
static u64 l1_vttbr;
static u64 l1_vtcr = L2_VTCR;
static u64 l2_stack[512] __aligned(16);

/* Where L1 goes on when L2 returns. */
static u64 l1_resume;

/* All registers are L2's when it returns, but for L1's stack pointer. */
static noinline u64 enter_l2(u64 (*l2)(void))
{
	register u64 x0 asm("x0") = (u64)l2;
	register u64 x1 asm("x1") = (u64)&l1_resume;
	register u64 x2 asm("x2") = PSTATE_EL1H;

	asm volatile("stp	x29, x30, [sp, #-16]!\n\t"
		     "adr	x3, 1f\n\t"
		     "str	x3, [x1]\n\t"
		     "msr	elr_el2, x0\n\t"
		     "msr	spsr_el2, x2\n\t"
		     "eret\n"
		     "1:\n\t"
		     "ldp	x29, x30, [sp], #16"
		     : "+r" (x0), "+r" (x1), "+r" (x2)
		     :
		     : "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12",
		       "x13", "x14", "x15", "x16", "x17", "x18", "x19", "x20", "x21",
		       "x22", "x23", "x24", "x25", "x26", "x27", "x28", "cc", "memory");
	return x0;
}

static void guest_handle_hvc(struct ex_regs *regs)
{
	regs->pc = l1_resume;
	regs->pstate = PSTATE_EL2H;
}

static void l2_return(u64 result)
{
	register u64 x0 asm("x0") = result;

	asm volatile("hvc #0" : : "r" (x0) : "memory");
}

static u64 l2_read(void)
{
	l2_return(READ_ONCE(*(u64 *)l2_gva));
	return 0;
}

static u64 l2_write(void)
{
	WRITE_ONCE(*(u64 *)l2_gva, 1);
	l2_return(0);
	return 0;
}

static u64 l2_read_vncr(void)
{
	l2_return(read_sysreg(vttbr_el2));
	return 0;
}

static u64 l2_write_vncr(void)
{
	write_sysreg(1, vttbr_el2);
	l2_return(0);
	return 0;
}

/* Leave EL0 alone, and be the hypervisor of EL1. */
static void guest_prepare_el1(u64 hcr)
{
	copy_el2_to_el1(SCTLR);
	copy_el2_to_el1(MAIR);
	copy_el2_to_el1(TCR);
	copy_el2_to_el1(TTBR0);
	copy_el2_to_el1(TTBR1);
	copy_el2_to_el1(CPACR);
	write_sysreg(l2_stack + ARRAY_SIZE(l2_stack), sp_el1);
	write_sysreg(hcr & HCR_EL2_VM ? l1_vtcr : 0, vtcr_el2);
	write_sysreg(l1_vttbr, vttbr_el2);
	sysreg_clear_set(hcr_el2, HCR_EL2_TGE | HCR_EL2_VM | HCR_EL2_NV | HCR_EL2_NV2, hcr);
	isb();
}

static u64 guest_run_l2(u64 (*l2)(void), u64 hcr)
{
	u64 result;

	guest_prepare_el1(hcr);
	result = enter_l2(l2);
	sysreg_clear_set(hcr_el2, HCR_EL2_VM | HCR_EL2_NV | HCR_EL2_NV2, HCR_EL2_TGE);
	isb();
	return result;
}

static u64 guest_run_under_stage_2(u64 l2)
{
	return guest_run_l2((void *)l2, HCR_EL2_VM);
}

static u64 guest_run_with_vncr(u64 l2)
{
	write_sysreg_s(l2_gva, SYS_VNCR_EL2);
	return guest_run_l2((void *)l2, HCR_EL2_NV | HCR_EL2_NV2);
}

/* Returns the physical address, or all ones. */
static u64 guest_translate_with(u64 gva, u64 tcr)
{
	u64 par;

	guest_prepare_el1(0);
	write_sysreg_s(read_sysreg_s(SYS_TCR_EL12) | tcr, SYS_TCR_EL12);
	isb();
	write_sysreg_s(gva, OP_AT_S1E1R);
	isb();
	par = read_sysreg(par_el1);
	sysreg_clear_set(hcr_el2, 0, HCR_EL2_TGE);
	isb();
	return par & SYS_PAR_EL1_F ? -1ull : par & SYS_PAR_EL1_PA;
}

static u64 guest_translate(u64 gva)
{
	return guest_translate_with(gva, 0);
}

static u64 guest_translate_and_mark(u64 gva)
{
	return guest_translate_with(gva, TCR_HA);
}

FIXTURE(nested) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
	int fd;
};

#define nested_data FIXTURE_DATA(nested)

#define l1_set(self, var, value)						\
	(*(typeof(var) *)addr_gva2hva((self)->vm, (gva_t)&(var)) = (value))

/* The descriptor in L1's table that leads L2 to the test's memory. */
static u64 *stage_2_desc(nested_data *self)
{
	gpa_t table = *(u64 *)addr_gva2hva(self->vm, (gva_t)&l1_vttbr);

	return (u64 *)addr_gpa2hva(self->vm, table) + L2_IPA / SZ_1G;
}

/* L1's table maps the lowest 5 GiB as they are, and the test's memory once more. */
static void create_stage_2(nested_data *self)
{
	gva_t gva = vm_alloc_page(self->vm);
	u64 *table = addr_gva2hva(self->vm, gva);
	u64 i;

	for (i = 0; i <= AGENT_GPA / SZ_1G; i++)
		table[i] = i * SZ_1G | S2_BLOCK;
	table[L2_IPA / SZ_1G] = AGENT_GPA | S2_BLOCK;
	l1_set(self, l1_vttbr, addr_gva2gpa(self->vm, gva));
	agent_map(self->vm, L2_IPA, L2_IPA, NR_PAGES * getpagesize());
}

static void create_vm(nested_data *self, enum vm_mem_backing_src_type src, u64 nr_pages)
{
	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);
	vm_init_descriptor_tables(self->vm);
	vcpu_init_descriptor_tables(self->vcpu);
	vm_install_sync_handler(self->vm, VECTOR_SYNC_LOWER_64, ESR_ELx_EC_HVC64,
				guest_handle_hvc);
	self->hva = agent_add_memory(self->vm, src, AGENT_GPA, AGENT_SLOT, nr_pages, 0);
	create_stage_2(self);
	vm_userfault_enable_async(self->vm, 0);
	self->fd = vm_create_userfault_fd(self->vm);
}

static void destroy_vm(nested_data *self)
{
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

FIXTURE_SETUP(nested)
{
	create_vm(self, VM_MEM_SRC_ANONYMOUS, NR_PAGES);
}

FIXTURE_TEARDOWN(nested)
{
	destroy_vm(self);
}

static void request(nested_data *self, u64 (*fn)(u64 arg), u64 (*l2)(void), u64 gva)
{
	l1_set(self, l2_gva, gva);
	agent_request(self->vcpu, AGENT_EXEC, (gva_t)fn, (u64)l2);
}

static u64 call(nested_data *self, u64 (*fn)(u64 arg), u64 (*l2)(void), u64 gva)
{
	request(self, fn, l2, gva);
	return agent_finish(self->vcpu);
}

/*
 * Arm a page, let L2 do something that needs it, twice, and only then let it have the
 * page.  The exit tells the address that L1 knows it by.
 */
static u64 expect_exit(nested_data *self, u64 (*fn)(u64 arg), u64 (*l2)(void), u64 gva,
		       gpa_t gpa, u64 flags)
{
	struct armed_page page;

	armed_page_init(&page, self->vm, gpa);
	request(self, fn, l2, gva);
	vcpu_run_expect_userfault(self->vcpu, gpa, flags);
	vcpu_run_expect_userfault(self->vcpu, gpa, flags);
	armed_page_assert_untouched(&page);
	armed_page_fill(&page, self->fd);
	return agent_finish(self->vcpu);
}

/* The page that KVM knows by @hva. */
static gpa_t page_of(nested_data *self, void *hva)
{
	return addr_hva2gpa(self->vm, hva) & ~(getpagesize() - 1ull);
}

static u64 word_of(nested_data *self, gpa_t gpa)
{
	return READ_ONCE(*(u64 *)addr_gpa2hva(self->vm, gpa));
}

/* Whether L2 has had the page before or not. */
userfault_test(nested, memory_of_l2)
{
	gpa_t gpa = page_gpa(3);
	gva_t gva = L2_IPA + (gpa - AGENT_GPA);
	u64 content = agent_page_content(gpa);
	int i;

	for (i = 0; i < 2; i++)
		TEST_ASSERT_EQ(expect_exit(self, guest_run_under_stage_2, l2_read, gva, gpa,
					   USERFAULT_READ), content);
	expect_exit(self, guest_run_under_stage_2, l2_write, gva, gpa, USERFAULT_WRITE);
	TEST_ASSERT_EQ(word_of(self, gpa), 1);

	/* Its neighbours stay. */
	vm_userfault_arm(self->vm, page_gpa(2), getpagesize());
	vm_userfault_arm(self->vm, page_gpa(4), getpagesize());
	TEST_ASSERT_EQ(call(self, guest_run_under_stage_2, l2_read, gva), 1);
}

static void finish_fn(void *arg)
{
	agent_finish(arg);
}

/* With something that happens while L1 waits, after which it does not wait again. */
static void expect_wait_during(nested_data *self, gpa_t gpa, u64 (*fn)(u64 arg), u64 arg,
			       void (*event)(nested_data *self, struct waiter *waiter))
{
	u64 nr = vm_get_stat(self->vm, userfault_records);
	struct armed_page page;
	struct waiter waiter;

	armed_page_init(&page, self->vm, gpa);
	agent_request(self->vcpu, AGENT_EXEC, (gva_t)fn, arg);
	waiter_start(&waiter, finish_fn, self->vcpu);
	userfault_wait_for_waiters(self->fd, 1);
	event(self, &waiter);
	armed_page_expect_access(&page, self->fd, &waiter, USERFAULT_READ,
				 self->vcpu->id, 0);
	waiter_join(&waiter);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), nr + 1);
}

static void nothing(nested_data *self, struct waiter *waiter)
{
}

static void expect_wait(nested_data *self, gpa_t gpa, u64 (*fn)(u64 arg), u64 arg)
{
	expect_wait_during(self, gpa, fn, arg, nothing);
}

/* KVM walks it, which is an access of its own. */
userfault_test(nested, stage_2_table)
{
	gva_t gva = L2_IPA + 3 * getpagesize();
	u64 content = agent_page_content(page_gpa(3));

	l1_set(self, l2_gva, gva);
	expect_wait(self, page_of(self, stage_2_desc(self)), guest_run_under_stage_2,
		    (u64)l2_read);
	TEST_ASSERT_EQ(agent_result(self->vcpu), content);
}

/* A table of L1 with a block of 2 MiB at its beginning. */
static u64 *create_stage_2_table(nested_data *self, gpa_t gpa)
{
	u64 *table = addr_gva2hva(self->vm, vm_alloc_page(self->vm));

	table[0] = gpa | S2_BLOCK;
	return table;
}

#define OTHER_GPA		(AGENT_GPA + SZ_2M)

/* As another vCPU of L1 might, which also invalidates the TLB. */
static void replace_stage_2_table(nested_data *self, struct waiter *waiter)
{
	u64 *table = create_stage_2_table(self, OTHER_GPA);

	WRITE_ONCE(*stage_2_desc(self), page_of(self, table) | S2_TABLE);
}

/*
 * What the walk has seen before the wait is no reason to map anything: nobody would
 * invalidate that any more.
 */
userfault_test(nested, stage_2_table_that_is_replaced_meanwhile)
{
	u64 *table = create_stage_2_table(self, AGENT_GPA);

	agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, AGENT_SLOT + 1, 1, 0);
	*stage_2_desc(self) = page_of(self, table) | S2_TABLE;
	l1_set(self, l2_gva, L2_IPA);
	expect_wait_during(self, page_of(self, table), guest_run_under_stage_2, (u64)l2_read,
			   replace_stage_2_table);
	TEST_ASSERT_EQ(agent_result(self->vcpu), agent_page_content(OTHER_GPA));
}

/* The table of the last level for the test's memory, in L1's own page tables. */
static gpa_t last_level_table(nested_data *self)
{
	return page_of(self, virt_get_pte_hva(self->vm, AGENT_GPA));
}

userfault_test(nested, address_translation)
{
	expect_wait(self, last_level_table(self), guest_translate, page_gpa(5));
	TEST_ASSERT_EQ(agent_result(self->vcpu), page_gpa(5));
}

/* Whether L1 can leave it to the hardware, i.e. to KVM, to set access flags. */
static bool has_access_flag_updates(nested_data *self)
{
	u64 reg = KVM_ARM64_SYS_REG(SYS_ID_AA64MMFR1_EL1);

	return SYS_FIELD_GET(ID_AA64MMFR1_EL1, HAFDBS, vcpu_get_reg(self->vcpu, reg));
}

/* KVM has waited for the descriptor when it read it, and updates what it has read. */
userfault_test(nested, access_flag_in_a_stage_2_table)
{
	u64 *desc = stage_2_desc(self);

	if (!has_access_flag_updates(self))
		SKIP(return, "Access flags are not updated by hardware");

	*desc &= ~PTE_AF;
	l1_set(self, l1_vtcr, L2_VTCR | L2_VTCR_HA);
	l1_set(self, l2_gva, L2_IPA);
	expect_wait(self, page_of(self, desc), guest_run_under_stage_2, (u64)l2_read);
	TEST_ASSERT_EQ(agent_result(self->vcpu), agent_page_content(AGENT_GPA));
	TEST_ASSERT_EQ(*desc, AGENT_GPA | S2_BLOCK);
}

userfault_test(nested, access_flag_for_address_translation)
{
	u64 *pte = virt_get_pte_hva(self->vm, page_gpa(5));
	u64 old = *pte;

	if (!has_access_flag_updates(self))
		SKIP(return, "Access flags are not updated by hardware");

	*pte &= ~PTE_AF;
	expect_wait(self, last_level_table(self), guest_translate_and_mark, page_gpa(5));
	TEST_ASSERT_EQ(agent_result(self->vcpu), page_gpa(5));
	TEST_ASSERT_EQ(*pte, old);
}

/* Exits for userfaults wait, too, and signals end that. */
static void enable_async_vcpu(nested_data *self)
{
	kvm_close(self->fd);
	vm_userfault_disable(self->vm);
	vm_userfault_enable_async(self->vm, KVM_USERFAULT_ASYNC_VCPU);
	self->fd = vm_create_userfault_fd(self->vm);
}

static void handle_signal(int sig)
{
}

static void interrupt(nested_data *self, struct waiter *waiter)
{
	struct sigaction action = { .sa_handler = handle_signal };

	TEST_ASSERT(!sigaction(SIGUSR1, &action, NULL), "errno %d", errno);
	TEST_ASSERT(!pthread_kill(waiter->thread, SIGUSR1), "pthread_kill()");
}

/* But not a walk, which would have to fail: L1 or L2 would get an abort. */
userfault_test(nested, signals_do_not_end_walks)
{
	gpa_t table = page_of(self, stage_2_desc(self));

	enable_async_vcpu(self);
	l1_set(self, l2_gva, L2_IPA);
	expect_wait_during(self, table, guest_run_under_stage_2, (u64)l2_read, interrupt);
	TEST_ASSERT_EQ(agent_result(self->vcpu), agent_page_content(AGENT_GPA));
	expect_wait_during(self, last_level_table(self), guest_translate, page_gpa(5),
			   interrupt);
	TEST_ASSERT_EQ(agent_result(self->vcpu), page_gpa(5));
}

userfault_test(nested, vncr)
{
	gpa_t gpa = page_gpa(3);
	u64 content = agent_page_content(gpa);
	int i;

	for (i = 0; i < 2; i++)
		TEST_ASSERT_EQ(expect_exit(self, guest_run_with_vncr, l2_read_vncr, gpa, gpa,
					   USERFAULT_READ), content);
	expect_exit(self, guest_run_with_vncr, l2_write_vncr, gpa, gpa, USERFAULT_WRITE);
	TEST_ASSERT_EQ(word_of(self, gpa + VNCR_VTTBR_EL2), 1);
	TEST_ASSERT_EQ(word_of(self, gpa), content);
}

/* As guest_memfd is another way to the page. */
userfault_test(nested, guest_memfd)
{
	gpa_t gpa = page_gpa(3);
	u64 content = agent_page_content(gpa);

	if (!kvm_has_mappable_guest_memfd())
		SKIP(return, "guest_memfd can't be mapped");

	destroy_vm(self);
	create_vm(self, VM_MEM_SRC_GUEST_MEMFD, NR_PAGES);
	TEST_ASSERT_EQ(expect_exit(self, guest_run_under_stage_2, l2_read, L2_IPA +
				   (gpa - AGENT_GPA), gpa, USERFAULT_READ), content);
	TEST_ASSERT_EQ(expect_exit(self, guest_run_with_vncr, l2_read_vncr, gpa, gpa,
				   USERFAULT_READ), content);
}

/* Nothing to do with userfault, but it must not be mistaken for a fault of L1. */
userfault_test(nested, vncr_without_memory)
{
	gpa_t gpa = AGENT_GPA + SZ_512M;
	int fd, ret;

	if (!kvm_has_mappable_guest_memfd())
		SKIP(return, "guest_memfd can't be mapped");

	fd = vm_create_guest_memfd(self->vm, getpagesize(), MAPPABLE_GUEST_MEMFD_FLAGS);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT + 1, KVM_MEM_GUEST_MEMFD, gpa,
				   getpagesize(), NULL, fd, 0);
	close(fd);
	agent_map(self->vm, gpa, gpa, getpagesize());
	request(self, guest_run_with_vncr, l2_read_vncr, gpa);

	ret = _vcpu_run(self->vcpu);
	TEST_ASSERT(ret == -1 && errno == EFAULT, "KVM_RUN returned %d, errno %d", ret, errno);
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(self->vcpu->run->memory_fault.flags, 0);
	TEST_ASSERT_EQ(self->vcpu->run->memory_fault.gpa, gpa);
}

/* Both L1 and the host map it by blocks. */
FIXTURE(nested_block) {
	nested_data nested;
};

FIXTURE_SETUP(nested_block)
{
	if (!thp_configured() || get_trans_hugepagesz() != SZ_2M)
		SKIP(return, "There are no huge pages of 2 MiB");

	create_vm(&self->nested, VM_MEM_SRC_ANONYMOUS_THP, SZ_2M / getpagesize());
	if (!is_thp(self->nested.hva, SZ_2M))
		SKIP(return, "There is no huge page");
}

FIXTURE_TEARDOWN(nested_block)
{
	destroy_vm(&self->nested);
}

userfault_test(nested_block, armed_page_in_a_block)
{
	nested_data *nested = &self->nested;
	gpa_t gpa = page_gpa(3);

	vm_userfault_arm(nested->vm, gpa, getpagesize());
	call(nested, guest_run_under_stage_2, l2_read, L2_IPA);
	request(nested, guest_run_under_stage_2, l2_read, L2_IPA + (gpa - AGENT_GPA));
	vcpu_run_expect_userfault(nested->vcpu, gpa, USERFAULT_READ);
	vm_userfault_clear(nested->vm, gpa, getpagesize());
	TEST_ASSERT_EQ(agent_finish(nested->vcpu), agent_page_content(gpa));
}

/* How often L2 leaves the vCPU when it reads a page. */
static u64 exits_for(nested_data *self, u64 page)
{
	u64 nr = vcpu_get_stat(self->vcpu, exits);

	call(self, guest_run_under_stage_2, l2_read, L2_IPA + page * getpagesize());
	return vcpu_get_stat(self->vcpu, exits) - nr;
}

/* As other things make it leave, too: the least of the pages from @start to @end. */
static u64 least_exits(nested_data *self, u64 start, u64 end)
{
	u64 least = -1ull;

	for (; start < end; start++)
		least = min(least, exits_for(self, start));
	return least;
}

userfault_test(nested_block, disabling_brings_the_block_back)
{
	nested_data *nested = &self->nested;
	u64 mapped, i;

	vm_userfault_arm(nested->vm, AGENT_GPA, getpagesize());
	least_exits(nested, 1, 9);
	mapped = least_exits(nested, 1, 9);
	for (i = 9; i < 17; i++)
		TEST_ASSERT(exits_for(nested, i) > mapped, "Page %lu was mapped by itself", i);

	/* A page that was mapped small has to fault again, and then maps the block. */
	vm_userfault_disable(nested->vm);
	TEST_ASSERT(exits_for(nested, 1) > mapped, "The small mapping was kept");
	TEST_ASSERT_EQ(least_exits(nested, 17, 25), mapped);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_USERFAULT) & KVM_USERFAULT_ASYNC);
	TEST_REQUIRE(test_supports_el2());
	TEST_REQUIRE(getpagesize() == SZ_4K);

	return test_harness_run(argc, argv);
}
