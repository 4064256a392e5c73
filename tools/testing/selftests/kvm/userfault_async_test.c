// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault for accesses that wait: the queue, by which userspace
 * learns of them, and the userfault file.  One function per rule.
 *
 * Most tests use accesses that KVM does by itself in vCPU ioctls, which wait in
 * threads of their own.
 */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <linux/aio_abi.h>
#include <linux/sizes.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "userfaultfd_util.h"

#define NR_VCPUS		8

static u64 page_size;

/*
 * The layout is the same for 32-bit userspace, where 64-bit members need not be aligned
 * by more than 4 bytes.
 */
struct compat_userfault_event {
	u64 id;
	u64 gpa;
	u64 size;
	u64 flags;
	u32 vcpu_id;
	u32 as_id;
	u64 reserved[3];
} __packed __aligned(4);

struct compat_create_userfault_fd {
	u64 flags;
	u64 reserved[7];
} __packed __aligned(4);

struct compat_userfault_resolve {
	u64 gpa;
	u64 size;
	u32 flags;
	s32 error;
	u64 reserved[5];
} __packed __aligned(4);

#define ASSERT_EVENT(type)						\
	kvm_static_assert(sizeof(type) == 64);				\
	kvm_static_assert(offsetof(type, id) == 0);			\
	kvm_static_assert(offsetof(type, gpa) == 8);			\
	kvm_static_assert(offsetof(type, size) == 16);			\
	kvm_static_assert(offsetof(type, flags) == 24);			\
	kvm_static_assert(offsetof(type, vcpu_id) == 32);		\
	kvm_static_assert(offsetof(type, as_id) == 36);			\
	kvm_static_assert(offsetof(type, reserved) == 40)

#define ASSERT_CREATE(type)						\
	kvm_static_assert(sizeof(type) == 64);				\
	kvm_static_assert(offsetof(type, flags) == 0);			\
	kvm_static_assert(offsetof(type, reserved) == 8)

#define ASSERT_RESOLVE(type)						\
	kvm_static_assert(sizeof(type) == 64);				\
	kvm_static_assert(offsetof(type, gpa) == 0);			\
	kvm_static_assert(offsetof(type, size) == 8);			\
	kvm_static_assert(offsetof(type, flags) == 16);			\
	kvm_static_assert(offsetof(type, error) == 20);			\
	kvm_static_assert(offsetof(type, reserved) == 24)

ASSERT_EVENT(struct kvm_userfault_event);
ASSERT_EVENT(struct compat_userfault_event);
ASSERT_CREATE(struct kvm_create_userfault_fd);
ASSERT_CREATE(struct compat_create_userfault_fd);
ASSERT_RESOLVE(struct kvm_userfault_resolve);
ASSERT_RESOLVE(struct compat_userfault_resolve);

/* Nor do the numbers that have the sizes in them. */
kvm_static_assert(KVM_READ_USERFAULT == 0x8040aed6);
kvm_static_assert(KVM_CREATE_USERFAULT_FD == 0x4040aed7);
kvm_static_assert(KVM_USERFAULT_RESOLVE == 0x4040aed8);

/* Where nothing is mapped, neither before nor after. */
static void *bad_address(void)
{
	void *mem = kvm_mmap(page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	return mem;
}

#define TEST_ASSERT_ERRNO(ret, expected)						\
do {											\
	typeof(ret) __ret = (ret);							\
											\
	TEST_ASSERT(__ret == -1 && errno == (expected),					\
		    #ret ": expected " #expected ", got %ld (errno %d)", (long)__ret, errno); \
} while (0)

/*
 * The capability.
 */

FIXTURE(capability) {
	struct kvm_vm *vm;
};

FIXTURE_SETUP(capability)
{
	self->vm = vm_create_barebones();
}

FIXTURE_TEARDOWN(capability)
{
	kvm_vm_free(self->vm);
}

static int enable(struct kvm_vm *vm, u64 flags, u64 arg1)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_USERFAULT,
		.args = { KVM_USERFAULT_ENABLE | flags, arg1 },
	};

	return __vm_ioctl(vm, KVM_ENABLE_CAP, &cap);
}

static bool is_enabled(struct kvm_vm *vm)
{
	return vm_check_cap(vm, KVM_CAP_MEMORY_ATTRIBUTES) &
	       KVM_MEMORY_ATTRIBUTE_USERFAULT;
}

userfault_test(capability, flags_are_reported)
{
	u32 flags = KVM_USERFAULT_ASYNC | KVM_USERFAULT_ASYNC_VCPU | KVM_USERFAULT_EVENTFD;

	TEST_ASSERT_EQ(kvm_check_cap(KVM_CAP_USERFAULT) & flags, flags);
	TEST_ASSERT_EQ(vm_check_cap(self->vm, KVM_CAP_USERFAULT) & flags, flags);
}

userfault_test(capability, flags_need_async)
{
	int fd = eventfd(0, 0);

	TEST_ASSERT(fd >= 0, "eventfd() failed, errno %d", errno);

	TEST_ASSERT_ERRNO(enable(self->vm, KVM_USERFAULT_ASYNC_VCPU, 0), EINVAL);
	TEST_ASSERT_ERRNO(enable(self->vm, KVM_USERFAULT_EVENTFD, fd), EINVAL);
	TEST_ASSERT_ERRNO(enable(self->vm, KVM_USERFAULT_ASYNC_VCPU |
				 KVM_USERFAULT_EVENTFD, fd), EINVAL);
	TEST_ASSERT_ERRNO(enable(self->vm, KVM_USERFAULT_DISABLE | KVM_USERFAULT_ASYNC, 0),
			  EINVAL);
	TEST_ASSERT(!is_enabled(self->vm), "What was refused enabled userfault");

	TEST_ASSERT_EQ(enable(self->vm, KVM_USERFAULT_ASYNC | KVM_USERFAULT_ASYNC_VCPU |
			      KVM_USERFAULT_EVENTFD, fd), 0);
	kvm_close(fd);
}

/* They belong to enabling. */
userfault_test(capability, flags_do_not_disable)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_USERFAULT,
		.args = { KVM_USERFAULT_DISABLE | KVM_USERFAULT_ASYNC },
	};

	vm_userfault_enable_async(self->vm, 0);
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_ENABLE_CAP, &cap), EINVAL);
	TEST_ASSERT(is_enabled(self->vm), "What was refused disabled userfault");
}

userfault_test(capability, eventfd_is_checked)
{
	u64 flags = KVM_USERFAULT_ASYNC | KVM_USERFAULT_EVENTFD;
	int fd = open("/dev/null", O_RDWR);
	int closed = kvm_dup(fd);

	kvm_close(closed);

	TEST_ASSERT_ERRNO(enable(self->vm, flags, fd), EINVAL);
	TEST_ASSERT_ERRNO(enable(self->vm, flags, closed), EBADF);
	TEST_ASSERT_ERRNO(enable(self->vm, flags, -1ul), EBADF);
	TEST_ASSERT_ERRNO(enable(self->vm, flags, BIT_ULL(32) + fd), EBADF);
	TEST_ASSERT_ERRNO(enable(self->vm, KVM_USERFAULT_ASYNC, 1), EINVAL);
	TEST_ASSERT(!is_enabled(self->vm), "A bad eventfd enabled userfault");

	TEST_ASSERT_EQ(enable(self->vm, KVM_USERFAULT_ASYNC, 0), 0);
	kvm_close(fd);
}

/* The id belongs to what is behind the files, and is used again when that is gone. */
static int eventfd_id(int fd)
{
	char path[64], line[128];
	FILE *file;
	int id;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	file = fopen(path, "r");
	TEST_ASSERT(file, "Cannot open %s, errno %d", path, errno);

	do {
		TEST_ASSERT(fgets(line, sizeof(line), file), "%s has no id", path);
	} while (sscanf(line, "eventfd-id: %d", &id) != 1);
	fclose(file);

	return id;
}

static int next_eventfd_id(void)
{
	int fd = eventfd(0, 0);
	int id = eventfd_id(fd);

	kvm_close(fd);
	return id;
}

userfault_test(capability, eventfd_is_let_go)
{
	int fd = eventfd(0, EFD_NONBLOCK);
	int id = eventfd_id(fd);
	u64 val;

	TEST_ASSERT_EQ(enable(self->vm, KVM_USERFAULT_ASYNC | KVM_USERFAULT_EVENTFD, fd), 0);
	TEST_ASSERT_ERRNO(enable(self->vm, KVM_USERFAULT_ASYNC | KVM_USERFAULT_EVENTFD, fd),
			  EEXIST);
	vm_userfault_disable(self->vm);

	/* Nothing was queued, so nothing may be signalled. */
	TEST_ASSERT_ERRNO(read(fd, &val, sizeof(val)), EAGAIN);

	TEST_ASSERT(next_eventfd_id() != id, "The id is no id");
	kvm_close(fd);
	/* Other processes may have eventfds that come and go. */
	userfault_wait_until(next_eventfd_id() <= id);
}

userfault_test(capability, file_needs_userfault)
{
	struct kvm_userfault_event event;

	TEST_ASSERT_ERRNO(__vm_create_userfault_fd(self->vm), EINVAL);
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_READ_USERFAULT, &event), EINVAL);

	vm_userfault_enable_async(self->vm, 0);
	kvm_close(vm_create_userfault_fd(self->vm));
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_READ_USERFAULT, &event), ENOENT);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_ERRNO(__vm_create_userfault_fd(self->vm), EINVAL);
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_READ_USERFAULT, &event), EINVAL);
}

userfault_test(capability, spare_words_of_the_file_are_checked)
{
	struct kvm_create_userfault_fd create, *bad = bad_address();
	u64 *words = (u64 *)&create;
	int i;

	vm_userfault_enable_async(self->vm, 0);

	for (i = 0; i < 512; i++) {
		memset(&create, 0, sizeof(create));
		words[i / 64] = BIT_ULL(i % 64);
		TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_CREATE_USERFAULT_FD, &create),
				  EINVAL);
	}
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_CREATE_USERFAULT_FD, bad), EFAULT);
}

/*
 * The queue.
 */

FIXTURE(async) {
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct kvm_access accesses[NR_VCPUS];
	struct kvm_vm *vm;
	void *hva;
	int eventfd;
	int fd;
};

#define async_data FIXTURE_DATA(async)

static void *add_memory_at(struct kvm_vm *vm, gpa_t gpa, u32 slot)
{
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, gpa, slot,
				    NR_PAGES * page_size / vm->page_size, 0);

	return memslot2region(vm, slot)->host_mem;
}

static void *add_memory(struct kvm_vm *vm)
{
	return add_memory_at(vm, AGENT_GPA, AGENT_SLOT);
}

/* The memory that one page of the bitmap is for. */
static u64 chunk_size(void)
{
	return 8 * page_size * page_size;
}

/* All pages are armed. */
FIXTURE_SETUP(async)
{
	self->vm = kvm_access_create_vm(NR_VCPUS, self->vcpus);
	self->hva = add_memory(self->vm);
	self->eventfd = eventfd(0, EFD_NONBLOCK);
	TEST_ASSERT(self->eventfd >= 0, "eventfd() failed, errno %d", errno);

	TEST_ASSERT_EQ(enable(self->vm, KVM_USERFAULT_ASYNC | KVM_USERFAULT_EVENTFD,
			      self->eventfd), 0);
	self->fd = vm_create_userfault_fd(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
}

FIXTURE_TEARDOWN(async)
{
	if (self->fd >= 0)
		kvm_close(self->fd);
	kvm_close(self->eventfd);
	if (self->vm)
		kvm_vm_free(self->vm);
}

static struct kvm_access *start(async_data *self, int vcpu, u64 page)
{
	kvm_access_start(&self->accesses[vcpu], self->vcpus[vcpu], page_gpa(page));
	return &self->accesses[vcpu];
}

/* Start an access that is the @nr-th one that waits, and see that it is in line. */
static struct kvm_access *start_nth(async_data *self, int vcpu, u64 page, int nr)
{
	struct kvm_access *access = start(self, vcpu, page);

	userfault_wait_for_waiters(self->fd, nr);
	waiter_wait_asleep(&access->waiter);
	return access;
}

static void finish(struct kvm_access *access)
{
	waiter_join(&access->waiter);
}

static void *page_hva(async_data *self, u64 page)
{
	return self->hva + page * page_size;
}

static void assert_succeeded(async_data *self, u64 page)
{
	TEST_ASSERT(!kvm_access_has_failed(page_hva(self, page)),
		    "The access to page %lu failed", page);
}

static void assert_failed(async_data *self, u64 page)
{
	TEST_ASSERT(kvm_access_has_failed(page_hva(self, page)),
		    "The access to page %lu did not fail", page);
}

static void assert_counts(int fd, unsigned int pending, unsigned int delivered,
			  unsigned int waiting)
{
	struct userfault_counts counts = userfault_get_counts(fd);

	TEST_ASSERT(counts.pending == pending && counts.delivered == delivered &&
		    counts.waiting == waiting,
		    "Pending %u, delivered %u, waiting %u; expected %u, %u, %u",
		    counts.pending, counts.delivered, counts.waiting,
		    pending, delivered, waiting);
}

static void assert_event(const struct kvm_userfault_event *event,
			 struct kvm_vcpu *vcpu, gpa_t gpa)
{
	TEST_ASSERT(event->id, "A record without an id");
	TEST_ASSERT_EQ(event->gpa, gpa);
	TEST_ASSERT_EQ(event->size, page_size);
	TEST_ASSERT_EQ(event->flags, USERFAULT_READ);
	TEST_ASSERT_EQ(event->vcpu_id, vcpu->id);
	TEST_ASSERT_EQ(event->as_id, 0);
	TEST_ASSERT(!event->reserved[0] && !event->reserved[1] && !event->reserved[2],
		    "Spare words are not zero");
}

static void resolve(async_data *self, u64 page, u64 nr)
{
	userfault_resolve(self->fd, page_gpa(page), nr * page_size, 0, 0);
}

static u64 eventfd_count(async_data *self)
{
	u64 count;

	if (read(self->eventfd, &count, sizeof(count)) < 0) {
		TEST_ASSERT_EQ(errno, EAGAIN);
		return 0;
	}
	return count;
}

userfault_test(async, access_waits_for_the_attribute)
{
	struct kvm_access *access = start_nth(self, 1, 5, 1);
	struct kvm_userfault_event event;

	waiter_assert_asleep(&access->waiter);
	event = vm_userfault_read(self->vm);
	assert_event(&event, self->vcpus[1], page_gpa(5));
	waiter_assert_asleep(&access->waiter);
	assert_failed(self, 5);

	vm_userfault_clear(self->vm, page_gpa(5), page_size);
	finish(access);
	assert_succeeded(self, 5);
	assert_counts(self->fd, 0, 0, 0);
}

userfault_test(async, access_waits_for_resolve)
{
	struct kvm_access *access = start_nth(self, 2, 6, 1);
	struct kvm_userfault_event event;

	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[2], page_gpa(6));
	waiter_assert_asleep(&access->waiter);

	resolve(self, 6, 1);
	finish(access);
	assert_succeeded(self, 6);
	assert_counts(self->fd, 0, 0, 0);
}

