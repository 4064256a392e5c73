// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of userfaultfd on mappings of a guest_memfd: one function per rule.
 *
 * The file is mapped twice.  The first mapping is the one that is registered
 * with userfaultfd, the second one shows what is in the file.  Whether a page is
 * in the file at all is what mincore() tells, without allocating it, of pages
 * that are more than allocated, i.e. were filled, or cleared.
 */
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfaultfd_util.h"

/* The kernels that run this with every debug option on are slow. */
#define TEST_TIMEOUT_SECS	60

#define uffd_test(fixture, name) \
	TEST_F_TIMEOUT(fixture, name, TEST_TIMEOUT_SECS)

/* How long something may take that must happen, before that is an error. */
#define WAIT_SECS		30
/* How long something has time to happen that must not happen. */
#define NEVER_USECS		50000

#define NR_PAGES		16

#define MISSING			UFFDIO_REGISTER_MODE_MISSING
#define MINOR			UFFDIO_REGISTER_MODE_MINOR
#define WP			UFFDIO_REGISTER_MODE_WP
#define RWP			UFFDIO_REGISTER_MODE_RWP

#define FAULT_WRITE		UFFD_PAGEFAULT_FLAG_WRITE
#define FAULT_MINOR		UFFD_PAGEFAULT_FLAG_MINOR

/* What freed memory is full of, which no page of a guest_memfd may ever show. */
#define STALE_BYTE		0xa5

static size_t page_size;

/*
 * Threads that access memory, because that may take them until it is filled.
 */

struct access {
	pthread_t thread;
	u8 *addr;
	bool write;
	u8 val;
	bool sigbus;
	pid_t tid;
	atomic_bool done;
};

static __thread sigjmp_buf access_jmpbuf;

static void access_sigbus(int sig)
{
	siglongjmp(access_jmpbuf, 1);
}

static void *access_thread(void *arg)
{
	struct access *a = arg;

	a->tid = kvm_gettid();
	if (sigsetjmp(access_jmpbuf, 1))
		a->sigbus = true;
	else if (a->write)
		WRITE_ONCE(*a->addr, a->val);
	else
		a->val = READ_ONCE(*a->addr);
	atomic_store(&a->done, true);

	return NULL;
}

static void access_start(struct access *a, void *addr)
{
	a->addr = addr;
	a->sigbus = false;
	atomic_store(&a->done, false);
	kvm_pthread_create(&a->thread, NULL, access_thread, a);
}

static void read_start(struct access *a, void *addr)
{
	a->write = false;
	access_start(a, addr);
}

static void write_start(struct access *a, void *addr, u8 val)
{
	a->write = true;
	a->val = val;
	access_start(a, addr);
}

static void access_join(struct access *a)
{
	struct timespec deadline;
	int ret;

	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += WAIT_SECS;
	ret = pthread_timedjoin_np(a->thread, NULL, &deadline);
	TEST_ASSERT(!ret, "The access to %p does not finish, error %d", a->addr, ret);
}

static void access_finish(struct access *a)
{
	access_join(a);
	TEST_ASSERT(!a->sigbus, "The access to %p got SIGBUS", a->addr);
}

static void access_expect_sigbus(struct access *a)
{
	access_join(a);
	TEST_ASSERT(a->sigbus, "The access to %p got no SIGBUS", a->addr);
}

static void assert_blocked(struct access *a)
{
	usleep(NEVER_USECS);
	TEST_ASSERT(!atomic_load(&a->done), "The access to %p did not wait", a->addr);
}

static void read_expect(void *addr, u8 val)
{
	struct access a;

	read_start(&a, addr);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, val);
}

static void read_expect_sigbus(void *addr)
{
	struct access a;

	read_start(&a, addr);
	access_expect_sigbus(&a);
}

static void write_expect_sigbus(void *addr)
{
	struct access a;

	write_start(&a, addr, 1);
	access_expect_sigbus(&a);
}

/*
 * A file and its mappings.
 */

FIXTURE(gmem) {
	struct kvm_vm *vm;
	size_t size;
	int fd;
	int uffd;
	u8 *mem;
	u8 *alias;
	/* What is copied: page N is full of the byte content(N). */
	u8 *src;
};

#define gmem_data FIXTURE_DATA(gmem)

static u8 content(u64 page)
{
	return 0x10 + page;
}

