/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __LINUX_KVM_USERFAULT_H
#define __LINUX_KVM_USERFAULT_H

#include <linux/kvm_host.h>

/*
 * KVM Userfault: one bit for each gfn, set while the page has no content yet.
 * KVM does not map such a page, which is called armed, into the guest; a vCPU
 * that needs it exits to userspace, which fills the page, clears the bit and
 * runs the vCPU again.
 */

/* Can userfault work for @kvm, or for some VM if @kvm is NULL? */
bool kvm_arch_supports_userfault(struct kvm *kvm);

/*
 * Make way for huge mappings of the gfns [@start, @end) of @slot, which were out
 * of reach because of armed pages.  Called with slots_lock held.
 */
void kvm_arch_userfault_recover(struct kvm *kvm, const struct kvm_memory_slot *slot,
				gfn_t start, gfn_t end);

/* Forget the I/O that @vcpu waits for userspace to do, if any. */
void kvm_arch_userfault_cancel_io(struct kvm_vcpu *vcpu);

#ifdef CONFIG_KVM_USERFAULT

/* Flags of KVM_CAP_USERFAULT that @kvm, or some VM if NULL, supports. */
u64 kvm_userfault_supported_flags(struct kvm *kvm);
int kvm_userfault_enable_cap(struct kvm *kvm, const struct kvm_enable_cap *cap);
void kvm_userfault_close(struct kvm *kvm);
void kvm_userfault_destroy(struct kvm *kvm);

int kvm_userfault_read(struct kvm *kvm, struct kvm_userfault_event __user *uevent);
int kvm_userfault_create_fd(struct kvm *kvm,
			    struct kvm_create_userfault_fd __user *ucreate);

/*
 * Arm the gfns [@start, @end), under slots_lock and in two steps: the first can
 * fail, and changes no bit but may leave memory allocated until userfault is
 * disabled.  The second can't fail.
 */
int kvm_userfault_reserve(struct kvm *kvm, gfn_t start, gfn_t end);
void kvm_userfault_arm(struct kvm *kvm, gfn_t start, gfn_t end);

/* Clear the gfns [@start, @end).  Needs no lock and allocates nothing. */
void kvm_userfault_clear(struct kvm *kvm, gfn_t start, gfn_t end);

gfn_t __kvm_userfault_nr_clear(struct kvm *kvm, gfn_t gfn, gfn_t nr_pages);
bool __kvm_userfault_armed(struct kvm *kvm, gfn_t gfn);

int kvm_userfault_prepare_exit(struct kvm_vcpu *vcpu, gfn_t gfn, bool is_write,
			       bool is_exec, bool is_private);

int __kvm_userfault_access(struct kvm *kvm, const struct kvm_memory_slot *slot,
			   gfn_t gfn, bool is_write);
int __kvm_userfault_access_atomic(struct kvm *kvm,
				  const struct kvm_memory_slot *slot, gfn_t gfn);

static inline bool kvm_userfault_enabled(struct kvm *kvm)
{
	/* Pairs with the barrier in kvm_userfault_detach(). */
	return unlikely(smp_load_acquire(&kvm->userfault));
}

/*
 * Is @gfn armed, as seen by an access through @slot?  Memslots that KVM itself
 * created are exempt: userspace doesn't know what is in there.
 *
 * A mapping may follow only if mmu_invalidate_seq was read before, and has not
 * changed once mmu_lock is held.
 */
static inline bool kvm_userfault_armed(struct kvm *kvm,
				       const struct kvm_memory_slot *slot, gfn_t gfn)
{
	return kvm_userfault_enabled(kvm) && slot->id < KVM_USER_MEM_SLOTS &&
	       __kvm_userfault_armed(kvm, gfn);
}

/* How many of the @nr_pages pages from @gfn on come before an armed one? */
static inline gfn_t kvm_userfault_nr_clear(struct kvm *kvm, gfn_t gfn,
					   gfn_t nr_pages)
{
	if (!kvm_userfault_enabled(kvm))
		return nr_pages;

	return __kvm_userfault_nr_clear(kvm, gfn, nr_pages);
}

/*
 * To be called before KVM itself, rather than a vCPU, accesses @gfn through @slot,
 * which may be NULL.  Waits as long as the page is armed, if such accesses are
 * intercepted, and fails if it never gets its content.
 *
 * The caller may sleep.  Whoever provides the page must not need the locks that
 * are held, nor those of others who wait for the caller.
 */
static inline int kvm_userfault_access(struct kvm *kvm,
				       const struct kvm_memory_slot *slot,
				       gfn_t gfn, bool is_write)
{
	if (!kvm_userfault_enabled(kvm))
		return 0;

	return __kvm_userfault_access(kvm, slot, gfn, is_write);
}

/* The same for a caller that can't sleep, which fails if the page is armed. */
static inline int kvm_userfault_access_atomic(struct kvm *kvm,
					      const struct kvm_memory_slot *slot,
					      gfn_t gfn)
{
	if (!kvm_userfault_enabled(kvm))
		return 0;

	return __kvm_userfault_access_atomic(kvm, slot, gfn);
}

