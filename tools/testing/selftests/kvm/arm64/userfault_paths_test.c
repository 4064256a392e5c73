// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault for the ways by which KVM itself gets at guest memory on
 * arm64: one test for each that can be reached without nested virtualization.
 * Documentation/virt/kvm/userfault.rst has the list.
 *
 * Each of them has to wait for the page, and then to do what it always does, with the
 * content that the page has got in the meantime.  The guest itself has no business with
 * the page: if it did it would exit.
 */
#include <linux/bitfield.h>
#include <linux/sizes.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "gic.h"
#include "gic_v3.h"
#include "gic_v3_its.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "vgic.h"

/* What has to be aligned to 64 KiB, one after the other. */
#define TABLE(nr)		(AGENT_GPA + (nr) * SZ_64K)
#define SCRATCH			TABLE(0)
#define DEVICE_TABLE		TABLE(1)
#define COLLECTION_TABLE	TABLE(2)
#define COMMAND_QUEUE		TABLE(3)
#define ITT			TABLE(4)
#define PROPERTIES		TABLE(5)
#define PENDING_TABLE		TABLE(6)
#define NR_TABLES		7

#define FIRST_LPI		8192
#define LPI_PRIORITY		0xa0

/* Of a device's events, which takes so many bits. */
#define EVENT_BITS		8
#define ITT_SIZE		BIT(EVENT_BITS + 1)

FIXTURE(paths) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
	int its_fd;
	int fd;
};

#define paths_data FIXTURE_DATA(paths)

FIXTURE_SETUP(paths)
{
	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);
	self->hva = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA, AGENT_SLOT,
				     NR_TABLES * SZ_64K / getpagesize(), 0);
	memset(self->hva, 0, NR_TABLES * SZ_64K);
	vm_userfault_enable_async(self->vm, 0);
	self->fd = vm_create_userfault_fd(self->vm);
	self->its_fd = -1;
}

FIXTURE_TEARDOWN(paths)
{
	kvm_close(self->fd);
	if (self->its_fd >= 0)
		kvm_close(self->its_fd);
	kvm_vm_free(self->vm);
}

static void arm(paths_data *self, struct armed_page *page, gpa_t gpa)
{
	armed_page_init(page, self->vm, gpa);
}

static void finish_fn(void *arg);

/* Only KVM_RUN accesses memory for a vCPU: other ioctls of it do not load the vCPU. */
static u32 expected_vcpu_id(paths_data *self, const struct waiter *waiter)
{
	return waiter->fn == finish_fn ? self->vcpu->id : ~0u;
}

static void expect_access(paths_data *self, struct waiter *waiter,
			  const struct armed_page *page, u64 flags)
{
	armed_page_expect_access(page, self->fd, waiter, flags,
				 expected_vcpu_id(self, waiter), 0);
}

/* Do what needs the page, and only one page, once. */
static void expect_wait(paths_data *self, struct armed_page *page, u64 flags,
			void (*fn)(void *arg), void *arg)
{
	u64 nr = vm_get_stat(self->vm, userfault_records);
	struct waiter waiter;

	waiter_start(&waiter, fn, arg);
	expect_access(self, &waiter, page, flags);
	waiter_join(&waiter);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), nr + 1);
}

static void finish_fn(void *arg)
{
	agent_finish(arg);
}

/* Let the guest call @fn, a function of this program. */
static void request_call(paths_data *self, u64 (*fn)(u64 arg), u64 arg)
{
	agent_request(self->vcpu, AGENT_EXEC, (gva_t)fn, arg);
}

static u64 call(paths_data *self, u64 (*fn)(u64 arg), u64 arg)
{
	request_call(self, fn, arg);
	return agent_finish(self->vcpu);
}

static u64 guest_nothing(u64 arg)
{
	return arg;
}

/* What comes before is mapped, so that it does not count. */
static void warm_up(paths_data *self)
{
	call(self, guest_nothing, 0);
}

/*
 * Stolen time.
 */

static bool enable_stolen_time(paths_data *self)
{
	u64 ipa = SCRATCH;

	return !__vcpu_device_attr_set(self->vcpu, KVM_ARM_VCPU_PVTIME_CTRL,
				       KVM_ARM_VCPU_PVTIME_IPA, &ipa);
}