static void gmem_init(gmem_data *self, struct kvm_vm *vm, int fd)
{
	struct sigaction sa = { .sa_handler = access_sigbus };
	u64 i;

	sigaction(SIGBUS, &sa, NULL);

	self->vm = vm;
	self->size = NR_PAGES * page_size;
	self->fd = fd;
	self->uffd = -1;
	/* Room behind the end of the file, to see that nothing is filled there. */
	self->mem = kvm_mmap(self->size + page_size, PROT_READ | PROT_WRITE,
			     MAP_SHARED, fd);
	self->alias = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	self->src = kvm_mmap(self->size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (i = 0; i < NR_PAGES; i++)
		memset(self->src + i * page_size, content(i), page_size);
}

static bool can_write(void)
{
	return kvm_has_guest_memfd_flags(GUEST_MEMFD_FLAG_WRITE);
}

static u64 uffd_features(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int uffd = syscall(__NR_userfaultfd, O_CLOEXEC);

	TEST_ASSERT(uffd >= 0, "userfaultfd() failed, errno %d", errno);
	TEST_ASSERT(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API failed, errno %d", errno);
	close(uffd);

	return api.features;
}

static void gmem_create(gmem_data *self)
{
	struct kvm_vm *vm = vm_create_barebones();
	u64 flags = MAPPABLE_GUEST_MEMFD_FLAGS;

	if (can_write())
		flags |= GUEST_MEMFD_FLAG_WRITE;

	gmem_init(self, vm, vm_create_guest_memfd(vm, NR_PAGES * page_size, flags));
}

static void gmem_destroy(gmem_data *self)
{
	if (self->uffd >= 0)
		close(self->uffd);
	munmap(self->mem, self->size + page_size);
	kvm_munmap(self->alias, self->size);
	kvm_munmap(self->src, self->size);
	if (self->fd >= 0)
		close(self->fd);
	if (self->vm)
		kvm_vm_free(self->vm);
}

FIXTURE_SETUP(gmem)
{
	gmem_create(self);
}

FIXTURE_TEARDOWN(gmem)
{
	gmem_destroy(self);
}

static void use_file(gmem_data *self, int fd)
{
	kvm_munmap(self->mem, self->size + page_size);
	kvm_munmap(self->alias, self->size);
	kvm_munmap(self->src, self->size);
	close(self->fd);
	gmem_init(self, self->vm, fd);
}

/*
 * Memory of a file as of shmem: a test of this fixture is run with both, and both must
 * do the same.
 */

FIXTURE(file) {
	gmem_data gmem;
};

FIXTURE_VARIANT(file) {
	bool shmem;
};

FIXTURE_VARIANT_ADD(file, guest_memfd) {
	.shmem = false,
};

FIXTURE_VARIANT_ADD(file, shmem) {
	.shmem = true,
};

FIXTURE_SETUP(file)
{
	gmem_create(&self->gmem);
	if (variant->shmem)
		use_file(&self->gmem, kvm_memfd_alloc(self->gmem.size, false));
}

FIXTURE_TEARDOWN(file)
{
	gmem_destroy(&self->gmem);
}

static u8 *mem_page(gmem_data *self, u64 page)
{
	return self->mem + page * page_size;
}

static u8 *alias_page(gmem_data *self, u64 page)
{
	return self->alias + page * page_size;
}

static u8 *src_page(gmem_data *self, u64 page)
{
	return self->src + page * page_size;
}

static bool is_in_file(gmem_data *self, u64 page)
{
	u8 *addr = alias_page(self, page);
	unsigned char vec;

	TEST_ASSERT(!mincore(addr, page_size, &vec), "mincore() failed, errno %d", errno);
	return vec & 1;
}

static void assert_in_file(gmem_data *self, u64 page, bool expected)
{
	TEST_ASSERT(is_in_file(self, page) == expected, "Page %lu must%s be in the file",
		    page, expected ? "" : " not");
}

static void assert_page(const u8 *mem, u8 val)
{
	size_t i;

	for (i = 0; i < page_size; i++)
		TEST_ASSERT(READ_ONCE(mem[i]) == val,
			    "Byte %#lx of a page: expected %#x, got %#x", i, val, mem[i]);
}

static void assert_page_content(gmem_data *self, u64 page)
{
	assert_in_file(self, page, true);
	assert_page(alias_page(self, page), content(page));
}

/* Put a page in the file without mapping it where userfaultfd is at work. */
static void fill_by_alias(gmem_data *self, u64 page)
{
	memset(alias_page(self, page), content(page), page_size);
}

static void punch(gmem_data *self, u64 page, u64 nr)
{
	kvm_fallocate(self->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      page * page_size, nr * page_size);
}

static u64 register_mem(gmem_data *self, u64 features, u64 mode)
{
	self->uffd = uffd_open(features);
	return uffd_register(self->uffd, self->mem, self->size, mode);
}

static s64 copy(gmem_data *self, u64 page, u64 nr)
{
	return __uffd_copy(self->uffd, mem_page(self, page), src_page(self, page),
			   nr * page_size, 0);
}

static s64 zeropage(gmem_data *self, u64 page, u64 nr)
{
	return __uffd_zeropage(self->uffd, mem_page(self, page), nr * page_size, 0);
}

static s64 cont(gmem_data *self, u64 page, u64 nr)
{
	return __uffd_continue(self->uffd, mem_page(self, page), nr * page_size, 0);
}

static s64 poison(gmem_data *self, u64 page, u64 nr)
{
	return __uffd_poison(self->uffd, mem_page(self, page), nr * page_size, 0);
}

/* Returns false if there is none for @msecs. */
static bool read_msg(int uffd, struct uffd_msg *msg, int msecs)
{
	struct pollfd pollfd = { .fd = uffd, .events = POLLIN };
	ssize_t len;

	if (!poll(&pollfd, 1, msecs))
		return false;

	TEST_ASSERT_EQ(pollfd.revents, POLLIN);
	len = read(uffd, msg, sizeof(*msg));
	/* Somebody may have woken who was waiting. */
	if (len < 0 && errno == EAGAIN)
		return false;
	TEST_ASSERT(len == sizeof(*msg), "read() returned %ld, errno %d", len, errno);
	return true;
}

static void expect_fault_msg(int uffd, void *addr, u64 flags, struct uffd_msg *msg)
{
	TEST_ASSERT(read_msg(uffd, msg, WAIT_SECS * 1000), "No fault on %p", addr);
	TEST_ASSERT_EQ(msg->event, UFFD_EVENT_PAGEFAULT);
	TEST_ASSERT_EQ(msg->arg.pagefault.address, (u64)addr);
	TEST_ASSERT_EQ(msg->arg.pagefault.flags, flags);
}

static void expect_fault(int uffd, void *addr, u64 flags)
{
	struct uffd_msg msg;

	expect_fault_msg(uffd, addr, flags, &msg);
}

static void assert_no_fault(int uffd)
{
	struct uffd_msg msg = {};

	TEST_ASSERT(!read_msg(uffd, &msg, 0), "Event %#x, flags %#llx, at %#llx",
		    msg.event, msg.arg.pagefault.flags, msg.arg.pagefault.address);
}

/*
 * Registration.
 */

#define IOCTL_BIT(name)		BIT_ULL(_UFFDIO_##name)
#define IOCTLS_ALWAYS		(IOCTL_BIT(WAKE) | IOCTL_BIT(COPY) |		\
				 IOCTL_BIT(ZEROPAGE) | IOCTL_BIT(POISON))

/* Each of them, in turn, on the four pages from @page on. */
static void assert_ioctls_work(gmem_data *self, u64 page, u64 ioctls)
{
	fill_by_alias(self, page + 3);

	TEST_ASSERT_EQ(copy(self, page, 1), page_size);
	TEST_ASSERT_EQ(zeropage(self, page + 1, 1), page_size);
	TEST_ASSERT_EQ(poison(self, page + 2, 1), page_size);
	if (ioctls & IOCTL_BIT(CONTINUE))
		TEST_ASSERT_EQ(cont(self, page + 3, 1), page_size);
	TEST_ASSERT_EQ(__uffd_wake(self->uffd, mem_page(self, page), 4 * page_size), 0);

	assert_page_content(self, page);
	read_expect(mem_page(self, page + 1), 0);
	read_expect_sigbus(mem_page(self, page + 2));
}

/* The ioctls that are reported are those that work, and no other. */
uffd_test(gmem, modes_and_their_ioctls)
{
	static const struct {
		u64 mode;
		u64 ioctls;
	} modes[] = {
		{ MISSING,		IOCTLS_ALWAYS },
		{ MINOR,		IOCTLS_ALWAYS | IOCTL_BIT(CONTINUE) },
		{ MISSING | MINOR,	IOCTLS_ALWAYS | IOCTL_BIT(CONTINUE) },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		TEST_ASSERT_EQ(register_mem(self, 0, modes[i].mode), modes[i].ioctls);
		assert_ioctls_work(self, 4 * i, modes[i].ioctls);
		close(self->uffd);
	}
	self->uffd = -1;
}

/* Of a range with other memory before or after it, what works everywhere is reported. */
uffd_test(gmem, ioctls_of_a_range_with_other_memory)
{
	u64 ioctls;
	u8 *mem;
	int i;

	self->uffd = uffd_open(0);
	for (i = 0; i < 2; i++) {
		mem = kvm_mmap(2 * page_size, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1);
		TEST_ASSERT_EQ(__uffd_register(self->uffd, mem, 2 * page_size, MISSING,
					       &ioctls), 0);
		TEST_ASSERT(ioctls & IOCTL_BIT(MOVE), "Anonymous memory can be moved");

		TEST_ASSERT(mmap(mem + i * page_size, page_size, PROT_READ | PROT_WRITE,
				 MAP_SHARED | MAP_FIXED, self->fd, 0) != MAP_FAILED,
			    "mmap() failed, errno %d", errno);
		TEST_ASSERT_EQ(__uffd_register(self->uffd, mem, 2 * page_size, MISSING,
					       &ioctls), 0);
		TEST_ASSERT_EQ(ioctls, IOCTLS_ALWAYS);
		kvm_munmap(mem, 2 * page_size);
	}
}

/* Those that are not reported fail: memory that others share is not to be taken away. */
uffd_test(gmem, moving_is_refused)
{
	u8 *anon = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1);
	u64 holes = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES;

	register_mem(self, 0, MISSING | MINOR);
	uffd_register(self->uffd, anon, page_size, MISSING);
	TEST_ASSERT_EQ(copy(self, 1, 1), page_size);

	/* In, out, and from one page to another one. */
	TEST_ASSERT_EQ(__uffd_move(self->uffd, mem_page(self, 0), src_page(self, 0),
				   page_size, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_move(self->uffd, anon, mem_page(self, 1), page_size, 0),
		       -EINVAL);
	TEST_ASSERT_EQ(__uffd_move(self->uffd, anon, mem_page(self, 2), page_size, holes),
		       -EINVAL);
	TEST_ASSERT_EQ(__uffd_move(self->uffd, mem_page(self, 3), mem_page(self, 1),
				   page_size, 0), -EINVAL);

	assert_in_file(self, 0, false);
	assert_page(src_page(self, 0), content(0));
	assert_page_content(self, 1);
	read_expect(mem_page(self, 1), content(1));
	assert_in_file(self, 2, false);
	assert_in_file(self, 3, false);
	assert_no_fault(self->uffd);

	/* Nothing was mapped there, and there is nothing wrong with the arguments. */
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	TEST_ASSERT_EQ(__uffd_move(self->uffd, anon, src_page(self, 0), page_size, 0),
		       page_size);
	assert_page(anon, content(0));
	kvm_munmap(anon, page_size);
}

uffd_test(gmem, protecting_is_refused)
{
	u64 wp = UFFDIO_WRITEPROTECT_MODE_WP;
	struct access a;

	register_mem(self, 0, MISSING | MINOR);
	TEST_ASSERT_EQ(copy(self, 1, 1), page_size);
	fill_by_alias(self, 2);

	/* A page that is missing, one that is mapped, and one that is not. */
	TEST_ASSERT_EQ(__uffd_writeprotect(self->uffd, mem_page(self, 0), page_size, wp),
		       -ENOENT);
	TEST_ASSERT_EQ(__uffd_writeprotect(self->uffd, mem_page(self, 1), page_size, wp),
		       -ENOENT);
	TEST_ASSERT_EQ(__uffd_writeprotect(self->uffd, mem_page(self, 2), page_size, wp),
		       -ENOENT);
	TEST_ASSERT_EQ(__uffd_writeprotect(self->uffd, self->mem, self->size, 0), -ENOENT);
	assert_in_file(self, 0, false);
	assert_page_content(self, 1);
	assert_page_content(self, 2);

	/* Writing to them is what it was before. */
	write_start(&a, mem_page(self, 1), 0x77);
	access_finish(&a);
	TEST_ASSERT_EQ(alias_page(self, 1)[0], 0x77);
	assert_no_fault(self->uffd);
	write_start(&a, mem_page(self, 2), 0x78);
	expect_fault(self->uffd, mem_page(self, 2), FAULT_WRITE | FAULT_MINOR);
	TEST_ASSERT_EQ(cont(self, 2, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(alias_page(self, 2)[0], 0x78);
}

uffd_test(gmem, features_are_reported)
{
	u64 features = UFFD_FEATURE_MISSING_GUEST_MEMFD | UFFD_FEATURE_MINOR_GUEST_MEMFD;

	TEST_ASSERT_EQ(uffd_features() & features, features);
	register_mem(self, features, MISSING | MINOR);
}

static const struct protection {
	u64 features;
	u64 mode;
} protections[] = {
	{ 0,						WP },
	{ 0,						WP | MISSING },
	{ 0,						WP | MINOR },
	{ 0,						WP | MISSING | MINOR },
	{ UFFD_FEATURE_WP_HUGETLBFS_SHMEM,		WP },
	{ UFFD_FEATURE_WP_UNPOPULATED,			WP },
	{ UFFD_FEATURE_WP_ASYNC,			WP },
	{ UFFD_FEATURE_WP_ASYNC,			WP | MISSING },
	{ UFFD_FEATURE_WP_ASYNC,			WP | MINOR },
	{ UFFD_FEATURE_RWP,				RWP },
	{ UFFD_FEATURE_RWP,				RWP | MISSING },
	{ UFFD_FEATURE_RWP,				RWP | MINOR },
	{ UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC,	RWP },
	{ UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC,	RWP | MISSING },
	{ UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC,	RWP | MINOR },
};

/* Those that are a way around what memory types say of modes. */
#define ASYNC_FEATURES	(UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_RWP_ASYNC)

/* What a kernel of these features can do with shmem. */
static u64 protection_modes(u64 features)
{
	u64 modes = MISSING | MINOR;

	if (features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
		modes |= WP;
	if (features & UFFD_FEATURE_RWP)
		modes |= RWP;

	return modes;
}

/* Refused because of what the memory is, and not because the kernel can't do it. */
static void assert_protection_is_refused(gmem_data *self, const struct protection *p,
					 u8 *shmem, u64 modes)
{
	int uffd = uffd_open(p->features);
	int ret;

	ret = __uffd_register(uffd, self->mem, self->size, p->mode, NULL);
	TEST_ASSERT(ret == -EINVAL, "Features %#lx, mode %#lx: expected EINVAL, got %d",
		    p->features, p->mode, -ret);

	ret = __uffd_register(uffd, shmem, self->size, p->mode, NULL);
	TEST_ASSERT(ret == (p->mode & ~modes ? -EINVAL : 0),
		    "Features %#lx, mode %#lx: got %d for shmem", p->features, p->mode,
		    -ret);
	close(uffd);
}

static void assert_all_protection_is_refused(gmem_data *self)
{
	int i, fd = kvm_memfd_alloc(self->size, false);
	u64 features = uffd_features(), tried = 0, tried_features = 0;
	u64 modes = protection_modes(features);
	u8 *shmem;

	shmem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	for (i = 0; i < ARRAY_SIZE(protections); i++) {
		/* Not all architectures have all features. */
		if (protections[i].features & ~features)
			continue;

		assert_protection_is_refused(self, &protections[i], shmem, modes);
		tried |= protections[i].mode;
		tried_features |= protections[i].features;
	}
	TEST_ASSERT(tried & WP, "Write-protection was not tried");
	TEST_ASSERT((tried & modes) == modes, "Modes %#lx were not tried", modes & ~tried);
	TEST_ASSERT_EQ(tried_features & ASYNC_FEATURES, features & ASYNC_FEATURES);

	kvm_munmap(shmem, self->size);
	close(fd);
}

/* Protecting host page tables does not stop a vCPU. */
uffd_test(gmem, write_protection_is_refused)
{
	assert_all_protection_is_refused(self);
}

uffd_test(gmem, copies_cannot_be_write_protected)
{
	register_mem(self, 0, MISSING | MINOR);
	fill_by_alias(self, 1);

	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, 0), self->src, page_size,
				   UFFDIO_COPY_MODE_WP), -EINVAL);
	TEST_ASSERT_EQ(__uffd_continue(self->uffd, mem_page(self, 1), page_size,
				       UFFDIO_CONTINUE_MODE_WP), -EINVAL);
	assert_in_file(self, 0, false);
}

/* A refused registration leaves nothing behind. */
uffd_test(gmem, refused_registration_registers_nothing)
{
	self->uffd = uffd_open(0);
	TEST_ASSERT_EQ(__uffd_register(self->uffd, self->mem, self->size, MISSING | WP,
				       NULL), -EINVAL);
	read_expect(self->mem, 0);
	assert_no_fault(self->uffd);
	TEST_ASSERT_EQ(copy(self, 1, 1), -ENOENT);
}

/*
 * MISSING.
 */

uffd_test(gmem, read_of_a_missing_page)
{
	struct access a;

	register_mem(self, 0, MISSING);
	read_start(&a, mem_page(self, 3) + 5);
	expect_fault(self->uffd, mem_page(self, 3), 0);
	assert_blocked(&a);
	assert_in_file(self, 3, false);

	TEST_ASSERT_EQ(copy(self, 3, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(3));
	assert_page_content(self, 3);
	assert_page(mem_page(self, 3), content(3));
	assert_in_file(self, 2, false);
	assert_in_file(self, 4, false);
	assert_no_fault(self->uffd);
}

uffd_test(gmem, write_of_a_missing_page)
{
	struct access a;

	register_mem(self, 0, MISSING);
	write_start(&a, mem_page(self, 3), 0x77);
	expect_fault(self->uffd, mem_page(self, 3), FAULT_WRITE);

	TEST_ASSERT_EQ(copy(self, 3, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(alias_page(self, 3)[0], 0x77);
	TEST_ASSERT_EQ(alias_page(self, 3)[1], content(3));
	assert_no_fault(self->uffd);
}

/* All pages of the file, to see the ends of it and of the mapping. */
uffd_test(gmem, every_page_is_missing_once)
{
	struct access a;
	u64 i;

	register_mem(self, 0, MISSING);
	for (i = 0; i < NR_PAGES; i++) {
		read_start(&a, mem_page(self, i));
		expect_fault(self->uffd, mem_page(self, i), 0);
		TEST_ASSERT_EQ(copy(self, i, 1), page_size);
		access_finish(&a);
	}

	/* Neither a second access nor a page table that is gone is a fault. */
	TEST_ASSERT(!madvise(self->mem, self->size, MADV_DONTNEED),
		    "MADV_DONTNEED failed, errno %d", errno);
	for (i = 0; i < NR_PAGES; i++) {
		read_expect(mem_page(self, i), content(i));
		assert_page_content(self, i);
	}
	assert_no_fault(self->uffd);
}

/* What is in the file is not missing, however it came there. */
uffd_test(gmem, pages_in_the_file_are_not_missing)
{
	register_mem(self, 0, MISSING);
	fill_by_alias(self, 0);
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, page_size, page_size);

	read_expect(mem_page(self, 0), content(0));
	read_expect(mem_page(self, 1), 0);
	assert_no_fault(self->uffd);
}

uffd_test(gmem, punched_pages_are_missing_again)
{
	struct access a;

	register_mem(self, 0, MISSING);
	TEST_ASSERT_EQ(copy(self, 0, NR_PAGES), self->size);
	punch(self, 5, 1);

	read_start(&a, mem_page(self, 5));
	expect_fault(self->uffd, mem_page(self, 5), 0);
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, 5), src_page(self, 6),
				   page_size, 0), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(6));
	read_expect(mem_page(self, 4), content(4));
	read_expect(mem_page(self, 6), content(6));
	assert_no_fault(self->uffd);
}

uffd_test(gmem, copy_of_a_range)
{
	register_mem(self, 0, MISSING);
	TEST_ASSERT_EQ(copy(self, 2, 5), 5 * page_size);
	assert_in_file(self, 1, false);
	assert_page_content(self, 2);
	assert_page_content(self, 4);
	assert_page_content(self, 6);
	assert_in_file(self, 7, false);
}

static void assert_second_copy_fails(gmem_data *self, u64 page)
{
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, page),
				   src_page(self, page + 1), page_size, 0), -EEXIST);
	assert_page_content(self, page);
}

