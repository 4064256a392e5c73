// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM Userfault: the userfault file, by which a process that need not be the VMM
 * reads the accesses that wait for a page, sees the bitmap, and resolves pages.
 *
 * A file refers to the userfault state, and not to the VM, which neither an open
 * file nor a mapping of the bitmap keeps alive.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>
#include <linux/uio.h>

#include "userfault.h"

/* Without padding, and thus the same for 32-bit userspace. */
static_assert(sizeof(struct kvm_create_userfault_fd) == 64);
static_assert(sizeof(struct kvm_userfault_resolve) == 64);

struct kvm_userfault_file {
	struct kvm_userfault *uf;
	struct kvm_userfault_reader reader;
};

/* Pass on one record.  Returns 0 if there is none. */
static ssize_t kvm_userfault_file_read_one(struct kvm_userfault_file *uff,
					   struct iov_iter *to)
{
	struct kvm_userfault_event event;
	size_t copied;

	if (!kvm_userfault_take_record(uff->uf, &uff->reader, &event))
		return 0;

	copied = copy_to_iter(&event, sizeof(event), to);
	if (copied == sizeof(event))
		return copied;

	iov_iter_revert(to, copied);
	kvm_userfault_return_record(uff->uf, &uff->reader, event.id);
	return -EFAULT;
}

/* Pass on as many records as there are, and fit. */
static ssize_t kvm_userfault_file_read_many(struct kvm_userfault_file *uff,
					    struct iov_iter *to)
{
	ssize_t total = 0, r;

	while (iov_iter_count(to) >= sizeof(struct kvm_userfault_event)) {
		r = kvm_userfault_file_read_one(uff, to);
		if (r <= 0)
			return total ?: r;

		total += r;
		cond_resched();
	}

	return total;
}

static ssize_t kvm_userfault_file_read(struct kiocb *iocb, struct iov_iter *to)
{
	struct kvm_userfault_file *uff = iocb->ki_filp->private_data;
	struct kvm_userfault *uf = uff->uf;
	ssize_t r;

	if (iov_iter_count(to) < sizeof(struct kvm_userfault_event))
		return -EINVAL;

	for (;;) {
		r = kvm_userfault_file_read_many(uff, to);
		if (r || kvm_userfault_is_closed(uf))
			return r;

		if ((iocb->ki_filp->f_flags & O_NONBLOCK) ||
		    (iocb->ki_flags & IOCB_NOWAIT))
			return -EAGAIN;

		r = wait_event_interruptible_exclusive(uf->wqh,
						       kvm_userfault_readable(uf));
		if (r)
			return r;
	}
}

static __poll_t kvm_userfault_file_poll(struct file *file, poll_table *wait)
{
	struct kvm_userfault_file *uff = file->private_data;
	struct kvm_userfault *uf = uff->uf;

	/* Who adds a record wakes afterwards, and takes the lock to do so. */
	poll_wait(file, &uf->wqh, wait);

	if (kvm_userfault_is_closed(uf))
		return EPOLLHUP;

	return kvm_userfault_readable(uf) ? EPOLLIN | EPOLLRDNORM : 0;
}

static int kvm_userfault_check_resolve(const struct kvm_userfault_resolve *resolve)
{
	u32 flags = resolve->flags;

	if (memchr_inv(resolve->reserved, 0, sizeof(resolve->reserved)))
		return -EINVAL;
	if (!resolve->size || resolve->gpa + resolve->size < resolve->gpa)
		return -EINVAL;
	if (!PAGE_ALIGNED(resolve->gpa) || !PAGE_ALIGNED(resolve->size))
		return -EINVAL;
	if (flags & ~(KVM_USERFAULT_CLEAR_ONLY | KVM_USERFAULT_WAKE_ONLY))
		return -EINVAL;

	/* Clear, wake or fail: both of the first two are what no flag means. */
	if (hweight32(flags) + !!resolve->error > 1)
		return -EINVAL;
	if (resolve->error && resolve->error != EFAULT && resolve->error != EHWPOISON)
		return -EINVAL;

	return 0;
}

static long kvm_userfault_file_resolve(struct kvm_userfault *uf,
				       struct kvm_userfault_resolve __user *uresolve)
{
	struct kvm_userfault_resolve resolve;
	gfn_t start, end;
	int r;

	if (copy_from_user(&resolve, uresolve, sizeof(resolve)))
		return -EFAULT;

	r = kvm_userfault_check_resolve(&resolve);
	if (r)
		return r;

	start = gpa_to_gfn(resolve.gpa);
	end = start + (resolve.size >> PAGE_SHIFT);