userfault_test(paths, stolen_time)
{
	u64 *stolen_time = self->hva + 8;
	struct armed_page page;
	int i;

	warm_up(self);
	if (!enable_stolen_time(self))
		SKIP(return, "There is no stolen time");

	/* It adds up, but for threads that have been robbed of different amounts. */
	for (i = 0; i < 2; i++) {
		*stolen_time = BIT_ULL(60);
		arm(self, &page, SCRATCH);
		request_call(self, guest_nothing, 0);
		expect_wait(self, &page, USERFAULT_READ, finish_fn, self->vcpu);
		TEST_ASSERT(*stolen_time > BIT_ULL(59) && *stolen_time < BIT_ULL(61),
			    "It does not go on from what the page has: %#lx", *stolen_time);
	}
}

/*
 * Page tables of the guest: KVM looks for the level of the table that an external abort
 * was for, which is what userspace may make of a fault of the walk by the hardware.
 */

static void inject_abort_fn(void *arg)
{
	struct kvm_vcpu_events events = { .exception.ext_dabt_pending = true };

	vcpu_events_set(arg, &events);
}

static gpa_t last_level_table(paths_data *self, gva_t gva)
{
	return addr_hva2gpa(self->vm, virt_get_pte_hva(self->vm, gva)) &
	       ~(self->vm->page_size - 1ull);
}

userfault_test(paths, stage_1_walk)
{
	gpa_t table = last_level_table(self, SCRATCH);
	struct armed_page page;
	u64 esr;
	int ret;

	warm_up(self);
	vm_userfault_arm(self->vm, table, getpagesize());
	agent_request(self->vcpu, AGENT_READ, SCRATCH, 0);
	ret = _vcpu_run(self->vcpu);
	if (!vcpu_has_userfault(self->vcpu, ret))
		vcpu_fail_run(self->vcpu, ret, "a userfault exit");
	TEST_ASSERT_EQ(self->vcpu->run->memory_fault.gpa, table);

	arm(self, &page, self->vm->mmu.pgd);
	expect_wait(self, &page, USERFAULT_READ, inject_abort_fn, self->vcpu);
	esr = vcpu_get_reg(self->vcpu, ctxt_reg_alias(self->vcpu, SYS_ESR_EL1));
	TEST_ASSERT_EQ(esr & ESR_ELx_FSC, ESR_ELx_FSC_SEA_TTW(3));
}

/*
 * The ITS.
 */

static u64 guest_init_gic(u64 arg)
{
	gic_init(GIC_V3, 1);
	gic_rdist_enable_lpis(PROPERTIES, SZ_64K, PENDING_TABLE);
	its_init(COLLECTION_TABLE, SZ_64K, DEVICE_TABLE, SZ_64K, COMMAND_QUEUE, SZ_64K);
	its_send_mapc_cmd((void *)COMMAND_QUEUE, 0, 0, true);
	its_send_mapd_cmd((void *)COMMAND_QUEUE, 0, ITT, ITT_SIZE, true);
	its_send_mapti_cmd((void *)COMMAND_QUEUE, 0, 0, 0, FIRST_LPI);
	its_send_sync_cmd((void *)COMMAND_QUEUE, 0);
	return 0;
}

static u64 guest_map_event(u64 event)
{
	its_send_mapti_cmd((void *)COMMAND_QUEUE, 0, event, 0, FIRST_LPI + event);
	return 0;
}

static u64 guest_invalidate(u64 arg)
{
	its_send_invall_cmd((void *)COMMAND_QUEUE, 0);
	return 0;
}

/* Let KVM process the command that userspace has put there. */
static u64 guest_process_command(u64 arg)
{
	u64 cwriter = readq_relaxed(GITS_BASE_GVA + GITS_CWRITER);

	writeq_relaxed(cwriter + 32, GITS_BASE_GVA + GITS_CWRITER);
	return readq_relaxed(GITS_BASE_GVA + GITS_CREADR) == cwriter + 32;
}

static u64 guest_disable_lpis(u64 arg)
{
	writel_relaxed(0, GICR_BASE_GVA + GICR_CTLR);
	return readl_relaxed(GICR_BASE_GVA + GICR_CTLR) & GICR_CTLR_ENABLE_LPIS;
}

static u64 guest_enable_lpis(u64 arg)
{
	writel_relaxed(GICR_CTLR_ENABLE_LPIS, GICR_BASE_GVA + GICR_CTLR);
	return 0;
}

/* Is there an interrupt that the guest would take? */
static u64 guest_has_irq(u64 arg)
{
	isb();
	return read_sysreg(isr_el1) & BIT(7);
}

