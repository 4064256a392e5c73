// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM Userfault: demand paging of guest memory by KVM itself, for post-copy
 * live migration and lazy restore of snapshots.
 *
 * The state is a bitmap for each VM, indexed by gfn and thus independent of the
 * memslots.  Page-sized chunks of it hang off an xarray; a chunk that is absent
 * is all clear.  Being kernel memory, it can be read in any context.
 *
 * Locking:
 *
 *  - kvm->userfault, and setting of bits: slots_lock
 *  - reading bits and clearing them: RCU, or a reference to the state
 *  - the chunks: they are added under the lock of the xarray, and stay until the
 *    state is freed
 *
 * Ordering:
 *
 *  - Whoever clears a bit, or all of them by disabling userfault, has filled the
 *    page: kvm_userfault_clear_range(), kvm_userfault_close_queue() and
 *    kvm_userfault_detach() order the two, and pair with the acquire of whoever
 *    finds the bit clear, the state closed, or userfault disabled.
 *  - Whoever sets a bit invalidates the gfn afterwards.  Whoever maps the gfn
 *    reads mmu_invalidate_seq first, then tests the bit, and then maps it under
 *    mmu_lock only if the sequence still stands: a bit that was missed is
 *    followed by an invalidation that is not.  Whoever tests the bit and maps
 *    the gfn in one critical section under mmu_lock need not look at the
 *    sequence: a mapping that missed the bit is there for the invalidation to
 *    find.
 */
#include <linux/eventfd.h>
#include <linux/kvm_host.h>
#include <linux/kvm_userfault.h>
#include <linux/nospec.h>
#include <linux/sizes.h>
#include <trace/events/kvm.h>

#include "kvm_mm.h"
#include "userfault.h"

#define KVM_USERFAULT_CHUNK_GFNS	BIT(KVM_USERFAULT_CHUNK_SHIFT)
#define KVM_USERFAULT_MAX_CHUNK		(gpa_to_gfn(~0ULL) >> KVM_USERFAULT_CHUNK_SHIFT)

/* The part of a range of gfns that lies in one chunk. */
struct kvm_userfault_span {
	unsigned long index;	/* of the chunk */
	unsigned long first;	/* bit in the chunk */
	unsigned long nr;	/* number of bits */
};

/* The first span of the gfns [@start, @end), which must not be empty. */
static struct kvm_userfault_span kvm_userfault_span(gfn_t start, gfn_t end)
{
	struct kvm_userfault_span span = {
		.index = start >> KVM_USERFAULT_CHUNK_SHIFT,
		.first = start & (KVM_USERFAULT_CHUNK_GFNS - 1),
	};

	span.nr = min(end - start, KVM_USERFAULT_CHUNK_GFNS - span.first);
	return span;
}

static struct kvm_userfault *kvm_userfault_locked(struct kvm *kvm)
{
	return rcu_dereference_protected(kvm->userfault,
					 lockdep_is_held(&kvm->slots_lock));
}

struct kvm_userfault *kvm_userfault_rcu(struct kvm *kvm)
{
	struct kvm_userfault *uf = rcu_dereference(kvm->userfault);

	/* Pairs with the barrier in kvm_userfault_detach(). */
	if (!uf)
		smp_acquire__after_ctrl_dep();

	return uf;
}

struct kvm_userfault *kvm_userfault_get(struct kvm *kvm)
{
	struct kvm_userfault *uf;

	guard(rcu)();

	/* The VM's own reference is dropped a grace period after the pointer. */
	uf = kvm_userfault_rcu(kvm);
	if (uf)
		refcount_inc(&uf->refs);

	return uf;
}

/*
 * A chunk is published after it was added, by whoever is about to use it.  It is
 * always the same one.
 */
static void kvm_userfault_publish_chunk(struct kvm_userfault *uf, unsigned long index,
					unsigned long *chunk)
{
	if (index >= KVM_USERFAULT_NR_LOW)
		return;

	/* Pairs with the address dependency of kvm_userfault_chunk()'s users. */
	smp_store_release(&uf->low_chunks[index], chunk);
}