/* An access that is queued again is one that waits, and has two records. */
userfault_test(async, statistics)
{
	int i;

	start_nth(self, 1, 5, 1);
	userfault_read(self->fd);
	userfault_resolve(self->fd, page_gpa(5), page_size, KVM_USERFAULT_WAKE_ONLY, 0);
	userfault_read(self->fd);
	start_nth(self, 2, 6, 2);
	resolve(self, 5, 2);
	finish(&self->accesses[1]);
	finish(&self->accesses[2]);

	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 3);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 1);
	for (i = 0; i < NR_VCPUS; i++) {
		TEST_ASSERT_EQ(vcpu_get_stat(self->vcpus[i], userfault_waits),
			       i == 1 || i == 2);
		TEST_ASSERT_EQ(vcpu_get_stat(self->vcpus[i], userfault_exits), 0);
	}

	/* What doesn't wait doesn't count. */
	kvm_access_perform(self->vcpus[1], page_gpa(5));
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpus[1], userfault_waits), 1);
}

/* Pages that are not armed make nobody wait, with any number of them armed. */
userfault_test(async, other_pages_do_not_wait)
{
	resolve(self, 7, 1);
	kvm_access_perform(self->vcpus[0], page_gpa(7));
	assert_succeeded(self, 7);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
}

#ifdef __x86_64__
/* The version of the clock, which is odd while the clock is written. */
static void put_content(u32 *page)
{
	WRITE_ONCE(page[0], 100);
}

static void assert_content_was_seen(u32 *page)
{
	TEST_ASSERT_EQ(READ_ONCE(page[0]), 102);
}
#endif

#ifdef __aarch64__
/* It adds up, but for threads that have been robbed of different amounts. */
static void put_content(u32 *page)
{
	WRITE_ONCE(*(u64 *)(page + 2), BIT_ULL(60));
}

static void assert_content_was_seen(u32 *page)
{
	u64 stolen_time = READ_ONCE(*(u64 *)(page + 2));

	TEST_ASSERT(stolen_time > BIT_ULL(59) && stolen_time < BIT_ULL(61),
		    "It does not go on from what the page has: %#lx", stolen_time);
}
#endif

/* The access does what it would have done: it sees what filled the page. */
userfault_test(async, access_sees_the_content)
{
	struct kvm_access *access = start_nth(self, 0, 0, 1);

	put_content(page_hva(self, 0));
	resolve(self, 0, 1);
	finish(access);
	assert_succeeded(self, 0);
	assert_content_was_seen(page_hva(self, 0));
}

FIXTURE(sync) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
};

FIXTURE_SETUP(sync)
{
	self->vm = kvm_access_create_vm(1, &self->vcpu);
	self->hva = add_memory(self->vm);
	vm_userfault_enable(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
}

FIXTURE_TEARDOWN(sync)
{
	kvm_vm_free(self->vm);
}

userfault_test(sync, without_async_kvm_does_not_wait)
{
	struct kvm_userfault_event event;

	kvm_access_perform(self->vcpu, AGENT_GPA);
	TEST_ASSERT(!kvm_access_has_failed(self->hva), "The access failed");
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_READ_USERFAULT, &event), ENOENT);
}

/*
 * Reading.
 */

userfault_test(async, read_ioctl_returns_each_record_once)
{
	struct kvm_userfault_event a, b, c;

	start_nth(self, 0, 3, 1);
	start_nth(self, 1, 4, 2);

	a = vm_userfault_read(self->vm);
	b = vm_userfault_read(self->vm);
	assert_event(&a, self->vcpus[0], page_gpa(3));
	assert_event(&b, self->vcpus[1], page_gpa(4));
	TEST_ASSERT(b.id > a.id, "Ids do not go up");
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_READ_USERFAULT, &c), ENOENT);
	assert_counts(self->fd, 0, 0, 2);

	vm_userfault_clear(self->vm, page_gpa(3), 2 * page_size);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
}

userfault_test(async, read_ioctl_loses_nothing)
{
	struct kvm_access *access = start_nth(self, 0, 3, 1);
	struct kvm_userfault_event event, *bad = bad_address();
	int i;

	start_nth(self, 1, 4, 2);

	for (i = 0; i < 10; i++) {
		TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_READ_USERFAULT, bad), EFAULT);
		assert_counts(self->fd, 2, 0, 2);
	}

	/* Nor is the order lost. */
	event = vm_userfault_read(self->vm);
	assert_event(&event, self->vcpus[0], page_gpa(3));
	event = vm_userfault_read(self->vm);
	assert_event(&event, self->vcpus[1], page_gpa(4));

	resolve(self, 3, 2);
	finish(access);
	finish(&self->accesses[1]);
}

userfault_test(async, read_loses_nothing)
{
	u8 *mem = kvm_mmap(2 * page_size, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1);
	u64 size = sizeof(struct kvm_userfault_event);
	struct kvm_userfault_event event;

	kvm_munmap(mem + page_size, page_size);
	start_nth(self, 0, 3, 1);
	start_nth(self, 1, 4, 2);

	/* No byte, some bytes of the first record, some bytes of the second one. */
	TEST_ASSERT_ERRNO(read(self->fd, mem + page_size, size), EFAULT);
	assert_counts(self->fd, 2, 0, 2);
	TEST_ASSERT_ERRNO(read(self->fd, mem + page_size - size / 2, 2 * size), EFAULT);
	assert_counts(self->fd, 2, 0, 2);

	TEST_ASSERT_EQ(read(self->fd, mem + page_size - size * 3 / 2, 2 * size), size);
	assert_counts(self->fd, 1, 1, 2);
	memcpy(&event, mem + page_size - size * 3 / 2, size);
	assert_event(&event, self->vcpus[0], page_gpa(3));

	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[1], page_gpa(4));

	resolve(self, 3, 2);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
	kvm_munmap(mem, page_size);
}

static void set_nonblock(int fd)
{
	TEST_ASSERT(!fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK), "errno %d", errno);
}

userfault_test(async, read_of_an_empty_queue)
{
	struct kvm_userfault_event event;
	struct kvm_access *access;

	set_nonblock(self->fd);
	TEST_ASSERT_ERRNO(read(self->fd, &event, sizeof(event)), EAGAIN);

	access = start_nth(self, 0, 0, 1);
	TEST_ASSERT_EQ(read(self->fd, &event, sizeof(event)), sizeof(event));
	TEST_ASSERT_ERRNO(read(self->fd, &event, sizeof(event)), EAGAIN);

	resolve(self, 0, 1);
	finish(access);
	TEST_ASSERT_ERRNO(read(self->fd, &event, sizeof(event)), EAGAIN);
}

userfault_test(async, read_needs_room_for_a_record)
{
	struct kvm_userfault_event event = {};
	size_t size = sizeof(event);

	start_nth(self, 0, 0, 1);

	TEST_ASSERT_ERRNO(read(self->fd, &event, 0), EINVAL);
	TEST_ASSERT_ERRNO(read(self->fd, &event, 1), EINVAL);
	TEST_ASSERT_ERRNO(read(self->fd, &event, size - 1), EINVAL);
	TEST_ASSERT_EQ(event.id, 0);
	assert_counts(self->fd, 1, 0, 1);

	TEST_ASSERT_EQ(read(self->fd, &event, size), size);
	resolve(self, 0, 1);
	finish(&self->accesses[0]);
}

/* Whole records only, and the oldest first. */
userfault_test(async, read_returns_many_records)
{
	struct kvm_userfault_event events[NR_VCPUS + 1];
	struct iovec iovs[] = {
		{ .iov_base = events, .iov_len = 10 },
		{ .iov_base = (u8 *)events + 10, .iov_len = 3 * sizeof(*events) - 20 },
	};
	u64 size = sizeof(*events);
	int i;

	/* In an order that is neither that of the pages nor that of the vCPUs. */
	for (i = 0; i < NR_VCPUS; i++)
		start_nth(self, i ^ 1, (i * 5) % NR_VCPUS, i + 1);

	TEST_ASSERT_EQ(readv(self->fd, iovs, 2), 2 * size);
	TEST_ASSERT_EQ(read(self->fd, events + 2, size * 2 + size / 2), 2 * size);
	assert_counts(self->fd, NR_VCPUS - 4, 4, NR_VCPUS);
	TEST_ASSERT_EQ(read(self->fd, events + 4, size * (NR_VCPUS - 3)),
		       size * (NR_VCPUS - 4));

	for (i = 0; i < NR_VCPUS; i++) {
		assert_event(&events[i], self->vcpus[i ^ 1], page_gpa((i * 5) % NR_VCPUS));
		TEST_ASSERT(!i || events[i].id > events[i - 1].id, "Ids do not go up");
	}

	resolve(self, 0, NR_VCPUS);
	for (i = 0; i < NR_VCPUS; i++)
		finish(&self->accesses[i]);
}

struct reader {
	struct waiter waiter;
	struct kvm_userfault_event event;
	int error;
	int ret;
	int fd;
};

static void reader_fn(void *arg)
{
	struct reader *reader = arg;

	reader->ret = read(reader->fd, &reader->event, sizeof(reader->event));
	reader->error = errno;
}

static void start_reader(struct reader *reader, int fd)
{
	reader->fd = fd;
	waiter_start(&reader->waiter, reader_fn, reader);
	waiter_wait_asleep(&reader->waiter);
}

userfault_test(async, read_waits_for_a_record)
{
	struct reader reader;

	start_reader(&reader, self->fd);
	waiter_assert_asleep(&reader.waiter);

	start(self, 0, 0);
	waiter_join(&reader.waiter);
	TEST_ASSERT_EQ(reader.ret, sizeof(reader.event));
	assert_event(&reader.event, self->vcpus[0], page_gpa(0));

	resolve(self, 0, 1);
	finish(&self->accesses[0]);
}

/* Each of them is woken for a record of its own. */
userfault_test(async, many_reads_wait)
{
	struct reader readers[NR_VCPUS];
	u64 seen = 0;
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		start_reader(&readers[i], self->fd);
	for (i = 0; i < NR_VCPUS; i++)
		start(self, i, i);

	for (i = 0; i < NR_VCPUS; i++) {
		waiter_join(&readers[i].waiter);
		TEST_ASSERT_EQ(readers[i].ret, sizeof(readers[i].event));
		seen |= BIT_ULL((readers[i].event.gpa - AGENT_GPA) / page_size);
	}
	TEST_ASSERT_EQ(seen, BIT_ULL(NR_VCPUS) - 1);

	resolve(self, 0, NR_PAGES);
	for (i = 0; i < NR_VCPUS; i++)
		finish(&self->accesses[i]);
}

static void handle_signal(int sig)
{
}

static void catch_signals(void)
{
	struct sigaction action = { .sa_handler = handle_signal };

	TEST_ASSERT(!sigaction(SIGUSR1, &action, NULL), "errno %d", errno);
}

userfault_test(async, read_is_interrupted_by_signals)
{
	struct reader reader;

	catch_signals();
	start_reader(&reader, self->fd);
	waiter_assert_asleep(&reader.waiter);
	pthread_kill(reader.waiter.thread, SIGUSR1);
	waiter_join(&reader.waiter);
	TEST_ASSERT_EQ(reader.ret, -1);
	TEST_ASSERT_EQ(reader.error, EINTR);
}

/* A reader that is interrupted does not take the wake-up of a record along. */
userfault_test(async, interrupted_read_loses_no_wakeup)
{
	struct reader readers[2];
	int i;

	catch_signals();
	for (i = 0; i < 100; i++) {
		start_reader(&readers[0], self->fd);
		start_reader(&readers[1], self->fd);

		start(self, 0, 0);
		pthread_kill(readers[0].waiter.thread, SIGUSR1);

		/* One of the two must get the record. */
		userfault_wait_until((waiter_is_done(&readers[0].waiter) &&
				      readers[0].ret > 0) ||
				     (waiter_is_done(&readers[1].waiter) &&
				      readers[1].ret > 0));
		resolve(self, 0, 1);
		finish(&self->accesses[0]);

		while (!waiter_is_done(&readers[0].waiter) ||
		       !waiter_is_done(&readers[1].waiter)) {
			pthread_kill(readers[0].waiter.thread, SIGUSR1);
			pthread_kill(readers[1].waiter.thread, SIGUSR1);
			usleep(1000);
		}
		waiter_join(&readers[0].waiter);
		waiter_join(&readers[1].waiter);
		vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	}
}

/* Unlike a vCPU that waits for the guest, KVM is in the middle of something. */
userfault_test(async, signal_does_not_end_an_access)
{
	struct kvm_access *access = start_nth(self, 1, 5, 1);
	struct kvm_userfault_event event;

	catch_signals();
	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[1], page_gpa(5));
	pthread_kill(access->waiter.thread, SIGUSR1);
	waiter_assert_asleep(&access->waiter);
	assert_counts(self->fd, 0, 1, 1);
	assert_failed(self, 5);

	resolve(self, 5, 1);
	finish(access);
	assert_succeeded(self, 5);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 1);
}