/* One device with one event, which is the first LPI, and is enabled. */
static bool enable_its(paths_data *self)
{
	u8 *properties = self->hva + (PROPERTIES - AGENT_GPA);

	if (!self->vm->arch.has_gic)
		return false;

	properties[0] = LPI_PRIORITY | LPI_PROP_GROUP1 | LPI_PROP_ENABLED;
	self->its_fd = vgic_its_setup(self->vm);
	call(self, guest_init_gic, 0);
	return true;
}

/* Returns whether there is such an event. */
static bool signal_event(paths_data *self, u32 event)
{
	u64 address = GITS_BASE_GPA + GITS_TRANSLATER;
	struct kvm_msi msi = {
		.address_lo = address,
		.address_hi = address >> 32,
		.data = event,
		.flags = KVM_MSI_VALID_DEVID,
	};

	return __vm_ioctl(self->vm, KVM_SIGNAL_MSI, &msi) == 1;
}

static u8 *pending_byte(u8 *table, u32 event)
{
	return &table[(FIRST_LPI + event) / 8];
}

#define PENDING_BIT(event)	BIT((FIRST_LPI + (event)) % 8)

static void put_map_event(void *command, u32 event)
{
	u64 raw[4] = {
		GITS_CMD_MAPTI,
		event | (FIRST_LPI + event) * BIT_ULL(32),
	};

	memcpy(command, raw, sizeof(raw));
}