uffd_test(gmem, second_copy_is_refused)
{
	register_mem(self, 0, MISSING);
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	assert_second_copy_fails(self, 0);

	/* The same for a page that is mapped nowhere, */
	kvm_madvise(self->mem, self->size, MADV_DONTNEED);
	kvm_madvise(self->alias, self->size, MADV_DONTNEED);
	assert_second_copy_fails(self, 0);

	/* and for a page that was not copied there. */
	fill_by_alias(self, 1);
	assert_second_copy_fails(self, 1);
}

/* Allocated, but not cleared: it is there all the same. */
uffd_test(gmem, allocated_pages_are_not_filled)
{
	register_mem(self, 0, MISSING);
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, 0, 2 * page_size);

	TEST_ASSERT_EQ(copy(self, 0, 1), -EEXIST);
	TEST_ASSERT_EQ(zeropage(self, 1, 1), -EEXIST);
	assert_page(mem_page(self, 0), 0);
	assert_page(mem_page(self, 1), 0);
}

uffd_test(gmem, copy_stops_at_a_page_that_is_there)
{
	register_mem(self, 0, MISSING);
	fill_by_alias(self, 3);

	TEST_ASSERT_EQ(copy(self, 1, 4), 2 * page_size);
	assert_page_content(self, 1);
	assert_page_content(self, 2);
	assert_page_content(self, 3);
	assert_in_file(self, 4, false);
	TEST_ASSERT_EQ(copy(self, 3, 2), -EEXIST);
	assert_in_file(self, 4, false);
}

/* A source that cannot be read, at all or from some point on. */
uffd_test(gmem, copy_of_unreadable_memory)
{
	register_mem(self, 0, MISSING);
	kvm_munmap(src_page(self, 2), page_size);

	TEST_ASSERT_EQ(copy(self, 2, 1), -EFAULT);
	assert_in_file(self, 2, false);
	TEST_ASSERT_EQ(copy(self, 0, 4), 2 * page_size);
	assert_page_content(self, 1);
	assert_in_file(self, 2, false);
	assert_in_file(self, 3, false);

	/* Half a page is no page. */
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, 5),
				   src_page(self, 1) + page_size / 2, page_size, 0),
		       -EFAULT);
	assert_in_file(self, 5, false);

	/* For the page to be filled later as if nothing had happened. */
	TEST_ASSERT_EQ(copy(self, 5, 1), page_size);
	assert_page_content(self, 5);
}

/* The copy faults its source in, for which it has to drop its locks. */
uffd_test(gmem, copy_of_absent_memory)
{
	register_mem(self, 0, MISSING);
	kvm_madvise(self->src, self->size, MADV_DONTNEED);
	TEST_ASSERT_EQ(copy(self, 0, 2), 2 * page_size);
	assert_in_file(self, 0, true);
	assert_page(alias_page(self, 0), 0);
	assert_page(alias_page(self, 1), 0);
}

uffd_test(gmem, copy_of_the_file_itself)
{
	register_mem(self, 0, MISSING);
	fill_by_alias(self, 0);
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, 1), alias_page(self, 0),
				   page_size, 0), page_size);
	assert_page(alias_page(self, 1), content(0));
}

uffd_test(gmem, unaligned_source)
{
	register_mem(self, 0, MISSING);
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, 0), self->src + 1,
				   page_size, 0), page_size);
	TEST_ASSERT_EQ(alias_page(self, 0)[page_size - 2], content(0));
	TEST_ASSERT_EQ(alias_page(self, 0)[page_size - 1], content(1));
}