userfault_test(async, poll)
{
	int fd = self->fd;

	TEST_ASSERT(!userfault_is_readable(fd, 0), "A record before there is one");
	start_nth(self, 0, 0, 1);
	start_nth(self, 1, 1, 2);
	TEST_ASSERT(userfault_is_readable(fd, 0), "Cannot read two records");
	userfault_read(fd);
	TEST_ASSERT(userfault_is_readable(fd, 0), "Cannot read the second record");
	userfault_read(fd);
	TEST_ASSERT(!userfault_is_readable(fd, 0), "A third record");

	resolve(self, 0, 2);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
}

userfault_test(async, poll_waits)
{
	struct kvm_userfault_event event;

	start(self, 3, 1);
	TEST_ASSERT(userfault_is_readable(self->fd, USERFAULT_TIMEOUT_SECS * 1000),
		    "There is no record");
	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[3], page_gpa(1));
	resolve(self, 1, 1);
	finish(&self->accesses[3]);
}

/* An access that is given up, or resolved, takes its record along. */
userfault_test(async, resolved_records_are_gone)
{
	struct kvm_userfault_event event;

	start_nth(self, 0, 0, 1);
	resolve(self, 0, 1);
	finish(&self->accesses[0]);

	assert_counts(self->fd, 0, 0, 0);
	TEST_ASSERT(!userfault_is_readable(self->fd, 0), "A record of nobody");
	set_nonblock(self->fd);
	TEST_ASSERT_ERRNO(read(self->fd, &event, sizeof(event)), EAGAIN);
}

static int epoll_add(int fd, u32 events)
{
	struct epoll_event event = { .events = events };
	int epfd = epoll_create1(0);

	TEST_ASSERT(epfd >= 0, "epoll_create1() failed, errno %d", errno);
	TEST_ASSERT(!epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event),
		    "epoll_ctl() failed, errno %d", errno);
	return epfd;
}

static u32 epoll_events(int epfd, int timeout_ms)
{
	struct epoll_event event;
	int ret = epoll_wait(epfd, &event, 1, timeout_ms);

	TEST_ASSERT(ret >= 0, "epoll_wait() failed, errno %d", errno);
	return ret ? event.events : 0;
}

userfault_test(async, epoll)
{
	int level = epoll_add(self->fd, EPOLLIN);
	int edge = epoll_add(self->fd, EPOLLIN | EPOLLET);
	int ms = USERFAULT_TIMEOUT_SECS * 1000;

	TEST_ASSERT_EQ(epoll_events(level, 0), 0);
	TEST_ASSERT_EQ(epoll_events(edge, 0), 0);

	/* Every record is an edge. */
	start_nth(self, 0, 0, 1);
	TEST_ASSERT_EQ(epoll_events(edge, ms), EPOLLIN);
	TEST_ASSERT_EQ(epoll_events(edge, 0), 0);
	start_nth(self, 1, 1, 2);
	TEST_ASSERT_EQ(epoll_events(edge, ms), EPOLLIN);
	TEST_ASSERT_EQ(epoll_events(edge, 0), 0);

	TEST_ASSERT_EQ(epoll_events(level, ms), EPOLLIN);
	userfault_read(self->fd);
	TEST_ASSERT_EQ(epoll_events(level, ms), EPOLLIN);
	userfault_read(self->fd);
	TEST_ASSERT_EQ(epoll_events(level, 0), 0);

	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(epoll_events(edge, ms), EPOLLHUP);
	TEST_ASSERT_EQ(epoll_events(level, ms), EPOLLHUP);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
	kvm_close(level);
	kvm_close(edge);
}

userfault_test(async, io_uring_read)
{
	struct kvm_userfault_event event;
	struct ring ring;

	if (!ring_create(&ring))
		SKIP(return, "There is no io_uring");

	/* Of a record that is to come, and of one that is there. */
	ring_submit(&ring, IORING_OP_READ, self->fd, &event, sizeof(event), 0);
	ring_assert_waits(&ring);
	start_nth(self, 0, 3, 1);
	TEST_ASSERT_EQ(ring_result(&ring), sizeof(event));
	assert_event(&event, self->vcpus[0], page_gpa(3));

	start_nth(self, 1, 4, 2);
	ring_submit(&ring, IORING_OP_READ, self->fd, &event, sizeof(event), 0);
	TEST_ASSERT_EQ(ring_result(&ring), sizeof(event));
	assert_event(&event, self->vcpus[1], page_gpa(4));
	assert_counts(self->fd, 0, 2, 2);

	resolve(self, 3, 2);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
	kvm_close(ring.fd);
}

userfault_test(async, io_uring_read_loses_nothing)
{
	struct kvm_userfault_event event, *bad = bad_address();
	struct ring ring;

	if (!ring_create(&ring))
		SKIP(return, "There is no io_uring");

	ring_submit(&ring, IORING_OP_READ, self->fd, bad, sizeof(*bad), 0);
	start_nth(self, 0, 3, 1);
	TEST_ASSERT_EQ(ring_result(&ring), -EFAULT);
	assert_counts(self->fd, 1, 0, 1);
	ring_submit(&ring, IORING_OP_READ, self->fd, bad, sizeof(*bad), 0);
	TEST_ASSERT_EQ(ring_result(&ring), -EFAULT);

	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[0], page_gpa(3));
	resolve(self, 3, 1);
	finish(&self->accesses[0]);
	kvm_close(ring.fd);
}

userfault_test(async, io_uring_poll)
{
	struct ring ring;

	if (!ring_create(&ring))
		SKIP(return, "There is no io_uring");

	ring_submit(&ring, IORING_OP_POLL_ADD, self->fd, NULL, 0, POLLIN);
	ring_assert_waits(&ring);
	start_nth(self, 0, 3, 1);
	TEST_ASSERT_EQ(ring_result(&ring), POLLIN);

	resolve(self, 3, 1);
	finish(&self->accesses[0]);
	kvm_close(ring.fd);
}

userfault_test(async, disabling_ends_io_uring)
{
	struct kvm_userfault_event event;
	struct ring reader, poller;

	if (!ring_create(&reader) || !ring_create(&poller))
		SKIP(return, "There is no io_uring");

	ring_submit(&reader, IORING_OP_READ, self->fd, &event, sizeof(event), 0);
	ring_submit(&poller, IORING_OP_POLL_ADD, self->fd, NULL, 0, POLLIN);
	ring_assert_waits(&reader);
	ring_assert_waits(&poller);
	vm_userfault_disable(self->vm);
	TEST_ASSERT_EQ(ring_result(&reader), 0);
	TEST_ASSERT_EQ(ring_result(&poller), POLLHUP);
	kvm_close(reader.fd);
	kvm_close(poller.fd);
}

/* It takes a lock with IRQs off around that of the wait queue. */
userfault_test(async, aio_poll)
{
	struct timespec timeout = { .tv_sec = USERFAULT_TIMEOUT_SECS };
	struct iocb iocb = {
		.aio_lio_opcode = IOCB_CMD_POLL,
		.aio_fildes = self->fd,
		.aio_buf = POLLIN,
	};
	struct iocb *iocbs[] = { &iocb };
	aio_context_t context = 0;
	struct io_event event;

	if (syscall(__NR_io_setup, 1, &context))
		SKIP(return, "There is no asynchronous I/O");

	TEST_ASSERT_EQ(syscall(__NR_io_submit, context, 1, iocbs), 1);
	start_nth(self, 0, 3, 1);
	TEST_ASSERT_EQ(syscall(__NR_io_getevents, context, 1, 1, &event, &timeout), 1);
	TEST_ASSERT(event.res & POLLIN, "The file cannot be read, %#llx", event.res);

	resolve(self, 3, 1);
	finish(&self->accesses[0]);
	TEST_ASSERT(!syscall(__NR_io_destroy, context), "errno %d", errno);
}

userfault_test(async, eventfd_counts_records)
{
	struct kvm_userfault_event *bad = bad_address();

	TEST_ASSERT_EQ(eventfd_count(self), 0);
	start_nth(self, 0, 0, 1);
	start_nth(self, 1, 1, 2);
	start_nth(self, 2, 1, 3);
	userfault_wait_until(vm_get_stat(self->vm, userfault_records) == 3);
	waiter_wait_asleep(&self->accesses[2].waiter);
	TEST_ASSERT_EQ(eventfd_count(self), 3);
	TEST_ASSERT_EQ(eventfd_count(self), 0);

	/* What can be read again is signalled again. */
	TEST_ASSERT_ERRNO(__vm_ioctl(self->vm, KVM_READ_USERFAULT, bad), EFAULT);
	TEST_ASSERT_EQ(eventfd_count(self), 1);

	resolve(self, 0, 2);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
	finish(&self->accesses[2]);
	TEST_ASSERT_EQ(eventfd_count(self), 0);
}

/*
 * Resolving.
 */

static void assert_resolve_invalid(int fd, struct kvm_userfault_resolve resolve)
{
	TEST_ASSERT_ERRNO(ioctl(fd, KVM_USERFAULT_RESOLVE, &resolve), EINVAL);
}

#define RESOLVE(...) ((struct kvm_userfault_resolve) {					\
	.gpa = AGENT_GPA,								\
	.size = page_size,								\
	__VA_ARGS__									\
})

userfault_test(async, resolve_is_checked)
{
	struct kvm_userfault_resolve resolve;
	u64 *reserved = (u64 *)resolve.reserved;
	int fd = self->fd;
	int i;

	start_nth(self, 0, 0, 1);

	for (i = 0; i < 5 * 64; i++) {
		resolve = RESOLVE();
		reserved[i / 64] = BIT_ULL(i % 64);
		assert_resolve_invalid(fd, resolve);
	}
	for (i = 2; i < 32; i++)
		assert_resolve_invalid(fd, RESOLVE(.flags = BIT(i)));
	for (i = -200; i < 200; i++) {
		if (i && i != EFAULT && i != EHWPOISON)
			assert_resolve_invalid(fd, RESOLVE(.error = i));
	}

	assert_resolve_invalid(fd, RESOLVE(.flags = KVM_USERFAULT_CLEAR_ONLY |
						    KVM_USERFAULT_WAKE_ONLY));
	assert_resolve_invalid(fd, RESOLVE(.flags = KVM_USERFAULT_CLEAR_ONLY,
					   .error = EFAULT));
	assert_resolve_invalid(fd, RESOLVE(.flags = KVM_USERFAULT_WAKE_ONLY,
					   .error = EFAULT));
	assert_resolve_invalid(fd, RESOLVE(.size = 0));
	assert_resolve_invalid(fd, RESOLVE(.size = page_size - 1));
	assert_resolve_invalid(fd, RESOLVE(.size = page_size / 2));
	assert_resolve_invalid(fd, RESOLVE(.size = -page_size));
	assert_resolve_invalid(fd, RESOLVE(.gpa = AGENT_GPA + 1));
	assert_resolve_invalid(fd, RESOLVE(.gpa = AGENT_GPA + page_size / 2));

	TEST_ASSERT_ERRNO(ioctl(fd, KVM_USERFAULT_RESOLVE, bad_address()), EFAULT);
	TEST_ASSERT_ERRNO(ioctl(fd, KVM_GET_API_VERSION, 0), ENOTTY);

	/* The page is still armed, and its access waits. */
	waiter_assert_asleep(&self->accesses[0].waiter);
	assert_counts(fd, 1, 0, 1);

	userfault_resolve(fd, AGENT_GPA, page_size, 0, 0);
	finish(&self->accesses[0]);
}

/* Ranges can be of any size, also where there is nothing. */
userfault_test(async, resolve_takes_large_ranges)
{
	start_nth(self, 0, 0, 1);
	start_nth(self, 1, NR_PAGES - 1, 2);

	userfault_resolve(self->fd, 0, AGENT_GPA, 0, 0);
	userfault_resolve(self->fd, page_gpa(NR_PAGES), SZ_1G, 0, 0);
	userfault_resolve(self->fd, page_gpa(1), (NR_PAGES - 2) * page_size, 0, 0);
	waiter_assert_asleep(&self->accesses[0].waiter);
	waiter_assert_asleep(&self->accesses[1].waiter);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 2);

	userfault_resolve(self->fd, 0, BIT_ULL(40), 0, 0);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
}

/* Only those whose page is in the range are woken. */
userfault_test(async, resolve_wakes_its_range)
{
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		start_nth(self, i, i, i + 1);

	resolve(self, 2, 3);
	for (i = 2; i < 5; i++) {
		finish(&self->accesses[i]);
		assert_succeeded(self, i);
	}
	for (i = 0; i < NR_VCPUS; i++) {
		if (i >= 2 && i < 5)
			continue;
		waiter_assert_asleep(&self->accesses[i].waiter);
		assert_failed(self, i);
	}
	assert_counts(self->fd, NR_VCPUS - 3, 0, NR_VCPUS - 3);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), NR_VCPUS);

	resolve(self, 0, NR_VCPUS);
	for (i = 0; i < NR_VCPUS; i++) {
		if (i < 2 || i >= 5)
			finish(&self->accesses[i]);
	}
}

userfault_test(async, clear_only_wakes_nobody)
{
	struct waiter *waiter = &self->accesses[0].waiter;

	start_nth(self, 0, 0, 1);
	userfault_resolve(self->fd, AGENT_GPA, page_size, KVM_USERFAULT_CLEAR_ONLY, 0);
	waiter_assert_asleep(waiter);
	assert_counts(self->fd, 1, 0, 1);

	/* The page is clear, though. */
	kvm_access_perform(self->vcpus[1], AGENT_GPA);

	userfault_resolve(self->fd, AGENT_GPA, page_size, KVM_USERFAULT_WAKE_ONLY, 0);
	waiter_join(waiter);
	assert_counts(self->fd, 0, 0, 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 1);
}

/* An access that is woken while its page is armed gets in line again. */
userfault_test(async, wake_only_clears_nothing)
{
	struct kvm_userfault_event a, b;

	start_nth(self, 0, 0, 1);
	a = userfault_read(self->fd);
	assert_counts(self->fd, 0, 1, 1);

	userfault_resolve(self->fd, AGENT_GPA, page_size, KVM_USERFAULT_WAKE_ONLY, 0);
	b = userfault_read(self->fd);
	TEST_ASSERT(b.id > a.id, "Queued again without a new id");
	assert_event(&b, self->vcpus[0], AGENT_GPA);
	waiter_assert_asleep(&self->accesses[0].waiter);
	assert_counts(self->fd, 0, 1, 1);

	resolve(self, 0, 1);
	finish(&self->accesses[0]);
	assert_succeeded(self, 0);
}