/* What is not published has no bit set that anybody could rely on. */
static unsigned long *kvm_userfault_chunk(struct kvm_userfault *uf, unsigned long index)
{
	if (likely(index < KVM_USERFAULT_NR_LOW)) {
		index = array_index_nospec(index, KVM_USERFAULT_NR_LOW);
		return READ_ONCE(uf->low_chunks[index]);
	}

	return xa_load(&uf->chunks, index);
}

static unsigned long *kvm_userfault_chunk_rcu(struct kvm *kvm, unsigned long index)
{
	struct kvm_userfault *uf = kvm_userfault_rcu(kvm);

	if (!uf || kvm_userfault_is_closed(uf))
		return NULL;

	return kvm_userfault_chunk(uf, index);
}

bool kvm_userfault_test(struct kvm_userfault *uf, gfn_t gfn)
{
	unsigned long *chunk;

	if (kvm_userfault_is_closed(uf))
		return false;

	chunk = kvm_userfault_chunk(uf, gfn >> KVM_USERFAULT_CHUNK_SHIFT);

	/* Pairs with the barrier in kvm_userfault_clear_range(). */
	return chunk && test_bit_acquire(gfn & (KVM_USERFAULT_CHUNK_GFNS - 1), chunk);
}

bool __kvm_userfault_armed(struct kvm *kvm, gfn_t gfn)
{
	struct kvm_userfault *uf;

	guard(rcu)();

	uf = kvm_userfault_rcu(kvm);
	return uf && kvm_userfault_test(uf, gfn);
}

gfn_t __kvm_userfault_nr_clear(struct kvm *kvm, gfn_t gfn, gfn_t nr_pages)
{
	gfn_t next = gfn, end = gfn + nr_pages;
	struct kvm_userfault_span span;
	unsigned long *chunk;

	guard(rcu)();

	for (; next < end; next += span.nr) {
		unsigned long bit, last;

		span = kvm_userfault_span(next, end);
		chunk = kvm_userfault_chunk_rcu(kvm, span.index);
		if (!chunk)
			continue;

		last = span.first + span.nr;
		bit = find_next_bit(chunk, last, span.first);
		if (bit < last) {
			next += bit - span.first;
			break;
		}
	}

	/*
	 * Read what is in the pages only after the bits, as the acquire in
	 * kvm_userfault_test() does.  Pairs with the barrier in
	 * kvm_userfault_clear_range().
	 */
	smp_rmb();
	return next - gfn;
}

static void kvm_userfault_write_word(unsigned long *word, unsigned long mask,
				     bool set)
{
	if (set)
		atomic_long_or(mask, (atomic_long_t *)word);
	else
		atomic_long_andnot(mask, (atomic_long_t *)word);
}

/*
 * Set or clear the bits of @span in @chunk.  Others may change bits at the same
 * time: the words at either end hold bits that are not part of the span and must
 * not be lost.  All others can be stored to, as a concurrent change of the same
 * bits may come first or last anyway.  That relies on atomic operations that are
 * atomic with regard to plain stores, too.
 */
static void kvm_userfault_write_span(unsigned long *chunk,
				     const struct kvm_userfault_span *span, bool set)
{
	unsigned long first = span->first, end = first + span->nr;
	unsigned long head = round_up(first, BITS_PER_LONG);
	unsigned long tail = round_down(end, BITS_PER_LONG);

	if (head > tail) {
		kvm_userfault_write_word(chunk + BIT_WORD(first),
					 BITMAP_FIRST_WORD_MASK(first) &
					 BITMAP_LAST_WORD_MASK(end), set);
		return;
	}

	if (first < head)
		kvm_userfault_write_word(chunk + BIT_WORD(first),
					 BITMAP_FIRST_WORD_MASK(first), set);

	memset_l(chunk + BIT_WORD(head), set ? ~0UL : 0, BIT_WORD(tail - head));

	if (tail < end)
		kvm_userfault_write_word(chunk + BIT_WORD(tail),
					 BITMAP_LAST_WORD_MASK(end), set);
}