uffd_test(gmem, invalid_arguments)
{
	u64 mode = BIT_ULL(20);
	u8 *mem = self->mem;
	u64 ps = page_size;
	int uffd;

	register_mem(self, 0, MISSING | MINOR);
	fill_by_alias(self, 8);
	uffd = self->uffd;

	TEST_ASSERT_EQ(__uffd_copy(uffd, mem + 1, self->src, ps, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_copy(uffd, mem, self->src, ps + 1, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_copy(uffd, mem, self->src, ps / 2, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_copy(uffd, mem, self->src, 0, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_copy(uffd, mem, self->src, ps, mode), -EINVAL);

	TEST_ASSERT_EQ(__uffd_zeropage(uffd, mem + 1, ps, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_zeropage(uffd, mem, ps + 1, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_zeropage(uffd, mem, 0, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_zeropage(uffd, mem, ps, mode), -EINVAL);

	mem = mem_page(self, 8);
	TEST_ASSERT_EQ(__uffd_continue(uffd, mem + 1, ps, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_continue(uffd, mem, ps + 1, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_continue(uffd, mem, 0, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_continue(uffd, mem, ps, mode), -EINVAL);

	TEST_ASSERT_EQ(__uffd_poison(uffd, mem + 1, ps, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_poison(uffd, mem, ps + 1, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_poison(uffd, mem, 0, 0), -EINVAL);
	TEST_ASSERT_EQ(__uffd_poison(uffd, mem, ps, mode), -EINVAL);

	TEST_ASSERT_EQ(__uffd_wake(uffd, mem + 1, ps), -EINVAL);
	TEST_ASSERT_EQ(__uffd_wake(uffd, mem, ps + 1), -EINVAL);
	TEST_ASSERT_EQ(__uffd_wake(uffd, mem, 0), -EINVAL);

	assert_in_file(self, 0, false);
}

/* Ranges that are not registered: not at all, not all of it, with someone else. */
uffd_test(gmem, unregistered_ranges)
{
	int other = uffd_open(0);

	self->uffd = uffd_open(0);
	uffd_register(self->uffd, self->mem, 4 * page_size, MISSING | MINOR);
	uffd_register(other, mem_page(self, 4), 4 * page_size, MISSING | MINOR);
	TEST_ASSERT_EQ(__uffd_register(other, mem_page(self, 0), page_size, MISSING,
				       NULL), -EBUSY);

	TEST_ASSERT_EQ(copy(self, 8, 1), -ENOENT);
	TEST_ASSERT_EQ(copy(self, 3, 2), -ENOENT);
	TEST_ASSERT_EQ(zeropage(self, 8, 1), -ENOENT);
	TEST_ASSERT_EQ(zeropage(self, 3, 2), -ENOENT);
	TEST_ASSERT_EQ(poison(self, 8, 1), -ENOENT);

	fill_by_alias(self, 3);
	fill_by_alias(self, 8);
	TEST_ASSERT_EQ(cont(self, 8, 1), -ENOENT);
	TEST_ASSERT_EQ(cont(self, 3, 2), -ENOENT);
	assert_in_file(self, 4, false);
	assert_in_file(self, 9, false);
	close(other);
}

/* The mapping is one page longer than the file. */
uffd_test(gmem, nothing_is_filled_past_the_end)
{
	u8 *end = self->mem + self->size;

	self->uffd = uffd_open(0);
	uffd_register(self->uffd, self->mem, self->size + page_size, MISSING | MINOR);

	TEST_ASSERT_EQ(__uffd_copy(self->uffd, end, self->src, page_size, 0), -EFAULT);
	TEST_ASSERT_EQ(__uffd_zeropage(self->uffd, end, page_size, 0), -EFAULT);
	TEST_ASSERT_EQ(__uffd_continue(self->uffd, end, page_size, 0), -EFAULT);
	TEST_ASSERT_EQ(__uffd_poison(self->uffd, end, page_size, 0), -EFAULT);

	/* It is an error to go there, and no fault to be resolved. */
	read_expect_sigbus(end);
	write_expect_sigbus(end);
	assert_no_fault(self->uffd);

	TEST_ASSERT_EQ(__uffd_zeropage(self->uffd, end - page_size, 2 * page_size, 0),
		       page_size);
}

/* Whoever is not asleep yet looks at the page, and needs no wake. */
uffd_test(gmem, waking_is_up_to_the_caller)
{
	struct access a;

	register_mem(self, 0, MISSING | MINOR);

	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	assert_blocked(&a);
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, 0), self->src, page_size,
				   UFFDIO_COPY_MODE_DONTWAKE), page_size);
	assert_blocked(&a);
	TEST_ASSERT_EQ(__uffd_wake(self->uffd, mem_page(self, 0), page_size), 0);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(0));

	read_start(&a, mem_page(self, 1));
	expect_fault(self->uffd, mem_page(self, 1), 0);
	assert_blocked(&a);
	TEST_ASSERT_EQ(__uffd_zeropage(self->uffd, mem_page(self, 1), page_size,
				       UFFDIO_ZEROPAGE_MODE_DONTWAKE), page_size);
	assert_blocked(&a);
	TEST_ASSERT_EQ(__uffd_wake(self->uffd, mem_page(self, 1), page_size), 0);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, 0);

	fill_by_alias(self, 2);
	read_start(&a, mem_page(self, 2));
	expect_fault(self->uffd, mem_page(self, 2), FAULT_MINOR);
	assert_blocked(&a);
	TEST_ASSERT_EQ(__uffd_continue(self->uffd, mem_page(self, 2), page_size,
				       UFFDIO_CONTINUE_MODE_DONTWAKE), page_size);
	assert_blocked(&a);
	TEST_ASSERT_EQ(__uffd_wake(self->uffd, mem_page(self, 2), page_size), 0);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(2));
}

/* Woken with nothing there, an access faults once more. */
uffd_test(gmem, waking_alone_resolves_nothing)
{
	struct access a;

	register_mem(self, 0, MISSING);
	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(__uffd_wake(self->uffd, mem_page(self, 0), page_size), 0);
	expect_fault(self->uffd, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(0));
}

/* Many threads at one page: all of them wait, and all of them go on. */
uffd_test(gmem, threads_that_share_a_page)
{
	struct access a[4];
	int i;

	register_mem(self, 0, MISSING);
	for (i = 0; i < ARRAY_SIZE(a); i++) {
		read_start(&a[i], mem_page(self, 0) + i);
		expect_fault(self->uffd, mem_page(self, 0), 0);
	}
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	for (i = 0; i < ARRAY_SIZE(a); i++) {
		access_finish(&a[i]);
		TEST_ASSERT_EQ(a[i].val, content(0));
	}
}

/*
 * ZEROPAGE.  The pages that it takes were full of something else before.
 */

uffd_test(gmem, zeropage_is_zero)
{
	struct access a;
	u64 i;

	register_mem(self, 0, MISSING);
	vm_stain_free_memory(self->vm, STALE_BYTE);

	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(zeropage(self, 0, NR_PAGES), self->size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, 0);

	for (i = 0; i < NR_PAGES; i++) {
		assert_in_file(self, i, true);
		assert_page(alias_page(self, i), 0);
	}

	/* It is memory of the file and not the zero page of the system. */
	memset(mem_page(self, 1), 0x33, page_size);
	assert_page(alias_page(self, 1), 0x33);
	assert_page(alias_page(self, 2), 0);
}

uffd_test(gmem, zeropage_replaces_nothing)
{
	register_mem(self, 0, MISSING);
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	fill_by_alias(self, 3);

	TEST_ASSERT_EQ(zeropage(self, 0, 1), -EEXIST);
	assert_page_content(self, 0);
	TEST_ASSERT_EQ(zeropage(self, 1, 4), 2 * page_size);
	assert_page_content(self, 3);
	assert_in_file(self, 4, false);
	TEST_ASSERT_EQ(copy(self, 1, 1), -EEXIST);
	assert_page(alias_page(self, 1), 0);
}

/*
 * MINOR and CONTINUE.
 */

uffd_test(gmem, read_of_an_unmapped_page)
{
	struct access a;

	register_mem(self, 0, MINOR);
	fill_by_alias(self, 3);

	read_start(&a, mem_page(self, 3) + 9);
	expect_fault(self->uffd, mem_page(self, 3), FAULT_MINOR);
	assert_blocked(&a);

	/* The point of it: there is still time to change the content. */
	memset(alias_page(self, 3), 0x44, page_size);
	TEST_ASSERT_EQ(cont(self, 3, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, 0x44);
	assert_page(mem_page(self, 3), 0x44);
	assert_no_fault(self->uffd);
}

uffd_test(gmem, write_of_an_unmapped_page)
{
	struct access a;

	register_mem(self, 0, MINOR);
	fill_by_alias(self, 3);

	write_start(&a, mem_page(self, 3), 0x77);
	expect_fault(self->uffd, mem_page(self, 3), FAULT_WRITE | FAULT_MINOR);
	TEST_ASSERT_EQ(cont(self, 3, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(alias_page(self, 3)[0], 0x77);
	TEST_ASSERT_EQ(alias_page(self, 3)[1], content(3));
	assert_no_fault(self->uffd);
}

/* With MINOR alone a page that is not there is none of userfaultfd's business. */
uffd_test(gmem, holes_are_no_minor_faults)
{
	register_mem(self, 0, MINOR);
	read_expect(mem_page(self, 0), 0);
	assert_no_fault(self->uffd);
}

uffd_test(gmem, both_modes)
{
	struct access a;

	register_mem(self, 0, MISSING | MINOR);
	fill_by_alias(self, 1);

	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(cont(self, 0, 1), -EFAULT);
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	access_finish(&a);

	read_start(&a, mem_page(self, 1));
	expect_fault(self->uffd, mem_page(self, 1), FAULT_MINOR);
	TEST_ASSERT_EQ(copy(self, 1, 1), -EEXIST);
	TEST_ASSERT_EQ(cont(self, 1, 1), page_size);
	access_finish(&a);

	/* A page that somebody puts there while a fault on the hole is open. */
	read_start(&a, mem_page(self, 2));
	expect_fault(self->uffd, mem_page(self, 2), 0);
	fill_by_alias(self, 2);
	TEST_ASSERT_EQ(copy(self, 2, 1), -EEXIST);
	TEST_ASSERT_EQ(__uffd_wake(self->uffd, mem_page(self, 2), page_size), 0);
	expect_fault(self->uffd, mem_page(self, 2), FAULT_MINOR);
	TEST_ASSERT_EQ(cont(self, 2, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(2));
	assert_no_fault(self->uffd);
}

uffd_test(gmem, continue_needs_a_page)
{
	register_mem(self, 0, MISSING | MINOR);
	TEST_ASSERT_EQ(cont(self, 0, 1), -EFAULT);
	assert_in_file(self, 0, false);

	fill_by_alias(self, 1);
	fill_by_alias(self, 2);
	TEST_ASSERT_EQ(cont(self, 1, 3), 2 * page_size);
	assert_in_file(self, 3, false);
	read_expect(mem_page(self, 1), content(1));
	read_expect(mem_page(self, 2), content(2));
	assert_no_fault(self->uffd);
}

uffd_test(gmem, second_continue_is_refused)
{
	register_mem(self, 0, MISSING | MINOR);
	fill_by_alias(self, 0);
	TEST_ASSERT_EQ(cont(self, 0, 1), page_size);
	TEST_ASSERT_EQ(cont(self, 0, 1), -EEXIST);
	TEST_ASSERT_EQ(copy(self, 1, 1), page_size);
	TEST_ASSERT_EQ(cont(self, 1, 1), -EEXIST);
	assert_page_content(self, 0);
	assert_page_content(self, 1);
}

uffd_test(gmem, unmapped_pages_are_minor_faults_again)
{
	struct access a;

	register_mem(self, 0, MINOR);
	fill_by_alias(self, 0);
	TEST_ASSERT_EQ(cont(self, 0, 1), page_size);
	kvm_madvise(self->mem, page_size, MADV_DONTNEED);

	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), FAULT_MINOR);
	TEST_ASSERT_EQ(cont(self, 0, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(0));
}

/*
 * Pages that fallocate() put in the file hold what their last owner left, until
 * they are cleared, which is the duty of who maps them first.
 */
uffd_test(gmem, continue_leaks_no_old_data)
{
	size_t size = SZ_2M;
	u8 *mem;
	u64 i;
	int fd;

	self->uffd = uffd_open(0);
	fd = vm_create_guest_memfd(self->vm, size, MAPPABLE_GUEST_MEMFD_FLAGS);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	uffd_register(self->uffd, mem, size, MINOR);

	vm_stain_free_memory(self->vm, STALE_BYTE);
	kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size);

	/* One half at once, the other one page by page. */
	TEST_ASSERT_EQ(__uffd_continue(self->uffd, mem, size / 2, 0), size / 2);
	for (i = size / 2; i < size; i += page_size)
		TEST_ASSERT_EQ(__uffd_continue(self->uffd, mem + i, page_size, 0),
			       page_size);
	for (i = 0; i < size; i += page_size)
		assert_page(mem + i, 0);

	kvm_munmap(mem, size);
	close(fd);
}

/* Allocated, it is there, and the same as any other page that is not mapped. */
uffd_test(gmem, allocated_pages_are_minor_faults)
{
	struct access a;

	register_mem(self, 0, MISSING | MINOR);
	vm_stain_free_memory(self->vm, STALE_BYTE);
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, 0, page_size);

	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), FAULT_MINOR);
	TEST_ASSERT_EQ(cont(self, 0, 1), page_size);
	access_finish(&a);
	assert_page(mem_page(self, 0), 0);
}

/*
 * POISON.
 */

uffd_test(gmem, poison_kills_the_access)
{
	struct access a;

	register_mem(self, 0, MISSING);
	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(poison(self, 0, 2), 2 * page_size);
	access_expect_sigbus(&a);

	read_expect_sigbus(mem_page(self, 0));
	write_expect_sigbus(mem_page(self, 1));
	assert_no_fault(self->uffd);

	/* It is the mapping that is poisoned. */
	assert_in_file(self, 0, false);
	fill_by_alias(self, 0);
	assert_page_content(self, 0);
	read_expect_sigbus(mem_page(self, 0));
}

uffd_test(gmem, poison_replaces_nothing)
{
	register_mem(self, 0, MISSING);
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	TEST_ASSERT_EQ(poison(self, 0, 1), -EEXIST);
	read_expect(mem_page(self, 0), content(0));

	TEST_ASSERT_EQ(poison(self, 1, 1), page_size);
	TEST_ASSERT_EQ(poison(self, 1, 1), -EEXIST);
}

/* As with other memory, poison is what userspace may change its mind about. */
uffd_test(gmem, poison_is_replaced)
{
	register_mem(self, 0, MISSING | MINOR);
	TEST_ASSERT_EQ(poison(self, 0, 3), 3 * page_size);
	fill_by_alias(self, 2);

	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	TEST_ASSERT_EQ(zeropage(self, 1, 1), page_size);
	TEST_ASSERT_EQ(cont(self, 2, 1), page_size);
	read_expect(mem_page(self, 0), content(0));
	read_expect(mem_page(self, 1), 0);
	read_expect(mem_page(self, 2), content(2));
	assert_no_fault(self->uffd);
}

/*
 * What cannot be mapped must not stay in the file: it was never filled as far as
 * anybody knows, and would be found there by the next one who looks.
 */
uffd_test(gmem, guarded_pages_are_not_filled)
{
	register_mem(self, 0, MISSING | MINOR);
	if (madvise(self->mem, 3 * page_size, MADV_GUARD_INSTALL))
		SKIP(return, "MADV_GUARD_INSTALL is not available");

	TEST_ASSERT_EQ(copy(self, 0, 1), -EEXIST);
	assert_in_file(self, 0, false);
	TEST_ASSERT_EQ(zeropage(self, 1, 1), -EEXIST);
	assert_in_file(self, 1, false);
	assert_page(alias_page(self, 0), 0);
	assert_page(alias_page(self, 1), 0);

	fill_by_alias(self, 2);
	TEST_ASSERT_EQ(cont(self, 2, 1), -EEXIST);
	TEST_ASSERT_EQ(poison(self, 2, 1), -EEXIST);
	assert_page_content(self, 2);

	/* The folio that was removed is of no further use to anybody. */
	kvm_madvise(self->mem, 3 * page_size, MADV_GUARD_REMOVE);
	punch(self, 0, 3);
	TEST_ASSERT_EQ(copy(self, 0, 3), 3 * page_size);
	assert_page_content(self, 0);
}

uffd_test(gmem, hwpoisoned_pages_are_not_mapped)
{
	struct access a;

	fill_by_alias(self, 0);
	if (!poison_page(alias_page(self, 0)))
		SKIP(return, "MADV_HWPOISON is not available");

	register_mem(self, 0, MISSING | MINOR);
	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), FAULT_MINOR);
	TEST_ASSERT_EQ(cont(self, 0, 1), -EIO);
	TEST_ASSERT_EQ(copy(self, 0, 1), -EEXIST);
	TEST_ASSERT_EQ(zeropage(self, 0, 1), -EEXIST);
	assert_blocked(&a);

	/* What is left to be done is to tell whoever waits. */
	TEST_ASSERT_EQ(poison(self, 0, 1), page_size);
	access_expect_sigbus(&a);
	assert_no_fault(self->uffd);
}

/* Where it was mapped, where it was not, and where userfaultfd is not asked for it. */
uffd_test(gmem, hwpoisoned_pages_cannot_be_accessed)
{
	fill_by_alias(self, 0);
	fill_by_alias(self, 1);
	if (!poison_page(alias_page(self, 0)))
		SKIP(return, "MADV_HWPOISON is not available");

	read_expect_sigbus(alias_page(self, 0));
	write_expect_sigbus(alias_page(self, 0));
	read_expect_sigbus(mem_page(self, 0));
	write_expect_sigbus(mem_page(self, 0));

	register_mem(self, 0, MISSING);
	read_expect_sigbus(mem_page(self, 0));
	write_expect_sigbus(mem_page(self, 0));
	TEST_ASSERT_EQ(copy(self, 0, 1), -EEXIST);
	TEST_ASSERT_EQ(zeropage(self, 0, 1), -EEXIST);
	read_expect(mem_page(self, 1), content(1));
	assert_no_fault(self->uffd);
}

/*
 * The other features of userfaultfd.
 */

uffd_test(gmem, sigbus_instead_of_events)
{
	register_mem(self, UFFD_FEATURE_SIGBUS, MISSING | MINOR);
	fill_by_alias(self, 1);

	read_expect_sigbus(mem_page(self, 0));
	write_expect_sigbus(mem_page(self, 1));
	assert_in_file(self, 0, false);

	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	TEST_ASSERT_EQ(cont(self, 1, 1), page_size);
	read_expect(mem_page(self, 0), content(0));
	read_expect(mem_page(self, 1), content(1));
}

uffd_test(gmem, exact_address_and_thread)
{
	u8 *addr = mem_page(self, 2) + 24;
	struct uffd_msg msg;
	struct access a;

	register_mem(self, UFFD_FEATURE_EXACT_ADDRESS | UFFD_FEATURE_THREAD_ID, MISSING);
	write_start(&a, addr, 1);
	expect_fault_msg(self->uffd, addr, FAULT_WRITE, &msg);
	TEST_ASSERT_EQ(msg.arg.pagefault.feat.ptid, a.tid);
	TEST_ASSERT_EQ(copy(self, 2, 1), page_size);
	access_finish(&a);
}

/* The kernel itself waits for a page, like anybody else. */
struct kernel_read {
	pthread_t thread;
	void *addr;
	int fd;
	ssize_t ret;
	int err;
};

static void *kernel_read_thread(void *arg)
{
	struct kernel_read *k = arg;

	k->ret = write(k->fd, k->addr, 8);
	k->err = errno;
	return NULL;
}

uffd_test(gmem, kernel_accesses_wait_too)
{
	struct kernel_read k;
	u8 buf[8];
	int fds[2];

	TEST_ASSERT(!pipe(fds), "pipe() failed, errno %d", errno);
	register_mem(self, 0, MISSING);

	k.addr = mem_page(self, 4);
	k.fd = fds[1];
	kvm_pthread_create(&k.thread, NULL, kernel_read_thread, &k);
	expect_fault(self->uffd, mem_page(self, 4), 0);
	TEST_ASSERT_EQ(copy(self, 4, 1), page_size);
	kvm_pthread_join(k.thread, NULL);
	TEST_ASSERT_EQ(k.ret, sizeof(buf));
	TEST_ASSERT_EQ(read(fds[0], buf, sizeof(buf)), sizeof(buf));
	TEST_ASSERT_EQ(buf[7], content(4));

	close(fds[0]);
	close(fds[1]);
}

uffd_test(gmem, faults_of_the_kernel_can_be_refused)
{
	struct kernel_read k;
	int fds[2];
	struct uffdio_api api = { .api = UFFD_API };

	self->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	TEST_ASSERT(self->uffd >= 0, "userfaultfd() failed, errno %d", errno);
	TEST_ASSERT(!ioctl(self->uffd, UFFDIO_API, &api), "UFFDIO_API failed, errno %d", errno);
	uffd_register(self->uffd, self->mem, self->size, MISSING);

	TEST_ASSERT(!pipe(fds), "pipe() failed, errno %d", errno);
	k.addr = mem_page(self, 4);
	k.fd = fds[1];
	kernel_read_thread(&k);
	TEST_ASSERT(k.ret == -1 && k.err == EFAULT, "write() returned %ld, errno %d",
		    k.ret, k.err);
	assert_in_file(self, 4, false);

	close(fds[0]);
	close(fds[1]);
}

/*
 * The end of things.
 */

uffd_test(gmem, unregistering_lets_accesses_go_on)
{
	struct access a;

	register_mem(self, 0, MISSING | MINOR);
	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(__uffd_unregister(self->uffd, self->mem, self->size), 0);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, 0);

	fill_by_alias(self, 1);
	read_expect(mem_page(self, 1), content(1));
	read_expect(mem_page(self, 2), 0);
	TEST_ASSERT_EQ(copy(self, 3, 1), -ENOENT);
}

uffd_test(gmem, closing_the_uffd_lets_accesses_go_on)
{
	struct access a;

	register_mem(self, 0, MISSING);
	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	close(self->uffd);
	self->uffd = -1;
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, 0);
	read_expect(mem_page(self, 1), 0);
}

/* The mapping keeps the file, and the file keeps the VM. */
uffd_test(gmem, closing_the_file_and_the_vm)
{
	struct access a;

	register_mem(self, 0, MISSING | MINOR);
	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);

	close(self->fd);
	self->fd = -1;
	kvm_vm_free(self->vm);
	self->vm = NULL;

	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(0));
	TEST_ASSERT_EQ(zeropage(self, 1, 1), page_size);
	fill_by_alias(self, 2);
	TEST_ASSERT_EQ(cont(self, 2, 1), page_size);
	read_expect(mem_page(self, 2), content(2));
}