static void test_error(async_data *self, int error)
{
	start_nth(self, 0, 0, 1);
	start_nth(self, 1, 1, 2);

	userfault_resolve(self->fd, AGENT_GPA, page_size, 0, error);
	finish(&self->accesses[0]);
	assert_failed(self, 0);
	waiter_assert_asleep(&self->accesses[1].waiter);
	assert_counts(self->fd, 1, 0, 1);

	/* The page stays armed, and the next access to it waits. */
	start_nth(self, 0, 0, 2);
	resolve(self, 0, 2);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
	assert_succeeded(self, 0);
	assert_succeeded(self, 1);
}

userfault_test(async, resolver_lets_accesses_fail_with_efault)
{
	test_error(self, EFAULT);
}

userfault_test(async, resolver_lets_accesses_fail_with_ehwpoison)
{
	test_error(self, EHWPOISON);
}

userfault_test(async, mapping_is_the_bitmap)
{
	u8 *bitmap = userfault_map_bitmap(self->fd, AGENT_GPA);
	u64 i;

	for (i = 0; i < 2 * NR_PAGES; i++)
		TEST_ASSERT_EQ(userfault_test_bit(bitmap, i), i < NR_PAGES);

	vm_userfault_clear(self->vm, page_gpa(1), page_size);
	resolve(self, 9, 1);
	vm_userfault_arm(self->vm, page_gpa(NR_PAGES + 7), page_size);
	for (i = 0; i < 2 * NR_PAGES; i++)
		TEST_ASSERT_EQ(userfault_test_bit(bitmap, i),
			       (i < NR_PAGES && i != 1 && i != 9) || i == NR_PAGES + 7);
}

/*
 * KVM finds the bits of the lower pages faster than those of the others, to which they
 * are the border.
 */
#define HIGH_GPA	(16 * SZ_4G)

static void test_mapping_before_arming(async_data *self, gpa_t gpa)
{
	u8 *bitmap = userfault_map_bitmap(self->fd, gpa);

	TEST_ASSERT(!userfault_test_bit(bitmap, 3), "Armed by mapping the bitmap");
	vm_userfault_arm(self->vm, gpa + 3 * page_size, page_size);
	TEST_ASSERT(userfault_test_bit(bitmap, 3), "Not the bitmap that KVM uses");
	TEST_ASSERT(!userfault_test_bit(bitmap, 2), "Not the bit of the page");
}

/* Also where no page has ever been armed. */
userfault_test(async, mapping_comes_before_arming)
{
	test_mapping_before_arming(self, AGENT_GPA + chunk_size());
	test_mapping_before_arming(self, HIGH_GPA - chunk_size());
	test_mapping_before_arming(self, HIGH_GPA);
	test_mapping_before_arming(self, HIGH_GPA + chunk_size());
}

userfault_test(async, mapping_must_be_shared)
{
	void *mem = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, self->fd, 0);

	TEST_ASSERT(mem == MAP_FAILED && errno == EINVAL,
		    "A private mapping: expected EINVAL, errno %d", errno);
}

/* A store and one system call for any number of pages. */
userfault_test(async, mapping_clears_pages)
{
	u8 *bitmap = userfault_map_bitmap(self->fd, AGENT_GPA);
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		start_nth(self, i, i, i + 1);

	for (i = 0; i < NR_VCPUS; i++)
		userfault_clear_bit(bitmap, i);
	for (i = 0; i < NR_VCPUS; i++)
		waiter_assert_asleep(&self->accesses[i].waiter);

	userfault_resolve(self->fd, AGENT_GPA, NR_VCPUS * page_size,
			  KVM_USERFAULT_WAKE_ONLY, 0);
	for (i = 0; i < NR_VCPUS; i++) {
		finish(&self->accesses[i]);
		assert_succeeded(self, i);
	}
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), NR_VCPUS);
}

/* Who comes when the bit is clear but nobody has been woken yet does not wait. */
userfault_test(async, mapping_clears_for_later_accesses)
{
	userfault_clear_bit(userfault_map_bitmap(self->fd, AGENT_GPA), 0);
	kvm_access_perform(self->vcpus[0], AGENT_GPA);
	assert_succeeded(self, 0);
}

/* Stop an access to page 1 of those at @gpa by the mapping alone, and let it go on. */
static void test_mapping_stops_access(async_data *self, gpa_t gpa)
{
	struct kvm_access *access = &self->accesses[0];
	u8 *bitmap = userfault_map_bitmap(self->fd, gpa);
	struct kvm_userfault_event event;

	gpa += page_size;
	userfault_set_bit(bitmap, 1);
	kvm_access_start(access, self->vcpus[0], gpa);
	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[0], gpa);
	waiter_assert_asleep(&access->waiter);

	userfault_clear_bit(bitmap, 1);
	userfault_resolve(self->fd, gpa, page_size, KVM_USERFAULT_WAKE_ONLY, 0);
	finish(access);
}

userfault_test(async, mapping_stops_accesses)
{
	resolve(self, 0, NR_PAGES);
	test_mapping_stops_access(self, AGENT_GPA);
}

/* KVM sees the bits where no page has ever been armed, too. */
userfault_test(async, mapping_stops_accesses_to_other_pages)
{
	gpa_t gpa = AGENT_GPA + chunk_size();

	add_memory_at(self->vm, gpa, AGENT_SLOT + 1);
	test_mapping_stops_access(self, gpa);
}

#define NR_RACES	500

struct race {
	struct waiter waiter;
	struct kvm_vcpu *vcpu;
	gpa_t gpa;
	u64 nr_done;
	u64 nr_allowed;
};

static void race_fn(void *arg)
{
	struct race *race = arg;
	int i;

	for (i = 0; i < NR_RACES; i++) {
		while (READ_ONCE(race->nr_allowed) == i)
			sched_yield();
		kvm_access_perform(race->vcpu, race->gpa);
		WRITE_ONCE(race->nr_done, i + 1);
	}
}

/*
 * Clear the bit while the access gets in line.  Whatever comes first, it must not
 * sleep for ever.
 */
userfault_test(async, clearing_races_with_waiting)
{
	struct race race = { .vcpu = self->vcpus[0], .gpa = AGENT_GPA };
	u8 *bitmap = userfault_map_bitmap(self->fd, AGENT_GPA);
	int i, j;

	waiter_start(&race.waiter, race_fn, &race);
	for (i = 0; i < NR_RACES; i++) {
		WRITE_ONCE(race.nr_allowed, i + 1);
		for (j = 0; j < (i * 7) % 300; j++)
			barrier();
		userfault_clear_bit(bitmap, 0);
		userfault_resolve(self->fd, AGENT_GPA, page_size,
				  KVM_USERFAULT_WAKE_ONLY, 0);
		userfault_wait_until(READ_ONCE(race.nr_done) == i + 1);
		vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	}
	waiter_join(&race.waiter);
	assert_counts(self->fd, 0, 0, 0);
}

/*
 * Files: who has read what, and what happens when they go.
 */

userfault_test(async, file_is_closed_on_exec)
{
	TEST_ASSERT_EQ(fcntl(self->fd, F_GETFD), FD_CLOEXEC);
}

userfault_test(async, counts)
{
	int other = vm_create_userfault_fd(self->vm);
	int i;

	assert_counts(self->fd, 0, 0, 0);
	for (i = 0; i < 4; i++)
		start_nth(self, i, i, i + 1);
	assert_counts(self->fd, 4, 0, 4);

	userfault_read(self->fd);
	assert_counts(self->fd, 3, 1, 4);
	assert_counts(other, 3, 0, 4);
	userfault_read(other);
	userfault_read(other);
	assert_counts(self->fd, 1, 1, 4);
	assert_counts(other, 1, 2, 4);
	vm_userfault_read(self->vm);
	assert_counts(self->fd, 0, 1, 4);
	assert_counts(other, 0, 2, 4);

	resolve(self, 1, 1);
	assert_counts(self->fd, 0, 1, 3);
	assert_counts(other, 0, 1, 3);
	resolve(self, 0, 4);
	assert_counts(self->fd, 0, 0, 0);
	assert_counts(other, 0, 0, 0);

	for (i = 0; i < 4; i++)
		finish(&self->accesses[i]);
	kvm_close(other);
}

/* The successor gets what its predecessor has read, the oldest first. */
userfault_test(async, closing_gives_records_back)
{
	struct kvm_userfault_event event;
	int other = vm_create_userfault_fd(self->vm);
	u64 id;
	int i;

	for (i = 0; i < 4; i++)
		start_nth(self, i, i, i + 1);
	id = userfault_read(other).id;
	userfault_read(self->fd);
	userfault_read(other);
	eventfd_count(self);

	kvm_close(other);
	assert_counts(self->fd, 3, 1, 4);
	TEST_ASSERT_EQ(eventfd_count(self), 2);

	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[0], page_gpa(0));
	TEST_ASSERT_EQ(event.id, id);
	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[2], page_gpa(2));
	event = vm_userfault_read(self->vm);
	assert_event(&event, self->vcpus[3], page_gpa(3));

	for (i = 0; i < 4; i++)
		waiter_assert_asleep(&self->accesses[i].waiter);
	resolve(self, 0, 4);
	for (i = 0; i < 4; i++)
		finish(&self->accesses[i]);
}

static void assert_order(async_data *self, const u64 *ids, int fd)
{
	struct kvm_userfault_event event;
	int i;

	for (i = 0; i < 4; i++) {
		event = userfault_read(fd);
		assert_event(&event, self->vcpus[i], page_gpa(i));
		TEST_ASSERT_EQ(event.id, ids[i]);
	}
}

/* Whoever has had them before. */
userfault_test(async, records_stay_in_order)
{
	int fds[5], i;
	u64 ids[4];

	for (i = 0; i < ARRAY_SIZE(fds); i++)
		fds[i] = vm_create_userfault_fd(self->vm);
	for (i = 0; i < 4; i++)
		start_nth(self, i, i, i + 1);

	/* One that comes back between two that have. */
	for (i = 0; i < 3; i++)
		ids[i] = userfault_read(fds[i % 2]).id;
	ids[3] = ids[2] + 1;
	kvm_close(fds[0]);
	kvm_close(fds[1]);
	assert_order(self, ids, fds[2]);
	kvm_close(fds[2]);

	/* One that goes to a file which has read a later one already. */
	TEST_ASSERT_EQ(userfault_read(fds[3]).id, ids[0]);
	TEST_ASSERT_EQ(userfault_read(fds[4]).id, ids[1]);
	kvm_close(fds[3]);
	assert_counts(fds[4], 3, 1, 4);
	TEST_ASSERT_EQ(userfault_read(fds[4]).id, ids[0]);
	kvm_close(fds[4]);
	assert_order(self, ids, self->fd);

	resolve(self, 0, 4);
	for (i = 0; i < 4; i++)
		finish(&self->accesses[i]);
}

/* Those who sleep in read() learn of such records, too. */
userfault_test(async, closing_wakes_readers)
{
	int other = vm_create_userfault_fd(self->vm);
	struct reader reader;

	start_nth(self, 0, 0, 1);
	userfault_read(other);

	start_reader(&reader, self->fd);
	waiter_assert_asleep(&reader.waiter);
	kvm_close(other);
	waiter_join(&reader.waiter);
	TEST_ASSERT_EQ(reader.ret, sizeof(reader.event));
	assert_event(&reader.event, self->vcpus[0], page_gpa(0));

	resolve(self, 0, 1);
	finish(&self->accesses[0]);
}

static void epoll_wait_fn(void *arg)
{
	int epfd = *(int *)arg;

	TEST_ASSERT_EQ(epoll_events(epfd, USERFAULT_TIMEOUT_SECS * 1000), EPOLLIN);
}

/* A pager that goes after it was woken, and read nothing, leaves that to others. */
userfault_test(async, closing_passes_on_wakeups)
{
	int other = vm_create_userfault_fd(self->vm);
	int epfd = epoll_add(other, EPOLLIN | EPOLLEXCLUSIVE);
	struct waiter poller;
	struct reader reader;

	waiter_start(&poller, epoll_wait_fn, &epfd);
	waiter_wait_asleep(&poller);
	start_reader(&reader, self->fd);

	start_nth(self, 0, 0, 1);
	waiter_join(&poller);
	waiter_assert_asleep(&reader.waiter);

	kvm_close(other);
	waiter_join(&reader.waiter);
	TEST_ASSERT_EQ(reader.ret, sizeof(reader.event));
	assert_event(&reader.event, self->vcpus[0], page_gpa(0));

	resolve(self, 0, 1);
	finish(&self->accesses[0]);
	kvm_close(epfd);
}

userfault_test(async, closing_the_last_file_fails_accesses)
{
	int other = vm_create_userfault_fd(self->vm);

	start_nth(self, 0, 0, 1);
	start_nth(self, 1, 1, 2);
	userfault_read(other);

	kvm_close(self->fd);
	self->fd = -1;
	waiter_assert_asleep(&self->accesses[0].waiter);
	waiter_assert_asleep(&self->accesses[1].waiter);

	kvm_close(other);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
	assert_failed(self, 0);
	assert_failed(self, 1);

	/* As are those that come later, to pages that are armed. */
	kvm_access_perform(self->vcpus[2], page_gpa(2));
	assert_failed(self, 2);
	vm_userfault_clear(self->vm, page_gpa(3), page_size);
	kvm_access_perform(self->vcpus[3], page_gpa(3));
	assert_succeeded(self, 3);

	/* Until there is somebody again. */
	self->fd = vm_create_userfault_fd(self->vm);
	start_nth(self, 0, 0, 1);
	waiter_assert_asleep(&self->accesses[0].waiter);
	resolve(self, 0, 1);
	finish(&self->accesses[0]);
	assert_succeeded(self, 0);
}

