// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM Userfault: accesses that wait for a page, and the queue through which
 * userspace learns of them.
 *
 * An access that waits is a waiter on the stack of its thread.  It is in two
 * places:
 *
 *  - in a bucket, found by its gfn, for whoever resolves the page
 *  - with its record in the queue, for whoever reads it: first among the pending
 *    records, then, once it has been read, among those delivered to its reader
 *
 * There are thus as many records as there are threads that wait; several of them
 * may be for the same page.  A waiter that is woken leaves both places.  If its
 * page is (still or again) armed then, it gets in line again with a new record.
 *
 * A pager is a userfault file.  Accesses that wait fail when there is no pager any
 * more.  When there has never been one, they wait for who uses the VM's ioctl.
 *
 * Locking: uf->lock protects the records, the lock of the bucket the waiters in
 * it.  The latter is the outer lock.  A waiter goes off its stack only after it
 * took the lock of its bucket: whoever holds that can use the waiters in it.
 * A reader copies a record under uf->lock.  If it fails to pass on the copy, it
 * looks for the record by its id, as the waiter may be gone.
 *
 * Ordering: a waiter is added to its bucket before it tests the bit of its page,
 * and whoever clears the bit does so before looking for waiters.  The full
 * barriers in kvm_userfault_sleep() and kvm_userfault_wake() make sure that one of
 * the two sees the other.
 */
#include <linux/eventfd.h>
#include <linux/hash.h>
#include <linux/kvm_host.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include <trace/events/kvm.h>

#include "userfault.h"

/* Without padding, and thus the same for 32-bit userspace. */
static_assert(sizeof(struct kvm_userfault_event) == 64);

struct kvm_userfault_waiter {
	/* In the bucket.  Empty once the waiter is woken.  Under the bucket's lock. */
	struct list_head node;

	/* Under the bucket's lock.  @woken is read without it, too. */
	bool woken;
	int error;

	/* In uf->pending or, if @reader is not NULL, reader->delivered.  Under uf->lock. */
	struct list_head record;
	struct kvm_userfault_reader *reader;

	/* Constant, but for the id, which is assigned under uf->lock. */
	struct kvm_userfault_event event;
	struct task_struct *task;
};

static gfn_t kvm_userfault_waiter_gfn(const struct kvm_userfault_waiter *waiter)
{
	return gpa_to_gfn(waiter->event.gpa);
}

static struct kvm_userfault_bucket *kvm_userfault_bucket(struct kvm_userfault *uf,
							 gfn_t gfn)
{
	return &uf->buckets[hash_64(gfn, KVM_USERFAULT_BUCKETS_SHIFT)];
}

/* Readers that sleep do so exclusively: wake one for each of @nr records. */
static void kvm_userfault_wake_readers(struct kvm_userfault *uf, unsigned int nr)
{
	if (nr)
		__wake_up(&uf->wqh, TASK_NORMAL, nr,
			  poll_to_key(EPOLLIN | EPOLLRDNORM));
}

/* Tell readers about @nr records that became pending. */
static void kvm_userfault_notify(struct kvm_userfault *uf, unsigned int nr)
{
	kvm_userfault_wake_readers(uf, nr);

	for (; uf->eventfd && nr; nr--)
		eventfd_signal(uf->eventfd);
}

/*
 * Make the record of @waiter pending, unless there were pagers and none is left to
 * fill the page.  Once userfault is being disabled none is needed, as nobody will
 * sleep.
 */
static int kvm_userfault_add_record(struct kvm_userfault *uf,
				    struct kvm_userfault_waiter *waiter)
{
	guard(spinlock_irqsave)(&uf->lock);

	if (kvm_userfault_is_closed(uf))
		return 0;
	/* The last pager may have cleared the page before it went. */
	if (uf->orphaned)
		return kvm_userfault_test(uf, kvm_userfault_waiter_gfn(waiter)) ?
		       -EFAULT : 0;

	waiter->event.id = ++uf->last_id;
	list_add_tail(&waiter->record, &uf->pending);
	++uf->nr_pending;
	++uf->nr_waiting;
	++uf->kvm->stat.generic.userfault_records;
	return 0;
}

static void kvm_userfault_del_record(struct kvm_userfault *uf,
				     struct kvm_userfault_waiter *waiter)
{
	guard(spinlock_irqsave)(&uf->lock);

	if (list_empty(&waiter->record))
		return;

