// SPDX-License-Identifier: GPL-2.0-only
/*
 * What userfault_postcopy_test needs to know about x86.
 */
#include <asm/kvm_para.h>

#include "apic.h"
#include "kvm_util.h"
#include "processor.h"
#include "userfault_postcopy.h"

struct vm_state {
	struct kvm_irqchip irqchips[3];
	struct kvm_clock_data clock;
};

u64 arch_save_vm(struct kvm_vm *vm, void *buf)
{
	struct vm_state *state = buf;
	u32 i;

	memset(state, 0, sizeof(*state));
	for (i = 0; i < ARRAY_SIZE(state->irqchips); i++) {
		state->irqchips[i].chip_id = i;
		vm_ioctl(vm, KVM_GET_IRQCHIP, &state->irqchips[i]);
	}
	vm_ioctl(vm, KVM_GET_CLOCK, &state->clock);
	state->clock.flags = 0;

	return sizeof(*state);
}

void arch_load_vm(struct kvm_vm *vm, void *buf)
{
	struct vm_state *state = buf;
	u32 i;

	for (i = 0; i < ARRAY_SIZE(state->irqchips); i++)
		vm_ioctl(vm, KVM_SET_IRQCHIP, &state->irqchips[i]);
	vm_ioctl(vm, KVM_SET_CLOCK, &state->clock);
}

/* The state that the library knows, and its XSAVE area, follow. */
struct vcpu_state {
	struct kvm_lapic_state lapic;
	u64 size;
	u64 xsave_size;
	u8 data[];
};

u64 arch_save_vcpu(struct kvm_vcpu *vcpu, void *buf)
{
	struct kvm_x86_state *x86_state = vcpu_save_state(vcpu);
	struct vcpu_state *state = buf;

	vcpu_ioctl(vcpu, KVM_GET_LAPIC, &state->lapic);
	state->size = struct_size(x86_state, msrs.entries, x86_state->msrs.nmsrs);
	state->xsave_size = max_t(u64, vm_check_cap(vcpu->vm, KVM_CAP_XSAVE2),
				  sizeof(struct kvm_xsave));
	TEST_ASSERT(sizeof(*state) + state->size + state->xsave_size <= POSTCOPY_MAX_STATE,
		    "The state of a vCPU is too big");

	memcpy(state->data, x86_state, state->size);
	memcpy(state->data + state->size, x86_state->xsave, state->xsave_size);
	kvm_x86_state_cleanup(x86_state);

	return sizeof(*state) + state->size + state->xsave_size;
}

void arch_load_vcpu(struct kvm_vcpu *vcpu, void *buf)
{
	struct vcpu_state *state = buf;
	struct kvm_x86_state *x86_state = malloc(state->size);

	TEST_ASSERT(x86_state, "Out of memory");
	memcpy(x86_state, state->data, state->size);
	x86_state->xsave = malloc(state->xsave_size);
	memcpy(x86_state->xsave, state->data + state->size, state->xsave_size);

	vcpu_load_state(vcpu, x86_state);
	vcpu_ioctl(vcpu, KVM_SET_LAPIC, &state->lapic);
	kvm_x86_state_cleanup(x86_state);
}

void arch_setup_kvm_page(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	kvm_static_assert(sizeof(struct kvm_steal_time) <= 64);

	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, (gpa + 64) | KVM_MSR_ENABLED);
	if (kvm_cpu_has(X86_FEATURE_KVM_STEAL_TIME))
		vcpu_set_msr(vcpu, MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
}

/* An interrupt that is pending, of a lower priority than what is let through. */
#define PENDING_VECTOR	0x42
#define TASK_PRIORITY	0x50
#define LVTT		(APIC_LVT_MASKED | 0x99)

void arch_guest_setup_irqchip(u64 vcpu_id)
{
	x2apic_enable();
	x2apic_write_reg(APIC_TASKPRI, TASK_PRIORITY);
	x2apic_write_reg(APIC_LVTT, LVTT);
	x2apic_write_reg(APIC_SELF_IPI, PENDING_VECTOR);
}

bool arch_guest_check_irqchip(u64 vcpu_id)
{
	u64 irr = x2apic_read_reg(APIC_IRR + PENDING_VECTOR / 32 * 0x10);

	return x2apic_read_reg(APIC_TASKPRI) == TASK_PRIORITY &&
	       x2apic_read_reg(APIC_LVTT) == LVTT &&
	       irr == BIT(PENDING_VECTOR % 32);
}

/* KVM emulates string I/O, and reads the memory. */
#define EMULATED_PORT	0x2000

void arch_guest_emulate(u32 *word)
{
	asm volatile("outsl" : "+S"(word) : "d"(EMULATED_PORT) : "memory");
}

bool arch_get_emulated(struct kvm_vcpu *vcpu, u32 *word)
{
	struct kvm_run *run = vcpu->run;

	if (run->exit_reason != KVM_EXIT_IO || run->io.port != EMULATED_PORT)
		return false;

	TEST_ASSERT(run->io.direction == KVM_EXIT_IO_OUT && run->io.size == sizeof(*word) &&
		    run->io.count == 1, "Unexpected I/O of %u * %u bytes", run->io.count,
		    run->io.size);
	memcpy(word, (void *)run + run->io.data_offset, sizeof(*word));
	return true;
}

bool arch_get_huge_mappings(struct kvm_vm *vm, u64 *nr)
{
	*nr = vm_get_stat(vm, pages_2m);
	return true;
}