static int use_guest_memfd(async_data *self)
{
	u64 size = NR_PAGES * page_size;
	void *mem;
	int fd;

	fd = vm_create_guest_memfd(self->vm, size, MAPPABLE_GUEST_MEMFD_FLAGS);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, 0, AGENT_GPA, 0, NULL, -1, 0);
	mem = mmap(self->hva, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	TEST_ASSERT(mem == self->hva, "mmap() failed, errno %d", errno);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   size, mem, fd, 0);
	return fd;
}

/*
 * Accesses by KVM go by the mapping, which keeps the file that has no descriptor any
 * more.  When the mapping goes as well there is nothing to be accessed, but still the
 * page to be waited for, and no more than that is to be seen of it.
 */
userfault_test(async, closing_the_guest_memfd)
{
	void *mem;
	int fd;

	if (!kvm_has_mappable_guest_memfd())
		SKIP(return, "guest_memfd cannot be mapped");

	fd = use_guest_memfd(self);
	start_nth(self, 0, 0, 1);
	start_nth(self, 1, 1, 2);
	kvm_close(fd);
	waiter_assert_asleep(&self->accesses[0].waiter);
	waiter_assert_asleep(&self->accesses[1].waiter);
	assert_counts(self->fd, 2, 0, 2);

	resolve(self, 0, 1);
	finish(&self->accesses[0]);
	TEST_ASSERT_EQ(self->accesses[0].error, 0);
	assert_succeeded(self, 0);

	mem = mmap(self->hva, NR_PAGES * page_size, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	TEST_ASSERT(mem == self->hva, "mmap() failed, errno %d", errno);
	waiter_assert_asleep(&self->accesses[1].waiter);
	assert_counts(self->fd, 1, 0, 1);

	resolve(self, 1, 1);
	finish(&self->accesses[1]);
	TEST_ASSERT_EQ(self->accesses[1].error, 0);
	assert_counts(self->fd, 0, 0, 0);

	/* Who comes later does the same. */
	start_nth(self, 2, 2, 1);
	resolve(self, 2, 1);
	finish(&self->accesses[2]);
	TEST_ASSERT_EQ(self->accesses[2].error, 0);
	TEST_ASSERT_EQ(kvm_access_perform(self->vcpus[3], page_gpa(1)), 0);
	assert_counts(self->fd, 0, 0, 0);
}

/* Before there has been a file, accesses wait for who uses the ioctl. */
userfault_test(async, no_file_is_needed)
{
	kvm_close(self->fd);
	self->fd = -1;
	vm_userfault_disable(self->vm);
	vm_userfault_enable_async(self->vm, 0);
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);

	start(self, 0, 0);
	vm_userfault_read(self->vm);
	waiter_assert_asleep(&self->accesses[0].waiter);
	vm_userfault_clear(self->vm, AGENT_GPA, page_size);
	finish(&self->accesses[0]);
	assert_succeeded(self, 0);
}

/* Wherever the page is: @gpa is where there is no other memory. */
static void test_access_waits_at(async_data *self, int vcpu, gpa_t gpa, u32 slot)
{
	struct kvm_access *access = &self->accesses[vcpu];
	struct kvm_userfault_event event;

	add_memory_at(self->vm, gpa, slot);
	gpa += 2 * page_size;
	vm_userfault_arm(self->vm, gpa, page_size);
	kvm_access_start(access, self->vcpus[vcpu], gpa);
	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[vcpu], gpa);
	waiter_assert_asleep(&access->waiter);

	userfault_resolve(self->fd, gpa, page_size, 0, 0);
	finish(access);
}

userfault_test(async, accesses_to_high_memory_wait)
{
	if (self->vm->max_gfn < (HIGH_GPA + 2 * chunk_size()) / self->vm->page_size)
		SKIP(return, "A guest can't have memory at %#llx", HIGH_GPA);

	test_access_waits_at(self, 0, HIGH_GPA - chunk_size(), AGENT_SLOT + 1);
	test_access_waits_at(self, 1, HIGH_GPA, AGENT_SLOT + 2);
	test_access_waits_at(self, 2, HIGH_GPA + chunk_size(), AGENT_SLOT + 3);
}

/* A file that comes later finds what has been waiting. */
userfault_test(async, file_finds_older_records)
{
	struct kvm_userfault_event event;
	int other;

	start_nth(self, 0, 0, 1);
	other = vm_create_userfault_fd(self->vm);
	TEST_ASSERT(userfault_is_readable(other, 0), "The record cannot be read");
	event = userfault_read(other);
	assert_event(&event, self->vcpus[0], page_gpa(0));

	userfault_resolve(other, AGENT_GPA, page_size, 0, 0);
	finish(&self->accesses[0]);
	kvm_close(other);
}

/* What it fails with as there is no descriptor for one more file. */
static int create_file_beyond_the_limit(struct kvm_vm *vm)
{
	struct rlimit old, none;
	int fd, error;

	TEST_ASSERT(!getrlimit(RLIMIT_NOFILE, &old), "getrlimit() failed, errno %d", errno);
	none = old;
	none.rlim_cur = 0;
	TEST_ASSERT(!setrlimit(RLIMIT_NOFILE, &none), "setrlimit() failed, errno %d", errno);
	fd = __vm_create_userfault_fd(vm);
	error = errno;
	TEST_ASSERT(!setrlimit(RLIMIT_NOFILE, &old), "setrlimit() failed, errno %d", errno);

	TEST_ASSERT(fd == -1, "There was a descriptor left, %d", fd);
	return error;
}

/* By two vCPUs. */
static void resolve_first_two(async_data *self)
{
	resolve(self, 0, 2);
	finish(&self->accesses[0]);
	finish(&self->accesses[1]);
	assert_succeeded(self, 0);
	assert_succeeded(self, 1);
}

/* A file that could not be created is none that goes: nothing fails, or is read again. */
userfault_test(async, failing_to_create_a_file_loses_nothing)
{
	struct kvm_userfault_event event;
	int other;

	start_nth(self, 0, 0, 1);
	start_nth(self, 1, 1, 2);
	userfault_read(self->fd);
	TEST_ASSERT_EQ(create_file_beyond_the_limit(self->vm), EMFILE);
	assert_counts(self->fd, 1, 1, 2);
	waiter_assert_asleep(&self->accesses[0].waiter);
	waiter_assert_asleep(&self->accesses[1].waiter);

	other = vm_create_userfault_fd(self->vm);
	event = userfault_read(other);
	assert_event(&event, self->vcpus[1], page_gpa(1));
	resolve_first_two(self);
	kvm_close(other);
}

/* Nor does it count as the first file, or the last one. */
userfault_test(async, failing_to_create_the_first_file_fails_no_access)
{
	struct kvm_userfault_event event;

	kvm_close(self->fd);
	self->fd = -1;
	vm_userfault_disable(self->vm);
	vm_userfault_enable_async(self->vm, 0);
	vm_userfault_arm(self->vm, AGENT_GPA, 2 * page_size);

	start(self, 0, 0);
	userfault_wait_until(vm_get_stat(self->vm, userfault_records) == 1);
	TEST_ASSERT_EQ(create_file_beyond_the_limit(self->vm), EMFILE);
	waiter_assert_asleep(&self->accesses[0].waiter);
	start(self, 1, 1);
	userfault_wait_until(vm_get_stat(self->vm, userfault_records) == 2);
	waiter_assert_asleep(&self->accesses[1].waiter);

	self->fd = vm_create_userfault_fd(self->vm);
	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[0], page_gpa(0));
	event = userfault_read(self->fd);
	assert_event(&event, self->vcpus[1], page_gpa(1));
	resolve_first_two(self);
}

/*
 * Disabling, and the end of the VM.
 */

static void assert_file_is_dead(int fd)
{
	struct pollfd pollfd = { .fd = fd, .events = POLLIN };
	struct kvm_userfault_event event;

	TEST_ASSERT_EQ(poll(&pollfd, 1, 0), 1);
	TEST_ASSERT_EQ(pollfd.revents, POLLHUP);
	TEST_ASSERT_EQ(read(fd, &event, sizeof(event)), 0);
	TEST_ASSERT_ERRNO(__userfault_resolve(fd, AGENT_GPA, page_size, 0, 0), ENODEV);
	assert_counts(fd, 0, 0, 0);
}

userfault_test(async, disabling_wakes_all)
{
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		start_nth(self, i, i, i + 1);
	userfault_read(self->fd);
	vm_userfault_read(self->vm);

	vm_userfault_disable(self->vm);
	for (i = 0; i < NR_VCPUS; i++) {
		finish(&self->accesses[i]);
		assert_succeeded(self, i);
	}
	assert_file_is_dead(self->fd);

	/* What comes next has nothing to do with the old file. */
	vm_userfault_enable_async(self->vm, 0);
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	assert_file_is_dead(self->fd);
	start(self, 0, 0);
	vm_userfault_read(self->vm);
	assert_file_is_dead(self->fd);
	waiter_assert_asleep(&self->accesses[0].waiter);
	vm_userfault_clear(self->vm, AGENT_GPA, page_size);
	finish(&self->accesses[0]);
}

userfault_test(async, disabling_ends_reads)
{
	struct reader readers[3];
	int i;

	for (i = 0; i < ARRAY_SIZE(readers); i++)
		start_reader(&readers[i], self->fd);
	vm_userfault_disable(self->vm);
	for (i = 0; i < ARRAY_SIZE(readers); i++) {
		waiter_join(&readers[i].waiter);
		TEST_ASSERT_EQ(readers[i].ret, 0);
	}
}

static void disable_fn(void *arg)
{
	vm_userfault_disable(arg);
}

static void delete_slot_fn(void *arg)
{
	vm_mem_region_delete(arg, AGENT_SLOT);
}

userfault_test(async, file_outlives_the_vm)
{
	u8 *bitmap = userfault_map_bitmap(self->fd, AGENT_GPA);
	struct reader reader;

	start_reader(&reader, self->fd);
	kvm_vm_free(self->vm);
	self->vm = NULL;

	waiter_join(&reader.waiter);
	TEST_ASSERT_EQ(reader.ret, 0);
	assert_file_is_dead(self->fd);

	/* Not that anybody would look at it. */
	userfault_clear_bit(bitmap, 0);
	TEST_ASSERT(!userfault_test_bit(bitmap, 0), "The mapping is gone");
	kvm_close(self->fd);
	self->fd = -1;
	TEST_ASSERT(userfault_test_bit(bitmap, 1), "The mapping is gone");
}

static sigjmp_buf bus_error;

static void handle_bus_error(int sig)
{
	siglongjmp(bus_error, 1);
}

static bool is_bus_error(u8 *address)
{
	struct sigaction action = { .sa_handler = handle_bus_error };

	TEST_ASSERT(!sigaction(SIGBUS, &action, NULL), "errno %d", errno);
	if (sigsetjmp(bus_error, 1))
		return true;

	READ_ONCE(*address);
	return false;
}

/* No memory is allocated for pages that can't be armed any more, nor for no pages. */
userfault_test(async, mapping_ends_with_userfault)
{
	u8 *used = userfault_map_bitmap(self->fd, AGENT_GPA);
	u8 *mapped = userfault_map_bitmap(self->fd, AGENT_GPA + chunk_size());
	u8 *unused = userfault_map_bitmap(self->fd, AGENT_GPA + 2 * chunk_size());
	u8 *outside = __kvm_mmap(page_size, PROT_READ, MAP_SHARED, self->fd, BIT_ULL(50));

	TEST_ASSERT(!is_bus_error(used), "The bitmap is not there");
	TEST_ASSERT(!is_bus_error(mapped), "The bitmap can't be mapped");
	TEST_ASSERT(is_bus_error(outside), "There are too many pages");
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 2);

	vm_userfault_disable(self->vm);
	TEST_ASSERT(!is_bus_error(used), "The bitmap went away");
	TEST_ASSERT(!is_bus_error(mapped), "The bitmap went away");
	TEST_ASSERT(is_bus_error(unused), "There is a bitmap for no page");
}

/* The file does not keep the VM, and the VM does not keep the file. */
userfault_test(async, file_does_not_keep_the_vm)
{
	kvm_close(self->fd);
	self->fd = vm_create_userfault_fd(self->vm);
	kvm_vm_free(self->vm);
	self->vm = NULL;
	assert_file_is_dead(self->fd);
}

/*
 * An access waits with the memslots as they are.  A change of them has to wait for
 * the access, and the resolver must not wait for the change.
 */
userfault_test(async, resolving_does_not_wait_for_memslot_updates)
{
	struct waiter deleter;

	start_nth(self, 0, 0, 1);
	start_nth(self, 1, 1, 2);
	waiter_start(&deleter, delete_slot_fn, self->vm);
	waiter_assert_asleep(&deleter);

	/* By the file, and by the attribute. */
	userfault_read(self->fd);
	userfault_resolve(self->fd, page_gpa(0), page_size, 0, 0);
	finish(&self->accesses[0]);

	userfault_read(self->fd);
	vm_userfault_clear(self->vm, page_gpa(1), page_size);
	finish(&self->accesses[1]);
	waiter_join(&deleter);
}

userfault_test(async, failing_does_not_wait_for_memslot_updates)
{
	struct waiter deleter;

	start_nth(self, 0, 0, 1);
	waiter_start(&deleter, delete_slot_fn, self->vm);
	waiter_assert_asleep(&deleter);
	userfault_resolve(self->fd, page_gpa(0), page_size, 0, EFAULT);
	finish(&self->accesses[0]);
	waiter_join(&deleter);
}

/* Nor do closing the last file and disabling, which let the accesses go. */
userfault_test(async, closing_does_not_wait_for_memslot_updates)
{
	struct waiter deleter;

	start_nth(self, 0, 0, 1);
	waiter_start(&deleter, delete_slot_fn, self->vm);
	waiter_assert_asleep(&deleter);
	kvm_close(self->fd);
	self->fd = -1;
	finish(&self->accesses[0]);
	waiter_join(&deleter);
}