	list_del_init(&waiter->record);
	--uf->nr_waiting;
	if (waiter->reader)
		--waiter->reader->nr_delivered;
	else
		--uf->nr_pending;
}

static void kvm_userfault_add_waiter(struct kvm_userfault *uf,
				     struct kvm_userfault_waiter *waiter)
{
	struct kvm_userfault_bucket *bucket;

	bucket = kvm_userfault_bucket(uf, kvm_userfault_waiter_gfn(waiter));

	atomic_inc(&uf->nr_waiters);

	guard(spinlock_irqsave)(&bucket->lock);
	list_add_tail(&waiter->node, &bucket->waiters);
}

/* Nobody uses @waiter any more when this returns. */
static void kvm_userfault_del_waiter(struct kvm_userfault *uf,
				     struct kvm_userfault_waiter *waiter)
{
	struct kvm_userfault_bucket *bucket;

	bucket = kvm_userfault_bucket(uf, kvm_userfault_waiter_gfn(waiter));

	scoped_guard(spinlock_irqsave, &bucket->lock) {
		list_del_init(&waiter->node);
		kvm_userfault_del_record(uf, waiter);
	}

	atomic_dec(&uf->nr_waiters);
}

static void kvm_userfault_wake_waiter(struct kvm_userfault *uf,
				      struct kvm_userfault_bucket *bucket,
				      struct kvm_userfault_waiter *waiter, int error)
{
	lockdep_assert_held(&bucket->lock);

	list_del_init(&waiter->node);
	kvm_userfault_del_record(uf, waiter);

	waiter->error = error;
	WRITE_ONCE(waiter->woken, true);
	wake_up_process(waiter->task);
}

static void kvm_userfault_wake_bucket(struct kvm_userfault *uf,
				      struct kvm_userfault_bucket *bucket,
				      gfn_t start, gfn_t end, int error)
{
	struct kvm_userfault_waiter *waiter, *tmp;

	guard(spinlock_irqsave)(&bucket->lock);

	list_for_each_entry_safe(waiter, tmp, &bucket->waiters, node) {
		gfn_t gfn = kvm_userfault_waiter_gfn(waiter);

		if (gfn >= start && gfn < end)
			kvm_userfault_wake_waiter(uf, bucket, waiter, error);
	}
}

/*
 * Let the accesses to the gfns [@start, @end) that wait look at the bitmap again
 * or, if @error is not 0, fail.
 */
void kvm_userfault_wake(struct kvm_userfault *uf, gfn_t start, gfn_t end, int error)
{
	gfn_t gfn;
	int i;

	/*
	 * Look for waiters only after the bits are clear, or what else lets an
	 * access go on is visible.  Pairs with kvm_userfault_sleep().
	 */
	smp_mb();

	if (!atomic_read(&uf->nr_waiters))
		return;

	trace_kvm_userfault_wake(start, end, error);

	if (end - start < KVM_USERFAULT_NR_BUCKETS) {
		for (gfn = start; gfn < end; gfn++)
			kvm_userfault_wake_bucket(uf, kvm_userfault_bucket(uf, gfn),
						  gfn, gfn + 1, error);
		return;
	}

	for (i = 0; i < KVM_USERFAULT_NR_BUCKETS; i++)
		kvm_userfault_wake_bucket(uf, &uf->buckets[i], start, end, error);
}

static void kvm_userfault_wake_all(struct kvm_userfault *uf, int error)
{
	kvm_userfault_wake(uf, 0, ~0ULL, error);
}

/* Sleep until @waiter is woken, its page is clear, or there is a signal. */
static int kvm_userfault_sleep(struct kvm_userfault *uf,
			       struct kvm_userfault_waiter *waiter,
			       unsigned int state)
{
	gfn_t gfn = kvm_userfault_waiter_gfn(waiter);
	int r = 0;

	for (;;) {
		/*
		 * A full barrier: test the bit only after the waiter can be
		 * found.  Pairs with the one in kvm_userfault_wake().
		 */
		set_current_state(state);
		if (READ_ONCE(waiter->woken) || !kvm_userfault_test(uf, gfn))
			break;

		if (signal_pending_state(state, current)) {
			r = -EINTR;
			break;
		}

		schedule();
	}

	__set_current_state(TASK_RUNNING);
	return r;
}