/* Add the chunk at @index, unless somebody else is faster. */
static int kvm_userfault_add_chunk(struct kvm_userfault *uf, unsigned long index)
{
	void *chunk = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	int r;

	if (!chunk)
		return -ENOMEM;

	r = xa_insert(&uf->chunks, index, chunk, GFP_KERNEL_ACCOUNT);
	if (r) {
		free_page((unsigned long)chunk);
		return r == -EBUSY ? 0 : r;
	}

	guard(spinlock_irqsave)(&uf->lock);

	if (uf->kvm)
		++uf->kvm->stat.generic.userfault_bitmap_pages;
	return 0;
}

void *kvm_userfault_get_chunk(struct kvm_userfault *uf, unsigned long index)
{
	void *chunk = kvm_userfault_chunk(uf, index);
	int r;

	if (chunk)
		return chunk;
	if (index > KVM_USERFAULT_MAX_CHUNK || kvm_userfault_is_closed(uf))
		return ERR_PTR(-EINVAL);

	r = kvm_userfault_add_chunk(uf, index);
	if (r)
		return ERR_PTR(r);

	chunk = xa_load(&uf->chunks, index);
	kvm_userfault_publish_chunk(uf, index, chunk);
	return chunk;
}

int kvm_userfault_reserve(struct kvm *kvm, gfn_t start, gfn_t end)
{
	struct kvm_userfault *uf = kvm_userfault_locked(kvm);
	struct kvm_userfault_span span;
	int r;

	/* Userfault may have been disabled since the attribute was validated. */
	if (!uf)
		return -EINVAL;

	for (; start < end; start += span.nr) {
		span = kvm_userfault_span(start, end);
		if (xa_load(&uf->chunks, span.index))
			continue;

		if (fatal_signal_pending(current))
			return -EINTR;

		r = kvm_userfault_add_chunk(uf, span.index);
		if (r)
			return r;

		cond_resched();
	}

	return 0;
}

static void kvm_userfault_unmap_window(struct kvm *kvm, gfn_t start, gfn_t end)
{
	struct kvm_gfn_range range = {
		.attr_filter = KVM_FILTER_SHARED | KVM_FILTER_PRIVATE,
		.may_block = true,
	};
	struct kvm_memslot_iter iter;
	bool flush = false;
	int i;

	KVM_MMU_LOCK(kvm);
	kvm_mmu_invalidate_start(kvm);
	kvm_mmu_invalidate_range_add(kvm, start, end);

	for (i = 0; i < kvm_arch_nr_memslot_as_ids(kvm); i++) {
		kvm_for_each_memslot_in_gfn_range(&iter, __kvm_memslots(kvm, i),
						  start, end) {
			range.slot = iter.slot;
			range.start = max(start, iter.slot->base_gfn);
			range.end = min(end, iter.slot->base_gfn + iter.slot->npages);
			if (range.start < range.end)
				flush |= kvm_unmap_gfn_range(kvm, &range);
		}
	}

	if (flush)
		kvm_flush_remote_tlbs(kvm);

	kvm_mmu_invalidate_end(kvm);
	KVM_MMU_UNLOCK(kvm);
}

/*
 * Unmap the gfns [@start, @end) from the guest, private or shared.  Go step by
 * step, as there may be no fault of the VM that can be resolved as long as there is
 * an invalidation.
 */
static void kvm_userfault_unmap(struct kvm *kvm, gfn_t start, gfn_t end)
{
	gfn_t next;

	for (; start < end; start = next) {
		next = min(ALIGN(start + 1, SZ_1G >> PAGE_SHIFT), end);
		kvm_userfault_unmap_window(kvm, start, next);
		cond_resched();
	}
}