userfault_test(async, disabling_lets_memslot_updates_go_on)
{
	struct waiter deleter, disabler;

	start_nth(self, 0, 0, 1);
	waiter_start(&deleter, delete_slot_fn, self->vm);
	waiter_assert_asleep(&deleter);
	waiter_start(&disabler, disable_fn, self->vm);
	finish(&self->accesses[0]);
	waiter_join(&deleter);
	waiter_join(&disabler);
}

/*
 * Something that holds slots_lock for as long as the test wants it to: it gets the dirty
 * log into memory that is not there.
 */
struct holder {
	struct waiter waiter;
	struct kvm_vm *vm;
	void *bitmap;
	int uffd;
};

static void get_dirty_log_fn(void *arg)
{
	struct holder *holder = arg;

	kvm_vm_get_dirty_log(holder->vm, AGENT_SLOT, holder->bitmap);
}

static bool init_holder(struct holder *holder, struct kvm_vm *vm)
{
	holder->vm = vm;
	holder->uffd = __uffd_open(0);
	if (holder->uffd < 0)
		return false;

	vm_mem_region_set_flags(vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	holder->bitmap = kvm_mmap(page_size, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uffd_register(holder->uffd, holder->bitmap, page_size, UFFDIO_REGISTER_MODE_MISSING);
	return true;
}

/* When vCPUs have run, which may need it for the first time. */
static void hold_slots_lock(struct holder *holder)
{
	struct pollfd pollfd = { .fd = holder->uffd, .events = POLLIN };

	waiter_start(&holder->waiter, get_dirty_log_fn, holder);
	userfault_wait_until(poll(&pollfd, 1, 0) == 1);
}

static void release_slots_lock(struct holder *holder)
{
	TEST_ASSERT_EQ(__uffd_zeropage(holder->uffd, holder->bitmap, page_size, 0), page_size);
	waiter_join(&holder->waiter);
	kvm_munmap(holder->bitmap, page_size);
	kvm_close(holder->uffd);
}

userfault_test(async, disabling_lets_accesses_go_on_at_once)
{
	struct waiter disabler;
	struct holder holder;

	if (!init_holder(&holder, self->vm))
		SKIP(return, "There is no userfaultfd");

	start_nth(self, 0, 0, 1);
	hold_slots_lock(&holder);
	waiter_start(&disabler, disable_fn, self->vm);
	finish(&self->accesses[0]);
	assert_succeeded(self, 0);
	waiter_assert_asleep(&disabler);

	/* Others do not wait any more. */
	kvm_access_perform(self->vcpus[1], page_gpa(1));
	assert_succeeded(self, 1);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 1);

	release_slots_lock(&holder);
	waiter_join(&disabler);
}

static void enable_fn(void *arg)
{
	vm_userfault_enable_async(arg, 0);
}

static void start_asleep(struct waiter *waiter, void (*fn)(void *arg), void *arg)
{
	waiter_start(waiter, fn, arg);
	waiter_assert_asleep(waiter);
}

/* What was enabled after it had begun is none of its business. */
userfault_test(async, disabling_disables_what_was_enabled)
{
	struct waiter disablers[2], enabler;
	struct holder holder;
	int i;

	if (!init_holder(&holder, self->vm))
		SKIP(return, "There is no userfaultfd");

	/* They get the lock in the order in which they have asked for it. */
	hold_slots_lock(&holder);
	start_asleep(&disablers[0], disable_fn, self->vm);
	start_asleep(&enabler, enable_fn, self->vm);
	start_asleep(&disablers[1], disable_fn, self->vm);
	release_slots_lock(&holder);
	waiter_join(&enabler);
	for (i = 0; i < ARRAY_SIZE(disablers); i++)
		waiter_join(&disablers[i]);
	TEST_ASSERT(is_enabled(self->vm), "Userfault was disabled twice");

	kvm_close(self->fd);
	self->fd = vm_create_userfault_fd(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	start_nth(self, 0, 0, 1);
	resolve(self, 0, 1);
	finish(&self->accesses[0]);
}

/*
 * Many waiters.
 */

#define NR_CROWD	64

FIXTURE(crowd) {
	struct kvm_vcpu *vcpus[NR_CROWD];
	struct kvm_access accesses[NR_CROWD];
	struct kvm_vm *vm;
	void *hva;
	int fd;
};

#define crowd_data FIXTURE_DATA(crowd)

FIXTURE_SETUP(crowd)
{
	if (kvm_check_cap(KVM_CAP_MAX_VCPUS) < NR_CROWD)
		SKIP(return, "64 vCPUs are needed");

	self->vm = kvm_access_create_vm(NR_CROWD, self->vcpus);
	self->hva = add_memory(self->vm);
	vm_userfault_enable_async(self->vm, 0);
	self->fd = vm_create_userfault_fd(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
}

FIXTURE_TEARDOWN(crowd)
{
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

static void start_crowd(crowd_data *self, bool one_page)
{
	int i;

	for (i = 0; i < NR_CROWD; i++)
		kvm_access_start(&self->accesses[i], self->vcpus[i],
				 page_gpa(one_page ? 0 : i));
	userfault_wait_for_waiters(self->fd, NR_CROWD);
}

static void finish_crowd(crowd_data *self)
{
	int i;

	for (i = 0; i < NR_CROWD; i++)
		waiter_join(&self->accesses[i].waiter);
	assert_counts(self->fd, 0, 0, 0);
}

/* Each of them has a record, and one resolve is for all of them. */
userfault_test(crowd, waits_for_one_page)
{
	struct kvm_userfault_event event;
	u64 seen = 0;
	int i;

	start_crowd(self, true);
	for (i = 0; i < NR_CROWD; i++) {
		event = userfault_read(self->fd);
		TEST_ASSERT_EQ(event.gpa, AGENT_GPA);
		TEST_ASSERT(!(seen & BIT_ULL(event.vcpu_id)), "Two records of a vCPU");
		seen |= BIT_ULL(event.vcpu_id);
	}
	assert_counts(self->fd, 0, NR_CROWD, NR_CROWD);

	userfault_resolve(self->fd, AGENT_GPA, page_size, 0, 0);
	finish_crowd(self);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), NR_CROWD);
}

userfault_test(crowd, waits_for_many_pages)
{
	struct kvm_userfault_event event;
	int i;

	start_crowd(self, false);
	for (i = 0; i < NR_CROWD; i++) {
		event = userfault_read(self->fd);
		TEST_ASSERT_EQ(event.gpa, page_gpa(event.vcpu_id));
		userfault_resolve(self->fd, event.gpa, page_size, 0, 0);
		waiter_join(&self->accesses[event.vcpu_id].waiter);
		assert_counts(self->fd, NR_CROWD - i - 1, 0, NR_CROWD - i - 1);
	}
	assert_counts(self->fd, 0, 0, 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), NR_CROWD);
}

userfault_test(crowd, is_let_go_by_disabling)
{
	start_crowd(self, false);
	vm_userfault_disable(self->vm);
	finish_crowd(self);
}

#define NR_ROUNDS	20

struct accessor {
	struct waiter waiter;
	struct kvm_vcpu *vcpu;
	gpa_t gpa;
};

/* The page is armed again after every access, by whoever sees that it is done. */
static void accessor_fn(void *arg)
{
	struct accessor *accessor = arg;
	int i;

	for (i = 0; i < NR_ROUNDS; i++) {
		kvm_access_perform(accessor->vcpu, accessor->gpa);
		vm_userfault_arm(accessor->vcpu->vm, accessor->gpa, page_size);
	}
	vm_userfault_clear(accessor->vcpu->vm, accessor->gpa, page_size);
}

struct pager {
	struct waiter waiter;
	u64 *seen;
	u64 nr;
	int fd;
};

#define NR_SHARERS	16

/*
 * An access that sees its page clear may be through, and the page armed again, before
 * the pager gets to wake it.  That is for the next access then, in vain, which gets a
 * new record.
 */
#define MAX_RECORDS	(4 * NR_SHARERS * NR_ROUNDS)

/* Reads a few at a time, until userfault is disabled. */
static void pager_fn(void *arg)
{
	struct kvm_userfault_event events[3];
	struct pager *pager = arg;
	ssize_t ret;
	int i;

	while ((ret = read(pager->fd, events, sizeof(events)))) {
		TEST_ASSERT(ret > 0 && !(ret % sizeof(*events)),
			    "read() returned %ld, errno %d", ret, errno);

		for (i = 0; i < ret / sizeof(*events); i++) {
			u64 id = events[i].id;

			TEST_ASSERT(id && id <= MAX_RECORDS, "Too many records");
			TEST_ASSERT(!__atomic_exchange_n(&pager->seen[id], 1,
							 __ATOMIC_RELAXED),
				    "Record %lu was read twice", id);
			pager->nr++;
			userfault_resolve(pager->fd, events[i].gpa, page_size, 0, 0);
		}
	}
}

/* Two files, and two threads for one of them. */
userfault_test(crowd, readers_share_the_queue)
{
	u64 *seen = calloc(MAX_RECORDS + 1, sizeof(*seen));
	struct accessor accessors[NR_SHARERS];
	struct pager pagers[3];
	u64 nr = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(pagers); i++) {
		pagers[i].fd = i == 1 ? pagers[0].fd : vm_create_userfault_fd(self->vm);
		pagers[i].seen = seen;
		pagers[i].nr = 0;
		waiter_start(&pagers[i].waiter, pager_fn, &pagers[i]);
	}
	for (i = 0; i < NR_SHARERS; i++) {
		accessors[i].vcpu = self->vcpus[i];
		accessors[i].gpa = page_gpa(i);
		waiter_start(&accessors[i].waiter, accessor_fn, &accessors[i]);
	}

	for (i = 0; i < NR_SHARERS; i++)
		waiter_join(&accessors[i].waiter);
	assert_counts(self->fd, 0, 0, 0);
	vm_userfault_disable(self->vm);
	for (i = 0; i < ARRAY_SIZE(pagers); i++) {
		waiter_join(&pagers[i].waiter);
		nr += pagers[i].nr;
	}

	TEST_ASSERT(nr >= NR_SHARERS * NR_ROUNDS, "%lu records for %u accesses", nr,
		    NR_SHARERS * NR_ROUNDS);
	TEST_ASSERT(nr <= vm_get_stat(self->vm, userfault_records),
		    "More records were read than there have been");
	kvm_close(pagers[0].fd);
	kvm_close(pagers[2].fd);
	free(seen);
}

/*
 * The queue comes and goes while accesses are on their way in: they have seen that
 * their page is armed, but nobody can see them yet.
 */

#define STRESS_MS	4000

enum stress_state {
	STRESS_GO,
	STRESS_PAUSE,
	STRESS_STOP,
};

static enum stress_state stress_state;

struct stress {
	struct waiter waiter;
	struct kvm_vcpu *vcpu;
	u64 nr;
};

static void stress_fn(void *arg)
{
	struct stress *stress = arg;
	enum stress_state state;
	int error;

	while ((state = READ_ONCE(stress_state)) != STRESS_STOP) {
		if (state == STRESS_PAUSE) {
			usleep(200);
			continue;
		}

		error = kvm_access_perform(stress->vcpu, AGENT_GPA);
		TEST_ASSERT(!error, "Access %lu failed, errno %d", stress->nr, error);
		stress->nr++;
	}
}

/*
 * Whoever wakes up preempts an access at once, wherever that is.  That makes the most
 * of it, but the test does without, too.
 */
static void try_realtime(void)
{
	struct sched_param param = { .sched_priority = 1 };

	if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &param))
		ksft_print_msg("No real-time priority, errno %d\n", errno);
}

/* Every access that is woken while its page is armed is on its way in again. */
static void waker_fn(void *arg)
{
	int *fd = arg;

	/* Until userfault is disabled. */
	while (!__userfault_resolve(READ_ONCE(*fd), AGENT_GPA, page_size,
				    KVM_USERFAULT_WAKE_ONLY, 0))
		;
	TEST_ASSERT_EQ(errno, ENODEV);
}

/* Let accesses go on while @round is called again and again. */
static void stress_accesses(async_data *self, void (*round)(async_data *self))
{
	u64 end = userfault_now_ms() + STRESS_MS;
	struct stress stress[NR_VCPUS];
	u64 nr = 0;
	int i;

	resolve(self, 0, NR_PAGES);
	kvm_close(self->fd);
	self->fd = -1;
	for (i = 0; i < NR_VCPUS; i++) {
		stress[i].vcpu = self->vcpus[i];
		stress[i].nr = 0;
		waiter_start(&stress[i].waiter, stress_fn, &stress[i]);
	}

	try_realtime();
	for (; userfault_now_ms() < end; nr++)
		round(self);
	WRITE_ONCE(stress_state, STRESS_STOP);
	for (i = 0; i < NR_VCPUS; i++)
		waiter_join(&stress[i].waiter);

	ksft_print_msg("%lu rounds\n", nr);
}

/* Arm the page, and let some accesses find that, and others be about to. */
static void arm_for_a_while(async_data *self, int fd)
{
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	usleep(random() % 200);
	userfault_resolve(fd, AGENT_GPA, page_size, KVM_USERFAULT_WAKE_ONLY, 0);
	usleep(random() % 200);
}

static void close_round(async_data *self)
{
	int fd = vm_create_userfault_fd(self->vm);

	arm_for_a_while(self, fd);
	userfault_resolve(fd, AGENT_GPA, page_size, KVM_USERFAULT_CLEAR_ONLY, 0);
	kvm_close(fd);
}

/* The last pager is gone, but not without having done its work. */
userfault_test(async, closing_races_with_accesses)
{
	stress_accesses(self, close_round);
}

/* Grace periods are longer the more there is to do, and this waits for many. */
static void disable_round(async_data *self)
{
	struct waiter waker;
	int fd;

	vm_userfault_disable(self->vm);
	vm_userfault_enable_async(self->vm, 0);
	fd = vm_create_userfault_fd(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	WRITE_ONCE(stress_state, STRESS_GO);
	waiter_start(&waker, waker_fn, &fd);
	usleep(1000 + random() % 1000);
	WRITE_ONCE(stress_state, STRESS_PAUSE);
	vm_userfault_disable(self->vm);
	waiter_join(&waker);
	kvm_close(fd);
}

userfault_test(async, disabling_races_with_accesses)
{
	stress_accesses(self, disable_round);
}

/* As do the pages of the bitmap, by mappings of it and by the attribute. */
#define NR_CHUNKS	1024
#define NR_POPULATORS	2

struct populator {
	struct waiter waiter;
	int error;
	int fd;
};

static void populator_fn(void *arg)
{
	struct populator *populator = arg;
	u64 size = NR_CHUNKS * page_size;
	void *mem = __kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, populator->fd, 0);

	populator->error = madvise(mem, size, MADV_POPULATE_READ) ? errno : 0;
	kvm_munmap(mem, size);
}

