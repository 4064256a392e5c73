/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_USERFAULT_H__
#define __KVM_USERFAULT_H__ 1

#include <linux/kvm_host.h>
#include <linux/kvm_userfault.h>
#include <linux/list.h>
#include <linux/refcount.h>
#include <linux/sizes.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/xarray.h>

/* What userfault.c shares with the other parts of KVM Userfault. */

#define KVM_USERFAULT_CHUNK_SHIFT	(PAGE_SHIFT + ilog2(BITS_PER_BYTE))

/* The chunks of so many gfns can be found without a walk. */
#define KVM_USERFAULT_NR_LOW		(SZ_64G >> PAGE_SHIFT >> KVM_USERFAULT_CHUNK_SHIFT)

#define KVM_USERFAULT_BUCKETS_SHIFT	8
#define KVM_USERFAULT_NR_BUCKETS	BIT(KVM_USERFAULT_BUCKETS_SHIFT)

struct eventfd_ctx;

/* Accesses that wait for pages whose gfns have the same hash. */
struct kvm_userfault_bucket {
	/* Protects the list, and whether those in it are woken. */
	spinlock_t lock;
	struct list_head waiters;
};

/* Who reads records, and has to resolve those that it has read. */
struct kvm_userfault_reader {
	struct list_head delivered;
	unsigned int nr_delivered;
};

/*
 * The userfault state of a VM.  The VM has a reference while userfault is
 * enabled, and so has whoever uses the state without preventing that userfault is
 * disabled.  The state can thus outlive the VM, and never keeps it alive.
 */
struct kvm_userfault {
	refcount_t refs;

	/* KVM_USERFAULT_*, as given when userfault was enabled. */
	u64 flags;

	/* By gfn >> KVM_USERFAULT_CHUNK_SHIFT, a page with one bit a gfn. */
	struct xarray chunks;

	/* Those with the lowest indexes once more, or NULL: faults look here. */
	unsigned long *low_chunks[KVM_USERFAULT_NR_LOW];

	/* Signalled once for each record that becomes pending, or NULL. */
	struct eventfd_ctx *eventfd;

	/* Those who read or poll sleep here. */
	wait_queue_head_t wqh;

	/* Number of waiters in all buckets, at least. */
	atomic_t nr_waiters;

	/*
	 * Protects what follows, up to the buckets.  IRQs are off while this or
	 * a bucket's lock is held, so that whoever holds the lock of a wait queue
	 * may take it.
	 */
	spinlock_t lock;

	/*
	 * For statistics.  NULL once userfault is being disabled: no page is
	 * armed any more.
	 */
	struct kvm *kvm;

	/* The records of the accesses that wait: those that nobody has read yet. */
	struct list_head pending;
	unsigned int nr_pending;

	/* Number of all records, pending and delivered. */
	unsigned int nr_waiting;

	/* Number of userfault files, and whether the last one has been closed. */
	unsigned int nr_pagers;
	bool orphaned;

	/* The id of the newest record.  0 is no record. */
	u64 last_id;

	/* For KVM_READ_USERFAULT. */
	struct kvm_userfault_reader vm_reader;

	struct kvm_userfault_bucket buckets[KVM_USERFAULT_NR_BUCKETS];
};

/*
 * The state of @kvm for use until the end of the RCU read-side critical section, or
 * NULL if userfault isn't enabled, when the content of its pages can be used.
 */
struct kvm_userfault *kvm_userfault_rcu(struct kvm *kvm);

/* The state of @kvm with a reference, or NULL if userfault isn't enabled. */
struct kvm_userfault *kvm_userfault_get(struct kvm *kvm);
void kvm_userfault_put(struct kvm_userfault *uf);

DEFINE_FREE(kvm_userfault_put, struct kvm_userfault *, kvm_userfault_put(_T))

/* Is userfault being disabled, or the VM gone?  Then no page is armed any more. */
static inline bool kvm_userfault_is_closed(struct kvm_userfault *uf)
{
	/* Pairs with the release in kvm_userfault_close_queue(). */
	return !smp_load_acquire(&uf->kvm);
}

/* Is @gfn armed?  If not, its content can be used. */
bool kvm_userfault_test(struct kvm_userfault *uf, gfn_t gfn);

/* Clear the gfns [@start, @end), without waking who waits for them. */
void kvm_userfault_clear_range(struct kvm_userfault *uf, gfn_t start, gfn_t end);

/*
 * The chunk at @index, for which memory is allocated if need be.  Once no page can
 * be armed any more there is none to come.
 */
void *kvm_userfault_get_chunk(struct kvm_userfault *uf, unsigned long index);

void kvm_userfault_init_queue(struct kvm_userfault *uf);
void kvm_userfault_close_queue(struct kvm_userfault *uf);

void kvm_userfault_wake(struct kvm_userfault *uf, gfn_t start, gfn_t end, int error);

void kvm_userfault_add_pager(struct kvm_userfault *uf,
			     struct kvm_userfault_reader *reader);
void kvm_userfault_del_pager(struct kvm_userfault *uf,
			     struct kvm_userfault_reader *reader);

bool kvm_userfault_readable(struct kvm_userfault *uf);
bool kvm_userfault_take_record(struct kvm_userfault *uf,
			       struct kvm_userfault_reader *reader,
			       struct kvm_userfault_event *event);
void kvm_userfault_return_record(struct kvm_userfault *uf,
				 struct kvm_userfault_reader *reader, u64 id);

#endif /* __KVM_USERFAULT_H__ */