void kvm_userfault_arm(struct kvm *kvm, gfn_t start, gfn_t end)
{
	struct kvm_userfault *uf = kvm_userfault_locked(kvm);
	struct kvm_userfault_span span;
	unsigned long *chunk;
	gfn_t gfn;

	lockdep_assert_held(&kvm->slots_lock);

	trace_kvm_userfault_arm(start, end);

	for (gfn = start; gfn < end; gfn += span.nr) {
		span = kvm_userfault_span(gfn, end);
		chunk = xa_load(&uf->chunks, span.index);
		kvm_userfault_write_span(chunk, &span, true);
		kvm_userfault_publish_chunk(uf, span.index, chunk);
		cond_resched();
	}

	/*
	 * Whoever reads the new mmu_invalidate_seq sees the bits.  Pairs with the
	 * smp_rmb() between reading the sequence and kvm_userfault_armed().
	 */
	smp_wmb();

	/* Also pages that are armed already: the bit alone unmaps nothing. */
	kvm_userfault_unmap(kvm, start, end);
}

/*
 * Clear the part of [@start, @end) that is in the first chunk there is, and
 * return where to go on.
 */
static gfn_t kvm_userfault_clear_chunk(struct kvm_userfault *uf, gfn_t start, gfn_t end)
{
	unsigned long index = start >> KVM_USERFAULT_CHUNK_SHIFT;
	struct kvm_userfault_span span;
	unsigned long *chunk;

	chunk = xa_find(&uf->chunks, &index, (end - 1) >> KVM_USERFAULT_CHUNK_SHIFT,
			XA_PRESENT);
	if (!chunk)
		return end;

	start = max(start, (gfn_t)index << KVM_USERFAULT_CHUNK_SHIFT);
	span = kvm_userfault_span(start, end);
	kvm_userfault_write_span(chunk, &span, false);

	return start + span.nr;
}

void kvm_userfault_clear_range(struct kvm_userfault *uf, gfn_t start, gfn_t end)
{
	might_sleep();

	trace_kvm_userfault_clear(start, end);

	/*
	 * The content of the pages, which somebody else may have written, is
	 * visible to all before any of the bits is seen clear.  Pairs with the
	 * acquire in kvm_userfault_test() and the smp_rmb() in
	 * __kvm_userfault_nr_clear().
	 */
	smp_mb();

	while (start < end) {
		start = kvm_userfault_clear_chunk(uf, start, end);
		cond_resched();
	}
}

void kvm_userfault_clear(struct kvm *kvm, gfn_t start, gfn_t end)
{
	struct kvm_userfault *uf __free(kvm_userfault_put) = kvm_userfault_get(kvm);

	if (!uf)
		return;

	kvm_userfault_clear_range(uf, start, end);
	kvm_userfault_wake(uf, start, end, 0);
}

/* The vCPU needs @gfn, which is armed: let KVM_RUN end.  Returns -EFAULT. */
int kvm_userfault_prepare_exit(struct kvm_vcpu *vcpu, gfn_t gfn, bool is_write,
			       bool is_exec, bool is_private)
{
	u64 access = is_write ? KVM_MEMORY_EXIT_FLAG_WRITE :
		     is_exec  ? KVM_MEMORY_EXIT_FLAG_EXEC :
				KVM_MEMORY_EXIT_FLAG_READ;

	/* A failure that KVM_RUN has to report goes first. */
	if (vcpu->userfault_error)
		return -EFAULT;

	/* What else there is has never been anything but zero. */
	vcpu->userfault.gpa = gfn_to_gpa(gfn);
	vcpu->userfault.size = PAGE_SIZE;
	vcpu->userfault.flags = KVM_MEMORY_EXIT_FLAG_USERFAULT | access |
				(is_private ? KVM_MEMORY_EXIT_FLAG_PRIVATE : 0);
	vcpu->userfault.vcpu_id = vcpu->vcpu_id;
	vcpu->userfault.as_id = kvm_arch_vcpu_memslots_id(vcpu);
	return -EFAULT;
}