static void start_populators(struct populator *populators, int fd)
{
	int i;

	for (i = 0; i < NR_POPULATORS; i++) {
		populators[i].fd = fd;
		waiter_start(&populators[i].waiter, populator_fn, &populators[i]);
	}
}

static void begin_with_no_chunk(async_data *self)
{
	kvm_close(self->fd);
	vm_userfault_disable(self->vm);
	vm_userfault_enable_async(self->vm, 0);
	self->fd = vm_create_userfault_fd(self->vm);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), 0);
}

userfault_test(async, chunks_are_added_once)
{
	struct populator populators[NR_POPULATORS];
	int i, j;

	for (i = 0; i < 8; i++) {
		begin_with_no_chunk(self);
		start_populators(populators, self->fd);
		vm_userfault_arm(self->vm, 0, NR_CHUNKS * chunk_size());
		for (j = 0; j < NR_POPULATORS; j++) {
			waiter_join(&populators[j].waiter);
			TEST_ASSERT_EQ(populators[j].error, 0);
		}
		TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_bitmap_pages), NR_CHUNKS);
	}
}

/* Those that come too late find no bitmap any more, which is a bus error. */
userfault_test(async, disabling_races_with_mappings)
{
	struct populator populators[NR_POPULATORS];
	int i, j, nr = 0;

	try_realtime();
	for (i = 0; i < 20; i++) {
		begin_with_no_chunk(self);
		start_populators(populators, self->fd);
		userfault_wait_until(vm_get_stat(self->vm, userfault_bitmap_pages) > i);
		vm_userfault_disable(self->vm);
		for (j = 0; j < NR_POPULATORS; j++) {
			waiter_join(&populators[j].waiter);
			TEST_ASSERT(!populators[j].error || populators[j].error == EFAULT,
				    "errno %d", populators[j].error);
			nr += !!populators[j].error;
		}
	}
	ksft_print_msg("%d mappings of %d came too late\n", nr, i * j);
}

/*
 * KVM_USERFAULT_ASYNC_VCPU: faults of vCPUs wait as well.
 */

#define NR_RUNNERS	2

struct runner {
	struct waiter waiter;
	struct kvm_vcpu *vcpu;
	/* After KVM_RUN. */
	sigset_t blocked;
	int error;
	int ret;
};

FIXTURE(async_vcpu) {
	struct kvm_vcpu *vcpus[NR_RUNNERS];
	struct runner runners[NR_RUNNERS];
	struct kvm_vm *vm;
	void *hva;
	int fd;
};

#define async_vcpu_data FIXTURE_DATA(async_vcpu)

/* All pages are armed, and no page has its content. */
FIXTURE_SETUP(async_vcpu)
{
	int i;

	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, NR_RUNNERS, self->vcpus);
	self->hva = agent_add_memory(self->vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA,
				     AGENT_SLOT, NR_PAGES, 0);
	memset(self->hva, 0xee, NR_PAGES * page_size);
	for (i = 0; i < NR_RUNNERS; i++)
		self->runners[i].vcpu = self->vcpus[i];

	vm_userfault_enable_async(self->vm, KVM_USERFAULT_ASYNC_VCPU);
	self->fd = vm_create_userfault_fd(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
	catch_signals();
}

FIXTURE_TEARDOWN(async_vcpu)
{
	if (self->fd >= 0)
		kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

static void runner_fn(void *arg)
{
	struct runner *runner = arg;

	runner->ret = __vcpu_run(runner->vcpu);
	runner->error = errno;
	TEST_ASSERT(!pthread_sigmask(SIG_BLOCK, NULL, &runner->blocked), "pthread_sigmask()");
}

/* Run a vCPU that does nothing more than wait for a page. */
static void start_runner(struct runner *runner, int fd, unsigned int nr)
{
	waiter_start(&runner->waiter, runner_fn, runner);
	userfault_wait_for_waiters(fd, nr);
	waiter_wait_asleep(&runner->waiter);
}

static void assert_run_failed(struct runner *runner, int error, int exit_reason)
{
	waiter_join(&runner->waiter);
	TEST_ASSERT(runner->ret == -1 && runner->error == error,
		    "KVM_RUN: expected errno %d, got %d (errno %d)", error,
		    runner->ret, runner->error);
	TEST_ASSERT_EQ(runner->vcpu->run->exit_reason, exit_reason);
}

static void interrupt_runner(struct runner *runner)
{
	pthread_kill(runner->waiter.thread, SIGUSR1);
	assert_run_failed(runner, EINTR, KVM_EXIT_INTR);
}

/* The access that was under way is done now. */
static void assert_run_done(struct runner *runner)
{
	struct ucall uc;

	waiter_join(&runner->waiter);
	TEST_ASSERT(!runner->ret, "KVM_RUN failed, errno %d", runner->error);
	TEST_ASSERT_EQ(get_ucall(runner->vcpu, &uc), UCALL_SYNC);
}

static void fill_and_resolve(async_vcpu_data *self, gpa_t gpa)
{
	agent_fill(self->hva + (gpa - AGENT_GPA), gpa, 1);
	userfault_resolve(self->fd, gpa, page_size, 0, 0);
}

/* The access is to page 3, which @fill gives its content. */
static void test_vcpu_access(async_vcpu_data *self, enum agent_op op, u64 flags,
			     void (*fill)(void *hva))
{
	struct runner *runner = &self->runners[1];
	struct kvm_userfault_event event;

	agent_request(runner->vcpu, op, page_gpa(3), 1);
	start_runner(runner, self->fd, 1);
	event = userfault_read(self->fd);
	TEST_ASSERT(event.id, "A record without an id");
	TEST_ASSERT_EQ(event.gpa, page_gpa(3));
	TEST_ASSERT_EQ(event.size, page_size);
	TEST_ASSERT_EQ(event.flags, flags);
	TEST_ASSERT_EQ(event.vcpu_id, runner->vcpu->id);
	TEST_ASSERT_EQ(event.as_id, 0);
	waiter_assert_asleep(&runner->waiter);

	fill(self->hva + 3 * page_size);
	userfault_resolve(self->fd, event.gpa, page_size, 0, 0);
	assert_run_done(runner);
	TEST_ASSERT_EQ(vcpu_get_stat(runner->vcpu, userfault_exits), 0);
	TEST_ASSERT_EQ(vcpu_get_stat(runner->vcpu, userfault_waits), 1);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 1);
}

static void fill_page_3(void *hva)
{
	agent_fill(hva, page_gpa(3), 1);
}

userfault_test(async_vcpu, read_waits)
{
	test_vcpu_access(self, AGENT_READ, USERFAULT_READ, fill_page_3);
	TEST_ASSERT_EQ(agent_do(self->vcpus[0], AGENT_CHECK, page_gpa(3), 1), 0);
}

userfault_test(async_vcpu, write_waits)
{
	test_vcpu_access(self, AGENT_WRITE, USERFAULT_WRITE, fill_page_3);
	TEST_ASSERT_EQ(agent_do(self->vcpus[0], AGENT_READ, page_gpa(3), 0), 1);
}

userfault_test(async_vcpu, execution_waits)
{
	test_vcpu_access(self, AGENT_EXEC, USERFAULT_EXEC, agent_put_code);
	TEST_ASSERT_EQ(agent_result(self->vcpus[1]), 4);
}

static void resolver_fn(void *arg)
{
	async_vcpu_data *self = arg;
	u8 *bitmap = userfault_map_bitmap(self->fd, AGENT_GPA);
	struct kvm_userfault_event event;
	bool armed;
	int ret;

	while (read(self->fd, &event, sizeof(event)) == sizeof(event)) {
		/* The other vCPU may have been faster. */
		armed = userfault_test_bit(bitmap, (event.gpa - AGENT_GPA) / page_size);
		if (armed)
			agent_fill(self->hva + (event.gpa - AGENT_GPA), event.gpa, 1);
		ret = __userfault_resolve(self->fd, event.gpa, page_size,
					  armed ? 0 : KVM_USERFAULT_WAKE_ONLY, 0);
		/* Once the last bit is clear nobody waits for the end of this. */
		TEST_ASSERT(!ret || errno == ENODEV,
			    KVM_IOCTL_ERROR(KVM_USERFAULT_RESOLVE, ret));
	}
}

/* The guest sees the content of each page, and never leaves KVM_RUN. */
userfault_test(async_vcpu, all_pages_arrive)
{
	struct waiter resolver;
	int i;

	waiter_start(&resolver, resolver_fn, self);
	for (i = 0; i < NR_RUNNERS; i++) {
		agent_request(self->vcpus[i], AGENT_CHECK, AGENT_GPA, NR_PAGES);
		waiter_start(&self->runners[i].waiter, runner_fn, &self->runners[i]);
	}
	for (i = 0; i < NR_RUNNERS; i++) {
		assert_run_done(&self->runners[i]);
		TEST_ASSERT_EQ(vcpu_get_stat(self->vcpus[i], userfault_exits), 0);
	}
	TEST_ASSERT(vm_get_stat(self->vm, userfault_records) >= NR_PAGES,
		    "Fewer records than pages");
	vm_userfault_disable(self->vm);
	waiter_join(&resolver);
	agent_assert_content(self->hva, AGENT_GPA, NR_PAGES);
	for (i = 0; i < NR_RUNNERS; i++)
		TEST_ASSERT_EQ(agent_do(self->vcpus[i], AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
}

/* The fault is found again when the vCPU is run again. */
userfault_test(async_vcpu, signal_ends_the_wait)
{
	struct runner *runner = &self->runners[0];
	u64 id = 0;
	int i;

	agent_request(runner->vcpu, AGENT_READ, AGENT_GPA, 0);
	for (i = 0; i < 3; i++) {
		struct kvm_userfault_event event;

		start_runner(runner, self->fd, 1);
		event = userfault_read(self->fd);
		TEST_ASSERT_EQ(event.gpa, AGENT_GPA);
		TEST_ASSERT(event.id > id, "Queued again without a new id");
		id = event.id;
		interrupt_runner(runner);
		assert_counts(self->fd, 0, 0, 0);
	}

	/* Also if the record was not read, or the page was filled in between. */
	start_runner(runner, self->fd, 1);
	interrupt_runner(runner);
	TEST_ASSERT(!userfault_is_readable(self->fd, 0), "A record of nobody");
	fill_and_resolve(self, AGENT_GPA);
	TEST_ASSERT_EQ(agent_finish(runner->vcpu), agent_page_content(AGENT_GPA));
}

userfault_test(async_vcpu, immediate_exit_ends_the_wait)
{
	struct runner *runner = &self->runners[0];
	struct kvm_vcpu *vcpu = runner->vcpu;
	u64 nr;

	agent_request(vcpu, AGENT_READ, AGENT_GPA, 0);
	start_runner(runner, self->fd, 1);
	vcpu->run->immediate_exit = 1;
	interrupt_runner(runner);

	/* It does not even get in line. */
	nr = vm_get_stat(self->vm, userfault_records);
	TEST_ASSERT_ERRNO(__vcpu_run(vcpu), EINTR);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), nr);
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, userfault_waits), 1);

	vcpu->run->immediate_exit = 0;
	start_runner(runner, self->fd, 1);
	fill_and_resolve(self, AGENT_GPA);
	assert_run_done(runner);
}

/* Set while the vCPU runs, it is found by the fault, before that gets in line. */
userfault_test(async_vcpu, immediate_exit_comes_before_the_wait)
{
	struct runner *runner = &self->runners[0];
	struct kvm_vcpu *vcpu = runner->vcpu;
	u64 *word = self->hva;

	fill_and_resolve(self, AGENT_GPA);
	agent_request(vcpu, AGENT_SPIN, AGENT_GPA, agent_page_content(AGENT_GPA));
	waiter_start(&runner->waiter, runner_fn, runner);
	userfault_wait_until(agent_is_spinning(vcpu));

	WRITE_ONCE(vcpu->run->immediate_exit, 1);
	vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	assert_run_failed(runner, EINTR, KVM_EXIT_INTR);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, userfault_waits), 0);

	vcpu->run->immediate_exit = 0;
	start_runner(runner, self->fd, 1);
	WRITE_ONCE(*word, 0x600d);
	userfault_resolve(self->fd, AGENT_GPA, page_size, 0, 0);
	assert_run_done(runner);
	TEST_ASSERT_EQ(agent_result(vcpu), 0x600d);
}

/* Signals that are blocked but for KVM_RUN end the wait as well. */
userfault_test(async_vcpu, signal_mask_applies)
{
	struct runner *runner = &self->runners[0];
	struct {
		struct kvm_signal_mask mask;
		u64 sigset;
	} mask = { .mask.len = 8, .sigset = 0 };
	sigset_t blocked;

	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	TEST_ASSERT(!pthread_sigmask(SIG_BLOCK, &blocked, NULL), "pthread_sigmask()");
	TEST_ASSERT(!ioctl(runner->vcpu->fd, KVM_SET_SIGNAL_MASK, &mask), "errno %d", errno);

	agent_request(runner->vcpu, AGENT_READ, AGENT_GPA, 0);
	start_runner(runner, self->fd, 1);
	interrupt_runner(runner);
	TEST_ASSERT(sigismember(&runner->blocked, SIGUSR1), "The thread lost its signal mask");
	fill_and_resolve(self, AGENT_GPA);
	TEST_ASSERT_EQ(agent_finish(runner->vcpu), agent_page_content(AGENT_GPA));
}