userfault_test(paths, its_command_queue)
{
	struct armed_page page;
	u64 creadr;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	TEST_ASSERT(!signal_event(self, 1), "There is an event that was not mapped");
	kvm_device_attr_get(self->its_fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CREADR,
			    &creadr);
	arm(self, &page, COMMAND_QUEUE);
	put_map_event(page.content + creadr, 1);
	request_call(self, guest_process_command, 0);
	expect_wait(self, &page, USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT(agent_result(self->vcpu), "The command was not processed");
	TEST_ASSERT(signal_event(self, 1), "The command was lost");
}

userfault_test(paths, lpi_properties)
{
	struct armed_page page;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	/* Whether event 1 is enabled is only known when the page is there. */
	call(self, guest_map_event, 1);
	TEST_ASSERT(signal_event(self, 1), "There is no event");
	TEST_ASSERT(!call(self, guest_has_irq, 0), "An LPI that is not enabled");

	arm(self, &page, PROPERTIES);
	page.content[1] = page.content[0];
	request_call(self, guest_invalidate, 0);
	expect_wait(self, &page, USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT(call(self, guest_has_irq, 0), "The LPI was lost");
}

/* The bit is taken from there, and cleared. */
userfault_test(paths, lpi_pending_table_for_a_new_lpi)
{
	u8 *properties = self->hva + (PROPERTIES - AGENT_GPA);
	u8 *table = self->hva + (PENDING_TABLE - AGENT_GPA);
	struct armed_page page;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	properties[1] = properties[0];
	arm(self, &page, PENDING_TABLE);
	*pending_byte(page.content, 1) |= PENDING_BIT(1);
	request_call(self, guest_map_event, 1);
	expect_wait(self, &page, USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT(!(*pending_byte(table, 1) & PENDING_BIT(1)), "The bit is still set");
	TEST_ASSERT(call(self, guest_has_irq, 0), "The LPI was lost");
}

userfault_test(paths, lpi_pending_table_when_enabled)
{
	struct armed_page page;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	TEST_ASSERT(!call(self, guest_disable_lpis, 0), "LPIs can't be disabled");
	arm(self, &page, PENDING_TABLE);
	*pending_byte(page.content, 0) |= PENDING_BIT(0);
	request_call(self, guest_enable_lpis, 0);
	expect_wait(self, &page, USERFAULT_READ, finish_fn, self->vcpu);
	TEST_ASSERT(call(self, guest_has_irq, 0), "The LPI was lost");
}

/* LPIs are enabled by then.  The table, where its bit is clear, does not take it back. */
userfault_test(paths, msi_while_the_lpi_pending_table_is_read)
{
	struct armed_page page;
	struct waiter waiter;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	TEST_ASSERT(!call(self, guest_disable_lpis, 0), "LPIs can't be disabled");
	arm(self, &page, PENDING_TABLE);
	TEST_ASSERT(!(*pending_byte(page.content, 0) & PENDING_BIT(0)), "The bit is set");
	request_call(self, guest_enable_lpis, 0);
	waiter_start(&waiter, finish_fn, self->vcpu);
	userfault_wait_for_waiters(self->fd, 1);
	TEST_ASSERT(signal_event(self, 0), "There is no event");
	expect_access(self, &waiter, &page, USERFAULT_READ);
	waiter_join(&waiter);
	TEST_ASSERT(call(self, guest_has_irq, 0), "The LPI was lost");
}

/* Nor does it know of one that was pending and masked when LPIs were disabled. */
userfault_test(paths, lpi_pending_table_without_a_masked_lpi)
{
	u8 *properties = self->hva + (PROPERTIES - AGENT_GPA);
	u8 *table = self->hva + (PENDING_TABLE - AGENT_GPA);

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	call(self, guest_map_event, 1);
	TEST_ASSERT(signal_event(self, 1), "There is no event");
	TEST_ASSERT(!call(self, guest_disable_lpis, 0), "LPIs can't be disabled");
	TEST_ASSERT(!(*pending_byte(table, 1) & PENDING_BIT(1)), "The bit is set");
	call(self, guest_enable_lpis, 0);
	properties[1] = properties[0];
	call(self, guest_invalidate, 0);
	TEST_ASSERT(!call(self, guest_has_irq, 0), "An LPI that is not in the table");

	TEST_ASSERT(signal_event(self, 1), "There is no event");
	TEST_ASSERT(call(self, guest_has_irq, 0), "The LPI was lost");
}

/*
 * Ioctls of the devices.
 */

static void save_pending_fn(void *arg)
{
	struct kvm_vm *vm = arg;

	kvm_device_attr_set(vm->arch.gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, NULL);
}

userfault_test(paths, lpi_pending_table_when_saved)
{
	u8 *table = self->hva + (PENDING_TABLE - AGENT_GPA);
	struct armed_page page;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	TEST_ASSERT(signal_event(self, 0), "There is no event");
	arm(self, &page, PENDING_TABLE);
	expect_wait(self, &page, USERFAULT_READ, save_pending_fn, self->vm);
	TEST_ASSERT(*pending_byte(table, 0) & PENDING_BIT(0), "The LPI was not saved");
}

static void its_control(int its_fd, u64 attr)
{
	kvm_device_attr_set(its_fd, KVM_DEV_ARM_VGIC_GRP_CTRL, attr, NULL);
}

static void save_tables_fn(void *arg)
{
	its_control(*(int *)arg, KVM_DEV_ARM_ITS_SAVE_TABLES);
}

static void restore_tables_fn(void *arg)
{
	its_control(*(int *)arg, KVM_DEV_ARM_ITS_RESTORE_TABLES);
}

/* As on the machine that the VM has been migrated to. */
static void reset_its(paths_data *self)
{
	u64 baser[GITS_BASER_NR_REGS];
	int i;

	for (i = 0; i < GITS_BASER_NR_REGS; i++)
		kvm_device_attr_get(self->its_fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
				    GITS_BASER + i * sizeof(u64), &baser[i]);
	its_control(self->its_fd, KVM_DEV_ARM_ITS_CTRL_RESET);
	for (i = 0; i < GITS_BASER_NR_REGS; i++)
		kvm_device_attr_set(self->its_fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
				    GITS_BASER + i * sizeof(u64), &baser[i]);
}

userfault_test(paths, its_tables_saved_and_restored)
{
	static const gpa_t saved[] = { ITT, DEVICE_TABLE, COLLECTION_TABLE };
	static const gpa_t restored[] = {
		COLLECTION_TABLE, DEVICE_TABLE, ITT, PROPERTIES, PENDING_TABLE,
	};
	struct armed_page pages[ARRAY_SIZE(restored)];
	struct waiter waiter;
	int i;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	for (i = 0; i < ARRAY_SIZE(saved); i++)
		arm(self, &pages[i], saved[i]);
	waiter_start(&waiter, save_tables_fn, &self->its_fd);
	for (i = 0; i < ARRAY_SIZE(saved); i++)
		expect_access(self, &waiter, &pages[i], USERFAULT_WRITE);
	waiter_join(&waiter);

	reset_its(self);
	TEST_ASSERT(!signal_event(self, 0), "The ITS was not reset");
	for (i = 0; i < ARRAY_SIZE(restored); i++)
		arm(self, &pages[i], restored[i]);
	waiter_start(&waiter, restore_tables_fn, &self->its_fd);
	for (i = 0; i < ARRAY_SIZE(restored); i++)
		expect_access(self, &waiter, &pages[i], USERFAULT_READ);
	waiter_join(&waiter);
}

/*
 * Accesses that fail: KVM_RUN ends before the guest sees what KVM made of it.
 */

#define FAILED_READ		(USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_FAILED)

/* Nobody will fill the page that the guest's access needs. */
static void expect_failure(paths_data *self, struct armed_page *page, int error)
{
	u64 nr = vcpu_get_stat(self->vcpu, userfault_exits);
	struct vcpu_call call = { .vcpu = self->vcpu };
	struct kvm_userfault_event event;
	struct waiter waiter;

	waiter_start(&waiter, vcpu_call_run_fn, &call);
	event = userfault_read(self->fd);
	TEST_ASSERT_EQ(event.gpa, page->gpa);
	userfault_resolve(self->fd, page->gpa, getpagesize(), 0, error);
	waiter_join(&waiter);

	TEST_ASSERT(call.ret == -1 && call.error == error, "KVM_RUN returned %d, errno %d",
		    call.ret, call.error);
	vcpu_assert_userfault(self->vcpu, page->gpa, FAILED_READ);
	armed_page_assert_untouched(page);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits), nr + 1);
	TEST_ASSERT(agent_is_busy(self->vcpu), "The guest went on");
}

userfault_test(paths, failed_stolen_time)
{
	struct armed_page page;

	warm_up(self);
	if (!enable_stolen_time(self))
		SKIP(return, "There is no stolen time");

	arm(self, &page, SCRATCH);
	request_call(self, guest_nothing, 0);
	expect_failure(self, &page, EFAULT);
	expect_failure(self, &page, EHWPOISON);
	armed_page_fill(&page, self->fd);
	agent_finish(self->vcpu);
}

/* The command is not skipped, as far as the guest sees. */
userfault_test(paths, failed_its_command)
{
	struct armed_page page;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	arm(self, &page, COMMAND_QUEUE);
	request_call(self, guest_process_command, 0);
	expect_failure(self, &page, EFAULT);
}

/* That of another ioctl is its own affair. */
userfault_test(paths, failed_ioctl_does_not_fail_kvm_run)
{
	struct armed_page page;
	int ret;

	if (!enable_its(self))
		SKIP(return, "There is no ITS");

	arm(self, &page, ITT);
	kvm_close(self->fd);
	ret = __kvm_device_attr_set(self->its_fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
				    KVM_DEV_ARM_ITS_SAVE_TABLES, NULL);
	TEST_ASSERT(ret == -1 && errno == EFAULT, "Expected EFAULT, got %d (errno %d)",
		    ret, errno);
	armed_page_assert_untouched(&page);

	self->fd = vm_create_userfault_fd(self->vm);
	warm_up(self);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_exits), 0);
}