uffd_test(gmem, unmapped_ranges)
{
	register_mem(self, 0, MISSING | MINOR);
	fill_by_alias(self, 0);
	kvm_munmap(self->mem, 4 * page_size);

	TEST_ASSERT_EQ(copy(self, 1, 1), -ENOENT);
	TEST_ASSERT_EQ(copy(self, 3, 2), -ENOENT);
	TEST_ASSERT_EQ(zeropage(self, 1, 1), -ENOENT);
	TEST_ASSERT_EQ(cont(self, 0, 1), -ENOENT);
	TEST_ASSERT_EQ(poison(self, 0, 1), -ENOENT);
	assert_in_file(self, 1, false);

	TEST_ASSERT_EQ(copy(self, 4, 1), page_size);
	assert_page_content(self, 4);
}

/*
 * Events that tell what becomes of the mapping.  Whoever causes one waits until it is
 * read.
 */

struct change {
	gmem_data *self;
	pthread_t thread;
	u8 *to;
	int advice;
	int status;
};

static void change_start(struct change *change, gmem_data *self, void *(*fn)(void *change))
{
	change->self = self;
	TEST_ASSERT(!pthread_create(&change->thread, NULL, fn, change), "pthread_create()");
}

static void change_join(struct change *change)
{
	TEST_ASSERT(!pthread_join(change->thread, NULL), "pthread_join()");
}

static void expect_event(int uffd, u8 event, struct uffd_msg *msg)
{
	TEST_ASSERT(read_msg(uffd, msg, WAIT_SECS * 1000), "No event %#x", event);
	TEST_ASSERT_EQ(msg->event, event);
}

static void *fork_thread(void *arg)
{
	struct change *change = arg;
	pid_t pid = fork();

	TEST_ASSERT(pid >= 0, "fork() failed, errno %d", errno);
	if (!pid)
		_exit(READ_ONCE(*mem_page(change->self, 0)));

	TEST_ASSERT_EQ(waitpid(pid, &change->status, 0), pid);
	return NULL;
}

/* The child's mapping has a userfaultfd of its own, and the same pages. */
uffd_test(gmem, event_of_a_fork)
{
	struct change change = {};
	struct uffd_msg msg;
	int child;

	register_mem(self, UFFD_FEATURE_EVENT_FORK, MISSING | MINOR);
	change_start(&change, self, fork_thread);
	expect_event(self->uffd, UFFD_EVENT_FORK, &msg);
	child = msg.arg.fork.ufd;

	expect_fault(child, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(__uffd_copy(child, mem_page(self, 0), src_page(self, 0), page_size, 0),
		       page_size);
	change_join(&change);
	TEST_ASSERT(WIFEXITED(change.status) && WEXITSTATUS(change.status) == content(0),
		    "The child ended with %#x", change.status);
	assert_page_content(self, 0);
	close(child);
}

static void *remap_thread(void *arg)
{
	struct change *change = arg;
	u8 *mem;

	mem = mremap(mem_page(change->self, 2), 2 * page_size, 2 * page_size,
		     MREMAP_MAYMOVE | MREMAP_FIXED, change->to);
	TEST_ASSERT(mem == change->to, "mremap() failed, errno %d", errno);
	return NULL;
}

/* What is moved stays registered, and what is in the file stays where it is there. */
uffd_test(gmem, event_of_a_remap)
{
	struct change change = {};
	struct uffd_msg msg;
	struct access a;

	change.to = kvm_mmap(2 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	register_mem(self, UFFD_FEATURE_EVENT_REMAP, MISSING | MINOR);
	change_start(&change, self, remap_thread);
	expect_event(self->uffd, UFFD_EVENT_REMAP, &msg);
	TEST_ASSERT_EQ(msg.arg.remap.from, (u64)mem_page(self, 2));
	TEST_ASSERT_EQ(msg.arg.remap.to, (u64)change.to);
	TEST_ASSERT_EQ(msg.arg.remap.len, 2 * page_size);
	change_join(&change);

	read_start(&a, change.to + page_size);
	expect_fault(self->uffd, change.to + page_size, 0);
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, change.to + page_size, src_page(self, 3),
				   page_size, 0), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(3));
	assert_page_content(self, 3);
	TEST_ASSERT_EQ(copy(self, 2, 1), -ENOENT);
	kvm_munmap(change.to, 2 * page_size);
}

static void *advise_thread(void *arg)
{
	struct change *change = arg;

	kvm_madvise(mem_page(change->self, 2), 2 * page_size, change->advice);
	return NULL;
}

static void test_event_of_a_removal(gmem_data *self, int advice, u64 fault_flags)
{
	struct change change = { .advice = advice };
	struct uffd_msg msg;
	struct access a;

	register_mem(self, UFFD_FEATURE_EVENT_REMOVE, MISSING | MINOR);
	TEST_ASSERT_EQ(copy(self, 1, 4), 4 * page_size);
	change_start(&change, self, advise_thread);
	expect_event(self->uffd, UFFD_EVENT_REMOVE, &msg);
	TEST_ASSERT_EQ(msg.arg.remove.start, (u64)mem_page(self, 2));
	TEST_ASSERT_EQ(msg.arg.remove.end, (u64)mem_page(self, 4));
	change_join(&change);

	read_expect(mem_page(self, 1), content(1));
	read_expect(mem_page(self, 4), content(4));
	assert_in_file(self, 3, fault_flags == FAULT_MINOR);
	read_start(&a, mem_page(self, 3));
	expect_fault(self->uffd, mem_page(self, 3), fault_flags);
	if (fault_flags == FAULT_MINOR)
		TEST_ASSERT_EQ(cont(self, 3, 1), page_size);
	else
		TEST_ASSERT_EQ(copy(self, 3, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(3));
}

/* From the file, and thus from all mappings and the guest. */
uffd_test(gmem, event_of_a_removal)
{
	test_event_of_a_removal(self, MADV_REMOVE, 0);
}

/* From the mapping alone. */
uffd_test(gmem, event_of_zapped_pages)
{
	test_event_of_a_removal(self, MADV_DONTNEED, FAULT_MINOR);
}

static void *unmap_thread(void *arg)
{
	struct change *change = arg;

	kvm_munmap(mem_page(change->self, 2), 2 * page_size);
	return NULL;
}

uffd_test(gmem, event_of_an_unmapping)
{
	struct change change = {};
	struct uffd_msg msg;

	register_mem(self, UFFD_FEATURE_EVENT_UNMAP, MISSING | MINOR);
	TEST_ASSERT_EQ(copy(self, 2, 1), page_size);
	change_start(&change, self, unmap_thread);
	expect_event(self->uffd, UFFD_EVENT_UNMAP, &msg);
	TEST_ASSERT_EQ(msg.arg.remove.start, (u64)mem_page(self, 2));
	TEST_ASSERT_EQ(msg.arg.remove.end, (u64)mem_page(self, 4));
	change_join(&change);

	TEST_ASSERT_EQ(copy(self, 2, 1), -ENOENT);
	assert_page_content(self, 2);
}

/*
 * As long as an event is not read, nothing is filled: whoever fills memory must not do
 * that on the strength of what the mapping was before.
 */

enum change_kind {
	REMOVED,
	ZAPPED,
	UNMAPPED,
	NR_CHANGES,
};

static const struct fill {
	const char *name;
	s64 (*fn)(gmem_data *self, u64 page, u64 nr);
	u64 page;
	/* What it returns after the change, where zero stands for a page. */
	s64 result[NR_CHANGES];
} fills[] = {
	/* Where nothing changes: holes, and the page 5, which is in the file. */
	{ "COPY",	copy,		0,	{} },
	{ "ZEROPAGE",	zeropage,	6,	{} },
	{ "POISON",	poison,		7,	{} },
	{ "CONTINUE",	cont,		5,	{} },
	/* Where it does. */
	{ "CONTINUE",	cont,		2,	{ -EFAULT, 0, -ENOENT } },
	{ "COPY",	copy,		2,	{ 0, -EEXIST, -ENOENT } },
	{ "ZEROPAGE",	zeropage,	3,	{ 0, -EEXIST, -ENOENT } },
};

static void expect_fills(gmem_data *self, const s64 results[])
{
	s64 ret;
	int i;

	for (i = 0; i < ARRAY_SIZE(fills); i++) {
		ret = fills[i].fn(self, fills[i].page, 1);
		TEST_ASSERT(ret == (results[i] ?: page_size),
			    "%s of page %lu: expected %ld, got %ld", fills[i].name,
			    fills[i].page, results[i], ret);
	}
}

/* The event is there to be read, and is left at that. */
static void wait_for_event(int uffd)
{
	struct pollfd pollfd = { .fd = uffd, .events = POLLIN };

	TEST_ASSERT(poll(&pollfd, 1, WAIT_SECS * 1000) == 1, "No event");
	TEST_ASSERT_EQ(pollfd.revents, POLLIN);
}

static void assert_nothing_was_filled(gmem_data *self)
{
	u64 i;

	assert_in_file(self, 0, false);
	for (i = 1; i <= 5; i++)
		assert_page_content(self, i);
	assert_in_file(self, 6, false);
	assert_in_file(self, 7, false);
}

static void assert_all_is_filled(gmem_data *self, enum change_kind kind)
{
	assert_page_content(self, 0);
	assert_page_content(self, 1);
	assert_page_content(self, 2);
	assert_page(alias_page(self, 3), kind == REMOVED ? 0 : content(3));
	assert_page_content(self, 4);
	read_expect(mem_page(self, 5), content(5));
	assert_page(alias_page(self, 6), 0);
	read_expect_sigbus(mem_page(self, 7));
}

static void test_filling_while_changing(gmem_data *self, u64 feature, struct change *change,
					void *(*fn)(void *change), enum change_kind kind)
{
	s64 busy[ARRAY_SIZE(fills)], results[ARRAY_SIZE(fills)];
	struct uffd_msg msg;
	int i;

	for (i = 0; i < ARRAY_SIZE(fills); i++) {
		busy[i] = -EAGAIN;
		results[i] = fills[i].result[kind];
	}

	register_mem(self, feature, MISSING | MINOR);
	TEST_ASSERT_EQ(copy(self, 1, 4), 4 * page_size);
	fill_by_alias(self, 5);

	change_start(change, self, fn);
	wait_for_event(self->uffd);
	expect_fills(self, busy);
	usleep(NEVER_USECS);
	expect_fills(self, busy);
	assert_nothing_was_filled(self);

	TEST_ASSERT(read_msg(self->uffd, &msg, 0), "The event is gone");
	change_join(change);
	expect_fills(self, results);
	assert_all_is_filled(self, kind);
	assert_no_fault(self->uffd);
}

uffd_test(file, filling_while_pages_are_removed)
{
	struct change change = { .advice = MADV_REMOVE };

	test_filling_while_changing(&self->gmem, UFFD_FEATURE_EVENT_REMOVE, &change,
				    advise_thread, REMOVED);
}

uffd_test(file, filling_while_pages_are_zapped)
{
	struct change change = { .advice = MADV_DONTNEED };

	test_filling_while_changing(&self->gmem, UFFD_FEATURE_EVENT_REMOVE, &change,
				    advise_thread, ZAPPED);
}

uffd_test(file, filling_while_pages_are_unmapped)
{
	struct change change = {};

	test_filling_while_changing(&self->gmem, UFFD_FEATURE_EVENT_UNMAP, &change,
				    unmap_thread, UNMAPPED);
}

uffd_test(file, filling_while_pages_are_moved)
{
	struct change change = {};

	change.to = kvm_mmap(2 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	test_filling_while_changing(&self->gmem, UFFD_FEATURE_EVENT_REMAP, &change,
				    remap_thread, UNMAPPED);
	kvm_munmap(change.to, 2 * page_size);
}

/*
 * A copy that waits for its source, which is missing itself, holds no lock, and has to
 * find out what has become of the page in the meantime.
 */

struct slow_copy {
	pthread_t thread;
	gmem_data *self;
	u64 page;
	u8 *src;
	int src_uffd;
	s64 ret;
};

static void *slow_copy_thread(void *arg)
{
	struct slow_copy *c = arg;

	c->ret = __uffd_copy(c->self->uffd, mem_page(c->self, c->page), c->src, page_size,
			     0);
	return NULL;
}

static void slow_copy_start(struct slow_copy *c, gmem_data *self, u64 page)
{
	c->self = self;
	c->page = page;
	c->src = kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			  -1);
	c->src_uffd = uffd_open(0);
	uffd_register(c->src_uffd, c->src, page_size, MISSING);
	kvm_pthread_create(&c->thread, NULL, slow_copy_thread, c);
	expect_fault(c->src_uffd, c->src, 0);
}

/* Let it have its source, which is @src, and return what it returns. */
static s64 __slow_copy_finish(struct slow_copy *c, u8 *src)
{
	TEST_ASSERT_EQ(__uffd_copy(c->src_uffd, c->src, src, page_size, 0), page_size);
	kvm_pthread_join(c->thread, NULL);
	close(c->src_uffd);
	kvm_munmap(c->src, page_size);
	return c->ret;
}

static s64 slow_copy_finish(struct slow_copy *c)
{
	return __slow_copy_finish(c, src_page(c->self, c->page));
}

/* Other ways to fill a page. All of them return what they fill it with. */

static u8 other_copy(gmem_data *self, u64 page)
{
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem_page(self, page),
				   src_page(self, page + 1), page_size, 0), page_size);
	return content(page + 1);
}