static void test_vcpu_error(async_vcpu_data *self, int error)
{
	struct runner *runner = &self->runners[0];

	agent_request(runner->vcpu, AGENT_WRITE, AGENT_GPA, 1);
	start_runner(runner, self->fd, 1);
	userfault_resolve(self->fd, AGENT_GPA, page_size, 0, error);
	assert_run_failed(runner, error, KVM_EXIT_MEMORY_FAULT);
	vcpu_assert_userfault(runner->vcpu, AGENT_GPA, USERFAULT_WRITE);
	TEST_ASSERT_EQ(vcpu_get_stat(runner->vcpu, userfault_exits), 1);

	/* Another try is another access. */
	start_runner(runner, self->fd, 1);
	fill_and_resolve(self, AGENT_GPA);
	assert_run_done(runner);
}

userfault_test(async_vcpu, resolver_lets_kvm_run_fail_with_efault)
{
	test_vcpu_error(self, EFAULT);
}

userfault_test(async_vcpu, resolver_lets_kvm_run_fail_with_ehwpoison)
{
	test_vcpu_error(self, EHWPOISON);
}

userfault_test(async_vcpu, closing_the_last_file_fails_kvm_run)
{
	struct runner *runner = &self->runners[0];

	agent_request(runner->vcpu, AGENT_READ, AGENT_GPA, 0);
	start_runner(runner, self->fd, 1);
	kvm_close(self->fd);
	self->fd = -1;
	assert_run_failed(runner, EFAULT, KVM_EXIT_MEMORY_FAULT);
	vcpu_assert_userfault(runner->vcpu, AGENT_GPA, USERFAULT_READ);

	vcpu_run_expect_userfault(runner->vcpu, AGENT_GPA, USERFAULT_READ);
	vcpu_run_expect_userfault(runner->vcpu, AGENT_GPA, USERFAULT_READ);

	self->fd = vm_create_userfault_fd(self->vm);
	start_runner(runner, self->fd, 1);
	fill_and_resolve(self, AGENT_GPA);
	assert_run_done(runner);
}

static void assert_nothing_to_map(struct runner *runner, gpa_t gpa)
{
	assert_run_failed(runner, EFAULT, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(runner->vcpu->run->memory_fault.flags, 0);
	TEST_ASSERT_EQ(runner->vcpu->run->memory_fault.gpa, gpa);
}

/*
 * As without the flag: armed comes first, so that they go on waiting, and that there
 * is no file any more is an error as soon as the page is released.
 */
userfault_test(async_vcpu, closing_the_guest_memfd)
{
	u64 size = NR_PAGES * page_size;
	struct runner *runner;
	int fd, i;

	if (!kvm_has_mappable_guest_memfd())
		SKIP(return, "guest_memfd cannot be mapped");

	fd = vm_create_guest_memfd(self->vm, size, MAPPABLE_GUEST_MEMFD_FLAGS);
	vm_mem_region_delete(self->vm, AGENT_SLOT);
	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   size, NULL, fd, 0);
	for (i = 0; i < NR_RUNNERS; i++) {
		agent_request(self->vcpus[i], AGENT_READ, page_gpa(i), 0);
		start_runner(&self->runners[i], self->fd, i + 1);
	}

	kvm_close(fd);
	for (i = 0; i < NR_RUNNERS; i++)
		waiter_assert_asleep(&self->runners[i].waiter);
	assert_counts(self->fd, NR_RUNNERS, 0, NR_RUNNERS);

	/* Who is interrupted waits once more. */
	interrupt_runner(&self->runners[0]);
	start_runner(&self->runners[0], self->fd, NR_RUNNERS);

	userfault_resolve(self->fd, AGENT_GPA, NR_RUNNERS * page_size, 0, 0);
	for (i = 0; i < NR_RUNNERS; i++) {
		runner = &self->runners[i];
		assert_nothing_to_map(runner, page_gpa(i));
		waiter_start(&runner->waiter, runner_fn, runner);
		assert_nothing_to_map(runner, page_gpa(i));
	}
	assert_counts(self->fd, 0, 0, 0);

	vm_set_user_memory_region2(self->vm, AGENT_SLOT, KVM_MEM_GUEST_MEMFD, AGENT_GPA,
				   0, NULL, -1, 0);
	vcpu_run(self->vcpus[0]);
	TEST_ASSERT_KVM_EXIT_REASON(self->vcpus[0], KVM_EXIT_MMIO);
}

userfault_test(async_vcpu, disabling_lets_vcpus_go_on)
{
	int i;

	agent_fill(self->hva, AGENT_GPA, NR_PAGES);
	for (i = 0; i < NR_RUNNERS; i++) {
		agent_request(self->vcpus[i], AGENT_CHECK, AGENT_GPA, NR_PAGES);
		start_runner(&self->runners[i], self->fd, i + 1);
	}
	vm_userfault_disable(self->vm);

	for (i = 0; i < NR_RUNNERS; i++) {
		assert_run_done(&self->runners[i]);
		TEST_ASSERT_EQ(agent_do(self->vcpus[i], AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
	}
}

/* Not only when it is disabled for good. */
userfault_test(async_vcpu, disabling_lets_vcpus_go_on_at_once)
{
	struct runner *runner = &self->runners[0];
	struct waiter disabler;
	struct holder holder;

	agent_fill(self->hva, AGENT_GPA, NR_PAGES);
	if (!init_holder(&holder, self->vm))
		SKIP(return, "There is no userfaultfd");

	agent_request(runner->vcpu, AGENT_CHECK, AGENT_GPA, NR_PAGES);
	start_runner(runner, self->fd, 1);
	hold_slots_lock(&holder);
	waiter_start(&disabler, disable_fn, self->vm);
	assert_run_done(runner);
	TEST_ASSERT_EQ(agent_result(runner->vcpu), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpus[1], AGENT_CHECK, AGENT_GPA, NR_PAGES), 0);
	waiter_assert_asleep(&disabler);

	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpus[0], userfault_waits), 1);
	TEST_ASSERT_EQ(vcpu_get_stat(self->vcpus[1], userfault_waits), 0);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 1);

	release_slots_lock(&holder);
	waiter_join(&disabler);
}

/* A vCPU that waits is not in the way of anything that the VMM does. */
userfault_test(async_vcpu, memslot_updates_do_not_wait_for_vcpus)
{
	struct runner *runner = &self->runners[0];
	struct waiter deleter;

	agent_request(runner->vcpu, AGENT_READ, AGENT_GPA, 0);
	start_runner(runner, self->fd, 1);

	vm_userfault_arm(self->vm, AGENT_GPA, page_size);
	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	waiter_start(&deleter, delete_slot_fn, self->vm);
	waiter_join(&deleter);
	waiter_assert_asleep(&runner->waiter);

	/* There is no memory any more. */
	userfault_resolve(self->fd, AGENT_GPA, page_size, 0, 0);
	waiter_join(&runner->waiter);
	TEST_ASSERT(!runner->ret, "KVM_RUN failed, errno %d", runner->error);
	TEST_ASSERT_KVM_EXIT_REASON(runner->vcpu, KVM_EXIT_MMIO);
}

/* A signal makes KVM_RUN fail, and may do so at any time.  Nothing else does. */
static void persistent_runner_fn(void *arg)
{
	struct runner *runner = arg;

	do {
		runner_fn(runner);
	} while (runner->ret == -1 && runner->error == EINTR);
}

struct storm {
	struct waiter waiter;
	struct runner *runners;
	bool stop;
};

static void storm_fn(void *arg)
{
	struct storm *storm = arg;
	int i;

	while (!READ_ONCE(storm->stop)) {
		for (i = 0; i < NR_RUNNERS; i++)
			pthread_kill(storm->runners[i].waiter.thread, SIGUSR1);
		usleep(random() % 300);
	}
}

static void interrupted_round(async_vcpu_data *self)
{
	struct storm storm = { .runners = self->runners };
	int i;

	memset(self->hva, 0xee, NR_PAGES * page_size);
	vm_userfault_enable_async(self->vm, KVM_USERFAULT_ASYNC_VCPU);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);

	for (i = 0; i < NR_RUNNERS; i++) {
		agent_request(self->vcpus[i], AGENT_CHECK, page_gpa(i), NR_PAGES - i);
		waiter_start(&self->runners[i].waiter, persistent_runner_fn,
			     &self->runners[i]);
	}
	waiter_start(&storm.waiter, storm_fn, &storm);

	agent_fill(self->hva, AGENT_GPA, NR_PAGES);
	usleep(random() % 3000);
	vm_userfault_disable(self->vm);
	WRITE_ONCE(storm.stop, true);
	waiter_join(&storm.waiter);
	for (i = 0; i < NR_RUNNERS; i++) {
		assert_run_done(&self->runners[i]);
		TEST_ASSERT_EQ(agent_result(self->vcpus[i]), 0);
	}
}

/* Wherever it finds them: entering or leaving the wait, or with a fault in hand. */
userfault_test(async_vcpu, disabling_races_with_vcpus)
{
	u64 end = userfault_now_ms() + STRESS_MS, nr;
	int i;

	kvm_close(self->fd);
	self->fd = -1;
	vm_userfault_disable(self->vm);

	try_realtime();
	for (nr = 0; userfault_now_ms() < end; nr++)
		interrupted_round(self);

	for (i = 0; i < NR_RUNNERS; i++)
		TEST_ASSERT_EQ(vcpu_get_stat(self->vcpus[i], userfault_exits), 0);
	ksft_print_msg("%lu rounds, %lu waits\n", nr,
		       vcpu_get_stat(self->vcpus[0], userfault_waits));
}

/* Without the flag vCPUs exit, and nothing is queued. */
userfault_test(async_vcpu, needs_its_flag)
{
	vm_userfault_disable(self->vm);
	vm_userfault_enable_async(self->vm, 0);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);

	agent_expect_userfault(self->vcpus[0], AGENT_READ, AGENT_GPA, 0, AGENT_GPA,
			       USERFAULT_READ);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
}

/*
 * Trace events.
 */

static const char * const trace_events[] = {
	"kvm_userfault_arm",
	"kvm_userfault_clear",
	"kvm_userfault_exit",
	"kvm_userfault_wait",
	"kvm_userfault_wake",
};

/* Those of this process, and of threads that it creates from now on. */
static void trace_start(const char *dir)
{
	char name[128];
	int i;

	trace_write(dir, "options/event-fork", 1);
	trace_write(dir, "set_event_pid", getpid());
	for (i = 0; i < ARRAY_SIZE(trace_events); i++) {
		snprintf(name, sizeof(name), "events/kvm/%s/enable", trace_events[i]);
		trace_write(dir, name, 1);
	}
}

/* How many there are, in @dir, with @text in it. */
static int trace_count(const char *dir, const char *text)
{
	FILE *file = trace_open(dir, "trace", "r");
	char line[512];
	int nr = 0;

	while (fgets(line, sizeof(line), file))
		nr += line[0] != '#' && strstr(line, text);
	fclose(file);
	return nr;
}

static void __printf(3, 4) trace_assert(const char *dir, int nr, const char *format, ...)
{
	char text[256];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	TEST_ASSERT(trace_count(dir, text) == nr, "%d events, expected %d: %s",
		    trace_count(dir, text), nr, text);
}

/* Each event of an exit for the first page, and of a wait for the second one. */
static void trace_assert_all(const char *dir, const struct kvm_userfault_event *event)
{
	u64 gfn = AGENT_GPA / page_size;

	trace_assert(dir, 1, "kvm_userfault_arm: %#016lx -- %#016lx\n", gfn, gfn + 2);
	trace_assert(dir, 1, "kvm_userfault_exit: vcpu 0 gfn %#lx flags %#lx\n", gfn,
		     (u64)USERFAULT_WRITE);
	trace_assert(dir, 1, "kvm_userfault_clear: %#016lx -- %#016lx\n", gfn, gfn + 1);
	trace_assert(dir, 1, "kvm_userfault_wait: id %llu vcpu 1 gpa %#llx flags %#llx\n",
		     event->id, event->gpa, event->flags);
	trace_assert(dir, 1, "kvm_userfault_clear: %#016lx -- %#016lx\n", gfn + 1, gfn + 2);
	trace_assert(dir, 1, "kvm_userfault_wake: %#016lx -- %#016lx error 0\n", gfn + 1,
		     gfn + 2);
	/* Nobody was to be woken for the first one. */
	trace_assert(dir, 6, "kvm_userfault_");
}

static void trace_accesses(const char *dir)
{
	struct kvm_userfault_event event;
	struct kvm_access access;
	struct kvm_vcpu *vcpus[2];
	struct kvm_vm *vm = agent_create_vm(VM_SHAPE_DEFAULT, 2, vcpus);
	int fd;

	agent_add_memory(vm, VM_MEM_SRC_ANONYMOUS, AGENT_GPA, AGENT_SLOT, NR_PAGES, 0);
	vm_userfault_enable_async(vm, 0);
	fd = vm_create_userfault_fd(vm);

	trace_start(dir);
	vm_userfault_arm(vm, AGENT_GPA, 2 * page_size);
	agent_expect_userfault(vcpus[0], AGENT_WRITE, AGENT_GPA, 1, AGENT_GPA,
			       USERFAULT_WRITE);
	userfault_resolve(fd, AGENT_GPA, page_size, 0, 0);
	agent_finish(vcpus[0]);

	kvm_access_start(&access, vcpus[1], page_gpa(1));
	event = userfault_read(fd);
	userfault_resolve(fd, page_gpa(1), page_size, 0, 0);
	waiter_join(&access.waiter);
	trace_assert_all(dir, &event);

	kvm_close(fd);
	kvm_vm_free(vm);
}

userfault_test(capability, trace_events)
{
	const char *dir = trace_create();

	if (!dir)
		SKIP(return, "There is no tracefs, or not for us");

	trace_accesses(dir);
	trace_remove(dir);
}

int main(int argc, char *argv[])
{
	u64 flags = KVM_USERFAULT_ASYNC | KVM_USERFAULT_ASYNC_VCPU | KVM_USERFAULT_EVENTFD;

	TEST_REQUIRE((kvm_check_cap(KVM_CAP_USERFAULT) & flags) == flags);

	page_size = getpagesize();

	return test_harness_run(argc, argv);
}