static void kvm_userfault_free(struct kvm_userfault *uf)
{
	unsigned long index;
	void *chunk;

	xa_for_each(&uf->chunks, index, chunk) {
		free_page((unsigned long)chunk);
		cond_resched();
	}

	xa_destroy(&uf->chunks);
	if (uf->eventfd)
		eventfd_ctx_put(uf->eventfd);
	kvfree(uf);
}

void kvm_userfault_put(struct kvm_userfault *uf)
{
	if (uf && refcount_dec_and_test(&uf->refs))
		kvm_userfault_free(uf);
}

static struct kvm_userfault *kvm_userfault_alloc(struct kvm *kvm, u64 flags)
{
	struct kvm_userfault *uf = kvzalloc_obj(*uf, GFP_KERNEL_ACCOUNT);

	if (!uf)
		return NULL;

	refcount_set(&uf->refs, 1);
	xa_init_flags(&uf->chunks, XA_FLAGS_ACCOUNT);
	kvm_userfault_init_queue(uf);
	uf->flags = flags;
	uf->kvm = kvm;
	return uf;
}

static int kvm_userfault_get_eventfd(struct kvm_userfault *uf, u64 fd)
{
	struct eventfd_ctx *eventfd;

	if (!(uf->flags & KVM_USERFAULT_EVENTFD))
		return 0;
	if (fd > INT_MAX)
		return -EBADF;

	eventfd = eventfd_ctx_fdget(fd);
	if (IS_ERR(eventfd))
		return PTR_ERR(eventfd);

	uf->eventfd = eventfd;
	return 0;
}

static int kvm_userfault_enable(struct kvm *kvm, u64 flags, u64 eventfd)
{
	struct kvm_userfault *uf;
	int r;

	guard(mutex)(&kvm->slots_lock);

	if (kvm_userfault_enabled(kvm))
		return -EEXIST;

	uf = kvm_userfault_alloc(kvm, flags);
	if (!uf)
		return -ENOMEM;

	r = kvm_userfault_get_eventfd(uf, eventfd);
	if (r) {
		kvm_userfault_put(uf);
		return r;
	}

	rcu_assign_pointer(kvm->userfault, uf);

	/*
	 * Wait for vCPUs that have found userfault disabled, and may be about to
	 * allocate a page in a guest_memfd: it must not appear after userspace has
	 * armed it and made sure that it isn't there.  Pairs with kvm->srcu being
	 * held by callers of kvm_gmem_get_pfn().
	 */
	synchronize_srcu_expedited(&kvm->srcu);
	return 0;
}

/*
 * Let the guest have the huge mappings that armed pages stood in the way of, in
 * the part of @slot where pages may have been armed at any time.
 */
static void kvm_userfault_recover_slot(struct kvm *kvm, struct kvm_userfault *uf,
				       const struct kvm_memory_slot *slot)
{
	gfn_t start = slot->base_gfn, end = start + slot->npages;
	unsigned long last = (end - 1) >> KVM_USERFAULT_CHUNK_SHIFT;
	unsigned long index = start >> KVM_USERFAULT_CHUNK_SHIFT;

	if (!xa_find(&uf->chunks, &index, last, XA_PRESENT))
		return;

	start = max(start, (gfn_t)index << KVM_USERFAULT_CHUNK_SHIFT);
	while (xa_find_after(&uf->chunks, &index, last, XA_PRESENT))
		;
	end = min(end, (gfn_t)(index + 1) << KVM_USERFAULT_CHUNK_SHIFT);

	kvm_arch_userfault_recover(kvm, slot, start, end);
}

static void kvm_userfault_recover(struct kvm *kvm, struct kvm_userfault *uf)
{
	struct kvm_memory_slot *slot;
	int bkt, i;

	lockdep_assert_held(&kvm->slots_lock);

	for (i = 0; i < kvm_arch_nr_memslot_as_ids(kvm); i++) {
		kvm_for_each_memslot(slot, bkt, __kvm_memslots(kvm, i)) {
			kvm_userfault_recover_slot(kvm, uf, slot);
			cond_resched();
		}
	}
}