static u8 other_zeropage(gmem_data *self, u64 page)
{
	TEST_ASSERT_EQ(zeropage(self, page, 1), page_size);
	return 0;
}

static u8 other_access(gmem_data *self, u64 page)
{
	memset(alias_page(self, page), 0x55, page_size);
	return 0x55;
}

static u8 other_allocation(gmem_data *self, u64 page)
{
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, page * page_size, page_size);
	return 0;
}

static u8 other_write(gmem_data *self, u64 page)
{
	TEST_ASSERT_EQ(pwrite(self->fd, src_page(self, page + 1), page_size,
			      page * page_size), page_size);
	return content(page + 1);
}

uffd_test(file, copy_is_too_late)
{
	u8 (*fns[])(gmem_data *self, u64 page) = {
		other_copy, other_zeropage, other_access, other_allocation, other_write,
	};
	int nr_fns = ARRAY_SIZE(fns) - !can_write();
	gmem_data *gmem = &self->gmem;
	struct slow_copy c;
	u8 val;
	int i;

	register_mem(gmem, 0, MISSING | MINOR);
	for (i = 0; i < nr_fns; i++) {
		slow_copy_start(&c, gmem, i);
		assert_in_file(gmem, i, false);
		val = fns[i](gmem, i);
		TEST_ASSERT_EQ(slow_copy_finish(&c), -EEXIST);
		assert_page(alias_page(gmem, i), val);
	}
	assert_no_fault(gmem->uffd);
}

/* Nor does it matter who was first to begin. */
uffd_test(file, copies_of_one_page)
{
	gmem_data *gmem = &self->gmem;
	struct slow_copy c[3];
	int i;

	register_mem(gmem, 0, MISSING);
	for (i = 0; i < ARRAY_SIZE(c); i++)
		slow_copy_start(&c[i], gmem, 4);

	TEST_ASSERT_EQ(__slow_copy_finish(&c[1], src_page(gmem, 9)), page_size);
	TEST_ASSERT_EQ(slow_copy_finish(&c[0]), -EEXIST);
	TEST_ASSERT_EQ(slow_copy_finish(&c[2]), -EEXIST);
	assert_page(alias_page(gmem, 4), content(9));
}

/* What does not get in its way: a hole, and poison, which is in the mapping only. */
uffd_test(file, copy_is_still_wanted)
{
	gmem_data *gmem = &self->gmem;
	struct slow_copy c;

	register_mem(gmem, 0, MISSING);
	slow_copy_start(&c, gmem, 0);
	other_access(gmem, 0);
	punch(gmem, 0, NR_PAGES);
	TEST_ASSERT_EQ(slow_copy_finish(&c), page_size);
	assert_page_content(gmem, 0);

	slow_copy_start(&c, gmem, 1);
	TEST_ASSERT_EQ(poison(gmem, 1, 1), page_size);
	TEST_ASSERT_EQ(slow_copy_finish(&c), page_size);
	read_expect(mem_page(gmem, 1), content(1));
	assert_page_content(gmem, 1);
}

uffd_test(file, copy_where_nothing_is_registered_any_more)
{
	gmem_data *gmem = &self->gmem;
	struct slow_copy c;

	register_mem(gmem, 0, MISSING | MINOR);
	slow_copy_start(&c, gmem, 2);
	TEST_ASSERT_EQ(__uffd_unregister(gmem->uffd, mem_page(gmem, 2), page_size), 0);
	TEST_ASSERT_EQ(slow_copy_finish(&c), -ENOENT);
	assert_in_file(gmem, 2, false);

	slow_copy_start(&c, gmem, 5);
	kvm_munmap(mem_page(gmem, 5), page_size);
	TEST_ASSERT_EQ(slow_copy_finish(&c), -ENOENT);
	assert_in_file(gmem, 5, false);
}

uffd_test(file, copy_where_something_else_is_registered)
{
	int fd = kvm_memfd_alloc(self->gmem.size, false);
	gmem_data *gmem = &self->gmem;
	struct slow_copy c;
	unsigned char vec;
	void *mem;

	register_mem(gmem, 0, MISSING | MINOR);
	slow_copy_start(&c, gmem, 3);
	TEST_ASSERT_EQ(__uffd_unregister(gmem->uffd, gmem->mem, gmem->size), 0);
	uffd_register(gmem->uffd, gmem->mem, gmem->size, MISSING);
	TEST_ASSERT_EQ(slow_copy_finish(&c), -EAGAIN);
	assert_in_file(gmem, 3, false);
	TEST_ASSERT_EQ(copy(gmem, 3, 1), page_size);

	/* Another file in the place of this one: it goes to neither of them. */
	slow_copy_start(&c, gmem, 0);
	mem = mmap(gmem->mem, gmem->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		   fd, 0);
	TEST_ASSERT(mem == gmem->mem, "mmap() failed, errno %d", errno);
	uffd_register(gmem->uffd, mem, gmem->size, MISSING);
	TEST_ASSERT_EQ(slow_copy_finish(&c), -EAGAIN);
	assert_in_file(gmem, 0, false);
	TEST_ASSERT(!mincore(mem, page_size, &vec), "mincore() failed, errno %d", errno);
	TEST_ASSERT(!(vec & 1), "The other file was filled");
	close(fd);
}

uffd_test(file, copy_that_waits_while_pages_are_zapped)
{
	struct change change = { .advice = MADV_DONTNEED };
	gmem_data *gmem = &self->gmem;
	struct uffd_msg msg;
	struct slow_copy c;

	register_mem(gmem, UFFD_FEATURE_EVENT_REMOVE, MISSING | MINOR);
	slow_copy_start(&c, gmem, 8);
	change_start(&change, gmem, advise_thread);
	wait_for_event(gmem->uffd);
	TEST_ASSERT_EQ(slow_copy_finish(&c), -EAGAIN);
	assert_in_file(gmem, 8, false);
	expect_event(gmem->uffd, UFFD_EVENT_REMOVE, &msg);
	change_join(&change);
	TEST_ASSERT_EQ(copy(gmem, 8, 1), page_size);
	assert_page_content(gmem, 8);
}

/* What becomes of the pages is settled before the copy goes on. */
uffd_test(file, copy_that_waits_until_pages_are_removed)
{
	struct change change = { .advice = MADV_REMOVE };
	gmem_data *gmem = &self->gmem;
	struct uffd_msg msg;
	struct slow_copy c;

	register_mem(gmem, UFFD_FEATURE_EVENT_REMOVE, MISSING | MINOR);
	slow_copy_start(&c, gmem, 2);
	change_start(&change, gmem, advise_thread);
	expect_event(gmem->uffd, UFFD_EVENT_REMOVE, &msg);
	change_join(&change);
	TEST_ASSERT_EQ(slow_copy_finish(&c), page_size);
	assert_page_content(gmem, 2);
}

/* The copy that has begun goes on, and no other one begins. */
uffd_test(file, closing_the_uffd_while_a_copy_waits)
{
	gmem_data *gmem = &self->gmem;
	struct slow_copy c;

	register_mem(gmem, 0, MISSING | MINOR);
	slow_copy_start(&c, gmem, 2);
	close(gmem->uffd);
	TEST_ASSERT_EQ(copy(gmem, 3, 1), -EBADF);
	TEST_ASSERT_EQ(slow_copy_finish(&c), page_size);
	assert_page_content(gmem, 2);
	assert_in_file(gmem, 3, false);

	/* With that it has come to its end: nobody waits, and the memory is free again. */
	read_expect(mem_page(gmem, 2), content(2));
	read_expect(mem_page(gmem, 4), 0);
	register_mem(gmem, 0, MISSING);
	TEST_ASSERT_EQ(copy(gmem, 3, 1), page_size);
}

/* As long as there is a mapping, there is memory to be filled. */
uffd_test(file, closing_the_file_while_a_copy_waits)
{
	gmem_data *gmem = &self->gmem;
	struct slow_copy c;
	struct access a;

	register_mem(gmem, 0, MISSING | MINOR);
	read_start(&a, mem_page(gmem, 2));
	expect_fault(gmem->uffd, mem_page(gmem, 2), 0);
	slow_copy_start(&c, gmem, 2);
	close(gmem->fd);
	gmem->fd = -1;
	assert_in_file(gmem, 2, false);
	assert_blocked(&a);

	TEST_ASSERT_EQ(slow_copy_finish(&c), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(2));
	assert_page_content(gmem, 2);
	assert_page(mem_page(gmem, 2), content(2));
	assert_in_file(gmem, 1, false);
	assert_in_file(gmem, 3, false);
	assert_no_fault(gmem->uffd);
}

/*
 * Two threads that copy all pages over and over until the userfaultfd is closed, which
 * is when both have done a given number of copies.
 */

#define NR_COPIERS	2

struct copier {
	pthread_t thread;
	gmem_data *self;
	u8 val;
	u8 *src;
	atomic_ulong nr_copies;
	u64 nr_existing;
	/* A bit for each page that it has filled. */
	u64 filled;
};

static bool copier_copy(struct copier *c, u64 page)
{
	s64 ret = __uffd_copy(c->self->uffd, mem_page(c->self, page), c->src, page_size, 0);

	if (ret == page_size) {
		TEST_ASSERT(!(c->filled & BIT(page)), "Page %lu was filled twice", page);
		c->filled |= BIT(page);
	} else if (ret == -EEXIST) {
		c->nr_existing++;
	} else {
		TEST_ASSERT(ret == -EBADF, "COPY returned %ld", ret);
	}

	return ret != -EBADF;
}

static void *copier_thread(void *arg)
{
	struct copier *c = arg;
	u64 i;

	for (i = 0; copier_copy(c, i % NR_PAGES); i++)
		atomic_store(&c->nr_copies, i + 1);

	return NULL;
}

static void copier_start(struct copier *c, gmem_data *self)
{
	c->self = self;
	c->nr_existing = 0;
	c->filled = 0;
	atomic_store(&c->nr_copies, 0);
	kvm_pthread_create(&c->thread, NULL, copier_thread, c);
}

/* A page has one copier at most, and holds what that one brought. */
static void assert_copied(gmem_data *self, struct copier *copiers)
{
	u64 i, a, b;

	for (i = 0; i < NR_PAGES; i++) {
		a = copiers[0].filled & BIT(i);
		b = copiers[1].filled & BIT(i);
		TEST_ASSERT(!a || !b, "Page %lu was filled by both", i);
		assert_in_file(self, i, a || b);
		if (a || b)
			assert_page(alias_page(self, i), copiers[!a].val);
	}
}

static void close_while_copying(gmem_data *self, struct copier *copiers, u64 nr)
{
	int i;

	register_mem(self, 0, MISSING | MINOR);
	for (i = 0; i < NR_COPIERS; i++)
		copier_start(&copiers[i], self);
	for (i = 0; i < NR_COPIERS; i++) {
		while (atomic_load(&copiers[i].nr_copies) < nr)
			sched_yield();
	}
	close(self->uffd);
	for (i = 0; i < NR_COPIERS; i++)
		kvm_pthread_join(copiers[i].thread, NULL);
	self->uffd = -1;

	assert_copied(self, copiers);
	for (i = 0; i < NR_PAGES; i += 5)
		read_expect(mem_page(self, i), alias_page(self, i)[0]);
	punch(self, 0, NR_PAGES);
}