static inline int kvm_vcpu_userfault_access(struct kvm_vcpu *vcpu, gfn_t gfn,
					    bool is_write)
{
	if (!kvm_userfault_enabled(vcpu->kvm))
		return 0;

	return __kvm_userfault_access(vcpu->kvm, kvm_vcpu_gfn_to_memslot(vcpu, gfn),
				      gfn, is_write);
}

bool __kvm_vcpu_userfault_exit(struct kvm_vcpu *vcpu, gfn_t gfn, bool is_write);

/*
 * Is @vcpu to leave KVM_RUN before KVM accesses @gfn for it?  To be called in place of
 * kvm_userfault_access(), where all that has been done so far can be done again when
 * the vCPU is run again.  If true, KVM_RUN has to fail with -EFAULT.
 */
static inline bool kvm_vcpu_userfault_exit(struct kvm_vcpu *vcpu, gfn_t gfn,
					   bool is_write)
{
	return kvm_userfault_enabled(vcpu->kvm) &&
	       __kvm_vcpu_userfault_exit(vcpu, gfn, is_write);
}

void __kvm_userfault_end_ioctl(struct kvm_vcpu *vcpu, int *r);

/*
 * Called at the end of an ioctl of @vcpu with its result @r, which is a failure if
 * KVM failed to access an armed page.
 */
static inline void kvm_userfault_end_ioctl(struct kvm_vcpu *vcpu, int *r)
{
	if (unlikely(vcpu->userfault.size))
		__kvm_userfault_end_ioctl(vcpu, r);
}

bool __kvm_userfault_run_again(struct kvm_vcpu *vcpu, int *r);

/*
 * Called with the result @r of running @vcpu.  If an armed page made it fail, and
 * vCPUs are to wait for such pages, do so and return true: run the vCPU again.
 * If KVM failed to access an armed page for the vCPU, make KVM_RUN fail.
 */
static inline bool kvm_userfault_run_again(struct kvm_vcpu *vcpu, int *r)
{
	if (likely(!vcpu->userfault.size))
		return false;

	return __kvm_userfault_run_again(vcpu, r);
}

#else /* CONFIG_KVM_USERFAULT */

static inline u64 kvm_userfault_supported_flags(struct kvm *kvm)
{
	return 0;
}

static inline int kvm_userfault_enable_cap(struct kvm *kvm,
					   const struct kvm_enable_cap *cap)
{
	return -EINVAL;
}

static inline void kvm_userfault_close(struct kvm *kvm)
{
}

static inline void kvm_userfault_destroy(struct kvm *kvm)
{
}

static inline int kvm_userfault_read(struct kvm *kvm,
				     struct kvm_userfault_event __user *uevent)
{
	return -ENOTTY;
}

static inline int
kvm_userfault_create_fd(struct kvm *kvm,
			struct kvm_create_userfault_fd __user *ucreate)
{
	return -ENOTTY;
}

static inline int kvm_userfault_reserve(struct kvm *kvm, gfn_t start, gfn_t end)
{
	return -EINVAL;
}

static inline void kvm_userfault_arm(struct kvm *kvm, gfn_t start, gfn_t end)
{
}

static inline void kvm_userfault_clear(struct kvm *kvm, gfn_t start, gfn_t end)
{
}

static inline int kvm_userfault_prepare_exit(struct kvm_vcpu *vcpu, gfn_t gfn,
					     bool is_write, bool is_exec,
					     bool is_private)
{
	return -EFAULT;
}

static inline int kvm_userfault_access(struct kvm *kvm,
				       const struct kvm_memory_slot *slot,
				       gfn_t gfn, bool is_write)
{
	return 0;
}

static inline int kvm_userfault_access_atomic(struct kvm *kvm,
					      const struct kvm_memory_slot *slot,
					      gfn_t gfn)
{
	return 0;
}

static inline int kvm_vcpu_userfault_access(struct kvm_vcpu *vcpu, gfn_t gfn,
					    bool is_write)
{
	return 0;
}

static inline bool kvm_vcpu_userfault_exit(struct kvm_vcpu *vcpu, gfn_t gfn,
					   bool is_write)
{
	return false;
}

static inline void kvm_userfault_end_ioctl(struct kvm_vcpu *vcpu, int *r)
{
}

static inline bool kvm_userfault_run_again(struct kvm_vcpu *vcpu, int *r)
{
	return false;
}

static inline bool kvm_userfault_enabled(struct kvm *kvm)
{
	return false;
}

static inline bool kvm_userfault_armed(struct kvm *kvm,
				       const struct kvm_memory_slot *slot, gfn_t gfn)
{
	return false;
}

static inline gfn_t kvm_userfault_nr_clear(struct kvm *kvm, gfn_t gfn,
					   gfn_t nr_pages)
{
	return nr_pages;
}

#endif /* CONFIG_KVM_USERFAULT */

#endif /* __LINUX_KVM_USERFAULT_H */