/* Queue the access that @event describes, and wait until somebody wakes it. */
static int kvm_userfault_wait_once(struct kvm_userfault *uf,
				   const struct kvm_userfault_event *event,
				   unsigned int state)
{
	struct kvm_userfault_waiter waiter = {
		.node = LIST_HEAD_INIT(waiter.node),
		.record = LIST_HEAD_INIT(waiter.record),
		.event = *event,
		.task = current,
	};
	int r;

	kvm_userfault_add_waiter(uf, &waiter);

	/* Without a record don't sleep, but look at the bit again. */
	r = kvm_userfault_add_record(uf, &waiter);
	if (waiter.event.id) {
		trace_kvm_userfault_wait(waiter.event.id, waiter.event.vcpu_id,
					 waiter.event.gpa, waiter.event.flags);
		kvm_userfault_notify(uf, 1);
		r = kvm_userfault_sleep(uf, &waiter, state);
	}

	kvm_userfault_del_waiter(uf, &waiter);

	return r ?: waiter.error;
}

/*
 * Wait until the page that @event describes is clear.  Fails with -EINTR if there
 * is a signal that matters in @state, or with what the resolver says.
 */
static int kvm_userfault_wait(struct kvm_userfault *uf,
			      const struct kvm_userfault_event *event,
			      unsigned int state)
{
	int r = 0;

	while (!r && kvm_userfault_test(uf, gpa_to_gfn(event->gpa)))
		r = kvm_userfault_wait_once(uf, event, state);

	return r;
}

/* Is the record at @pos older than that of @waiter? */
static bool kvm_userfault_older(const struct list_head *pos,
				const struct kvm_userfault_waiter *waiter)
{
	return list_entry(pos, struct kvm_userfault_waiter, record)->event.id <
	       waiter->event.id;
}

/*
 * Add the record of @waiter to those of @reader.  It goes to the end, unless others
 * have taken it back in the meantime: the list stays sorted.
 */
static void kvm_userfault_deliver(struct kvm_userfault_reader *reader,
				  struct kvm_userfault_waiter *waiter)
{
	struct list_head *pos = reader->delivered.prev;

	while (pos != &reader->delivered && !kvm_userfault_older(pos, waiter))
		pos = pos->prev;

	list_move(&waiter->record, pos);
	waiter->reader = reader;
}

/*
 * Hand the oldest pending record to @reader, and copy it to @event.  Returns false
 * if there is none.
 */
bool kvm_userfault_take_record(struct kvm_userfault *uf,
			       struct kvm_userfault_reader *reader,
			       struct kvm_userfault_event *event)
{
	struct kvm_userfault_waiter *waiter;

	guard(spinlock_irqsave)(&uf->lock);

	waiter = list_first_entry_or_null(&uf->pending, struct kvm_userfault_waiter,
					  record);
	if (!waiter)
		return false;

	kvm_userfault_deliver(reader, waiter);
	--uf->nr_pending;
	++reader->nr_delivered;
	*event = waiter->event;
	return true;
}

/*
 * Make the records of @reader pending again, all of them or only that with the
 * given @id.  A record that isn't there any more has been resolved, or its access
 * was given up.  Returns the number of records.
 */
static unsigned int kvm_userfault_take_back(struct kvm_userfault *uf,
					    struct kvm_userfault_reader *reader, u64 id)
{
	struct list_head *pos = uf->pending.next;
	struct kvm_userfault_waiter *waiter, *tmp;
	unsigned int nr = 0;

	lockdep_assert_held(&uf->lock);

	/* Both lists are sorted: merge them in one go. */
	list_for_each_entry_safe(waiter, tmp, &reader->delivered, record) {
		if (id && waiter->event.id != id)
			continue;

		while (pos != &uf->pending && kvm_userfault_older(pos, waiter))
			pos = pos->next;

		list_move_tail(&waiter->record, pos);
		waiter->reader = NULL;
		--reader->nr_delivered;
		++uf->nr_pending;
		++nr;
	}

	return nr;
}

/* @reader failed to pass on the record @id: let it be read again. */
void kvm_userfault_return_record(struct kvm_userfault *uf,
				 struct kvm_userfault_reader *reader, u64 id)
{
	unsigned int nr;

	scoped_guard(spinlock_irqsave, &uf->lock)
		nr = kvm_userfault_take_back(uf, reader, id);

	kvm_userfault_notify(uf, nr);
}