uffd_test(file, closing_the_uffd_while_copying)
{
	struct copier copiers[NR_COPIERS] = {};
	u64 nr, nr_existing;
	int i;

	for (i = 0; i < NR_COPIERS; i++) {
		copiers[i].val = content(i);
		copiers[i].src = src_page(&self->gmem, i);
	}

	for (nr = 0; nr <= NR_PAGES; nr++)
		close_while_copying(&self->gmem, copiers, nr);

	/* At last, both have copied all pages, of which each was there by then. */
	nr_existing = copiers[0].nr_existing + copiers[1].nr_existing;
	TEST_ASSERT(nr_existing >= NR_PAGES, "%lu copies were refused", nr_existing);
}

/* The offset in the file is what counts, not the one in the mapping. */
uffd_test(gmem, mapping_with_an_offset)
{
	size_t size = 4 * page_size;
	u8 *mem;

	self->uffd = uffd_open(0);
	mem = __kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd,
			 5 * page_size);
	uffd_register(self->uffd, mem, size, MISSING | MINOR);

	TEST_ASSERT_EQ(__uffd_copy(self->uffd, mem + page_size, src_page(self, 6),
				   page_size, 0), page_size);
	assert_page_content(self, 6);
	fill_by_alias(self, 8);
	TEST_ASSERT_EQ(__uffd_continue(self->uffd, mem + 3 * page_size, page_size, 0),
		       page_size);
	assert_page(mem + 3 * page_size, content(8));
	assert_in_file(self, 1, false);
	kvm_munmap(mem, size);
}

/* Two mappings with a userfaultfd each: what one fills is a minor fault in the other. */
uffd_test(gmem, two_mappings)
{
	int other = uffd_open(0);
	struct access a;

	register_mem(self, 0, MISSING | MINOR);
	uffd_register(other, self->alias, self->size, MISSING | MINOR);

	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	TEST_ASSERT_EQ(__uffd_copy(other, self->alias, self->src, page_size, 0), -EEXIST);
	read_start(&a, self->alias);
	expect_fault(other, self->alias, FAULT_MINOR);
	TEST_ASSERT_EQ(__uffd_continue(other, self->alias, page_size, 0), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(0));
	assert_no_fault(self->uffd);
	close(other);
}

/*
 * Memory policies are those of the file, whichever mapping they were set by.  As there
 * is no node that all memory comes from by chance, each page has the next one's.
 */

#define NR_BOUND_PAGES	6

static int node_of_page(u64 page)
{
	return !(page % 2);
}

static void bind_pages(gmem_data *self)
{
	unsigned long node;
	u64 i;

	for (i = 0; i < NR_BOUND_PAGES; i++) {
		node = BIT(node_of_page(i));
		kvm_mbind(mem_page(self, i), page_size, MPOL_BIND, &node, 8, 0);
	}
}

static void assert_pages_are_bound(gmem_data *self)
{
	void *pages[NR_BOUND_PAGES];
	int nodes[NR_BOUND_PAGES];
	u64 i;

	for (i = 0; i < NR_BOUND_PAGES; i++) {
		assert_in_file(self, i, true);
		pages[i] = alias_page(self, i);
		READ_ONCE(*alias_page(self, i));
	}
	kvm_move_pages(0, NR_BOUND_PAGES, pages, NULL, nodes, 0);
	for (i = 0; i < NR_BOUND_PAGES; i++)
		TEST_ASSERT(nodes[i] == node_of_page(i), "Page %lu is on node %d", i,
			    nodes[i]);
}

uffd_test(gmem, memory_policy_is_honoured)
{
	u64 i;

	if (!is_multi_numa_node_system())
		SKIP(return, "There is one NUMA node only");

	register_mem(self, 0, MISSING);
	bind_pages(self);
	for (i = 0; i < NR_BOUND_PAGES / 2; i++)
		TEST_ASSERT_EQ(copy(self, i, 1), page_size);
	for (; i < NR_BOUND_PAGES; i++)
		TEST_ASSERT_EQ(zeropage(self, i, 1), page_size);
	assert_pages_are_bound(self);
}

/* Of holes that are filled by going there: no faults of MINOR, or not registered. */
uffd_test(gmem, memory_policy_of_accesses)
{
	u64 i;

	if (!is_multi_numa_node_system())
		SKIP(return, "There is one NUMA node only");

	register_mem(self, 0, MINOR);
	bind_pages(self);
	for (i = 0; i < NR_BOUND_PAGES / 2; i++)
		read_expect(mem_page(self, i), 0);
	for (; i < NR_BOUND_PAGES; i++)
		fill_by_alias(self, i);
	assert_no_fault(self->uffd);
	assert_pages_are_bound(self);
}

/*
 * write(), which fills the file and maps nothing.
 */

static ssize_t write_page(gmem_data *self, u64 page)
{
	return pwrite(self->fd, src_page(self, page), page_size, page * page_size);
}

uffd_test(gmem, written_pages_are_minor_faults)
{
	struct access a;

	if (!can_write())
		SKIP(return, "guest_memfd cannot be written");

	register_mem(self, 0, MISSING | MINOR);
	TEST_ASSERT_EQ(write_page(self, 0), page_size);
	TEST_ASSERT_EQ(copy(self, 0, 1), -EEXIST);

	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), FAULT_MINOR);
	TEST_ASSERT_EQ(cont(self, 0, 1), page_size);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(0));
	assert_page_content(self, 0);
}

/* write() knows nothing of who waits: to wake them is up to the writer. */
uffd_test(gmem, written_pages_resolve_missing_faults)
{
	struct access a;

	if (!can_write())
		SKIP(return, "guest_memfd cannot be written");

	register_mem(self, 0, MISSING);
	read_start(&a, mem_page(self, 0));
	expect_fault(self->uffd, mem_page(self, 0), 0);
	TEST_ASSERT_EQ(write_page(self, 0), page_size);
	assert_blocked(&a);
	TEST_ASSERT_EQ(__uffd_wake(self->uffd, mem_page(self, 0), page_size), 0);
	access_finish(&a);
	TEST_ASSERT_EQ(a.val, content(0));
	assert_no_fault(self->uffd);
}

/* It has no mapping to go by, and need not: there is one of which it is set. */
uffd_test(gmem, memory_policy_of_written_pages)
{
	size_t size = NR_BOUND_PAGES * page_size;

	if (!can_write())
		SKIP(return, "guest_memfd cannot be written");
	if (!is_multi_numa_node_system())
		SKIP(return, "There is one NUMA node only");

	bind_pages(self);
	TEST_ASSERT_EQ(pwrite(self->fd, self->src, size, 0), size);
	assert_pages_are_bound(self);
}

uffd_test(gmem, write_replaces_nothing)
{
	if (!can_write())
		SKIP(return, "guest_memfd cannot be written");

	register_mem(self, 0, MISSING);
	TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
	TEST_ASSERT(pwrite(self->fd, src_page(self, 1), page_size, 0) == -1 &&
		    errno == EEXIST, "Expected EEXIST, got errno %d", errno);
	assert_page_content(self, 0);
}

/*
 * The source of a write() may itself have to be filled first, by something that
 * works on the same file: neither may wait for the other.
 */
struct file_write {
	pthread_t thread;
	int fd;
	void *src;
	off_t offset;
	ssize_t ret;
	int err;
};

static void *file_write_thread(void *arg)
{
	struct file_write *w = arg;

	w->ret = pwrite(w->fd, w->src, page_size, w->offset);
	w->err = errno;
	return NULL;
}

static void file_write_start(struct file_write *w, gmem_data *self, void *src, u64 to)
{
	w->fd = self->fd;
	w->src = src;
	w->offset = to * page_size;
	kvm_pthread_create(&w->thread, NULL, file_write_thread, w);
}

uffd_test(gmem, write_from_missing_memory)
{
	struct file_write w;

	if (!can_write())
		SKIP(return, "guest_memfd cannot be written");

	register_mem(self, 0, MISSING);

	/* It waits half way, with nothing to be seen of the first half. */
	TEST_ASSERT_EQ(copy(self, 1, 1), page_size);
	file_write_start(&w, self, mem_page(self, 2) - page_size / 2, 3);
	expect_fault(self->uffd, mem_page(self, 2), 0);
	assert_in_file(self, 3, false);
	TEST_ASSERT_EQ(copy(self, 2, 1), page_size);
	kvm_pthread_join(w.thread, NULL);
	TEST_ASSERT_EQ(w.ret, page_size);
	assert_in_file(self, 3, true);
	TEST_ASSERT_EQ(alias_page(self, 3)[page_size / 2 - 1], content(1));
	TEST_ASSERT_EQ(alias_page(self, 3)[page_size / 2], content(2));

	/* Onto itself: filling the source fills the destination. */
	file_write_start(&w, self, mem_page(self, 4), 4);
	expect_fault(self->uffd, mem_page(self, 4), 0);
	TEST_ASSERT_EQ(copy(self, 4, 1), page_size);
	kvm_pthread_join(w.thread, NULL);
	TEST_ASSERT(w.ret == -1 && w.err == EEXIST, "write() returned %ld, errno %d",
		    w.ret, w.err);
	assert_page_content(self, 4);
}

/*
 * Private memory: a file that can be mapped, but has nothing to show.
 */

static void use_private_file(gmem_data *self)
{
	use_file(self, vm_create_guest_memfd(self->vm, self->size, GUEST_MEMFD_FLAG_MMAP));
}

uffd_test(gmem, private_memory_is_refused)
{
	static const u64 modes[] = { MISSING, MINOR, MISSING | MINOR };
	int i;

	use_private_file(self);
	self->uffd = uffd_open(0);
	for (i = 0; i < ARRAY_SIZE(modes); i++)
		TEST_ASSERT_EQ(__uffd_register(self->uffd, self->mem, self->size,
					       modes[i], NULL), -EINVAL);

	/* What can't be registered can't be filled, by any of the ioctls. */
	TEST_ASSERT_EQ(copy(self, 0, 1), -ENOENT);
	TEST_ASSERT_EQ(zeropage(self, 0, 1), -ENOENT);
	TEST_ASSERT_EQ(poison(self, 0, 1), -ENOENT);
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, 0, page_size);
	TEST_ASSERT_EQ(cont(self, 0, 1), -ENOENT);

	read_expect_sigbus(mem_page(self, 0));
	write_expect_sigbus(mem_page(self, 1));
	assert_no_fault(self->uffd);
}

/* Neither is asynchronous write-protection, that other memory needs no support for. */
uffd_test(gmem, write_protection_of_private_memory_is_refused)
{
	use_private_file(self);
	assert_all_protection_is_refused(self);
	read_expect_sigbus(mem_page(self, 0));
}