/*
 * An interrupt controller in userspace.
 */

FIXTURE(no_vgic) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
	int fd;
};

#define no_vgic_data FIXTURE_DATA(no_vgic)

FIXTURE_SETUP(no_vgic)
{
	if (!kvm_has_cap(KVM_CAP_ARM_USER_IRQ))
		SKIP(return, "KVM does not report lines to userspace");

	test_disable_default_vgic();
	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, &self->vcpu);
	self->hva = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA, AGENT_SLOT,
				     1, 0);
	vm_userfault_enable_async(self->vm, KVM_USERFAULT_ASYNC_VCPU);
	self->fd = vm_create_userfault_fd(self->vm);
}

FIXTURE_TEARDOWN(no_vgic)
{
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

static void run_interrupted_fn(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	int ret = __vcpu_run(vcpu);

	TEST_ASSERT(ret == -1 && errno == EINTR, KVM_IOCTL_ERROR(KVM_RUN, ret));
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_INTR);
}

/* It has to see the lines that KVM has reported when the wait began. */
userfault_test(no_vgic, wait_of_a_vcpu_ends_in_userspace)
{
	struct armed_page page;
	struct waiter waiter;

	armed_page_init(&page, self->vm, AGENT_GPA);
	agent_request(self->vcpu, AGENT_READ, AGENT_GPA, 0);
	waiter_start(&waiter, run_interrupted_fn, self->vcpu);
	armed_page_expect_access(&page, self->fd, &waiter, USERFAULT_READ, self->vcpu->id, 0);
	waiter_join(&waiter);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpu, userfault_waits), 1);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), agent_page_content(AGENT_GPA));
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_USERFAULT) & KVM_USERFAULT_ASYNC);

	return test_harness_run(argc, argv);
}