static bool kvm_userfault_is_async(struct kvm_userfault *uf)
{
	return uf->flags & KVM_USERFAULT_ASYNC;
}

/* Accesses through memslots that userspace created can be intercepted. */
static bool kvm_userfault_is_user_slot(const struct kvm_memory_slot *slot)
{
	return slot && slot->id < KVM_USER_MEM_SLOTS;
}

/*
 * Is @gfn armed, and are accesses by KVM itself intercepted?  If so, -EFAULT, as
 * for a bad hva: all that an access which can't sleep may do is to fail.
 */
int __kvm_userfault_access_atomic(struct kvm *kvm,
				  const struct kvm_memory_slot *slot, gfn_t gfn)
{
	struct kvm_userfault *uf;

	guard(rcu)();

	uf = kvm_userfault_rcu(kvm);
	if (!uf || !kvm_userfault_is_async(uf) || !kvm_userfault_is_user_slot(slot))
		return 0;

	return kvm_userfault_test(uf, gfn) ? -EFAULT : 0;
}

/*
 * An access that KVM did for @vcpu has failed.  Whatever the code that did it makes
 * of that, the vCPU must not go on: let KVM_RUN fail before the guest is entered
 * the next time, for the first of such accesses, as others may be its consequences.
 */
static void kvm_userfault_fail_run(struct kvm_vcpu *vcpu,
				   const struct kvm_userfault_event *event, int error)
{
	lockdep_assert_held(&vcpu->mutex);

	if (vcpu->userfault_error)
		return;

	vcpu->userfault = *event;
	vcpu->userfault.flags |= KVM_MEMORY_EXIT_FLAG_FAILED;
	vcpu->userfault_error = error;
	kvm_make_request(KVM_REQ_USERFAULT_FAILED, vcpu);
}

static int kvm_userfault_wait_access(struct kvm *kvm,
				     const struct kvm_memory_slot *slot, gfn_t gfn,
				     bool is_write)
{
	struct kvm_userfault *uf __free(kvm_userfault_put) = kvm_userfault_get(kvm);
	struct kvm_vcpu *vcpu = kvm_get_running_vcpu();
	struct kvm_userfault_event event = {
		.gpa = gfn_to_gpa(gfn),
		.size = PAGE_SIZE,
		.flags = KVM_MEMORY_EXIT_FLAG_USERFAULT |
			 (is_write ? KVM_MEMORY_EXIT_FLAG_WRITE :
				     KVM_MEMORY_EXIT_FLAG_READ),
		.vcpu_id = vcpu ? vcpu->vcpu_id : ~0u,
		.as_id = slot->as_id,
	};
	int r;

	/* Userfault may have been disabled, and enabled anew without ASYNC. */
	if (!uf || !kvm_userfault_is_async(uf))
		return 0;

	if (kvm_mem_is_private(kvm, gfn))
		event.flags |= KVM_MEMORY_EXIT_FLAG_PRIVATE;
	if (vcpu)
		++vcpu->stat.generic.userfault_waits;

	r = kvm_userfault_wait(uf, &event, TASK_KILLABLE);
	if (r && r != -EINTR && vcpu)
		kvm_userfault_fail_run(vcpu, &event, r);

	return r;
}

/*
 * KVM itself accesses @gfn through @slot: wait until the page has its content.
 * Whoever fills the page must not depend on any lock that is held here, which
 * includes those that are waited for in turn: a memslot update that waits for the
 * caller's kvm->srcu holds slots_lock.
 *
 * A kernel thread must not wait: nothing could end that but userspace, which may
 * be gone, and others wait for the work that it does.  It gets -EAGAIN, and should
 * have somebody else do the access.
 */
