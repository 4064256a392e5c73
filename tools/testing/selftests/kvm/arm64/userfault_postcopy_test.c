// SPDX-License-Identifier: GPL-2.0-only
/*
 * What userfault_postcopy_test needs to know about arm64.
 */
#include "kvm_util.h"
#include "gic.h"
#include "gic_v3.h"
#include "processor.h"
#include "userfault_postcopy.h"
#include "vgic.h"

/*
 * The GIC, with 32 private and 32 shared interrupts.
 */

/* @nr registers of 4 bytes, or a system register of 8. */
struct gic_regs {
	u32 group;
	u32 attr;
	u32 nr;
};

#define SGI_BASE	SZ_64K
#define SYSREG_ATTR(reg) \
	(KVM_ARM64_SYS_REG(reg) & KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK)

static const struct gic_regs dist_regs[] = {
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_CTLR, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_IGROUPR + 4, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_ICFGR + 8, 2 },
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_IPRIORITYR + 32, 8 },
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_IROUTER + 32 * 8, 64 },
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_ISENABLER + 4, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_ISPENDR + 4, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_ISACTIVER + 4, 1 },
};

static const struct gic_regs redist_regs[] = {
	{ KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, SGI_BASE + GICR_IGROUPR0, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, SGI_BASE + GICR_ICFGR0, 2 },
	{ KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, SGI_BASE + GICR_IPRIORITYR0, 8 },
	{ KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, SGI_BASE + GICR_ISENABLER0, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, SGI_BASE + GICD_ISPENDR, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, SGI_BASE + GICR_ISACTIVER0, 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_SRE_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_CTLR_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_PMR_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_BPR0_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_BPR1_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_IGRPEN0_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_IGRPEN1_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_AP0R0_EL1), 1 },
	{ KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG_ATTR(SYS_ICC_AP1R0_EL1), 1 },
};

/* Save resp. load registers, each of which takes 8 bytes. Returns their number. */
static u64 gic_access(struct kvm_vm *vm, const struct gic_regs *regs, u64 nr_regs,
		      u64 affinity, u64 *vals, bool save)
{
	u64 attr, nr = 0;
	u32 i, j;

	for (i = 0; i < nr_regs; i++) {
		for (j = 0; j < regs[i].nr; j++) {
			attr = (affinity << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT) |
			       (regs[i].attr + j * 4);
			if (save)
				kvm_device_attr_get(vm->arch.gic_fd, regs[i].group, attr,
						    &vals[nr++]);
			else
				kvm_device_attr_set(vm->arch.gic_fd, regs[i].group, attr,
						    &vals[nr++]);
		}
	}

	return nr;
}

/* As in the attributes of the GIC: without what is between the fields. */
static u64 vcpu_affinity(struct kvm_vcpu *vcpu)
{
	u64 mpidr = vcpu_get_reg(vcpu, KVM_ARM64_SYS_REG(SYS_MPIDR_EL1));

	return (mpidr & 0xffffff) | (mpidr >> 32 & 0xff) << 24;
}

u64 arch_save_vm(struct kvm_vm *vm, void *buf)
{
	memset(buf, 0, SZ_4K);
	return gic_access(vm, dist_regs, ARRAY_SIZE(dist_regs), 0, buf, true) * sizeof(u64);
}

void arch_load_vm(struct kvm_vm *vm, void *buf)
{
	gic_access(vm, dist_regs, ARRAY_SIZE(dist_regs), 0, buf, false);
}

struct vcpu_state {
	struct kvm_mp_state mp_state;
	struct kvm_vcpu_events events;
	u64 pvtime;
	u64 gic[64];
	u64 nr;
	/* A register each: its id, and its value. */
	struct {
		u64 id;
		u64 val[2];
	} regs[];
};

u64 arch_save_vcpu(struct kvm_vcpu *vcpu, void *buf)
{
	struct vcpu_state *state = buf;
	struct kvm_reg_list *list;
	u64 i;

	vcpu_run_complete_io(vcpu);

	memset(state, 0, sizeof(*state));
	vcpu_mp_state_get(vcpu, &state->mp_state);
	vcpu_ioctl(vcpu, KVM_GET_VCPU_EVENTS, &state->events);
	vcpu_device_attr_get(vcpu, KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA,
			     &state->pvtime);
	gic_access(vcpu->vm, redist_regs, ARRAY_SIZE(redist_regs), vcpu_affinity(vcpu),
		   state->gic, true);

	list = vcpu_get_reg_list(vcpu);
	state->nr = list->n;
	TEST_ASSERT(struct_size(state, regs, state->nr) <= POSTCOPY_MAX_STATE,
		    "The state of a vCPU is too big");
	for (i = 0; i < list->n; i++) {
		state->regs[i].id = list->reg[i];
		TEST_ASSERT((list->reg[i] & KVM_REG_SIZE_MASK) <= KVM_REG_SIZE_U128,
			    "Register %#llx is too big", list->reg[i]);
		__vcpu_get_reg(vcpu, list->reg[i], state->regs[i].val);
	}
	free(list);

	return struct_size(state, regs, state->nr);
}