/* Shared and private memory side by side is registered as a whole, or not at all. */
uffd_test(gmem, private_memory_spoils_the_range)
{
	size_t size = 2 * page_size;
	u8 *mem, *addr;
	int fd;

	fd = vm_create_guest_memfd(self->vm, page_size, GUEST_MEMFD_FLAG_MMAP);
	mem = kvm_mmap(size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	addr = mmap(mem, page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		    self->fd, 0);
	TEST_ASSERT(addr == mem, "mmap() failed, errno %d", errno);
	addr = mmap(mem + page_size, page_size, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_FIXED, fd, 0);
	TEST_ASSERT(addr == mem + page_size, "mmap() failed, errno %d", errno);

	self->uffd = uffd_open(0);
	TEST_ASSERT_EQ(__uffd_register(self->uffd, mem, size, MISSING, NULL), -EINVAL);
	read_expect(mem, 0);
	assert_no_fault(self->uffd);

	kvm_munmap(mem, size);
	close(fd);
}

/*
 * The guest, which shares the file and knows nothing of userfaultfd.
 */

#define GUEST_SLOT	10
#define GUEST_GPA	((u64)SZ_4G)

static void guest_code(u8 *mem, u64 stride)
{
	u64 i;

	for (i = 0; ; i++) {
		u8 *page = mem + (i % NR_PAGES) * stride;

		GUEST_SYNC2(i, READ_ONCE(*page));
		WRITE_ONCE(*page, ~READ_ONCE(*page));
	}
}

static void guest_expect(struct kvm_vcpu *vcpu, u64 i, u8 val)
{
	struct ucall uc;

	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	TEST_ASSERT_EQ(uc.args[0], i);
	TEST_ASSERT_EQ((u8)uc.args[1], val);
}

uffd_test(gmem, guest_sees_what_was_filled)
{
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	u64 i;

	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	close(self->fd);
	self->fd = vm_create_guest_memfd(vm, self->size, MAPPABLE_GUEST_MEMFD_FLAGS);
	vm_mem_add(vm, VM_MEM_SRC_GUEST_MEMFD, GUEST_GPA, GUEST_SLOT,
		   self->size / vm->page_size, 0, self->fd, 0);
	virt_map(vm, GUEST_GPA, GUEST_GPA, self->size / vm->page_size);
	vcpu_args_set(vcpu, 2, GUEST_GPA, page_size);

	kvm_munmap(self->mem, self->size + page_size);
	self->mem = kvm_mmap(self->size + page_size, PROT_READ | PROT_WRITE, MAP_SHARED,
			     self->fd);
	kvm_munmap(self->alias, self->size);
	self->alias = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	register_mem(self, 0, MISSING | MINOR);

	TEST_ASSERT_EQ(copy(self, 0, 2), 2 * page_size);
	TEST_ASSERT_EQ(zeropage(self, 2, 1), page_size);
	fill_by_alias(self, 3);
	TEST_ASSERT_EQ(cont(self, 3, 1), page_size);

	guest_expect(vcpu, 0, content(0));
	guest_expect(vcpu, 1, content(1));
	guest_expect(vcpu, 2, 0);
	guest_expect(vcpu, 3, content(3));

	/* The guest itself puts pages there, which are as present as any other. */
	guest_expect(vcpu, 4, 0);
	TEST_ASSERT_EQ(copy(self, 4, 1), -EEXIST);
	TEST_ASSERT_EQ(cont(self, 4, 1), page_size);

	guest_expect(vcpu, 5, 0);
	TEST_ASSERT_EQ(mem_page(self, 0)[0], (u8)~content(0));
	TEST_ASSERT_EQ(mem_page(self, 3)[0], (u8)~content(3));
	TEST_ASSERT_EQ(mem_page(self, 4)[0], 0xff);

	/* Filled anew behind the guest's back, whose mapping must be gone. */
	punch(self, 0, 1);
	TEST_ASSERT_EQ(__uffd_copy(self->uffd, self->mem, src_page(self, 9), page_size,
				   0), page_size);
	for (i = 6; i < NR_PAGES; i++)
		guest_expect(vcpu, i, 0);
	guest_expect(vcpu, NR_PAGES, content(9));

	kvm_vm_free(vm);
}

/*
 * Everything at once.  Each word of a page tells the page, its own place, and
 * which fill it comes from.  Fills come one by one or not at all, so:
 *
 * - whatever is read from a page is a word of it, never zero or another page's;
 * - once all is quiet, all words of a page come from the same fill, and both
 *   mappings show the same.
 */

#define RACE_ROUNDS	5
#define RACE_MSECS	400
#define RACE_PAGES	8

struct race {
	gmem_data *gmem;
	atomic_bool stop;
	atomic_bool stop_pager;
	atomic_ullong fill;
	/* A mapping that comes and goes, with a userfaultfd of its own. */
	u8 *fleeting;
	int fleeting_uffd;
	atomic_ullong nr_copies, nr_writes, nr_reads, nr_punches, nr_faults, nr_remaps;
	/* Copies to pages that were there. */
	atomic_ullong nr_existing;
};

static u64 race_word(u64 page, u64 fill, u64 word)
{
	return 1ull << 63 | page << 48 | fill << 16 | word;
}

static void race_check_word(struct race *r, u64 page, u64 word, u64 val)
{
	u64 fill = (val >> 16) & 0xffffffff;

	TEST_ASSERT(val == race_word(page, fill, word) &&
		    fill <= atomic_load(&r->fill),
		    "Page %lu, word %lu holds %#lx", page, word, val);
}

static void race_prepare(struct race *r, u64 *buf, u64 page)
{
	u64 fill = atomic_fetch_add(&r->fill, 1) + 1;
	u64 i;

	for (i = 0; i < page_size / sizeof(*buf); i++)
		buf[i] = race_word(page, fill, i);
}

static void race_assert_result(const char *what, s64 ret, bool fleeting)
{
	TEST_ASSERT(ret == page_size || ret == -EEXIST || ret == -EAGAIN ||
		    (fleeting && ret == -ENOENT), "%s returned %ld", what, ret);
}

static void race_copy(struct race *r, int uffd, u8 *mem, u64 page, u64 *buf)
{
	s64 ret;

	race_prepare(r, buf, page);
	ret = __uffd_copy(uffd, mem + page * page_size, buf, page_size, 0);
	race_assert_result("COPY", ret, mem == r->fleeting);
	atomic_fetch_add(&r->nr_copies, ret == page_size);
	atomic_fetch_add(&r->nr_existing, ret == -EEXIST);
}

static void *race_copier(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(1);
	struct race *r = arg;
	u64 *buf = malloc(page_size);

	while (!atomic_load(&r->stop)) {
		u64 page = kvm_random_u32(&rng) % RACE_PAGES;

		if (kvm_random_bool(&rng))
			race_copy(r, r->gmem->uffd, r->gmem->mem, page, buf);
		else
			race_copy(r, r->fleeting_uffd, r->fleeting, page, buf);
	}
	free(buf);

	return NULL;
}

static void *race_writer(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(2);
	struct race *r = arg;
	u64 *buf = malloc(page_size);

	while (!atomic_load(&r->stop)) {
		u64 page = kvm_random_u32(&rng) % RACE_PAGES;
		ssize_t ret;

		race_prepare(r, buf, page);
		ret = pwrite(r->gmem->fd, buf, page_size, page * page_size);
		race_assert_result("write()", ret < 0 ? -errno : ret, false);
		if (ret == page_size)
			atomic_fetch_add(&r->nr_writes, 1);
	}
	free(buf);

	return NULL;
}

static void *race_reader(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(3);
	struct race *r = arg;
	u64 i;

	while (!atomic_load(&r->stop)) {
		u64 page = kvm_random_u32(&rng) % RACE_PAGES;
		u64 *mem = (u64 *)mem_page(r->gmem, page);

		for (i = 0; i < page_size / sizeof(*mem); i += 16)
			race_check_word(r, page, i, READ_ONCE(mem[i]));
		atomic_fetch_add(&r->nr_reads, 1);
	}

	return NULL;
}

static void *race_puncher(void *arg)
{
	struct kvm_random_state rng = new_kvm_random_state(4);
	struct race *r = arg;

	while (!atomic_load(&r->stop)) {
		u64 page = kvm_random_u32(&rng) % RACE_PAGES;

		punch(r->gmem, page, 1 + kvm_random_u32(&rng) % (RACE_PAGES - page));
		if (kvm_random_bool(&rng))
			kvm_madvise(mem_page(r->gmem, page), page_size, MADV_DONTNEED);
		atomic_fetch_add(&r->nr_punches, 1);
		if (kvm_random_bool(&rng))
			usleep(kvm_random_u32(&rng) % 200);
	}

	return NULL;
}

/* As only one thread maps and registers, nothing is copied there until it does so. */
static void race_unregister(struct race *r)
{
	size_t size = RACE_PAGES * page_size;

	TEST_ASSERT_EQ(__uffd_unregister(r->fleeting_uffd, r->fleeting, size), 0);
	TEST_ASSERT_EQ(__uffd_copy(r->fleeting_uffd, r->fleeting, r->gmem->src, page_size,
				   0), -ENOENT);
}

/* The other mapping, in the place of the one that COPY is at work in. */
static void *race_mapper(void *arg)
{
	struct race *r = arg;
	size_t size = RACE_PAGES * page_size;
	void *mem;
	int dup;

	while (!atomic_load(&r->stop)) {
		dup = kvm_dup(r->gmem->fd);
		mem = mmap(r->fleeting, size, PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_FIXED, dup, 0);
		TEST_ASSERT(mem == r->fleeting, "mmap() failed, errno %d", errno);
		close(dup);
		uffd_register(r->fleeting_uffd, mem, size, MISSING | MINOR);
		usleep(500);
		if (atomic_fetch_add(&r->nr_remaps, 1) & 1)
			race_unregister(r);
	}

	return NULL;
}

static void race_resolve(struct race *r, struct uffd_msg *msg, u64 *buf)
{
	u8 *addr = (u8 *)msg->arg.pagefault.address;
	u64 page = (addr - r->gmem->mem) / page_size;
	int uffd = r->gmem->uffd;
	s64 ret;

	if (msg->arg.pagefault.flags & FAULT_MINOR) {
		ret = __uffd_continue(uffd, addr, page_size, 0);
		/* The page may be gone by now. */
		if (ret != -EFAULT)
			race_assert_result("CONTINUE", ret, false);
	} else {
		race_copy(r, uffd, r->gmem->mem, page, buf);
	}

	TEST_ASSERT_EQ(__uffd_wake(uffd, addr, page_size), 0);
	atomic_fetch_add(&r->nr_faults, 1);
}

static void *race_pager(void *arg)
{
	u64 *buf = malloc(page_size);
	struct race *r = arg;
	struct uffd_msg msg;

	while (!atomic_load(&r->stop_pager)) {
		if (read_msg(r->gmem->uffd, &msg, 20))
			race_resolve(r, &msg, buf);
	}
	free(buf);

	return NULL;
}

static void race_check_page(struct race *r, u64 page)
{
	u64 *alias = (u64 *)alias_page(r->gmem, page);
	u64 *mem = (u64 *)mem_page(r->gmem, page);
	u64 first = READ_ONCE(alias[0]);
	u64 i;

	race_check_word(r, page, 0, first);
	for (i = 0; i < page_size / sizeof(*alias); i++) {
		TEST_ASSERT(alias[i] == first + i,
			    "Page %lu, word %lu holds %#lx, word 0 %#lx", page, i,
			    alias[i], first);
		TEST_ASSERT(mem[i] == alias[i],
			    "Page %lu, word %lu is %#lx in one mapping, %#lx in the other",
			    page, i, mem[i], alias[i]);
	}
}

static void race_round(struct race *r, pthread_fn_t *fns, int nr_fns)
{
	pthread_t threads[8], pager;
	u64 page;
	int i;

	atomic_store(&r->stop, false);
	atomic_store(&r->stop_pager, false);
	kvm_pthread_create(&pager, NULL, race_pager, r);
	for (i = 0; i < nr_fns; i++)
		kvm_pthread_create(&threads[i], NULL, fns[i], r);

	usleep(RACE_MSECS * 1000);
	atomic_store(&r->stop, true);
	for (i = 0; i < nr_fns; i++)
		kvm_pthread_join(threads[i], NULL);

	/* The pager is needed still, for what is read below. */
	for (page = 0; page < RACE_PAGES; page++) {
		READ_ONCE(*mem_page(r->gmem, page));
		race_check_page(r, page);
	}
	atomic_store(&r->stop_pager, true);
	kvm_pthread_join(pager, NULL);
}

uffd_test(gmem, races)
{
	pthread_fn_t fns[] = {
		race_copier, race_puncher, race_reader, race_reader, race_mapper,
		race_writer,
	};
	int nr_fns = ARRAY_SIZE(fns) - !can_write();
	struct race r = { .gmem = self };
	int i;

	self->uffd = uffd_open(0);
	uffd_register(self->uffd, self->mem, RACE_PAGES * page_size, MISSING | MINOR);
	r.fleeting_uffd = uffd_open(0);
	r.fleeting = kvm_mmap(RACE_PAGES * page_size, PROT_NONE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1);

	for (i = 0; i < RACE_ROUNDS; i++)
		race_round(&r, fns, nr_fns);

	pr_info("# %llu copies, %llu of pages that were there, %llu writes, %llu reads, %llu faults, %llu punches, %llu remaps\n",
		r.nr_copies, r.nr_existing, r.nr_writes, r.nr_reads, r.nr_faults,
		r.nr_punches, r.nr_remaps);
	TEST_ASSERT(r.nr_copies && r.nr_reads && r.nr_faults && r.nr_punches && r.nr_remaps,
		    "Somebody did nothing");
	TEST_ASSERT(r.nr_existing, "No page was copied twice");
	if (can_write())
		TEST_ASSERT(r.nr_writes, "Nothing was written");

	close(r.fleeting_uffd);
	kvm_munmap(r.fleeting, RACE_PAGES * page_size);
}

/* The file and the userfaultfd are closed while faults are open, one of them resolved. */
uffd_test(gmem, closing_everything_at_once)
{
	struct access a[4];
	u64 i, round;

	for (round = 0; round < 20; round++) {
		register_mem(self, 0, MISSING | MINOR);
		for (i = 0; i < ARRAY_SIZE(a); i++)
			read_start(&a[i], mem_page(self, i));
		TEST_ASSERT_EQ(copy(self, 0, 1), page_size);
		close(self->fd);
		close(self->uffd);
		for (i = 0; i < ARRAY_SIZE(a); i++) {
			access_finish(&a[i]);
			TEST_ASSERT_EQ(a[i].val, i ? 0 : content(0));
		}

		kvm_munmap(self->mem, self->size + page_size);
		kvm_munmap(self->alias, self->size);
		kvm_munmap(self->src, self->size);
		gmem_init(self, self->vm, vm_create_guest_memfd(self->vm,
								NR_PAGES * page_size,
								MAPPABLE_GUEST_MEMFD_FLAGS));
	}
}

int main(int argc, char *argv[])
{
	page_size = getpagesize();

	TEST_REQUIRE(kvm_has_mappable_guest_memfd());
	TEST_REQUIRE(has_uffd(UFFD_FEATURE_MISSING_GUEST_MEMFD));

	return test_harness_run(argc, argv);
}