int __kvm_userfault_access(struct kvm *kvm, const struct kvm_memory_slot *slot,
			   gfn_t gfn, bool is_write)
{
	int r = __kvm_userfault_access_atomic(kvm, slot, gfn);

	/* As a page fault would fail here. */
	if (faulthandler_disabled())
		return r;

	might_sleep();
	lockdep_assert_not_held(&kvm->mmu_lock);
	lockdep_assert_not_held(&kvm->slots_lock);

	if (!r)
		return 0;
	if (current->flags & PF_KTHREAD)
		return -EAGAIN;

	return kvm_userfault_wait_access(kvm, slot, gfn, is_write);
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(__kvm_userfault_access);

bool __kvm_vcpu_userfault_exit(struct kvm_vcpu *vcpu, gfn_t gfn, bool is_write)
{
	struct kvm_memory_slot *slot = kvm_vcpu_gfn_to_memslot(vcpu, gfn);

	if (!__kvm_userfault_access_atomic(vcpu->kvm, slot, gfn))
		return false;

	kvm_userfault_prepare_exit(vcpu, gfn, is_write, false,
				   kvm_mem_is_private(vcpu->kvm, gfn));
	return true;
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(__kvm_vcpu_userfault_exit);

static int kvm_userfault_interrupt(struct kvm_vcpu *vcpu)
{
	vcpu->run->exit_reason = KVM_EXIT_INTR;
	return -EINTR;
}

static int kvm_userfault_wait_vcpu(struct kvm_userfault *uf, struct kvm_vcpu *vcpu,
				   const struct kvm_userfault_event *event)
{
	int r;

	lockdep_assert_held(&vcpu->mutex);

	if (READ_ONCE(vcpu->run->immediate_exit__unsafe))
		return kvm_userfault_interrupt(vcpu);

	++vcpu->stat.generic.userfault_waits;
	kvm_sigset_activate(vcpu);
	r = kvm_userfault_wait(uf, event, TASK_INTERRUPTIBLE);
	kvm_sigset_deactivate(vcpu);

	return r == -EINTR ? kvm_userfault_interrupt(vcpu) : r;
}

/*
 * Where userspace is the interrupt controller, vcpu->run has news for it when KVM_RUN
 * would return, e.g. of the line of a timer, and the vCPU relies on these being looked
 * at.
 */
static int kvm_userfault_end_wait(struct kvm_vcpu *vcpu)
{
	if (kvm_arch_irqchip_in_kernel(vcpu->kvm))
		return 0;

	return kvm_userfault_interrupt(vcpu);
}

/* Tell userspace why KVM_RUN fails. */
static void kvm_userfault_exit(struct kvm_vcpu *vcpu,
			       const struct kvm_userfault_event *event)
{
	kvm_prepare_memory_fault_exit(vcpu, event->gpa, event->size, false, false, false);
	vcpu->run->memory_fault.flags = event->flags;

	++vcpu->stat.generic.userfault_exits;
	trace_kvm_userfault_exit(vcpu->vcpu_id, gpa_to_gfn(event->gpa), event->flags);
}

static bool kvm_userfault_is_async_vcpu(struct kvm_userfault *uf)
{
	return uf->flags & KVM_USERFAULT_ASYNC_VCPU;
}

static bool kvm_userfault_vcpus_exit(struct kvm *kvm)
{
	struct kvm_userfault *uf;

	guard(rcu)();

	uf = kvm_userfault_rcu(kvm);
	return uf && !kvm_userfault_is_async_vcpu(uf);
}

/* Wait for the page that vcpu->userfault is about, if that is what vCPUs do. */
static int kvm_userfault_wait_or_exit(struct kvm_vcpu *vcpu)
{
	struct kvm_userfault *uf __free(kvm_userfault_put) = NULL;
	int r = 0;

	/* To exit takes no reference, which all vCPUs would contend for. */
	if (kvm_userfault_vcpus_exit(vcpu->kvm))
		return -EFAULT;

	/*
	 * If userfault has been disabled no page is armed: run the vCPU again.  It
	 * finds out by itself if userfault has been enabled anew, for vCPUs to exit.
	 */
	uf = kvm_userfault_get(vcpu->kvm);
	if (uf && kvm_userfault_is_async_vcpu(uf))
		r = kvm_userfault_wait_vcpu(uf, vcpu, &vcpu->userfault);

	return r ?: kvm_userfault_end_wait(vcpu);
}

/* Forget what vcpu->userfault says, as it has been reported. */
static void kvm_userfault_forget(struct kvm_vcpu *vcpu)
{
	vcpu->userfault.size = 0;
	vcpu->userfault_error = 0;
	kvm_clear_request(KVM_REQ_USERFAULT_FAILED, vcpu);
}

/* KVM_RUN has reported it.  Other ioctls may not even look at what they access. */
void __kvm_userfault_end_ioctl(struct kvm_vcpu *vcpu, int *r)
{
	if (*r >= 0 && vcpu->userfault_error)
		*r = vcpu->userfault_error;

	kvm_userfault_forget(vcpu);
}

/*
 * An access by the vCPU makes it fail with -EFAULT, and is done again when the vCPU
 * is run again.  An access that KVM did for it, and that failed, may have ended in
 * anything: it replaces what KVM_RUN would have returned for.
 *
 * The vCPU holds neither kvm->srcu nor any other lock but its mutex.  If it does
 * not get to the end of the wait, it finds the page armed when it is run again.
 */
bool __kvm_userfault_run_again(struct kvm_vcpu *vcpu, int *r)
{
	bool again = false;

	/* It isn't going to be completed either. */
	if (vcpu->userfault_error)
		kvm_arch_userfault_cancel_io(vcpu);

	if (vcpu->userfault_error || *r == -EFAULT) {
		*r = vcpu->userfault_error ?: kvm_userfault_wait_or_exit(vcpu);
		again = !*r;
		if (*r && *r != -EINTR)
			kvm_userfault_exit(vcpu, &vcpu->userfault);
	}

	kvm_userfault_forget(vcpu);
	return again;
}

bool kvm_userfault_readable(struct kvm_userfault *uf)
{
	guard(spinlock_irqsave)(&uf->lock);

	return uf->nr_pending || kvm_userfault_is_closed(uf);
}

static void kvm_userfault_init_reader(struct kvm_userfault_reader *reader)
{
	INIT_LIST_HEAD(&reader->delivered);
	reader->nr_delivered = 0;
}

void kvm_userfault_init_queue(struct kvm_userfault *uf)
{
	int i;

	spin_lock_init(&uf->lock);
	init_waitqueue_head(&uf->wqh);
	INIT_LIST_HEAD(&uf->pending);
	kvm_userfault_init_reader(&uf->vm_reader);

	for (i = 0; i < KVM_USERFAULT_NR_BUCKETS; i++) {
		spin_lock_init(&uf->buckets[i].lock);
		INIT_LIST_HEAD(&uf->buckets[i].waiters);
	}
}

void kvm_userfault_add_pager(struct kvm_userfault *uf,
			     struct kvm_userfault_reader *reader)
{
	kvm_userfault_init_reader(reader);

	guard(spinlock_irqsave)(&uf->lock);

	++uf->nr_pagers;
	uf->orphaned = false;
}

/*
 * The pager that is @reader is gone.  What it has read and not resolved is for
 * others to read.  After the last one all accesses try to get in line again, which
 * fails unless there is a new pager.
 */
void kvm_userfault_del_pager(struct kvm_userfault *uf,
			     struct kvm_userfault_reader *reader)
{
	unsigned int nr, nr_older;
	bool orphaned;

	scoped_guard(spinlock_irqsave, &uf->lock) {
		nr_older = uf->nr_pending;
		nr = kvm_userfault_take_back(uf, reader, 0);
		orphaned = !--uf->nr_pagers;
		uf->orphaned = orphaned;
	}

	if (orphaned) {
		kvm_userfault_wake_all(uf, 0);
		return;
	}

	kvm_userfault_notify(uf, nr);

	/* It may have been woken for others, and gone without reading them. */
	kvm_userfault_wake_readers(uf, nr_older);
}

/*
 * Userfault is being disabled, or the VM is gone: no access waits from here on,
 * and whoever reads finds the end.
 */
void kvm_userfault_close_queue(struct kvm_userfault *uf)
{
	scoped_guard(spinlock_irqsave, &uf->lock) {
		/*
		 * As when a bit is cleared, the content of the pages comes first.
		 * Pairs with the acquire in kvm_userfault_is_closed().
		 */
		smp_store_release(&uf->kvm, NULL);
	}

	kvm_userfault_wake_all(uf, 0);
	__wake_up(&uf->wqh, TASK_NORMAL, 0, poll_to_key(EPOLLHUP));
}

/* KVM_READ_USERFAULT */
int kvm_userfault_read(struct kvm *kvm, struct kvm_userfault_event __user *uevent)
{
	struct kvm_userfault *uf __free(kvm_userfault_put) = kvm_userfault_get(kvm);
	struct kvm_userfault_event event;

	if (!uf)
		return -EINVAL;

	if (!kvm_userfault_take_record(uf, &uf->vm_reader, &event))
		return -ENOENT;

	if (copy_to_user(uevent, &event, sizeof(event))) {
		kvm_userfault_return_record(uf, &uf->vm_reader, event.id);
		return -EFAULT;
	}

	return 0;
}