	/* A page that fails has no content: it stays armed for later accesses. */
	if (!resolve.error && !(resolve.flags & KVM_USERFAULT_WAKE_ONLY))
		kvm_userfault_clear_range(uf, start, end);
	if (!(resolve.flags & KVM_USERFAULT_CLEAR_ONLY))
		kvm_userfault_wake(uf, start, end, -resolve.error);

	return kvm_userfault_is_closed(uf) ? -ENODEV : 0;
}

static long kvm_userfault_file_ioctl(struct file *file, unsigned int ioctl,
				     unsigned long arg)
{
	struct kvm_userfault_file *uff = file->private_data;

	switch (ioctl) {
	case KVM_USERFAULT_RESOLVE:
		return kvm_userfault_file_resolve(uff->uf, (void __user *)arg);
	default:
		return -ENOTTY;
	}
}

/*
 * The bitmap is mapped as it is in memory.  Its layout is that of set_bit(), i.e.
 * little-endian on all architectures that support userfault.
 */
static vm_fault_t kvm_userfault_file_fault(struct vm_fault *vmf)
{
	struct kvm_userfault_file *uff = vmf->vma->vm_file->private_data;
	void *chunk = kvm_userfault_get_chunk(uff->uf, vmf->pgoff);

	if (IS_ERR(chunk))
		return vmf_error(PTR_ERR(chunk));

	vmf->page = virt_to_page(chunk);
	get_page(vmf->page);
	return 0;
}

static const struct vm_operations_struct kvm_userfault_file_vm_ops = {
	.fault = kvm_userfault_file_fault,
};

static int kvm_userfault_file_mmap(struct file *file, struct vm_area_struct *vma)
{
	/* What is written to a private mapping would go nowhere. */
	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;

	vm_flags_set(vma, VM_DONTDUMP);
	vma->vm_ops = &kvm_userfault_file_vm_ops;
	return 0;
}

static void kvm_userfault_file_show_fdinfo(struct seq_file *m, struct file *file)
{
	struct kvm_userfault_file *uff = file->private_data;
	unsigned int pending, delivered, waiting;

	scoped_guard(spinlock_irqsave, &uff->uf->lock) {
		pending = uff->uf->nr_pending;
		delivered = uff->reader.nr_delivered;
		waiting = uff->uf->nr_waiting;
	}

	seq_printf(m, "pending:\t%u\n", pending);
	seq_printf(m, "delivered:\t%u\n", delivered);
	seq_printf(m, "waiting:\t%u\n", waiting);
}

static int kvm_userfault_file_release(struct inode *inode, struct file *file)
{
	struct kvm_userfault_file *uff = file->private_data;

	kvm_userfault_del_pager(uff->uf, &uff->reader);
	kvm_userfault_put(uff->uf);
	kfree(uff);
	return 0;
}

static const struct file_operations kvm_userfault_file_fops = {
	.owner		= THIS_MODULE,
	.read_iter	= kvm_userfault_file_read,
	.poll		= kvm_userfault_file_poll,
	.unlocked_ioctl	= kvm_userfault_file_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.mmap		= kvm_userfault_file_mmap,
	.show_fdinfo	= kvm_userfault_file_show_fdinfo,
	.release	= kvm_userfault_file_release,
};

/* The file becomes a pager only once nothing can fail any more. */
static struct file *kvm_userfault_file_open(struct kvm_userfault *uf)
{
	struct kvm_userfault_file *uff;
	struct file *file;

	uff = kzalloc_obj(*uff, GFP_KERNEL_ACCOUNT);
	if (!uff)
		return ERR_PTR(-ENOMEM);

	file = anon_inode_getfile_fmode("[kvm-userfault]", &kvm_userfault_file_fops,
					uff, O_RDWR, FMODE_NOWAIT);
	if (IS_ERR(file)) {
		kfree(uff);
		return file;
	}

	refcount_inc(&uf->refs);
	uff->uf = uf;
	kvm_userfault_add_pager(uf, &uff->reader);
	return file;
}

/* KVM_CREATE_USERFAULT_FD */
int kvm_userfault_create_fd(struct kvm *kvm,
			    struct kvm_create_userfault_fd __user *ucreate)
{
	struct kvm_userfault *uf __free(kvm_userfault_put) = kvm_userfault_get(kvm);
	struct kvm_create_userfault_fd create;

	if (copy_from_user(&create, ucreate, sizeof(create)))
		return -EFAULT;
	if (!uf || memchr_inv(&create, 0, sizeof(create)))
		return -EINVAL;

	return FD_ADD(O_CLOEXEC, kvm_userfault_file_open(uf));
}