void arch_load_vcpu(struct kvm_vcpu *vcpu, void *buf)
{
	struct vcpu_state *state = buf;
	struct kvm_one_reg reg;
	u64 i;

	for (i = 0; i < state->nr; i++) {
		reg.id = state->regs[i].id;
		reg.addr = (u64)state->regs[i].val;
		vcpu_ioctl(vcpu, KVM_SET_ONE_REG, &reg);
	}
	gic_access(vcpu->vm, redist_regs, ARRAY_SIZE(redist_regs), vcpu_affinity(vcpu),
		   state->gic, false);
	vcpu_device_attr_set(vcpu, KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA,
			     &state->pvtime);
	vcpu_ioctl(vcpu, KVM_SET_VCPU_EVENTS, &state->events);
	vcpu_mp_state_set(vcpu, &state->mp_state);
}

/* The stolen time. */
void arch_setup_kvm_page(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	u64 ipa = gpa;

	__TEST_REQUIRE(!__vcpu_has_device_attr(vcpu, KVM_ARM_VCPU_PVTIME_CTRL,
					       KVM_ARM_VCPU_PVTIME_IPA), "No stolen time");
	vcpu_device_attr_set(vcpu, KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA, &ipa);
}

/*
 * Interrupts that are pending, and priorities.  The private one is not enabled, and the
 * shared one, which is for vCPU 0 to look after, has a priority that is not let through.
 * The GIC is not used for anything.
 */
#define PENDING		BIT(5)
#define SPI		BIT(0)
#define PRIORITIES	0x80a0c0e0
#define PRIORITY_MASK	0x90

static void *guest_redist(u64 vcpu_id, u64 reg)
{
	return (void *)(GICR_BASE_GPA + vcpu_id * KVM_VGIC_V3_REDIST_SIZE + SGI_BASE + reg);
}

/* A register with @bits for each interrupt, from the first one that is shared on. */
static void *guest_dist(u64 reg, u64 bits)
{
	return (void *)(GICD_BASE_GPA + reg + 32 * bits / 8);
}

static void guest_setup_spi(void)
{
	writel(PRIORITIES, guest_dist(GICD_IPRIORITYR, 8));
	writel(SPI, guest_dist(GICD_ISENABLER, 1));
	writel(SPI, guest_dist(GICD_ISPENDR, 1));
}

static bool guest_check_spi(void)
{
	return readl(guest_dist(GICD_IPRIORITYR, 8)) == PRIORITIES &&
	       readl(guest_dist(GICD_ISENABLER, 1)) == SPI &&
	       readl(guest_dist(GICD_ISPENDR, 1)) == SPI;
}

void arch_guest_setup_irqchip(u64 vcpu_id)
{
	writel(PRIORITIES, guest_redist(vcpu_id, GICR_IPRIORITYR0));
	writel(PENDING, guest_redist(vcpu_id, GICD_ISPENDR));
	write_sysreg_s(PRIORITY_MASK, SYS_ICC_PMR_EL1);
	if (!vcpu_id)
		guest_setup_spi();
}

bool arch_guest_check_irqchip(u64 vcpu_id)
{
	return readl(guest_redist(vcpu_id, GICR_IPRIORITYR0)) == PRIORITIES &&
	       readl(guest_redist(vcpu_id, GICD_ISPENDR)) == PENDING &&
	       read_sysreg_s(SYS_ICC_PMR_EL1) == PRIORITY_MASK &&
	       (vcpu_id || guest_check_spi());
}

/* KVM emulates no access to memory. */
void arch_guest_emulate(u32 *word)
{
}

bool arch_get_emulated(struct kvm_vcpu *vcpu, u32 *word)
{
	return false;
}

/* Only CONFIG_PTDUMP_STAGE2_DEBUGFS tells: by ranges, with what maps them. */
bool arch_get_huge_mappings(struct kvm_vm *vm, u64 *nr)
{
	char line[256];
	u64 start, end;
	FILE *file;

	snprintf(line, sizeof(line), "/sys/kernel/debug/kvm/%d-%d/stage2_page_tables",
		 getpid(), vm->fd);
	file = fopen(line, "r");
	if (!file)
		return false;

	*nr = 0;
	while (fgets(line, sizeof(line), file)) {
		if (strstr(line, " BLK") && sscanf(line, "%lx-%lx", &start, &end) == 2)
			*nr += (end - start) / SZ_2M;
	}
	fclose(file);

	return true;
}