/* Take @uf away from @kvm, unless somebody else has done that. */
static bool kvm_userfault_detach(struct kvm *kvm, struct kvm_userfault *uf)
{
	guard(mutex)(&kvm->slots_lock);

	if (kvm_userfault_locked(kvm) != uf)
		return false;

	/*
	 * As in kvm_userfault_clear_range(), the content of the pages comes first.
	 * Pairs with the acquire in kvm_userfault_enabled() and kvm_userfault_rcu().
	 */
	smp_mb();
	rcu_assign_pointer(kvm->userfault, NULL);
	kvm->stat.generic.userfault_bitmap_pages = 0;

	/*
	 * Wait for who chose a small mapping because of a bit, and has not
	 * installed it yet.  Architectures that choose it without holding
	 * mmu_lock have to invalidate what they recover.
	 */
	KVM_MMU_LOCK(kvm);
	KVM_MMU_UNLOCK(kvm);

	kvm_userfault_recover(kvm, uf);
	return true;
}

static void kvm_userfault_disable(struct kvm *kvm)
{
	struct kvm_userfault *uf __free(kvm_userfault_put) = kvm_userfault_get(kvm);

	if (!uf)
		return;

	/*
	 * First of all let go the accesses that wait.  A memslot update may wait
	 * for them, with slots_lock held.
	 */
	kvm_userfault_close_queue(uf);

	if (!kvm_userfault_detach(kvm, uf))
		return;

	/* Others may have looked up the state, to get a reference or read bits. */
	synchronize_rcu();
	kvm_userfault_put(uf);
}

u64 kvm_userfault_supported_flags(struct kvm *kvm)
{
	if (!kvm_arch_supports_userfault(kvm))
		return 0;

	return KVM_USERFAULT_ENABLE | KVM_USERFAULT_DISABLE | KVM_USERFAULT_ASYNC |
	       KVM_USERFAULT_ASYNC_VCPU | KVM_USERFAULT_EVENTFD;
}

static bool kvm_userfault_valid_flags(u64 flags)
{
	if (flags & (KVM_USERFAULT_ASYNC_VCPU | KVM_USERFAULT_EVENTFD))
		return flags & KVM_USERFAULT_ASYNC;

	return true;
}

int kvm_userfault_enable_cap(struct kvm *kvm, const struct kvm_enable_cap *cap)
{
	u64 flags = cap->args[0];

	if (cap->flags || cap->args[2] || cap->args[3])
		return -EINVAL;
	if (cap->args[1] && !(flags & KVM_USERFAULT_EVENTFD))
		return -EINVAL;
	if (flags & ~kvm_userfault_supported_flags(kvm))
		return -EINVAL;

	if (flags == KVM_USERFAULT_DISABLE) {
		kvm_userfault_disable(kvm);
		return 0;
	}

	if (!(flags & KVM_USERFAULT_ENABLE) || (flags & KVM_USERFAULT_DISABLE) ||
	    !kvm_userfault_valid_flags(flags))
		return -EINVAL;

	return kvm_userfault_enable(kvm, flags, cap->args[1]);
}

/*
 * The last reference to the VM is gone, or its process is.  Freeing its vCPUs may
 * access guest memory, e.g. to leave a nested guest, and nobody is left to resolve
 * what would wait.
 */
void kvm_userfault_close(struct kvm *kvm)
{
	struct kvm_userfault *uf = rcu_dereference_protected(kvm->userfault, true);

	if (uf)
		kvm_userfault_close_queue(uf);
}

/* The VM is gone: no vCPU, no device and no file refers to it any more. */
void kvm_userfault_destroy(struct kvm *kvm)
{
	struct kvm_userfault *uf = rcu_dereference_protected(kvm->userfault, true);

	if (uf)
		kvm_userfault_put(uf);
}
